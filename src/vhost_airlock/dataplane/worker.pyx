# SPDX-License-Identifier: Apache-2.0
"""A thread that runs pumps: epoll, or polling for as long as that pays.

While there is work, the worker goes round its pumps and needs no notification from
anybody, so both sides are left unarmed and send none. When a round moves nothing, it
polls for a while, if that pays (polling.pyx), then arms both sides of every ring, looks
once more (else a chain that came in between would be slept over) and sleeps.

The control plane changes pumps, pool and guest memory only under pause(): the worker
stands still between two rounds then, and has seen the change when it goes on.

A ring of another worker that waits for room in the pool is told by the pool's eventfd,
which all of the pool's workers watch.

Who notifies without end, and for nothing, wakes the worker once a millisecond only:
after a number of such wake-ups without a single chain it is deaf for so long.

Eventfds are registered edge-triggered and never read: each write is an edge. Writing
is another matter: the back shares our kick's open file description and can make it
blocking and full, in which case a kick waits. That stalls this device only; a pause
interrupts it with a signal whose handler does nothing.
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
from vhost_airlock.dataplane.step cimport PumpState, is_drained, pending, rest, step
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

from vhost_airlock.errors import DeadlineExceeded

cdef enum:
    # Chains that a ring may move each way before the next one's turn.
    BUDGET = 256
    MAX_EVENTS = 64
    # Wake-ups in vain, one after the other, that are taken for a storm; and for how
    # many milliseconds the worker then is deaf to notifications.
    STORM = 64
    NAP = 1
    # Nanoseconds after which who got the core is taken to poll on it; and for how long
    # then nobody is given way to.
    TURN = 2_500_000
    RIVALRY = 100_000_000
    # Nanoseconds that a worker has to stand still before it is interrupted.
    PATIENCE = 100_000_000

cdef uint64_t STOP_TIME = 5_000_000_000

cdef struct Route:
    # What the loop needs of a pump, beside its state.
    PumpState *pump
    int kick_out
    int call_out
    int err_out
    # The fault that front and control plane have been told of.
    int fault
    # The control plane has been told.
    bint drained


cdef class Worker:
    """Runs pumps in the thread that calls run().

    `poll_us` is the longest time in microseconds to poll before sleeping; 0: never.
    `events` is an eventfd that it signals when the control plane should look: a pump
    has a new fault, is drained, or wants a larger pool or a lone region.
    """

    cdef pthread_mutex_t mutex
    cdef pthread_cond_t changed
    cdef int paused
    """How many pauses are wanted; read by the loop without the mutex."""
    cdef int stopping
    cdef bint running
    cdef pthread_t thread
    cdef int epoll
    cdef int wake
    cdef int events
    cdef Polling polling
    cdef uint64_t moved
    """Chains, each way."""
    cdef uint64_t sleeps
    cdef uint64_t rounds
    cdef uint64_t spins
    cdef uint64_t polled
    cdef uint64_t vain
    cdef uint64_t vain_since
    """Of these, how many there were when a chain last moved."""
    cdef bint woken
    """It was notified, and has moved nothing since."""
    cdef uint64_t slept
    """For so long, in ns, since something moved the last time."""
    cdef uint64_t rivalry
    """Until then, by the clock, somebody on our core is taken to poll."""
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
        pthread_mutex_lock(&self.mutex)
        self.thread = pthread_self()
        set_running(self, True)
        pthread_mutex_unlock(&self.mutex)
        with nogil:
            while True:
                if load_int(&self.paused):
                    stand_still(self)
                if load_int(&self.stopping):
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
        """Give back its descriptors, when run() has returned or never was called."""
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
        """Run this pump from now on; call it again when its descriptors changed.

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
        if route.err_out == pump.err_out:
            fault = route.fault     # else it is told at the new descriptor
        route[0] = Route(
            &pump.state, pump.kick_out, pump.call_out, pump.err_out, fault, False
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
        """Wake up for this eventfd. ValueError when it is of no kind to wait for."""
        self._watch(fd, <uint32_t> EPOLLIN | <uint32_t> EPOLLET)

    def unwatch(self, int fd):
        """Stop that, before the descriptor is closed."""
        if epoll_ctl(self.epoll, EPOLL_CTL_DEL, fd, NULL) != 0 and errno != ENOENT:
            raise OSError(errno, f"cannot stop to wait for descriptor {fd}")

    def counters(self):
        """What the loop has done, by name; times in ns. Any thread may ask."""
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
    """Give every pump its turn and send what is due; how many chains moved."""
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
        if pump.call_due:
            pump.call_due = False
            if route.call_out >= 0:
                signal_fd(route.call_out)
        if pump.kick_due:
            pump.kick_due = False
            if route.kick_out >= 0:
                signal_fd(route.kick_out)
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
            # Told once; the control plane sets it again.
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


cdef void idle(Worker worker) noexcept nogil:
    """Nothing moved: poll for as long as that pays, then sleep."""
    cdef epoll_event events[MAX_EVENTS]
    cdef uint64_t start = now_ns()
    cdef uint64_t count
    cdef int i, n

    if worker.woken:
        # By a notification of something that we had found by looking. That says
        # nothing of how long to poll: what we sleep is still the same sleep.
        worker.woken = False
        worker.vain += 1
        if worker.vain - worker.vain_since > STORM:
            nap(worker)
    elif worker.polling.pays(start, worker.moved):
        if poll(worker, start):
            return
    elif give_way(worker, start):
        return

    for i in range(worker.routes):
        rest(worker.route[i].pump)
    # We arm and then look; the others move their index and then look whether we are
    # armed. Without a full fence both could miss the other.
    fence()
    if is_pending(worker) or must_look(worker):
        return
    worker.sleeps += 1
    start = now_ns()
    n = epoll_wait(worker.epoll, events, MAX_EVENTS, -1)
    worker.woken = n > 0
    for i in range(n):
        if events[i].data.u64:
            worker.woken = False    # by the control plane
            while read(worker.wake, &count, sizeof(count)) > 0:
                pass
    worker.slept += now_ns() - start


cdef void nap(Worker worker) noexcept nogil:
    """Somebody notifies without end, for nothing: let it wait, unlike a pause."""
    cdef uint64_t start = now_ns()
    cdef pollfd wake = pollfd(worker.wake, POLLIN, 0)

    wait_for(&wake, 1, NAP)
    worker.slept += now_ns() - start


cdef bint poll(Worker worker, uint64_t start) noexcept nogil:
    """Look for work as long as the window is. False: there was none in that time."""
    cdef uint64_t now = start
    cdef bint found = False

    while not found and now - start < worker.polling.window:
        worker.spins += 1
        found = is_pending(worker) or must_look(worker)
        if not found:
            # Whoever is runnable on this core goes first: most often it is the one
            # that we wait for, or that we have just woken.
            sched_yield()
            now = now_ns()
    worker.polled += now - start
    return found


cdef bint give_way(Worker worker, uint64_t start) noexcept nogil:
    """Let who is runnable on this core go first: that may spare a sleep. True: it did.

    But who polls there keeps the core for as long as it may: it is better asked for a
    notification, which wakes us sooner.
    """
    cdef uint64_t now

    if start < worker.rivalry:
        return False
    sched_yield()
    now = now_ns()
    if now - start > TURN:
        worker.rivalry = now + RIVALRY
    return is_pending(worker)


cdef bint is_pending(Worker worker) noexcept nogil:
    """Is there anything for a round to do? A look at a ring may have found a fault."""
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
    """Note whether the worker runs, in its pumps and their pools too: see CHECKS."""
    cdef PumpState *pump
    cdef int i

    worker.running = running
    if CHECKS:
        for i in range(worker.routes):
            pump = worker.route[i].pump
            pump.share.running = running
            add_int(&pump.pool.running, 1 if running else -1)


cdef bint hold(Worker worker, uint64_t until) noexcept:
    """Ask the worker to stand still and wait for it. False: it did not in time."""
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
    """Let SIGURG, which otherwise does nothing, end a system call that waits."""
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
