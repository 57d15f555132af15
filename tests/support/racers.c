/* A guest and a back that are as fast as the data plane with which they race.
 *
 * Between one look at its ring and the next, each rewrites whatever it is told to:
 * millions of times a second, where Python's threads do it now and then. Each runs in a
 * thread of its own, without the interpreter's lock, until `*stop`.
 * tests/support/racers.py compiles this and has the same structures.
 */

#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#define NEXT 1
#define WRITE 2
#define INDIRECT 4

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags;
    uint16_t next;
};

struct used_elem {
    uint32_t id;
    uint32_t len;
};

struct avail {
    uint16_t flags;
    uint16_t idx;
    uint16_t ring[];
};

struct used {
    uint16_t flags;
    uint16_t idx;
    struct used_elem ring[];
};

struct ring {
    volatile struct desc *desc;
    volatile struct avail *avail;
    volatile struct used *used;
    uint32_t size;
    /* The eventfd to tell the other side. */
    int32_t notify;
    /* One in so many indices is a wild one, for a moment; 0: none. */
    uint32_t odds;
};

static uint64_t chance(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed >> 11;
}

static int one_in(uint64_t *seed, uint32_t odds)
{
    return odds && chance(seed) % odds == 0;
}

static void notify(int fd)
{
    uint64_t one = 1;
    ssize_t written = write(fd, &one, sizeof(one));

    (void)written;
}

/* Less than 2^bits, and small ones as often as large ones. */
static uint32_t some(uint64_t *seed, uint32_t bits)
{
    return chance(seed) % (1u << chance(seed) % (bits + 1));
}

/* Leave what was just written for a moment, or for as long as a thread has its turn. */
static void linger(uint64_t *seed)
{
    if (one_in(seed, 8))
        for (volatile uint32_t left = some(seed, 17); left; left--)
            ;
    if (one_in(seed, 1000))
        sched_yield();
}

/* Publish an index, and a wrong one before it if that is its turn. */
static void publish(const struct ring *ring, volatile uint16_t *idx, uint16_t value,
                    uint64_t *seed)
{
    if (one_in(seed, ring->odds)) {
        __atomic_store_n(idx, (uint16_t)(value + chance(seed) % (4 * ring->size)),
                         __ATOMIC_RELEASE);
        notify(ring->notify);
        linger(seed);
    }
    __atomic_store_n(idx, value, __ATOMIC_RELEASE);
    notify(ring->notify);
}

struct place {
    uint8_t *at;
    /* How many bytes, of which the first value is what a good peer has there. */
    uint32_t width;
    uint32_t values;
    /* The values one after the other; NULL: noise, that stays. */
    const uint8_t *value;
    /* One in so many visits changes something. */
    uint32_t odds;
};

struct mutator {
    const struct place *place;
    uint64_t places;
    /* How many times it has changed something. */
    uint64_t writes;
};

static void put(volatile uint8_t *to, const uint8_t *from, uint32_t width)
{
    for (; width >= 8; width -= 8, to += 8, from += 8) {
        uint64_t word;

        memcpy(&word, from, 8);
        *(volatile uint64_t *)to = word;
    }
    for (; width >= 2; width -= 2, to += 2, from += 2) {
        uint16_t word;

        memcpy(&word, from, 2);
        *(volatile uint16_t *)to = word;
    }
}

/* Change some places one after the other, and change them back. */
static void mutate(struct mutator *mutator, uint64_t *seed)
{
    for (int visits = 0; mutator->places && visits < 100; visits++) {
        const struct place *one = &mutator->place[chance(seed) % mutator->places];

        if (!one_in(seed, one->odds))
            continue;
        mutator->writes++;
        if (one->value == NULL) {
            for (uint32_t at = 0; at + 8 <= one->width; at += 8)
                *(volatile uint64_t *)(one->at + at) = chance(seed) * 0x9e3779b97f4a7c15;
            continue;
        }
        put(one->at, one->value + chance(seed) % one->values * one->width, one->width);
        linger(seed);
        put(one->at, one->value, one->width);
    }
}

struct guest {
    struct ring ring;
    struct mutator mutator;
    /* Descriptors 0 to `heads` - 1 begin the chains that there are. */
    uint32_t heads;
    uint64_t offered;
    uint64_t completed;
    /* Completions of what was not in flight. */
    uint64_t doubled;
    /* Completions that tell of more than `room` bytes. */
    uint64_t too_long;
    uint32_t room;
    uint8_t busy[256];
};

/* Offer every chain again as soon as it is completed. */
void run_guest(struct guest *guest, uint64_t seed, const volatile int *stop)
{
    const struct ring *ring = &guest->ring;
    uint16_t mask = ring->size - 1;
    uint16_t idx = ring->avail->idx;
    uint16_t seen = ring->used->idx;

    while (!*stop) {
        uint16_t before = idx;
        uint16_t used = __atomic_load_n(&ring->used->idx, __ATOMIC_ACQUIRE);

        mutate(&guest->mutator, &seed);
        for (; seen != used; seen++) {
            uint32_t id = ring->used->ring[seen & mask].id;

            if (id < guest->heads && guest->busy[id])
                guest->busy[id] = 0;
            else
                guest->doubled++;
            guest->too_long += ring->used->ring[seen & mask].len > guest->room;
            guest->completed++;
        }
        for (uint32_t head = 0; head < guest->heads; head++) {
            if (guest->busy[head] || chance(&seed) % 4 == 0)
                continue;
            guest->busy[head] = 1;
            ring->avail->ring[idx++ & mask] = head;
        }
        if (idx == before) {
            sched_yield();
            continue;
        }
        guest->offered += (uint16_t)(idx - before);
        publish(ring, &ring->avail->idx, idx, &seed);
        if (one_in(&seed, ring->odds)) {
            volatile uint16_t *last = &ring->avail->ring[(uint16_t)(idx - 1) & mask];
            uint16_t head = *last;

            for (uint32_t left = some(&seed, 19); left; left--) {
                *last = ring->size + left;
                *last = head;
            }
        }
    }
}

struct region {
    uint64_t start;
    uint64_t size;
    uint8_t *host;
};

struct back {
    struct ring ring;
    struct mutator mutator;
    struct region region[8];
    uint32_t regions;
    /* Completions change after they were published, with such pauses; 0: they don't. */
    uint32_t lies;
    uint64_t taken;
    /* Chains that are none. */
    uint64_t malformed;
};

static uint8_t *host_of(const struct back *back, uint64_t addr, uint64_t len)
{
    for (uint32_t i = 0; i < back->regions; i++) {
        const struct region *region = &back->region[i];

        if (addr >= region->start && addr - region->start < region->size
            && len <= region->size - (addr - region->start))
            return region->host + (addr - region->start);
    }
    return NULL;
}

/* Write to each buffer of a chain, another letter than the last time. 0: there is something wrong with the chain. */
static int serve(struct back *back, const volatile struct desc *table, uint32_t size,
                 uint32_t at)
{
    int writable = 0;

    for (uint32_t count = 0; count < size && at < size; count++) {
        struct desc desc = table[at];
        uint8_t *host = host_of(back, desc.addr, desc.len);

        if (desc.len == 0 || host == NULL)
            return 0;
        if (desc.flags & INDIRECT)
            return serve(back, (struct desc *)host, desc.len / sizeof(desc), 0);
        if (writable && !(desc.flags & WRITE))
            return 0;
        writable = desc.flags & WRITE;
        if (writable)
            memset(host, 'a' + back->taken % 26, desc.len < 64 ? desc.len : 64);
        if (!(desc.flags & NEXT))
            return 1;
        at = desc.next;
    }
    return 0;
}

/* Change elements that were published last, again and again, and change them back: the
 * longer time they are true, or no chain would be completed. */
static void lie(const struct back *back, uint16_t done, uint64_t *seed)
{
    const struct ring *ring = &back->ring;

    for (uint32_t left = some(seed, 12); left; left--) {
        uint16_t at = done - 1 - chance(seed) % 16;
        volatile struct used_elem *elem = &ring->used->ring[at & (ring->size - 1)];
        struct used_elem said = {elem->id, elem->len};

        elem->id = left % (2 * ring->size);
        elem->len = 0xffffffff;
        elem->id = said.id;
        elem->len = said.len;
        for (volatile uint32_t pause = back->lies; pause; pause--)
            ;
    }
}

/* Complete every chain as soon as it is there. */
void run_back(struct back *back, uint64_t seed, const volatile int *stop)
{
    const struct ring *ring = &back->ring;
    uint16_t mask = ring->size - 1;
    uint16_t seen = 0;
    uint16_t done = 0;

    while (!*stop) {
        uint16_t avail = __atomic_load_n(&ring->avail->idx, __ATOMIC_ACQUIRE);

        if (back->lies && done != 0)
            lie(back, done, &seed);
        mutate(&back->mutator, &seed);
        /* A liar may have destroyed the index. */
        if (avail == seen || (uint16_t)(avail - seen) > ring->size) {
            if (avail != seen)
                seen = avail - 1;
            sched_yield();
            continue;
        }
        for (; seen != avail; seen++) {
            uint32_t head = ring->avail->ring[seen & mask];

            if (!back->lies && (head >= ring->size
                                || !serve(back, ring->desc, ring->size, head)))
                back->malformed++;
            ring->used->ring[done & mask].id = head;
            ring->used->ring[done++ & mask].len = chance(&seed) % 4096;
            back->taken++;
            if (one_in(&seed, 8)) {
                seen++;
                break;
            }
        }
        publish(ring, &ring->used->idx, done, &seed);
    }
}
