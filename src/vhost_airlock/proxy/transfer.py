# SPDX-License-Identifier: Apache-2.0
"""The transfer of a device's internal state, between two pipes (for migration).

Neither side gets the other's descriptor: the back one end of a pipe of ours, and a
thread carries the bytes over, up to a limit. The front has to see that its pipe ends
when the state does, and whether all of it came.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import threading

from ..errors import PeerRefused, ProtocolError, RequestRefused
from ..vhost.fds import Fd, close_all, eventfd, notify
from ..vhost.frontend import Frontend
from ..vhost.wire import DeviceState, StateDirection

LIMIT = 256 << 20
"""The most bytes of state: front-ends read all of it into their memory."""
CHUNK = 1 << 16


class Transfer:
    """Carries bytes from one descriptor to another until the first one ends.

    It owns both and closes them as soon as it's over. ProtocolError if one is neither
    a pipe nor a socket, since reading anything else may never end; but for `ours`,
    which is a file of our own.
    """

    def __init__(
        self, source: Fd, sink: Fd, limit: int = LIMIT, *, ours: Fd | None = None
    ) -> None:
        self._source = source
        self._sink = sink
        self._left = limit
        self._stop = eventfd()
        self._error = "it was cut off"
        for fd in (source, sink):
            mode = os.fstat(fd.fileno()).st_mode
            if fd is not ours and not stat.S_ISFIFO(mode) and not stat.S_ISSOCK(mode):
                close_all((source, sink, self._stop))
                raise ProtocolError("the device's state comes in no pipe and no socket")
        self._thread = threading.Thread(target=self._run, name="airlock-transfer")
        self._thread.start()

    def finish(self, timeout: float) -> None:
        """Wait for the end, in seconds. RequestRefused if that was not a good one."""
        self._thread.join(timeout)
        self.close()
        if self._error:
            raise RequestRefused(f"the device's state did not come: {self._error}")

    def close(self) -> None:
        """Stop, wherever it is."""
        if not self._stop.closed:
            notify(self._stop)
            self._thread.join()
            self._stop.close()

    def _run(self) -> None:
        try:
            while data := self._read():
                self._left -= len(data)
                if self._left < 0:
                    self._error = "there is too much of it"
                    return
                self._write(data)
            self._error = ""
        except OSError as error:
            self._error = error.strerror or str(error)
        finally:
            self._source.close()
            self._sink.close()

    def _read(self) -> bytes:
        while True:
            self._wait(self._source, select.POLLIN)
            try:
                return _read_some(self._source)
            except BlockingIOError:
                continue

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            self._wait(self._sink, select.POLLOUT)
            try:
                rest = rest[_write_some(self._sink, rest) :]
            except BlockingIOError:
                continue

    def _wait(self, fd: Fd, event: int) -> None:
        poll = select.poll()
        poll.register(fd.fileno(), event)
        poll.register(self._stop.fileno(), select.POLLIN)
        if any(number == self._stop.fileno() for number, _ in poll.poll()):
            raise OSError("it was cut off")


class StateTransfer:
    """The transfer of one device, which has at most one at a time.

    The back may refuse (a file of virtiofsd's has no path any more, or none at the
    destination). Then it goes on as it was, for the guest does too if it is the source.
    """

    def __init__(self) -> None:
        self._transfer: Transfer | None = None

    def begin(self, state: DeviceState, front: Fd, back: Frontend) -> None:
        """Begin to carry the state between the front's pipe and one of ours."""
        with front:
            self.close()
            kept = _begin(state, back)
            ends = (kept, Fd(front.release()))
            saves = state.direction == StateDirection.SAVE
            self._transfer = Transfer(*(ends if saves else reversed(ends)))

    @property
    def active(self) -> bool:
        """Has one begun, and was not checked yet?"""
        return self._transfer is not None

    def check(self, timeout: float, back: Frontend) -> None:
        """Wait for the end of the transfer, and let the back say if all of it came."""
        transfer, self._transfer = self._transfer, None
        if transfer is None:
            raise RequestRefused("CHECK_DEVICE_STATE: nothing was transferred")
        transfer.finish(timeout)
        _check(back)

    def close(self) -> None:
        """Stop it, wherever it is."""
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None


def save_state(back: Frontend, timeout: float) -> Fd:
    """Return a file of ours with a back's whole state; its rings are stopped.

    RequestRefused if it did not come within `timeout` seconds.
    """
    with Fd(os.memfd_create("vhost-airlock-state", os.MFD_CLOEXEC)) as file:
        source = _begin(DeviceState(StateDirection.SAVE, 0), back)
        sink = Fd(os.dup(file.fileno()))
        Transfer(source, sink, ours=sink).finish(timeout)
        _check(back)
        return Fd(file.release())


def load_state(back: Frontend, file: Fd, timeout: float) -> None:
    """Let a back that no ring was started at have the state in a file of ours.

    RequestRefused if it has not taken all of it within `timeout` seconds.
    """
    sink = _begin(DeviceState(StateDirection.LOAD, 0), back)
    source = Fd(os.dup(file.fileno()))
    os.lseek(source.fileno(), 0, os.SEEK_SET)
    Transfer(source, sink, ours=source).finish(timeout)
    _check(back)


def _begin(state: DeviceState, back: Frontend) -> Fd:
    """Let a back begin to save or to load; returns our end of the pipe to it."""
    out, into = map(Fd, os.pipe2(os.O_CLOEXEC))
    saves = state.direction == StateDirection.SAVE
    ours, theirs = (out, into) if saves else (into, out)
    with ours, theirs:
        try:
            other = back.set_device_state_fd(state.direction, theirs, state.phase)
        except PeerRefused:
            raise RequestRefused("SET_DEVICE_STATE_FD: the back-end refuses") from None
        return other or Fd(ours.release())


def _check(back: Frontend) -> None:
    try:
        back.check_device_state()
    except PeerRefused:
        raise RequestRefused(
            "CHECK_DEVICE_STATE: the back-end says that it went wrong"
        ) from None


# O_NONBLOCK is no help: it belongs to all that have the descriptor, the back too.


def _read_some(fd: Fd) -> bytes:
    """Read the bytes that are there, without waiting; none at the end."""
    data = bytearray(CHUNK)
    try:
        count = os.preadv(fd.fileno(), [data], -1, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return os.read(fd.fileno(), CHUNK)
    return bytes(data[:count])


def _write_some(fd: Fd, data: memoryview) -> int:
    """Write as many bytes as there is room for, without waiting."""
    try:
        return os.pwritev(fd.fileno(), [data], -1, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    # Linux before 6.4 can't do that with a pipe. So much fits into one that is ready.
    return os.write(fd.fileno(), data[: select.PIPE_BUF])
