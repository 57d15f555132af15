# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint16_t, uint64_t, uintptr_t

from vhost_airlock.dataplane.step cimport PumpState

cdef tuple open_record(PumpState *pump, uintptr_t at, uint16_t room, bint reset)
cdef set_apart(PumpState *pump, list heads)
cdef uint64_t first_of_ring(const PumpState *pump) noexcept nogil
cdef void take_out(PumpState *pump, uint16_t head) noexcept nogil
