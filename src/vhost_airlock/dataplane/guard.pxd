# SPDX-License-Identifier: Apache-2.0
"""Survive that a page of shared memory is not there: a SIGBUS only ends a job."""

ctypedef int (*Job)(void *what, int number) noexcept nogil

# Run job(what, number) and store its result. False: it was cut off by a SIGBUS.
cdef bint guarded(Job job, void *what, int number, int *result) noexcept nogil
