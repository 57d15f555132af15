# SPDX-License-Identifier: Apache-2.0
"""Back-ends of the test's own, for real programs to connect to."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.support.backs import RecordedBack, ScriptedBack
from vhost_airlock.process.sockets import Listener


@contextmanager
def serving(back: RecordedBack, path: Path) -> Iterator[None]:
    """Let a back-end serve all who connect to a path, one after the other.

    They must have hung up at the end.
    """

    def accept() -> None:
        while True:
            try:
                sock = listener.accept()
            except OSError:  # it is shut down
                return
            back.join()
            back.start(sock)

    thread = threading.Thread(target=accept, name="accept")
    with closing(Listener(str(path))) as listener:
        thread.start()
        try:
            yield
        finally:
            listener.socket.shutdown(socket.SHUT_RDWR)
            thread.join()
            back.close()


def hang_up(back: ScriptedBack) -> None:
    """Let it lose its front-end, whatever it is doing."""
    assert back.channel is not None
    with socket.socket(fileno=os.dup(back.channel.fileno())) as sock:
        sock.shutdown(socket.SHUT_RDWR)
