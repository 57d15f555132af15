# SPDX-License-Identifier: Apache-2.0
"""Survive that a page of shared memory is not there.

The owner of a file can cut it short while it is mapped here, and the kernel can be
without a page for a hole in it (huge pages above all). An access then raises SIGBUS. In
a job that was called by guarded(), only the job ends, wherever it was: guarded()
returns False. A SIGBUS outside a job goes to the previous handler.

A job that is cut off runs no further, so all state that has to be put right then must
be in memory. Its stores before the access are there: for all that the compiler knows,
shared memory could be any of our memory (-fno-strict-aliasing), so it can't delay these
stores. And a job must hold no lock while it touches shared memory.

A SIGSEGV is not caught: mapped memory can be read and written, so it is a bug.
"""

from libc.errno cimport errno

cdef extern from * nogil:
    """
    #include <setjmp.h>
    #include <signal.h>
    #include <string.h>

    /* The handler must not be the first to use this in a thread, which could allocate
       memory. In this model nothing is allocated; musl never does. */
    #ifdef __GLIBC__
    #define AIRLOCK_TLS __attribute__((tls_model("initial-exec")))
    #else
    #define AIRLOCK_TLS
    #endif

    static __thread AIRLOCK_TLS sigjmp_buf *volatile airlock_way_back;
    static struct sigaction airlock_before;

    static void airlock_on_sigbus(int number, siginfo_t *info, void *context)
    {
        (void)context;
        if (airlock_way_back && info->si_code > 0)
            siglongjmp(*airlock_way_back, 1);
        /* Outside a job: the access is repeated, now with the previous handler. */
        sigaction(number, &airlock_before, NULL);
        if (info->si_code <= 0)
            raise(number);
    }

    static int airlock_catch_sigbus(void)
    {
        struct sigaction action;

        memset(&action, 0, sizeof(action));
        action.sa_sigaction = airlock_on_sigbus;
        /* The way back leads past the handler's end, which would unblock the signal. */
        action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
        return sigaction(SIGBUS, &action, &airlock_before);
    }

    static int airlock_guarded(
        int (*job)(void *, int), void *what, int number, int *result)
    {
        sigjmp_buf here;

        if (sigsetjmp(here, 0)) {
            airlock_way_back = NULL;
            return 0;
        }
        airlock_way_back = &here;
        *result = job(what, number);
        airlock_way_back = NULL;
        return 1;
    }
    """
    int catch_sigbus "airlock_catch_sigbus"()
    bint airlock_guarded(Job, void *, int, int *)


cdef bint guarded(Job job, void *what, int number, int *result) noexcept nogil:
    return airlock_guarded(job, what, number, result)


if catch_sigbus() != 0:
    raise OSError(errno, "cannot catch SIGBUS")  # not reached: it always can
