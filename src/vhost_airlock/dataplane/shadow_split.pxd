# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint16_t

from vhost_airlock.dataplane.layout cimport Avail, Desc, Used
from vhost_airlock.dataplane.shadow cimport ShadowRing

cdef void start_split(
    ShadowRing *ring, Desc *desc, Avail *avail, Used *used
) noexcept nogil
