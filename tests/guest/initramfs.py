"""Makes the initramfs of a test guest out of a Debian's programs and kernel modules."""

import lzma
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.real.programs import Programs

INIT = Path(__file__).with_name("init")
MODULES = ("virtio_pci", "virtio_blk", "ext4")
"""What the guest needs; a module that is not there is built into the kernel."""
TOOLS = ("/sbin/mke2fs", "/sbin/e2fsck", "/sbin/sfdisk")


def kernel(programs: Programs) -> Path:
    """The kernel that tools/real-root has unpacked, as the programs see it."""
    folder = programs.path("/kernel")
    found = [*folder.glob("usr/lib/modules/*/vmlinuz"), *folder.glob("boot/vmlinuz-*")]
    return Path("/kernel") / max(found).relative_to(folder)


def initramfs(programs: Programs, files: dict[str, bytes]) -> bytes:
    """An archive of our init, busybox, the tools, the modules, and these files."""
    content = {"/init": INIT.read_bytes(), **files}
    content["/bin/busybox"] = programs.path("/bin/busybox").read_bytes()
    for path in [*TOOLS, *_libraries(programs)]:
        name = f"/tools/{Path(path).name}" if path in TOOLS else path
        content[name] = programs.path(path).read_bytes()
    modules = dict(_modules(programs.path("/kernel")))
    content |= {f"/modules/{name}": code for name, code in modules.items()}
    content["/modules/order"] = "\n".join(modules).encode()
    return _archive(content)


def _libraries(programs: Programs) -> set[str]:
    said = subprocess.run(
        programs("ldd", *TOOLS), check=True, capture_output=True, text=True
    )
    return set(re.findall(r"(/\S+) \(0x", said.stdout))


def _modules(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The modules and all that they depend on, which comes first."""
    files = {
        path.name.split(".")[0].replace("-", "_"): path
        for path in folder.rglob("*.ko*")
    }
    done = set()

    def visit(name: str) -> Iterator[tuple[str, bytes]]:
        if name in done or name not in files:
            return
        done.add(name)
        code = files[name].read_bytes()
        if files[name].suffix == ".xz":
            code = lzma.decompress(code)
        depends = re.search(rb"\0depends=([^\0]*)\0", code)
        for other in depends[1].decode().split(",") if depends else []:
            yield from visit(other)
        yield f"{name}.ko", code

    for name in MODULES:
        yield from visit(name)


def _archive(content: dict[str, bytes]) -> bytes:
    """A cpio archive in the format that Linux unpacks ("newc")."""
    paths = [Path(path) for path in content]
    folders = {str(up) for path in paths for up in path.parents} - {"/"}
    folders |= {"/dev", "/proc", "/sys", "/tmp", "/mnt"}
    entries = [(path, 0o040755, b"") for path in sorted(folders)]
    entries += [(path, 0o100755, data) for path, data in content.items()]
    entries.append(("/TRAILER!!!", 0, b""))
    parts = []
    for number, (path, mode, data) in enumerate(entries):
        name = path[1:].encode() + b"\0"
        numbers = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % value for value in numbers) + name
        parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]
    return b"".join(parts)
