/*
 * blkdrive: drives a vhost-user-blk device through libblkio, without a virtual machine.
 *
 *   blkdrive SOCKET randread|randwrite|verify|hold [NAME=VALUE]...
 *
 *   randread, randwrite   timed load; prints throughput and latencies
 *   verify                writes, zeroes, reads and flushes at random, knows what each
 *                         sector must hold, and reads everything back at the end;
 *                         SIGUSR1 ends the random part
 *   hold                  plants `marker` (16 hex digits) in the memory it shares, does
 *                         some I/O elsewhere in it, says "holding", waits for end of input
 *
 * Prints one JSON object. Status: 0 good, 1 usage, 2 an error of the device or the
 * connection, 3 nothing more happened for `hang` seconds, 4 wrong data.
 */
#define _GNU_SOURCE
#include <blkio.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SECTOR = 512, WORDS = SECTOR / 8, GAP = 64, CANARY = 0xc7, SEGMENTS = 126 };
enum op { READ, WRITE, ZERO, FLUSH, OPS };

static struct {
    uint64_t bs, segment, qd, queues, queue_size, poll;             /* how to ask */
    uint64_t ms, warmup;                                            /* load */
    uint64_t size, max, passes, seed, null, remap;                  /* verify */
    uint64_t marker, hang;
} opt = { .bs = 4096, .qd = 1, .queues = 1, .queue_size = 256, .ms = 1000, .warmup = 200,
          .max = 1 << 20, .passes = 2, .seed = 1, .hang = 60 };

static const struct { const char *name; uint64_t *value; int base; } options[] = {
    { "bs", &opt.bs, 0 },                   /* bytes of a request */
    { "segment", &opt.segment, 0 },         /* load: cut requests into these */
    { "qd", &opt.qd, 0 },                   /* requests in flight, a queue */
    { "queues", &opt.queues, 0 },
    { "queue-size", &opt.queue_size, 0 },
    { "poll", &opt.poll, 0 },               /* 1: spin for completions */
    { "ms", &opt.ms, 0 },                   /* time to measure */
    { "warmup", &opt.warmup, 0 },           /* time not to measure, before it */
    { "size", &opt.size, 0 },               /* bytes to use, 0: the whole device */
    { "max", &opt.max, 0 },                 /* verify: longest request */
    { "passes", &opt.passes, 0 },           /* verify: times `size` in the random part */
    { "seed", &opt.seed, 0 },
    { "null", &opt.null, 0 },               /* verify: writes are lost, reads are zeroes */
    { "remap", &opt.remap, 0 },             /* verify: requests before their memory is new */
    { "marker", &opt.marker, 16 },
    { "hang", &opt.hang, 0 },
};

struct request {
    enum op op;
    uint64_t first, count;                  /* sectors */
    uint64_t generation, started;
    char *arena;                            /* its part of the shared memory */
    struct blkio_mem_region own;            /* or, with `remap`, memory of its own */
    uint64_t uses;                          /* of that memory */
    struct iovec iov[SEGMENTS];
    int segments;
    bool busy;
};

/* Latencies in 16 linear steps for each power of two. */
struct histogram { uint64_t count, sum, max, bucket[61 * 16]; };

struct queue {
    struct blkioq *q;
    struct request *requests;
    char *memory, *flat;
    uint64_t first, sectors;                /* the stripe that is this queue's alone */
    uint64_t *generation;                   /* what each sector of it holds */
    uint64_t random, inflight, done[OPS], bytes, begin, elapsed, cpu;
    struct histogram latency;
    pthread_t thread;
};

static struct blkio *device;
static struct blkio_mem_region region;
static uint64_t arena_size, next_generation = 1, remaps;
static pthread_mutex_t remapping = PTHREAD_MUTEX_INITIALIZER;
static int max_segments;
static pthread_barrier_t start_line;

static void die(int status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printf("{\"error\": \"");
    vprintf(format, args);
    printf("\"}\n");
    fflush(stdout);
    _exit(status);
}

static void check(int rc, const char *what)
{
    if (rc < 0)
        die(2, "%s: %s", what, blkio_get_error_msg());
}

static uint64_t nanoseconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static uint64_t mix(uint64_t x)             /* splitmix64's finaliser */
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static uint64_t draw(struct queue *q, uint64_t below)
{
    return mix(q->random += 0x9e3779b97f4a7c15ull) % below;
}

/* ---- latencies ---- */

static void record(struct histogram *h, uint64_t ns)
{
    int e = ns < 32 ? 0 : 59 - __builtin_clzll(ns);
    h->bucket[e * 16 + (ns >> e)]++;
    h->count++;
    h->sum += ns;
    if (ns > h->max)
        h->max = ns;
}

static double percentile_us(const struct histogram *h, double share)
{
    uint64_t seen = 0, wanted = h->count * share;
    for (unsigned i = 0; i < sizeof h->bucket / sizeof *h->bucket; i++)
        if ((seen += h->bucket[i]) > wanted) {
            int e = i < 32 ? 0 : i / 16 - 1;
            return (double)((uint64_t)(i - e * 16) << e) / 1000;
        }
    return h->max / 1000.0;
}

/* ---- requests ---- */

static void submit(struct queue *q, struct request *r)
{
    uint64_t at = r->first * SECTOR, length = r->count * SECTOR;
    r->busy = true;
    r->started = nanoseconds(CLOCK_MONOTONIC);
    q->inflight++;
    switch (r->op) {
    case READ:  blkioq_readv(q->q, at, r->iov, r->segments, r, 0); break;
    case WRITE: blkioq_writev(q->q, at, r->iov, r->segments, r, 0); break;
    case ZERO:  blkioq_write_zeroes(q->q, at, length, r, BLKIO_REQ_NO_UNMAP); break;
    default:    blkioq_flush(q->q, r, 0);
    }
}

/* Wait for completions, and hand each to `finish`. */
static void reap(struct queue *q, void (*finish)(struct queue *, struct request *))
{
    struct blkio_completion completions[64];
    int n = blkioq_do_io(q->q, completions, 1, q->inflight < 64 ? q->inflight : 64, NULL);
    check(n, "blkioq_do_io");
    for (int i = 0; i < n; i++) {
        struct request *r = completions[i].user_data;
        if (completions[i].ret)
            die(2, "request %d of sectors %llu+%llu: %s", r->op,
                (unsigned long long)r->first, (unsigned long long)r->count,
                strerror(-completions[i].ret));
        finish(q, r);
        r->busy = false;
        q->inflight--;
        q->done[r->op]++;
        q->bytes += r->count * SECTOR;
    }
    alarm(opt.hang);
}

/* ---- timed load ---- */

static void finish_load(struct queue *q, struct request *r)
{
    record(&q->latency, nanoseconds(CLOCK_MONOTONIC) - r->started);
}

static void load(struct queue *q, enum op op)
{
    uint64_t blocks = opt.size / opt.bs, step = opt.segment ? opt.segment : opt.bs;
    uint64_t now = nanoseconds(CLOCK_MONOTONIC), begin = now + opt.warmup * 1000000;
    bool warm = false;

    for (uint64_t i = 0; i < opt.qd; i++) {
        struct request *r = &q->requests[i];
        r->op = op;
        r->count = opt.bs / SECTOR;
        for (uint64_t at = 0; at < opt.bs; at += step)
            r->iov[r->segments++] = (struct iovec){
                r->arena + at, opt.bs - at < step ? opt.bs - at : step };
    }
    while (!warm || now < begin + opt.ms * 1000000) {
        if (!warm && now >= begin) {
            warm = true;
            memset(&q->latency, 0, sizeof q->latency);
            memset(q->done, 0, sizeof q->done);
            q->bytes = 0;
            begin = now;
            q->cpu = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
        }
        for (uint64_t i = 0; i < opt.qd; i++)
            if (!q->requests[i].busy) {
                q->requests[i].first = draw(q, blocks) * (opt.bs / SECTOR);
                submit(q, &q->requests[i]);
            }
        reap(q, finish_load);
        now = nanoseconds(CLOCK_MONOTONIC);
    }
    q->begin = begin;
    q->elapsed = now - begin;
    q->cpu = nanoseconds(CLOCK_THREAD_CPUTIME_ID) - q->cpu;
    while (q->inflight)
        reap(q, finish_load);
}

/* ---- data integrity ---- */

/* What a sector holds: a function of its number and of the write that was last. */
static void expect(uint64_t *words, uint64_t sector, uint64_t generation)
{
    uint64_t key = mix(opt.seed + (sector << 24) + generation);
    for (int i = 0; i < WORDS; i++)
        words[i] = generation ? mix(key + i) : 0;
}

/* Lay a request out in 1 to 8 segments of any length, with canaries all around. */
static void lay_out(struct queue *q, struct request *r)
{
    uint64_t left = r->count * SECTOR;
    uint64_t wanted = 1 + draw(q, max_segments < 8 ? max_segments : 8);
    char *at = r->arena + GAP + draw(q, 4096);
    memset(r->arena, CANARY, arena_size);
    for (r->segments = 0; left; r->segments++) {
        bool last = (uint64_t)r->segments + 1 == wanted || left == 1;
        uint64_t length = last ? left : 1 + draw(q, left - 1);
        r->iov[r->segments] = (struct iovec){ at, length };
        at += length + GAP;
        left -= length;
    }
}

static void check_canaries(const struct request *r)
{
    const char *at = r->arena, *end = r->arena + arena_size;
    for (int i = 0; i <= r->segments; i++) {
        const char *until = i < r->segments ? r->iov[i].iov_base : end;
        for (; at < until; at++)
            if (*at != (char)CANARY)
                die(4, "request %d of sectors %llu+%llu: a byte before segment %d of %d "
                    "changed", r->op, (unsigned long long)r->first,
                    (unsigned long long)r->count, i, r->segments);
        if (i < r->segments)
            at = until + r->iov[i].iov_len;
    }
}

static void copy(const struct request *r, char *flat, bool to_segments)
{
    for (int i = 0; i < r->segments; flat += r->iov[i++].iov_len)
        if (to_segments)
            memcpy(r->iov[i].iov_base, flat, r->iov[i].iov_len);
        else
            memcpy(flat, r->iov[i].iov_base, r->iov[i].iov_len);
}

/* Reads must have brought, and writes must have left, what the sectors hold. */
static void finish_verify(struct queue *q, struct request *r)
{
    uint64_t *known = q->generation + (r->first - q->first);
    uint64_t wanted[WORDS];

    if (r->op == READ || r->op == WRITE) {
        check_canaries(r);
        copy(r, q->flat, false);
        for (uint64_t i = 0; i < r->count; i++) {
            expect(wanted, r->first + i, r->op == READ ? known[i] : r->generation);
            if (memcmp(wanted, q->flat + i * SECTOR, SECTOR))
                die(4, "%s of sector %llu: %016llx..., not %016llx... (generation %llu)",
                    r->op == READ ? "read" : "buffer after a write",
                    (unsigned long long)(r->first + i),
                    (unsigned long long)((uint64_t *)q->flat)[i * WORDS],
                    (unsigned long long)wanted[0], (unsigned long long)known[i]);
        }
    }
    if ((r->op == WRITE || r->op == ZERO) && !opt.null)
        for (uint64_t i = 0; i < r->count; i++)
            known[i] = r->generation;
}

/* Give a request other memory: the device gets to know the new, and forgets the old. */
static void renew(struct request *r)
{
    pthread_mutex_lock(&remapping);
    if (r->own.addr) {
        blkio_unmap_mem_region(device, &r->own);
        blkio_free_mem_region(device, &r->own);
        remaps++;
    }
    check(blkio_alloc_mem_region(device, &r->own, arena_size), "alloc_mem_region");
    check(blkio_map_mem_region(device, &r->own), "map_mem_region");
    pthread_mutex_unlock(&remapping);
    r->arena = r->own.addr;
    r->uses = 0;
}

static bool conflicts(const struct queue *q, const struct request *new)
{
    for (const struct request *r = q->requests; r < q->requests + opt.qd; r++)
        if (r->busy && (r->op != READ || new->op != READ) &&
            r->first < new->first + new->count && new->first < r->first + r->count)
            return true;
    return false;
}

enum phase { FILL, RANDOM, READ_BACK, PHASES };

/* Prepare a request; false: its sectors are in use by one in flight. */
static bool choose(struct queue *q, struct request *r, enum phase phase, uint64_t done)
{
    uint64_t limit = opt.max / SECTOR < q->sectors ? opt.max / SECTOR : q->sectors;

    if (phase == RANDOM) {
        int dice = draw(q, 100);
        r->op = dice < 47 ? READ : dice < 94 ? WRITE : dice < 97 ? ZERO : FLUSH;
        r->count = 1 + draw(q, 1 + ((limit - 1) >> draw(q, 12)));     /* mostly small */
        r->first = q->first + draw(q, q->sectors - r->count + 1);
    } else {
        r->op = phase == FILL ? WRITE : READ;
        r->count = limit < q->sectors - done ? limit : q->sectors - done;
        r->first = q->first + done;
    }
    if (r->op == FLUSH)
        r->count = r->segments = 0;
    if (conflicts(q, r))
        return false;
    if (opt.remap && (!r->own.addr || r->uses == opt.remap))
        renew(r);
    r->uses++;
    r->generation = 0;
    if (r->op == READ || r->op == WRITE)
        lay_out(q, r);
    if (r->op == WRITE) {
        r->generation = __atomic_fetch_add(&next_generation, 1, __ATOMIC_RELAXED);
        for (uint64_t i = 0; i < r->count; i++)
            expect((uint64_t *)(q->flat + i * SECTOR), r->first + i, r->generation);
        copy(r, q->flat, true);
    }
    return true;
}

static struct request *idle(struct queue *q)
{
    for (struct request *r = q->requests; r < q->requests + opt.qd; r++)
        if (!r->busy)
            return r;
    return NULL;
}

/* SIGUSR1 ends the random part. */
static volatile sig_atomic_t enough;

static void on_enough(int number) { (void)number; enough = 1; }

static void verify(struct queue *q)
{
    uint64_t start = nanoseconds(CLOCK_MONOTONIC);
    signal(SIGUSR1, on_enough);
    for (enum phase phase = FILL; phase < PHASES; phase++) {
        uint64_t done = 0, goal = q->sectors * (phase == RANDOM ? opt.passes : 1);
        while (done < goal || q->inflight) {
            struct request *r;
            if (phase == RANDOM && enough) {
                goal = done;
                if (!q->inflight)
                    break;
            }
            while (done < goal && (r = idle(q)) && choose(q, r, phase, done)) {
                done += r->count;
                submit(q, r);
            }
            reap(q, finish_verify);
        }
    }
    q->elapsed = nanoseconds(CLOCK_MONOTONIC) - start;
    q->cpu = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
}

/* ---- the marker ---- */

static void ignore(struct queue *q, struct request *r) { (void)q; (void)r; }

/* One marker to a page in the upper half of the memory; I/O in the lower half only. */
static void hold(struct queue *q)
{
    struct request *r = q->requests;
    char *half = q->memory + opt.qd * arena_size;
    for (char *page = half; page < half + opt.qd * arena_size; page += 4096)
        memcpy(page + 128, &opt.marker, sizeof opt.marker);
    for (r->op = READ; r->op <= WRITE; r->op++) {
        r->count = opt.bs / SECTOR;
        r->iov[0] = (struct iovec){ r->arena, opt.bs };
        r->segments = 1;
        submit(q, r);
        reap(q, ignore);
    }
    printf("{\"holding\": true}\n");
    fflush(stdout);
    alarm(0);
    while (getchar() != EOF)
        ;
}

/* ---- set-up ---- */

static const char *mode;

static void *run(void *queue)
{
    pthread_barrier_wait(&start_line);
    if (!strcmp(mode, "verify"))
        verify(queue);
    else if (!strcmp(mode, "hold"))
        hold(queue);
    else
        load(queue, strcmp(mode, "randread") ? WRITE : READ);
    return NULL;
}

static void connect_device(const char *path, struct queue *queues)
{
    uint64_t capacity, alignment, each = opt.qd * arena_size;
    int value;

    if (!strcmp(mode, "hold"))
        each *= 2;
    check(blkio_create("virtio-blk-vhost-user", &device), "blkio_create");
    check(blkio_set_str(device, "path", path), "path");
    check(blkio_connect(device), "connect");
    check(blkio_get_int(device, "max-queues", &value), "max-queues");
    if (opt.queues > (uint64_t)value)
        die(2, "the device has %d queues", value);
    check(blkio_set_int(device, opt.poll ? "num-poll-queues" : "num-queues", opt.queues),
          "queues");
    check(blkio_set_int(device, opt.poll ? "num-queues" : "num-poll-queues", 0), "queues");
    check(blkio_set_int(device, "queue-size", opt.queue_size), "queue-size");
    check(blkio_get_int(device, "max-segments", &max_segments), "max-segments");
    check(blkio_start(device), "start");
    check(blkio_get_uint64(device, "capacity", &capacity), "capacity");
    if (!opt.size || opt.size > capacity)
        opt.size = capacity;
    check(blkio_get_uint64(device, "mem-region-alignment", &alignment), "alignment");
    each = (each + alignment - 1) / alignment * alignment;
    check(blkio_alloc_mem_region(device, &region, each * opt.queues), "alloc_mem_region");
    check(blkio_map_mem_region(device, &region), "map_mem_region");
    for (uint64_t i = 0; i < opt.queues; i++) {
        struct queue *q = &queues[i];
        q->q = opt.poll ? blkio_get_poll_queue(device, i) : blkio_get_queue(device, i);
        q->memory = (char *)region.addr + each * i;
        q->random = mix(opt.seed) + i;
        q->sectors = opt.size / SECTOR / opt.queues;
        q->first = q->sectors * i;
        q->generation = calloc(q->sectors, sizeof *q->generation);
        q->flat = malloc(opt.max);
        q->requests = calloc(opt.qd, sizeof *q->requests);
        if (!q->generation || !q->flat || !q->requests)
            die(2, "out of memory");
        for (uint64_t k = 0; k < opt.qd; k++)
            q->requests[k].arena = q->memory + k * arena_size;
    }
}

static void report(struct queue *queues)
{
    struct queue sum = { 0 };
    struct histogram *h = &sum.latency;
    uint64_t ios = 0;

    for (struct queue *q = queues; q < queues + opt.queues; q++) {
        for (int i = 0; i < OPS; i++) {
            sum.done[i] += q->done[i];
            ios += q->done[i];
        }
        for (unsigned i = 0; i < sizeof h->bucket / sizeof *h->bucket; i++)
            h->bucket[i] += q->latency.bucket[i];
        h->count += q->latency.count;
        h->sum += q->latency.sum;
        h->max = q->latency.max > h->max ? q->latency.max : h->max;
        sum.bytes += q->bytes;
        sum.cpu += q->cpu;
        sum.begin = q->begin > sum.begin ? q->begin : sum.begin;
        sum.elapsed = q->elapsed > sum.elapsed ? q->elapsed : sum.elapsed;
    }
    double seconds = sum.elapsed / 1e9;
    printf("{\"mode\": \"%s\", \"seconds\": %.3f, \"ios\": %llu, \"iops\": %.0f, "
           "\"mb_per_s\": %.1f, \"cpu_s\": %.3f, \"max_segments\": %d, \"reads\": %llu, "
           "\"writes\": %llu, \"zeroes\": %llu, \"flushes\": %llu, "
           "\"remaps\": %llu, \"begin_ns\": %llu, \"latency_us\": "
           "{\"mean\": %.1f, \"p50\": %.1f, \"p99\": %.1f, \"p999\": %.1f, \"max\": %.1f}}\n",
           mode, seconds, (unsigned long long)ios, ios / seconds,
           sum.bytes / seconds / 1e6, sum.cpu / 1e9, max_segments,
           (unsigned long long)sum.done[READ], (unsigned long long)sum.done[WRITE],
           (unsigned long long)sum.done[ZERO], (unsigned long long)sum.done[FLUSH],
           (unsigned long long)remaps, (unsigned long long)sum.begin,
           h->count ? h->sum / 1e3 / h->count : 0, percentile_us(h, .5),
           percentile_us(h, .99), percentile_us(h, .999), h->max / 1e3);
}

static void on_alarm(int signal)
{
    static const char text[] = "{\"error\": \"hang\"}\n";
    (void)signal;
    _exit(write(1, text, sizeof text - 1) < 0 ? 2 : 3);
}

static void set_option(const char *arg)
{
    const char *equals = strchr(arg, '=');
    for (unsigned i = 0; equals && i < sizeof options / sizeof *options; i++)
        if (strlen(options[i].name) == (size_t)(equals - arg) &&
            !strncmp(arg, options[i].name, equals - arg)) {
            char *end;
            *options[i].value = strtoull(equals + 1, &end, options[i].base);
            if (!*end && end != equals + 1)
                return;
        }
    die(1, "bad option %s", arg);
}

int main(int argc, char **argv)
{
    struct queue *queues;

    if (argc < 3)
        die(1, "usage: blkdrive SOCKET randread|randwrite|verify|hold [NAME=VALUE]...");
    mode = argv[2];
    if (strcmp(mode, "randread") && strcmp(mode, "randwrite") && strcmp(mode, "verify") &&
        strcmp(mode, "hold"))
        die(1, "no mode %s", mode);
    for (int i = 3; i < argc; i++)
        set_option(argv[i]);
    if (!opt.qd || !opt.queues || !opt.bs || opt.bs % SECTOR || opt.max < SECTOR ||
        (opt.segment && opt.bs / opt.segment >= SEGMENTS))
        die(1, "a number makes no sense");
    arena_size = strcmp(mode, "verify") ? opt.bs : opt.max + 4096 + 10 * GAP;
    arena_size = (arena_size + 4095) / 4096 * 4096;

    signal(SIGALRM, on_alarm);
    alarm(opt.hang);
    queues = calloc(opt.queues, sizeof *queues);
    if (!queues)
        die(2, "out of memory");
    connect_device(argv[1], queues);
    pthread_barrier_init(&start_line, NULL, opt.queues);
    for (uint64_t i = 0; i < opt.queues; i++)
        if (pthread_create(&queues[i].thread, NULL, run, &queues[i]))
            die(2, "no thread: %s", strerror(errno));
    for (uint64_t i = 0; i < opt.queues; i++)
        pthread_join(queues[i].thread, NULL);
    report(queues);
    blkio_destroy(&device);
    return 0;
}
