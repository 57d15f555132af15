# SPDX-License-Identifier: Apache-2.0
"""The requests by which a back-end may die, of one ring.

A request that kills its back-end comes to the next one as well, and kills that too. So
for each head we count the losses of a back in which its chain was in flight. A head
names one chain from the moment when the guest offers it until the guest sees it as
done, whatever is between: the chain may be offered again from its slot, be taken from
the guest's ring again, or by its head from the record of chains in flight.

- A chain that was there at two losses is *suspected*. A ring with such chains has a
  turn in which the back gets one chain at a time, while no other ring takes any. So the
  next loss tells which one it was; those that are done are acquitted.
- A chain that was there alone in such a turn at one more loss is *condemned*: no back
  gets it again. It ends with an error, if the device has a way to say that, else its
  ring breaks. One of another ring that the back still had then may be to blame as well,
  so the chain was not alone.

A chain with nothing for the device to read asks for nothing: it is a buffer that waits
for a packet, perhaps for hours. It is never accused.
"""

from libc.stdint cimport uint8_t, uint16_t

cdef enum:
    # Losses with which a chain is suspected, and with which it is condemned.
    SUSPECTED = 2
    CONDEMNED = 3

cdef struct Suspects:
    # For each head, the losses at which its chain was in flight.
    uint8_t *losses
    # How many heads have losses, and how many of them are suspected or condemned.
    uint16_t accused
    uint16_t suspected


cdef inline bint accuse(Suspects *these, uint16_t head, bint alone) noexcept nogil:
    """The chain was in flight when the back was lost, `alone` or with others. True: it
    is condemned by that.
    """
    cdef uint8_t before = these.losses[head]

    if before == CONDEMNED or (before == SUSPECTED and not alone):
        return False
    these.losses[head] = before + 1
    these.accused += before == 0
    these.suspected += before + 1 == SUSPECTED
    return before + 1 == CONDEMNED


cdef inline bint acquit(Suspects *these, uint16_t head) noexcept nogil:
    """The chain is done, or nobody waits for it. True: it was the last suspect."""
    cdef uint8_t before = these.losses[head]

    if before == 0:
        return False
    these.losses[head] = 0
    these.accused -= 1
    if before < SUSPECTED:
        return False
    these.suspected -= 1
    return these.suspected == 0
