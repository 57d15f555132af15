# SPDX-License-Identifier: Apache-2.0
"""The faults for which a ring stops, in words."""

from vhost_airlock.dataplane.layout cimport (
    BACK_ERROR, BAD_ADDRESS, BAD_AVAIL_INDEX, BAD_HEAD, BAD_INDIRECT, BAD_NEXT,
    BAD_ORDER, BAD_USED_ID, BAD_USED_INDEX, CHAIN_TOO_LONG, EMPTY_CHAIN, HEAD_IN_USE,
    LOOP, MEMORY_LOST, NESTED_INDIRECT, NEVER_FITS, OUT_OF_MEMORY, POISON,
    RING_UNMAPPED,
)

FAULTS = {
    BAD_AVAIL_INDEX: "the guest's avail index jumps by more than the ring holds",
    BAD_HEAD: "a head in the guest's avail ring is beyond the ring",
    HEAD_IN_USE: "the guest offered a head that is still in flight",
    BAD_NEXT: "a descriptor's next is beyond its table",
    LOOP: "a chain has a loop or too many descriptors",
    BAD_INDIRECT: "an indirect descriptor is malformed or was not negotiated",
    NESTED_INDIRECT: "an indirect table holds an indirect descriptor",
    BAD_ADDRESS: "a descriptor points outside of the guest's memory",
    BAD_ORDER: "a descriptor to read from follows one to write to",
    EMPTY_CHAIN: "a chain has no bytes at all",
    CHAIN_TOO_LONG: "a chain has more than 2^32 - 1 bytes",
    NEVER_FITS: "a chain is larger than the pool allows",
    POISON: "the back-end is lost each time that it gets a chain",
    BAD_USED_INDEX: "the back's used index jumps by more than the ring holds",
    BAD_USED_ID: "the back completes chains that are not in flight, again and again",
    BACK_ERROR: "the back signalled an error of the ring",
    RING_UNMAPPED: "the ring's own memory is not there any more",
    OUT_OF_MEMORY: "the airlock has no memory left",
    MEMORY_LOST: "a page of memory that the ring or a request is in can't be had",
}
"""The meaning of each fault."""

DETAILS = {
    BAD_AVAIL_INDEX: "to {number} from {other}",
    BAD_HEAD: "{number} of {other}",
    HEAD_IN_USE: "{number} of {other}",
    BAD_NEXT: "head {head}, {number} of {other}",
    LOOP: "head {head}, {descs} descriptors",
    BAD_INDIRECT: "head {head}, flags {number:#x}, {other} bytes",
    NESTED_INDIRECT: "head {head}, entry {number} of {other}",
    BAD_ADDRESS: "head {head}, address {number:#x}, {other} bytes",
    BAD_ORDER: "head {head}, address {number:#x}, {other} bytes",
    EMPTY_CHAIN: "head {head}, {descs} descriptors",
    CHAIN_TOO_LONG: "head {head}, {bytes} bytes",
    NEVER_FITS: "head {head}, {bytes} bytes, {descs} descriptors",
    POISON: "head {number}, {other} losses",
    BAD_USED_INDEX: "to {number} from {other}",
    BAD_USED_ID: "id {number}, {other} in a row",
}
"""The place and the values of a fault, for its message: words of the ring, never of a
buffer.

`head`, `descs` and `bytes` are of the chain at hand, `number` and `other` are Blamed.
"""
