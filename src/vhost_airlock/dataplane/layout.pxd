# SPDX-License-Identifier: Apache-2.0
"""Structures in shared memory, and the only ways in which we read and write them.

Ring structures are those of the virtio specification, 2.7 "Split Virtqueues",
little-endian, which is the host's order: a big-endian host is refused at build.

The other side can rewrite this memory at any moment. So a word that decides something
is fetched once, by an access that the compiler may neither repeat nor split, into
memory of our own, and only that copy is looked at.
"""

from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from * nogil:
    """
    #if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "vhost-airlock needs a little-endian host"
    #endif

    typedef struct { uint64_t addr; uint32_t len; uint16_t flags, next; } airlock_desc;
    typedef struct { uint32_t id, len; } airlock_used_elem;
    typedef struct { uint16_t flags, idx, ring[]; } airlock_avail;
    typedef struct { uint16_t flags, idx; airlock_used_elem ring[]; } airlock_used;
    typedef uint64_t __attribute__((may_alias)) airlock_word;

    static inline void airlock_fetch_desc(airlock_desc *to, const airlock_desc *from)
    {
        ((airlock_word *)to)[0] =
            __atomic_load_n((const airlock_word *)from, __ATOMIC_RELAXED);
        ((airlock_word *)to)[1] =
            __atomic_load_n((const airlock_word *)from + 1, __ATOMIC_RELAXED);
    }
    #define airlock_load(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define airlock_load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define airlock_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    #define airlock_store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define airlock_or_release(p, v) \
        ((void)__atomic_fetch_or((p), (v), __ATOMIC_RELEASE))
    #define airlock_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    #define airlock_forget() __asm__ volatile("" ::: "memory")
    """
    ctypedef struct Desc "airlock_desc":
        uint64_t addr
        uint32_t len
        uint16_t flags
        uint16_t next

    ctypedef struct UsedElem "airlock_used_elem":
        uint32_t id
        uint32_t len

    ctypedef struct Avail "airlock_avail":
        uint16_t flags
        uint16_t idx
        uint16_t *ring

    ctypedef struct Used "airlock_used":
        uint16_t flags
        uint16_t idx
        UsedElem *ring

    void fetch_desc "airlock_fetch_desc"(Desc *to, const Desc *source)
    uint16_t load16 "airlock_load"(const uint16_t *)
    uint32_t load32 "airlock_load"(const uint32_t *)
    uint64_t load64 "airlock_load"(const uint64_t *)
    int load_int "airlock_load"(const int *)
    uint16_t load16_acquire "airlock_load_acquire"(const uint16_t *)
    void store8 "airlock_store"(uint8_t *, uint8_t)
    void store16 "airlock_store"(uint16_t *, uint16_t)
    void store64 "airlock_store"(uint64_t *, uint64_t)
    void store_int "airlock_store"(int *, int)
    void store16_release "airlock_store_release"(uint16_t *, uint16_t)
    void or8_release "airlock_or_release"(uint8_t *, uint8_t)
    void or64_release "airlock_or_release"(uint64_t *, uint64_t)
    void fence "airlock_fence"()
    # The compiler must not read bytes again that were copied before this point.
    void forget "airlock_forget"()


cdef enum:
    DESC_NEXT = 1
    DESC_WRITE = 2
    DESC_INDIRECT = 4
    AVAIL_NO_INTERRUPT = 1
    USED_NO_NOTIFY = 1

    PAGE = 4096
    MAX_SEGMENTS = 1024

cdef enum Fault:
    # Why a ring stopped for good: from BAD_AVAIL_INDEX down to POISON the guest is
    # to blame, from BAD_USED_INDEX down to BACK_ERROR the back, and nobody is for the
    # others, after which neither ring can be used.
    BAD_AVAIL_INDEX = -1
    BAD_HEAD = -2
    HEAD_IN_USE = -3
    BAD_NEXT = -4
    LOOP = -5
    BAD_INDIRECT = -6
    NESTED_INDIRECT = -7
    BAD_ADDRESS = -8
    BAD_ORDER = -9
    EMPTY_CHAIN = -10
    CHAIN_TOO_LONG = -11
    NEVER_FITS = -12
    POISON = -13
    BAD_USED_INDEX = -32
    BAD_USED_ID = -33
    BACK_ERROR = -34
    RING_UNMAPPED = -64
    OUT_OF_MEMORY = -65
    MEMORY_LOST = -66

cdef struct Blamed:
    # The numbers at which a fault was found, for its message.
    uint64_t number
    uint64_t other


cdef inline int blame(
    Blamed *blamed, int fault, uint64_t number, uint64_t other
) noexcept nogil:
    """Keep the numbers at which a fault was found. Returns the fault."""
    blamed.number = number
    blamed.other = other
    return fault


cdef inline bint back_usable(int fault) noexcept nogil:
    """May the shadow ring still be used? The guest's faults end the taking of chains
    only: those in flight are completed.
    """
    return fault > BAD_USED_INDEX


cdef inline bint need_event(uint16_t event, uint16_t new, uint16_t old) noexcept nogil:
    """Did an index pass `event` on its way from old to new (virtio 2.7.7.1)?"""
    return <uint16_t> (new - event - 1) < <uint16_t> (new - old)
