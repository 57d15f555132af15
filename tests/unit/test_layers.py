"""Imports point down only: what is allowed, against every import and cimport line."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "vhost_airlock"
SOURCE = Path(__file__).parents[2] / "src" / PACKAGE

LAYERS = """
    __main__
    cli
    demo  bench  watch
    demo_report  bench_report
    daemon
    session  connector  stats  sandbox
    handlers
    device
    rings
    back
    isolated
    memory  state  starter  workers  transfer  devices  sandbox_calls  sandbox_files
    config

    attack.command
    attack.back_judge
    attack.front_judge  attack.report
    attack.back_messages  attack.back_rings
    attack.guest_chains  attack.guest_requests  attack.guest_races  attack.vmm
    attack.back_scene  attack.guest_scene  attack.driving  attack.program
    attack.catalogue  attack.__init__

    peers.__init__
    peers.workload  peers.blk_load
    peers.blk_process  peers.guest
    peers.blk
    peers.server  peers.guest_queue
    peers.vring  peers.ram
    peers.device  peers.driver  peers.disk  peers.memory  peers.events  peers.scan
    peers.load
    peers.ring

    vhost.__init__
    vhost.backend  vhost.frontend       dataplane.worker
    vhost.channel  vhost.rules          dataplane.pump
    vhost.wire  vhost.fds               dataplane.guest_split  dataplane.shadow_split
                                        dataplane.bounce
                                        dataplane.guest  dataplane.shadow
                                        dataplane.pool  dataplane.regions
                                        dataplane.mapping  dataplane.guard
                                        dataplane.copying  dataplane.polling
                                        dataplane.layout  dataplane.sys
    sockets  signals  arguments
    errors  __init__  dataplane.__init__
"""
"""A module may import what stands on a line below its own."""

COLUMNS = {
    "attack": {
        *("attack", "peers", "vhost"),
        *("arguments", "sockets", "signals", "errors"),
    },
    "vhost": {"vhost", "errors"},
    "dataplane": {"dataplane", "errors"},
    "peers": {"peers", "vhost", "sockets", "errors"},
}
"""Of the packages, each may import only from these."""

WORDS = {"dataplane.layout", "dataplane.sys"}
"""What the compiled modules of all packages share: declarations, and no code."""

ABOVE_PEERS = {"attack", "demo", "demo_report", "bench", "bench_report", "peers"}
"""Who may import peers: the proxy itself has no use for them."""

LEVEL = {
    module: level
    for level, line in enumerate(LAYERS.splitlines())
    for module in line.split()
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


FILES = sorted(
    path for kind in ("py", "pyx", "pxd") for path in SOURCE.rglob(f"*.{kind}")
)
MODULES = {module_of(path) for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, as they are called in LAYERS."""
    parents = [PACKAGE, *path.relative_to(SOURCE).parts[:-1]]
    for base, names in statements(path):
        dots = len(base) - len(base.lstrip("."))
        above = parents[: len(parents) - dots + 1] if dots else []
        whole = ".".join([*above, base[dots:]]).rstrip(".")
        if whole.split(".")[0] != PACKAGE:
            continue
        for name in names:
            module = f"{whole}.{name}".removeprefix(f"{PACKAGE}.")
            package = module.rpartition(".")[0]
            candidates = (module, package, f"{package}.__init__".lstrip("."))
            yield next(each for each in candidates if each in MODULES)


def statements(path: Path) -> Iterator[tuple[str, list[str]]]:
    """What each import statement imports from, and the names."""
    text = path.read_text()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                base = "." * node.level + (node.module or "")
                yield base, [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                yield from (split(alias.name) for alias in node.names)
    else:
        several = r"^\s*from +(\S+) +c?import +(\(.*?\)|.*?$)"
        for base, names in re.findall(several, text, re.M | re.S):
            yield base, re.findall(r"(\w+)(?: +as +\w+)?\s*(?:,|\)|$)", names)
        for module in re.findall(r"^\s*c?import +([\w.]+)", text, re.M):
            yield split(module)


def split(module: str) -> tuple[str, list[str]]:
    base, _, name = module.rpartition(".")
    return base, [name]


def test_every_module_has_its_place():
    assert set(LEVEL) == MODULES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path):
    module = module_of(path)
    column = module.split(".")[0]
    for target in imports(path):
        if target == module:
            continue  # a .pyx and its own .pxd
        assert LEVEL[target] > LEVEL[module], f"{module} imports {target}"
        top = target.split(".")[0]
        allowed = top in COLUMNS.get(column, {top}) or target in WORDS
        assert allowed, f"{module} imports {target}"
        assert top != "peers" or column in ABOVE_PEERS, f"{module} imports {target}"


def test_imports_are_found():
    """The test of the test: one of each way to import is seen."""
    pump = set(imports(SOURCE / "dataplane" / "pump.pyx"))
    assert {"dataplane.shadow", "dataplane.guest_split", "dataplane.layout"} <= pump
    assert "errors" in set(imports(SOURCE / "dataplane" / "worker.pyx"))
    assert "vhost.wire" in set(imports(SOURCE / "vhost" / "__init__.py"))
    assert {"demo", "dataplane.pump"} <= set(imports(SOURCE / "cli.py"))
