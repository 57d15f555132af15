/* The VMM's part in a dirty log: takes bits out of it, as QEMU does, while others set
 * some. tests/support/dirty.py compiles this.
 */

#include <stddef.h>
#include <stdint.h>

/* Takes all bits of `size` bytes out of the log, and sets them in `found`. Whole words
 * are exchanged with 0; bytes that are no whole, aligned word of it are exchanged alone.
 */
void take(uint8_t *log, uint8_t *found, size_t size)
{
    size_t i = 0;

    while (i < size) {
        if (((uintptr_t)(log + i) & 7) == 0 && size - i >= 8) {
            uint64_t *word = (uint64_t *)(log + i);

            if (__atomic_load_n(word, __ATOMIC_RELAXED))
                *(uint64_t *)(found + i) |=
                    __atomic_exchange_n(word, 0, __ATOMIC_SEQ_CST);
            i += 8;
        } else {
            if (__atomic_load_n(log + i, __ATOMIC_RELAXED))
                found[i] |= __atomic_exchange_n(log + i, 0, __ATOMIC_SEQ_CST);
            i++;
        }
    }
}
