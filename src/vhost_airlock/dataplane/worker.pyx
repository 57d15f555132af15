# SPDX-License-Identifier: Apache-2.0
"""A thread that runs pumps: epoll, or polling for as long as that pays.

As long as rounds move chains, the worker goes round its pumps and needs no
notifications, so both sides are left unarmed and send none. When a round moves no
chain, the worker polls for a while, if that pays (polling.pyx). Then it arms both sides
of every ring, passes a fence, looks once more and sleeps: a chain that became available
or used before the other side saw the arming comes without a notification, and only this
last look finds it. In short:

    repeat:
        step each pump, and send the notifications that are due
        if no chain moved, and none comes while the worker polls:
            arm both sides of each ring; fence; if no chain is pending: sleep

The control plane changes pumps, pool and guest memory only under pause(): the worker
stands still between two rounds then, and has seen the change when it goes on.

While a ring holds a chain, since it has enough in flight, the worker wakes after a
while by itself: whether it is enough depends on the time (window.pyx).

When a worker frees room in the pool for which another one's ring waits, the pool's
eventfd tells it, which all of the pool's workers watch.

Notifications without end, and without a chain, wake the worker only once a millisecond:
after STORM such wake-ups, one after the other, it ignores notifications for NAP.

Eventfds are registered edge-triggered and never read: each write is an edge. A write to
the kick eventfd can block: the back shares its open file description, and can make it
blocking and full. That stalls this device only; a pause interrupts the write with a
signal whose handler does nothing.
"""

from contextlib import contextmanager

from libc.errno cimport EEXIST, ENOENT, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset
from posix.signal cimport sigaction, sigaction_t
from posix.time cimport timespec

from vhost_airlock.dataplane.layout cimport fence, load64, load_int, store_int
from vhost_airlock.dataplane.polling cimport Polling
from vhost_airlock.dataplane.pool cimport CHECKS, add_int, tell_room
from vhost_airlock.dataplane.pump cimport Pump
from vhost_airlock.dataplane.step cimport (
    PumpState, is_drained, logged, pending, rest, step,
)
from vhost_airlock.dataplane.sys cimport (
    CLOCK_MONOTONIC, EFD_CLOEXEC, EFD_NONBLOCK, EPOLL_CLOEXEC, EPOLL_CTL_ADD,
    EPOLL_CTL_DEL, EPOLLET, EPOLLIN, POLLIN, SIGURG, close, epoll_create1, epoll_ctl,
    epoll_event, epoll_wait, eventfd, now_ns, pthread_cond_broadcast,
    pthread_cond_destroy, pthread_cond_init, pthread_cond_t, pthread_cond_timedwait,
    pthread_cond_wait, pthread_condattr_init, pthread_condattr_setclock,
    pthread_condattr_t, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_kill, pthread_mutex_t, pthread_mutex_unlock, pthread_self, pthread_t, read,
    pollfd, sched_yield, signal_fd, wait_for,
)
from vhost_airlock.dataplane.window cimport SLICE_MS

from vhost_airlock.errors import DeadlineExceeded

cdef enum:
    # Chains that a ring may move each way before the next one's turn.
    BUDGET = 256
    MAX_EVENTS = 64
    # After more than STORM wake-ups in vain, one after the other, the worker ignores
    # notifications for NAP milliseconds before each sleep.
    STORM = 64
    NAP = 1
    # Nanoseconds that a worker has to come to rest before a signal interrupts it.
    PATIENCE = 100_000_000

cdef uint64_t STOP_TIME = 5_000_000_000

cdef struct Route:
    # A pump, and the descriptors and reports that the loop has of it.
    PumpState *pump
    int kick_out
    int call_out
    int err_out
    int log_out
    # The fault that front and control plane have been told of.
    int fault
    # The control plane has been told.
    bint drained
    # How often a page was logged when the front was last told.
    uint64_t logged


cdef class Worker:
    """Runs pumps in the thread that calls run().

    `poll_us` is the longest time in microseconds to poll before sleeping; 0: never.
    `events` is an eventfd that it signals when the control plane should look: a pump
    has a new fault, is drained, or wants a larger pool or a lone region.
    """

    cdef pthread_mutex_t mutex
    cdef pthread_cond_t changed
    cdef int paused
    """The number of pauses that are wanted; read by the loop without the mutex."""
    cdef int stopping
    cdef bint running
    cdef pthread_t thread
    cdef int epoll
    cdef int wake
    cdef int events
    cdef Polling polling
    cdef uint64_t moved
    """Chains moved, both ways together."""
    cdef uint64_t sleeps
    cdef uint64_t rounds
    cdef uint64_t spins
    cdef uint64_t polled
    cdef uint64_t vain
    cdef uint64_t vain_since
    """The number of `vain` when a chain last moved."""
    cdef bint woken
    """A notification woke it, and no chain has moved since."""
    cdef uint64_t slept
    """Nanoseconds that it has slept since a chain last moved."""
    cdef Route *route
    cdef int routes
    cdef list pumps

    def __cinit__(self, int events, *, poll_us=0):
        cdef pthread_condattr_t attributes

        self.epoll = self.wake = -1     # for __dealloc__, should this fail
        self.pumps = []
        self.events = events
        self.polling = Polling(poll_us * 1000)
        pthread_mutex_init(&self.mutex, NULL)
        pthread_condattr_init(&attributes)
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
        pthread_cond_init(&self.changed, &attributes)
        self.epoll = epoll_create1(EPOLL_CLOEXEC)
        self.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.epoll < 0 or self.wake < 0:
            raise OSError(errno, "cannot make a worker's descriptors")
        self._watch(self.wake, EPOLLIN)

    def __dealloc__(self):
        close_both(self)
        free(self.route)
        pthread_cond_destroy(&self.changed)
        pthread_mutex_destroy(&self.mutex)

    def run(self):
        """Move chains until stop() is called. The target of the worker's thread."""
        cdef int i

        pthread_mutex_lock(&self.mutex)
        self.thread = pthread_self()
        set_running(self, True)
        pthread_mutex_unlock(&self.mutex)
        with nogil:
            while True:
                if load_int(&self.paused):
                    stand_still(self)
                if load_int(&self.stopping):
                    for i in range(self.routes):
                        notify(&self.route[i])
                    break
                if not go_round(self):
                    idle(self)
            pthread_mutex_lock(&self.mutex)
            set_running(self, False)
            pthread_cond_broadcast(&self.changed)
            pthread_mutex_unlock(&self.mutex)

    def stop(self):
        """Make run() return; join the thread to know that it has."""
        hold(self, now_ns() + STOP_TIME)
        store_int(&self.stopping, 1)
        signal_fd(self.wake)
        let_go(self)

    def close(self):
        """Close its descriptors, when run() has returned or never was called."""
        close_both(self)

    @contextmanager
    def pause(self, timeout=5.0):
        """A context in which the worker stands still and pumps may be changed.

        `timeout` in seconds; DeadlineExceeded when the worker does not come to rest.
        """
        cdef uint64_t until = now_ns() + <uint64_t> (timeout * 1e9)

        if not hold(self, until):
            let_go(self)
            raise DeadlineExceeded(f"the worker did not come to rest in {timeout} s")
        try:
            yield
        finally:
            let_go(self)

    def add(self, Pump pump):
        """Run this pump from now on; call it again when its descriptors changed, and
        under the same pause as Pump.attach(): its next fault is a new one then.

        Only under pause().
        """
        cdef Route *route
        cdef int fault = 0

        if pump not in self.pumps:
            self.route = <Route *> resized(self.route, self.routes + 1)
            memset(&self.route[self.routes], 0, sizeof(Route))
            self.pumps.append(pump)
            self.routes += 1
        route = &self.route[self.pumps.index(pump)]
        if route.err_out == pump.err_out and pump.state.fault:
            fault = route.fault     # else it is signalled at the new descriptor
        route[0] = Route(
            &pump.state, pump.kick_out, pump.call_out, pump.err_out, pump.log_out,
            fault, False, 0,
        )
        if pump.state.pool.shared:
            self.watch(pump.state.pool.room)

    def remove(self, Pump pump):
        """Run this pump no more, if it was run at all. Only under pause()."""
        cdef int at

        if pump not in self.pumps:
            return
        at = self.pumps.index(pump)
        del self.pumps[at]
        self.routes -= 1
        while at < self.routes:
            self.route[at] = self.route[at + 1]
            at += 1

    def watch(self, int fd):
        """Wake up for this eventfd. ValueError if epoll can't wait for its kind."""
        self._watch(fd, <uint32_t> EPOLLIN | <uint32_t> EPOLLET)

    def unwatch(self, int fd):
        """Wake up for this eventfd no more; called before it is closed."""
        if epoll_ctl(self.epoll, EPOLL_CTL_DEL, fd, NULL) != 0 and errno != ENOENT:
            raise OSError(errno, f"cannot stop to wait for descriptor {fd}")

    def counters(self):
        """Return the loop's counters by name; times in ns. Any thread may ask."""
        return {
            "rounds": load64(&self.rounds),
            "sleeps": load64(&self.sleeps),
            "vain": load64(&self.vain),
            "spins": load64(&self.spins),
            "polled": load64(&self.polled),
            "window": self.polling.now,
        }

    cdef _watch(self, int fd, uint32_t events):
        cdef epoll_event event

        event.events = events
        event.data.u64 = fd == self.wake
        if epoll_ctl(self.epoll, EPOLL_CTL_ADD, fd, &event) != 0 and errno != EEXIST:
            raise ValueError(f"descriptor {fd} cannot be waited for (errno {errno})")


cdef void close_both(Worker worker) noexcept:
    if worker.epoll >= 0:
        close(worker.epoll)
    if worker.wake >= 0:
        close(worker.wake)
    worker.epoll = worker.wake = -1


cdef int go_round(Worker worker) noexcept nogil:
    """Step every pump and send the notifications that are due; returns the number of
    chains that moved, both ways together.
    """
    cdef Route *route
    cdef PumpState *pump
    cdef int moved = 0
    cdef bint tell = False
    cdef int i

    worker.rounds += 1
    for i in range(worker.routes):
        route = &worker.route[i]
        pump = route.pump
        moved += step(pump, BUDGET)
        notify(route)
        tell_room(pump.pool)
        if pump.fault != route.fault:
            route.fault = pump.fault
            if route.err_out >= 0 and pump.fault and pump.attached:
                signal_fd(route.err_out)
            tell = True
        if not pump.draining:
            route.drained = False
        elif not route.drained and is_drained(pump):
            route.drained = True
            tell = True
        if (
            pump.stalled and load64(&pump.pool.wanted)
            and load_int(&pump.pool.may_grow)
        ):
            # The control plane is told once, and sets it again.
            store_int(&pump.pool.may_grow, 0)
            tell = True
        if load_int(&pump.pool.news):
            store_int(&pump.pool.news, 0)
            tell = True
    if tell:
        signal_fd(worker.events)
    if moved:
        worker.moved += moved
        worker.woken = False
        worker.vain_since = worker.vain
        if worker.slept:
            worker.polling.learn(worker.slept)
            worker.slept = 0
    return moved


cdef void notify(Route *route) noexcept nogil:
    """Send the call and the kick that are due, and the news that a page was logged. A
    call may be due after a ring's end.
    """
    if route.log_out >= 0 and route.logged != logged(route.pump):
        route.logged = logged(route.pump)
        signal_fd(route.log_out)
    if route.pump.call_due:
        route.pump.call_due = False
        if route.call_out >= 0:
            signal_fd(route.call_out)
    if route.pump.kick_due:
        route.pump.kick_due = False
        if route.kick_out >= 0:
            signal_fd(route.kick_out)


cdef void idle(Worker worker) noexcept nogil:
    """No chain moved: poll for as long as that pays, then sleep."""
    cdef epoll_event events[MAX_EVENTS]
    cdef uint64_t start = now_ns()
    cdef uint64_t count
    cdef int longest = -1
    cdef int i, n

    if worker.woken:
        # The notification was for a chain that a look had found before. It says
        # nothing about the time to poll: the sleep goes on as the same one.
        worker.woken = False
        worker.vain += 1
        if worker.vain - worker.vain_since > STORM:
            nap(worker)
    elif worker.polling.pays(start, worker.moved) and poll(worker, start):
        return

    for i in range(worker.routes):
        rest(worker.route[i].pump)
        notify(&worker.route[i])
        if worker.route[i].pump.held:
            longest = SLICE_MS
    # The worker arms and then looks for chains; the other sides publish their index and
    # then look if the worker is armed. Without a full fence each could miss the other.
    fence()
    if is_pending(worker) or must_look(worker):
        return
    worker.sleeps += 1
    start = now_ns()
    n = epoll_wait(worker.epoll, events, MAX_EVENTS, longest)
    worker.woken = n > 0
    for i in range(n):
        if events[i].data.u64:
            worker.woken = False    # the control plane woke it
            while read(worker.wake, &count, sizeof(count)) > 0:
                pass
    worker.slept += now_ns() - start


cdef void nap(Worker worker) noexcept nogil:
    """Ignore notifications, which come without end and without a chain, for NAP. A
    pause ends it earlier.
    """
    cdef uint64_t start = now_ns()
    cdef pollfd wake = pollfd(worker.wake, POLLIN, 0)

    wait_for(&wake, 1, NAP)
    worker.slept += now_ns() - start


cdef bint poll(Worker worker, uint64_t start) noexcept nogil:
    """Look for chains until the window is over. False: none came in that time."""
    cdef uint64_t now = start
    cdef bint found = False

    while not found and now - start < worker.polling.window:
        worker.spins += 1
        found = is_pending(worker) or must_look(worker)
        if not found:
            # Runnable threads on this core go first: most often it is the peer that the
            # worker waits for, or that it has just woken.
            sched_yield()
            now = now_ns()
    worker.polled += now - start
    return found


cdef bint is_pending(Worker worker) noexcept nogil:
    """Is a chain pending, or a fault that a look at a ring has found?"""
    cdef PumpState *pump
    cdef int i

    for i in range(worker.routes):
        pump = worker.route[i].pump
        if pending(pump) or pump.fault != worker.route[i].fault:
            return True
    return False


cdef bint must_look(Worker worker) noexcept nogil:
    return load_int(&worker.paused) != 0 or load_int(&worker.stopping) != 0


cdef void stand_still(Worker worker) noexcept nogil:
    pthread_mutex_lock(&worker.mutex)
    set_running(worker, False)
    pthread_cond_broadcast(&worker.changed)
    while worker.paused:
        pthread_cond_wait(&worker.changed, &worker.mutex)
    set_running(worker, True)
    pthread_mutex_unlock(&worker.mutex)


cdef void set_running(Worker worker, bint running) noexcept nogil:
    """Note if the worker runs, in debug builds in its pumps and pools too: see CHECKS.
    """
    cdef PumpState *pump
    cdef int i

    worker.running = running
    if CHECKS:
        for i in range(worker.routes):
            pump = worker.route[i].pump
            pump.share.running = running
            add_int(&pump.pool.running, 1 if running else -1)


cdef bint hold(Worker worker, uint64_t until) noexcept:
    """Ask the worker to stand still and wait until it does. False: not in time."""
    cdef timespec deadline
    cdef uint64_t next_try
    cdef bint running

    with nogil:
        pthread_mutex_lock(&worker.mutex)
        store_int(&worker.paused, worker.paused + 1)
        if worker.running:
            signal_fd(worker.wake)
        while worker.running and now_ns() < until:
            next_try = min(until, now_ns() + <uint64_t> PATIENCE)
            deadline.tv_sec = next_try // 1000000000
            deadline.tv_nsec = next_try % 1000000000
            if pthread_cond_timedwait(&worker.changed, &worker.mutex, &deadline) != 0:
                pthread_kill(worker.thread, SIGURG)
        running = worker.running
        pthread_mutex_unlock(&worker.mutex)
    return not running


cdef void let_go(Worker worker) noexcept nogil:
    pthread_mutex_lock(&worker.mutex)
    store_int(&worker.paused, worker.paused - 1)
    pthread_cond_broadcast(&worker.changed)
    pthread_mutex_unlock(&worker.mutex)


cdef void ignore(int number) noexcept nogil:
    pass


cdef interrupt_by_signal():
    """Let SIGURG, which by default is ignored, interrupt a system call that waits."""
    cdef sigaction_t action

    memset(&action, 0, sizeof(action))
    action.sa_handler = ignore
    sigaction(SIGURG, &action, NULL)


interrupt_by_signal()


cdef void *resized(void *route, size_t count) except NULL:
    cdef void *bigger = realloc(route, count * sizeof(Route))

    if bigger == NULL:
        raise MemoryError  # not reached: no memory
    return bigger
