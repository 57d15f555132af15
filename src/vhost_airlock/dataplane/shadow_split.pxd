# SPDX-License-Identifier: Apache-2.0
from vhost_airlock.dataplane.shadow cimport ShadowOps

cdef const ShadowOps *split_shadow() noexcept nogil
