# SPDX-License-Identifier: Apache-2.0
"""A shared mapping of a part of a file, which is undone exactly once."""

from libc.errno cimport ENOMEM, errno
from libc.stdint cimport UINT64_MAX, uint64_t, uintptr_t

from vhost_airlock.dataplane.layout cimport PAGE
from vhost_airlock.dataplane.sys cimport (
    HUGETLBFS_MAGIC, MADV_DONTDUMP, MADV_HUGEPAGE, MADV_REMOVE, MAP_FAILED,
    MAP_NORESERVE, MAP_SHARED, PROT_READ, PROT_WRITE, fstatfs, madvise, mmap, munmap,
    statfs_t,
)


cdef class Mapping:
    """`size` bytes of the file behind `fd` from byte `offset`, read and write.

    The offset may be any number: the mapping begins with its page (its huge page, if
    the file is made of these). The memory is left out of core dumps. `huge_pages` asks
    the kernel for transparent huge pages; its settings decide. OSError when it refuses
    to map the file.
    """

    cdef void *_start
    cdef size_t _length
    cdef readonly object address
    cdef readonly object size

    def __init__(self, int fd, uint64_t size, uint64_t offset=0, bint huge_pages=False):
        cdef uint64_t page = page_size(fd)
        cdef uint64_t before = offset % page
        cdef void *start

        # Rounded up, the length would wrap round and be less than `size`.
        if size > UINT64_MAX - before - page:
            raise OSError(ENOMEM, f"cannot map {size} bytes at offset {offset}")
        self._length = (before + size + page - 1) // page * page
        start = mmap(
            NULL, self._length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
            fd, offset - before,
        )
        if start == MAP_FAILED:
            raise OSError(errno, f"cannot map {size} bytes at offset {offset}")
        self._start = start
        self.address = <uintptr_t> start + before
        self.size = size
        madvise(start, self._length, MADV_DONTDUMP)
        if huge_pages:
            madvise(start, self._length, MADV_HUGEPAGE)

    def empty(self, uint64_t start=0):
        """Give the memory from byte `start` on back to the system, in whole pages.

        The file keeps its size, and reads as zeros there. OSError when the kernel
        refuses.
        """
        cdef int rc

        if self._start == NULL or start % PAGE or start > self.size:
            raise ValueError(f"cannot empty a mapping from byte {start} on")
        with nogil:
            rc = madvise(
                <char *> self._start + start, self._length - start, MADV_REMOVE
            )
        if rc != 0:
            raise OSError(errno, f"cannot empty a mapping from byte {start} on")

    def close(self):
        """Unmap the memory, which no code may use any more. A second call does nothing.
        """
        if self._start != NULL:
            munmap(self._start, self._length)
            self._start = NULL

    def __dealloc__(self):
        if self._start != NULL:
            munmap(self._start, self._length)


cdef uint64_t page_size(int fd) except 0:
    """Return the page size of the file: its mappings must be multiples of it."""
    cdef statfs_t fs

    if fstatfs(fd, &fs) != 0:
        raise OSError(errno, f"cannot ask the file system of descriptor {fd}")
    if fs.f_type == HUGETLBFS_MAGIC and fs.f_bsize > PAGE:
        return fs.f_bsize
    return PAGE
