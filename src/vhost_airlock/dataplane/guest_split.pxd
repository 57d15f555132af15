# SPDX-License-Identifier: Apache-2.0
from vhost_airlock.dataplane.guest cimport GuestOps

cdef const GuestOps *split_guest() noexcept nogil
