/* The VMM's part in a dirty log: takes bits out of it, as QEMU does, while others set
 * some. tests/support/dirty.py compiles this.
 */

#include <stddef.h>
#include <stdint.h>

static size_t note(uint64_t bits, size_t page, uint64_t *pages, size_t room, size_t n)
{
    for (; bits; bits &= bits - 1, n++)
        if (n < room)
            pages[n] = page + __builtin_ctzll(bits);
    return n;
}

/* Takes all bits of `size` bytes out of the log; returns how many there were, and their
 * pages, as far as there is room for these. Whole words are exchanged with 0; bytes that
 * are no whole, aligned word of it are exchanged alone.
 */
size_t take(uint8_t *log, size_t size, uint64_t *pages, size_t room)
{
    size_t i = 0, n = 0;

    while (i < size) {
        if (((uintptr_t)(log + i) & 7) == 0 && size - i >= 8) {
            uint64_t *word = (uint64_t *)(log + i);

            if (__atomic_load_n(word, __ATOMIC_RELAXED))
                n = note(__atomic_exchange_n(word, 0, __ATOMIC_SEQ_CST), i * 8,
                         pages, room, n);
            i += 8;
        } else {
            if (__atomic_load_n(log + i, __ATOMIC_RELAXED))
                n = note(__atomic_exchange_n(log + i, 0, __ATOMIC_SEQ_CST), i * 8,
                         pages, room, n);
            i++;
        }
    }
    return n;
}

/* Toggles the bits of `mask` in the log until `*stop`, as another device may that shares
 * it. Returns how often one was not as this had left it.
 */
uint64_t hammer(uint8_t *log, size_t size, const uint8_t *mask,
                const volatile int *stop)
{
    uint8_t left[256] = {0};
    uint64_t lost = 0;

    while (!*stop)
        for (size_t i = 0; i < size && i < sizeof(left); i++) {
            uint8_t found = __atomic_fetch_xor(log + i, mask[i], __ATOMIC_SEQ_CST);

            lost += (found & mask[i]) != left[i];
            left[i] = ~found & mask[i];
        }
    return lost;
}
