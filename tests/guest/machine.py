"""A virtual machine under QEMU's own emulation, with one vhost-user-blk disk."""

from pathlib import Path
from subprocess import PIPE

from tests.guest.initramfs import initramfs, kernel
from tests.real.processes import Process
from tests.real.programs import Programs

MEMORY = "256M"


class Guest(Process):
    """It runs tests/guest/init; its console is the process's input and output."""

    def __init__(
        self,
        programs: Programs,
        folder: Path,
        front: Path,
        *,
        payload: bytes,
        cpus: int,
        queue_size: int,
        boot_words: str = "",
    ) -> None:
        archive = folder / "initramfs"
        archive.write_bytes(initramfs(programs, {"/payload": payload}))
        words = f"console=ttyS0 quiet panic=0 tsc=unstable {boot_words}"
        argv = programs(
            "qemu-system-x86_64",
            *("-M", "q35,accel=tcg,memory-backend=ram", "-cpu", "max"),
            *("-smp", str(cpus), "-m", MEMORY),
            *("-object", f"memory-backend-memfd,id=ram,size={MEMORY},share=on"),
            *("-nodefaults", "-display", "none", "-serial", "stdio"),
            *("-kernel", str(kernel(programs)), "-initrd", str(archive)),
            *("-append", words),
            *("-chardev", f"socket,id=front,path={front}"),
            *("-device", f"vhost-user-blk-pci,chardev=front,queue-size={queue_size}"),
        )
        super().__init__(argv, folder / "guest.log", stdin=PIPE)

    def said(self) -> list[str]:
        """What its init has told us so far."""
        lines = self.output().replace("\r", "").splitlines()
        assert not any("Kernel panic" in line for line in lines), self.describe()
        said = [line.removeprefix("GUEST ") for line in lines if line[:6] == "GUEST "]
        assert not any(line.startswith("failed") for line in said), self.describe()
        return said

    def wait_for(self, line: str, timeout: float) -> None:
        self.wait_until(lambda: line in self.said(), timeout)

    def answer(self) -> None:
        """Let it go on after 'ready'."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(b"\n")
        self.popen.stdin.close()
