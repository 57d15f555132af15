# SPDX-License-Identifier: Apache-2.0
"""Copies bytes: through the processor's caches, or past them.

Data that the caches don't hold is better written past them, by non-temporal stores: no
line is read only to be overwritten, and the data of guest and back stays in the caches.
The source is prefetched a KiB ahead, beyond its end too: a prefetch is no access.
Non-temporal stores are ordered with no other stores, so a store fence ends each of
these copies: an index that is published later is seen later. On processors without
non-temporal stores, all copies are memcpy().
"""

from libc.stdint cimport uint8_t, uint64_t

cdef extern from * nogil:
    """
    #include <stdint.h>
    #include <string.h>
    #ifdef __SSE2__
    #include <emmintrin.h>
    #endif

    static inline void airlock_copy(
        uint8_t *to, const uint8_t *from, uint64_t size, int past_caches)
    {
    #ifdef __SSE2__
        uint64_t head = -(uintptr_t)to & 63;

        if (past_caches && size > head) {
            memcpy(to, from, head);
            to += head;
            from += head;
            for (size -= head; size >= 64; size -= 64) {
                __m128i a = _mm_loadu_si128((const __m128i *)from);
                __m128i b = _mm_loadu_si128((const __m128i *)from + 1);
                __m128i c = _mm_loadu_si128((const __m128i *)from + 2);
                __m128i d = _mm_loadu_si128((const __m128i *)from + 3);

                _mm_prefetch(from + 1024, _MM_HINT_NTA);
                _mm_stream_si128((__m128i *)to, a);
                _mm_stream_si128((__m128i *)to + 1, b);
                _mm_stream_si128((__m128i *)to + 2, c);
                _mm_stream_si128((__m128i *)to + 3, d);
                to += 64;
                from += 64;
            }
            _mm_sfence();
        }
    #endif
        (void)past_caches;
        memcpy(to, from, size);
    }
    """
    void copy "airlock_copy"(
        uint8_t *to, const uint8_t *source, uint64_t size, bint past_caches
    )
