# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint16_t

from vhost_airlock.dataplane.guest cimport GuestRing
from vhost_airlock.dataplane.layout cimport Avail, Desc, Used

cdef void start_split(
    GuestRing *ring, Desc *desc, Avail *avail, Used *used, uint16_t base
) noexcept nogil
cdef void resume_split(GuestRing *ring) noexcept nogil
cdef void move_split(
    GuestRing *ring, Desc *desc, Avail *avail, Used *used
) noexcept nogil
