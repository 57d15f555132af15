/*
 * nbddrive: the load of blkdrive.c on an NBD export, over a Unix socket.
 *
 *   nbddrive SOCKET randread|randwrite|read|write [NAME=VALUE]...
 *
 * Speaks the protocol itself, and as little of it as there is: simple replies, one
 * system call to send all requests that are due and one to receive all replies that
 * came. So what is measured is NBD, not a library. Each queue is a connection and a
 * thread. Prints one JSON object; status 0 good, 1 usage, 2 an error.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { READ, WRITE, DISCONNECT };

static struct { uint64_t bs, qd, queues, ms, warmup, span, poll; } opt = {
    .bs = 4096, .qd = 1, .queues = 1, .ms = 1000, .warmup = 200 };

static const struct { const char *name; uint64_t *value; } options[] = {
    { "bs", &opt.bs },                      /* bytes of a request */
    { "qd", &opt.qd },                      /* requests in flight, a queue */
    { "queues", &opt.queues },
    { "ms", &opt.ms },                      /* time to measure */
    { "warmup", &opt.warmup },              /* time not to measure, before it */
    { "span", &opt.span },                  /* memory that requests walk through */
    { "poll", &opt.poll },                  /* 1: spin for replies */
};

struct wire_request { uint32_t magic; uint16_t flags, type; uint64_t cookie, from;
                      uint32_t length; } __attribute__((packed));
struct wire_reply { uint32_t magic, error; uint64_t cookie; } __attribute__((packed));

/* Latencies in 16 linear steps for each power of two. */
struct histogram { uint64_t count, max, bucket[61 * 16]; };

struct slot { uint64_t started; char *stripe; uint64_t place; struct wire_request wire; };

struct queue {
    int fd, number;
    struct slot *slots;
    struct iovec *iov;                      /* what is to be sent */
    int iovs;
    uint64_t inflight, random, cursor, begin, elapsed;
    char *input;                            /* what was received, and not looked at */
    size_t have, at, room;
    struct histogram latency;
    pthread_t thread;
};

static const char *path, *mode;
static uint64_t device_size;

static void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printf("{\"error\": \"");
    vprintf(format, args);
    printf("\"}\n");
    fflush(stdout);
    _exit(2);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static uint64_t mix(uint64_t x)             /* splitmix64's finaliser */
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static void record(struct histogram *h, uint64_t ns)
{
    int e = ns < 32 ? 0 : 59 - __builtin_clzll(ns);
    h->bucket[e * 16 + (ns >> e)]++;
    h->count++;
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

/* ---- the connection ---- */

static void receive(int fd, void *to, size_t size)
{
    while (size) {
        ssize_t n = recv(fd, to, size, 0);
        if (n <= 0)
            die("receive: %s", n ? strerror(errno) : "the server has hung up");
        to = (char *)to + n;
        size -= n;
    }
}

static void give(int fd, const void *from, size_t size)
{
    if (send(fd, from, size, MSG_NOSIGNAL) != (ssize_t)size)
        die("send: %s", strerror(errno));
}

/* The fixed newstyle handshake, with the option that older clients use: it has no
 * negotiation of replies, which stay simple. The export is called "disk". */
static int connect_export(void)
{
    static const char export[] = "disk";
    struct __attribute__((packed)) { uint64_t magic, option; uint16_t flags; } hello;
    struct __attribute__((packed)) {
        uint32_t flags; uint64_t magic; uint32_t option, length; char name[4];
    } ask = { htobe32(3), htobe64(0x49484156454F5054ull), htobe32(1), htobe32(4), "" };
    struct __attribute__((packed)) { uint64_t size; uint16_t flags; } info;
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM, 0), size = 4 << 20;

    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
        die("connect: %s", strerror(errno));
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    receive(fd, &hello, sizeof hello);
    if (hello.magic != htobe64(0x4e42444d41474943ull) || !(be16toh(hello.flags) & 1))
        die("no NBD server of the newstyle");
    memcpy(ask.name, export, 4);
    give(fd, &ask, sizeof ask);
    receive(fd, &info, sizeof info);
    device_size = be64toh(info.size);
    if (!(be16toh(hello.flags) & 2))
        receive(fd, (char[124]){ 0 }, 124);
    return fd;
}

static void fill(struct queue *q, bool wait);

/* Send all that is due. While the server does not read since we do not, receive. */
static void flush(struct queue *q)
{
    struct iovec *iov = q->iov, *end = iov + q->iovs;

    while (iov < end) {
        int count = end - iov < 1024 ? end - iov : 1024;
        struct msghdr message = { .msg_iov = iov, .msg_iovlen = count };
        ssize_t n = sendmsg(q->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0) {
            if (errno != EAGAIN)
                die("send: %s", strerror(errno));
            struct pollfd wait = { q->fd, POLLIN | POLLOUT, 0 };
            if (!opt.poll)
                poll(&wait, 1, -1);
            fill(q, false);
            continue;
        }
        for (; iov < end && (size_t)n >= iov->iov_len; iov++)
            n -= iov->iov_len;
        if (iov < end) {
            iov->iov_base = (char *)iov->iov_base + n;
            iov->iov_len -= n;
        }
    }
    q->iovs = 0;
}

/* Receive what there is, into the space that is left. */
static void fill(struct queue *q, bool wait)
{
    ssize_t n;

    if (q->at && (q->at == q->have || q->have == q->room)) {
        memmove(q->input, q->input + q->at, q->have - q->at);
        q->have -= q->at;
        q->at = 0;
    }
    if (q->have == q->room)
        return;
    n = recv(q->fd, q->input + q->have, q->room - q->have,
             wait && !opt.poll ? 0 : MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno != EAGAIN))
        die("receive: %s", n ? strerror(errno) : "the server has hung up");
    if (n > 0)
        q->have += n;
}

/* ---- the load ---- */

static void submit(struct queue *q, uint64_t index, bool write)
{
    struct slot *s = &q->slots[index];
    uint64_t blocks = device_size / opt.bs, block, stripe = opt.span / opt.qd;

    if (!strncmp(mode, "rand", 4)) {
        block = mix(q->random += 0x9e3779b97f4a7c15ull) % blocks;
    } else {
        block = q->cursor++ % (blocks / opt.queues) + blocks / opt.queues * q->number;
    }
    s->place = s->place + 2 * opt.bs <= stripe ? s->place + opt.bs : 0;
    s->wire = (struct wire_request){
        htobe32(0x25609513), 0, htobe16(write ? WRITE : READ), index,
        htobe64(block * opt.bs), htobe32(opt.bs) };
    q->iov[q->iovs++] = (struct iovec){ &s->wire, sizeof s->wire };
    if (write)
        q->iov[q->iovs++] = (struct iovec){ s->stripe + s->place, opt.bs };
    s->started = now_ns();
    q->inflight++;
}

/* Receive the data of a read: what came with its reply, and the rest straight to where
 * it belongs. */
static void take_data(struct queue *q, char *to)
{
    size_t n = q->have - q->at < opt.bs ? q->have - q->at : opt.bs;
    memcpy(to, q->input + q->at, n);
    q->at += n;
    if (n < opt.bs)
        receive(q->fd, to + n, opt.bs - n);
}

static void *run(void *queue)
{
    struct queue *q = queue;
    bool write = strstr(mode, "write"), warm = false, more = true;
    uint64_t now = now_ns(), begin = now + opt.warmup * 1000000;
    struct wire_reply reply;

    for (uint64_t i = 0; i < opt.qd; i++)
        submit(q, i, write);
    flush(q);
    while (q->inflight) {
        fill(q, true);
        while (q->have - q->at >= sizeof reply) {
            memcpy(&reply, q->input + q->at, sizeof reply);
            q->at += sizeof reply;
            if (reply.magic != htobe32(0x67446698) || reply.cookie >= opt.qd || reply.error)
                die("a request failed: %u", be32toh(reply.error));
            struct slot *s = &q->slots[reply.cookie];
            if (!write)
                take_data(q, s->stripe + s->place);
            q->inflight--;
            if (more) {
                record(&q->latency, now_ns() - s->started);
                submit(q, reply.cookie, write);
            }
        }
        flush(q);
        now = now_ns();
        if (!warm && now >= begin) {
            warm = true;
            begin = now;
            memset(&q->latency, 0, sizeof q->latency);
        }
        if (more && warm && now >= begin + opt.ms * 1000000) {
            more = false;
            q->begin = begin;
            q->elapsed = now - begin;
        }
    }
    return NULL;
}

static void report(struct queue *queues)
{
    struct histogram all = { 0 };
    uint64_t elapsed = 0, begin = 0;

    for (struct queue *q = queues; q < queues + opt.queues; q++) {
        for (unsigned i = 0; i < sizeof all.bucket / sizeof *all.bucket; i++)
            all.bucket[i] += q->latency.bucket[i];
        all.count += q->latency.count;
        all.max = q->latency.max > all.max ? q->latency.max : all.max;
        begin = q->begin > begin ? q->begin : begin;
        elapsed = q->elapsed > elapsed ? q->elapsed : elapsed;
    }
    double seconds = elapsed / 1e9;
    printf("{\"mode\": \"%s\", \"seconds\": %.3f, \"ios\": %llu, \"iops\": %.0f, "
           "\"mb_per_s\": %.1f, \"begin_ns\": %llu, \"latency_us\": "
           "{\"p50\": %.1f, \"p99\": %.1f, \"p999\": %.1f, \"max\": %.1f}}\n",
           mode, seconds, (unsigned long long)all.count, all.count / seconds,
           all.count * opt.bs / seconds / 1e6, (unsigned long long)begin,
           percentile_us(&all, .5), percentile_us(&all, .99), percentile_us(&all, .999),
           all.max / 1e3);
}

static void set_option(const char *arg)
{
    const char *equals = strchr(arg, '=');
    for (unsigned i = 0; equals && i < sizeof options / sizeof *options; i++)
        if (strlen(options[i].name) == (size_t)(equals - arg) &&
            !strncmp(options[i].name, arg, equals - arg)) {
            *options[i].value = strtoull(equals + 1, NULL, 0);
            return;
        }
    die("bad option %s", arg);
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        puts("usage: nbddrive SOCKET randread|randwrite|read|write [NAME=VALUE]...");
        return 1;
    }
    path = argv[1];
    mode = argv[2];
    for (int i = 3; i < argc; i++)
        set_option(argv[i]);
    if (!opt.qd || !opt.queues || !opt.bs)
        die("a number makes no sense");
    if (opt.span < opt.qd * opt.bs)
        opt.span = opt.qd * opt.bs;

    struct queue *queues = calloc(opt.queues, sizeof *queues);
    for (uint64_t i = 0; i < opt.queues; i++) {
        struct queue *q = &queues[i];
        char *memory = aligned_alloc(4096, (opt.span + 4095) / 4096 * 4096);
        q->fd = connect_export();
        q->number = i;
        q->random = mix(i);
        q->slots = calloc(opt.qd, sizeof *q->slots);
        q->iov = calloc(2 * opt.qd, sizeof *q->iov);
        /* For reads: small, so that most data is received where it belongs. */
        q->room = 256 << 10;
        q->input = malloc(q->room);
        if (!memory || !q->slots || !q->iov || !q->input)
            die("out of memory");
        memset(memory, 0x5a, opt.span);
        for (uint64_t k = 0; k < opt.qd; k++)
            q->slots[k].stripe = memory + opt.span / opt.qd * k;
    }
    for (uint64_t i = 0; i < opt.queues; i++)
        if (pthread_create(&queues[i].thread, NULL, run, &queues[i]))
            die("no thread");
    for (uint64_t i = 0; i < opt.queues; i++)
        pthread_join(queues[i].thread, NULL);
    report(queues);
    for (uint64_t i = 0; i < opt.queues; i++) {
        struct wire_request bye = { htobe32(0x25609513), 0, htobe16(DISCONNECT), 0, 0, 0 };
        give(queues[i].fd, &bye, sizeof bye);
    }
    return 0;
}
