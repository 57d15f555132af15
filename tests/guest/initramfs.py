# SPDX-License-Identifier: Apache-2.0
"""Makes the initramfs of a test guest out of a Debian's programs and kernel modules.

Besides busybox it has Python, with just the modules that the agent and the functions
beside it (inside/) import.
"""

import functools
import lzma
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.real.programs import PROJECT, Programs

HERE = Path(__file__).parent
INSIDE = {str(path.relative_to(PROJECT)): path for path in HERE.glob("inside/*.py")}
LIST_PYTHON = """
import importlib.util, os, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    importlib.import_module(name)
print(os.path.realpath(sys.executable))
for module in list(sys.modules.values()):
    path = getattr(module, "__file__", None) or ""
    if path.startswith("/usr/"):
        print(path, importlib.util.cache_from_source(path), sep="\\n")
"""


@dataclass(frozen=True)
class File:
    """A file for the archive. Python compares a module's time with its cache's."""

    data: bytes
    time: int = 0


def kernel(programs: Programs) -> Path:
    """The kernel that tools/debian-root has unpacked, as the programs see it."""
    return _found(programs, "vmlinux") or bootable_kernel(programs)


def bootable_kernel(programs: Programs) -> Path:
    """The same, for any boot loader: it unpacks itself, which takes a guest 3 s."""
    found = _found(programs, "usr/lib/modules/*/vmlinuz", "boot/vmlinuz-*")
    assert found
    return found


def _found(programs: Programs, *patterns: str) -> Path | None:
    folder = programs.path("/kernel")
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    return Path("/kernel") / max(found).relative_to(folder) if found else None


def plain_initramfs(programs: Programs, init: bytes, modules: Iterable[str]) -> bytes:
    """An archive of this init, busybox and these kernel modules."""
    content = {"/init": File(init), "/bin/busybox": _file(programs, "/bin/busybox")}
    return _archive(content | _loaded(programs, modules))


def initramfs(
    programs: Programs, modules: Iterable[str], tools: Iterable[str]
) -> bytes:
    """An archive of our init, these kernel modules, and these programs in /tools."""
    content = dict(_base(programs))
    content |= {f"/{name}": File(path.read_bytes()) for name, path in INSIDE.items()}
    content["/init"] = File((HERE / "init").read_bytes())
    for tool in tools:
        content[f"/tools/{Path(tool).name}"] = _file(programs, tool)
    content |= {path: _file(programs, path) for path in _libraries(programs, *tools)}
    return _archive(content | _loaded(programs, modules))


def _loaded(programs: Programs, modules: Iterable[str]) -> dict[str, File]:
    """The modules, and the order in which an init has to load them."""
    loaded: dict[str, bytes] = {}
    for module in modules:
        loaded |= _modules(programs, module)
    content = {f"/modules/{name}": File(code) for name, code in loaded.items()}
    content["/modules/order"] = File("\n".join(loaded).encode())
    return content


def _file(programs: Programs, name: str) -> File:
    path = programs.path(name)
    return File(path.read_bytes(), int(path.stat().st_mtime))


@functools.cache
def _base(programs: Programs) -> dict[str, File]:
    """Busybox and Python."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        for name, path in INSIDE.items():
            copy = Path(folder, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        names = [name.removesuffix(".py").replace("/", ".") for name in INSIDE]
        said = subprocess.run(
            programs("python3", "-S", "-c", LIST_PYTHON, folder, "traceback", *names),
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    python, *found = said.stdout.splitlines()
    files = [name for name in found if programs.path(name).exists()]
    binaries = [python, *(name for name in files if ".so" in Path(name).suffixes)]
    files += _libraries(programs, *binaries)
    content = {name: _file(programs, name) for name in files}
    content["/bin/busybox"] = _file(programs, "/bin/busybox")
    content["/usr/bin/python3"] = _file(programs, python)
    return content


@functools.cache
def _libraries(programs: Programs, *binaries: str) -> list[str]:
    """The shared libraries that these need, and what loads them."""
    if not binaries:
        return []
    said = subprocess.run(
        programs("ldd", *binaries), check=True, stdout=subprocess.PIPE, text=True
    )
    return sorted(set(re.findall(r"(/\S+) \(0x", said.stdout)))


@functools.cache
def _modules(programs: Programs, wanted: str) -> dict[str, bytes]:
    """The module and all that it depends on, which comes first.

    A module that is not there is built into the kernel.
    """
    files = {
        path.name.split(".")[0].replace("-", "_"): path
        for path in programs.path("/kernel").rglob("*.ko*")
    }

    def visit(name: str) -> Iterator[tuple[str, bytes]]:
        if name not in files:
            return
        code = files[name].read_bytes()
        if files[name].suffix == ".xz":
            code = lzma.decompress(code)
        depends = re.search(rb"\0depends=([^\0]*)\0", code)
        for other in depends[1].decode().split(",") if depends else []:
            yield from visit(other)
        yield f"{name}.ko", code

    return dict(visit(wanted))


def _archive(content: dict[str, File]) -> bytes:
    """A cpio archive in the format that Linux unpacks ("newc")."""
    paths = [Path(path) for path in content]
    folders = {str(up) for path in paths for up in path.parents} - {"/"}
    folders |= {"/dev", "/proc", "/sys", "/tmp", "/mnt"}
    entries = [(path, 0o040755, File(b"")) for path in sorted(folders)]
    entries += [(path, 0o100755, file) for path, file in content.items()]
    entries.append(("/TRAILER!!!", 0, File(b"")))
    parts = []
    for number, (path, mode, file) in enumerate(entries):
        name = path[1:].encode() + b"\0"
        size = len(file.data)
        numbers = (number, mode, 0, 0, 1, file.time, size, 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % value for value in numbers) + name
        parts += [head, bytes(-len(head) % 4), file.data, bytes(-size % 4)]
    return b"".join(parts)
