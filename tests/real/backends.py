# SPDX-License-Identifier: Apache-2.0
"""Back-end programs for other devices than disks. Each is ready when it is yielded."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.real.network import Network
from tests.real.processes import Process, listening
from tests.real.programs import Programs


@contextmanager
def backend(argv: list[str], path: Path) -> Iterator[Process]:
    """A program that listens at `path`."""
    with Process(argv, path.with_suffix(".backend.log")) as process:
        process.wait_until(lambda: listening(path, process.pid))
        yield process


def virtiofsd_command(programs: Programs, share: Path, *options: str) -> list[str]:
    """It lacks the socket. The sandbox is that of tools/in-real-root."""
    program = programs.find("virtiofsd")
    return programs(program, f"--shared-dir={share}", "--sandbox=none", *options)


@contextmanager
def virtiofsd(
    programs: Programs, share: Path, path: Path, *options: str
) -> Iterator[Process]:
    """It ends by itself when its connection ends."""
    command = virtiofsd_command(programs, share, f"--socket-path={path}", *options)
    with backend(command, path) as process:
        yield process
        assert process.wait(timeout=10) == 0, process.describe()


@contextmanager
def passt(
    programs: Programs, network: Network, path: Path, *options: str
) -> Iterator[Process]:
    """The guest's way into a network: passt is its DHCP server, router, and all."""
    argv = programs(programs.find("passt"), "--vhost-user", "--foreground")
    with ExitStack() as stack:
        with network.entered():
            command = [*argv, f"--socket={path}", *options]
            process = stack.enter_context(backend(command, path))
        yield process


@contextmanager
def vhost_device_vsock(
    programs: Programs, path: Path, host: Path, *options: str
) -> Iterator[Process]:
    """Port N of the host is the Unix socket `host`_N; guests are called at `host`."""
    program = programs.find("vhost-device-vsock")
    command = programs(program, f"--socket={path}", f"--uds-path={host}", *options)
    with backend(command, path) as process:
        yield process
        assert not process.ended(), process.describe()
