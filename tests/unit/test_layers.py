# SPDX-License-Identifier: Apache-2.0
"""Imports point down only: what is allowed, against every import and cimport line."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "vhost_airlock"
SOURCE = Path(__file__).parents[2] / "src" / PACKAGE

LAYERS = """
    __main__
    cli.emulator  cli.virtiofsd
    cli.main
    cli.qemu
    cli.run  cli.demo  cli.bench  cli.stats  cli.attack  cli.qemu_plan  cli.keeper
    cli.swap
    cli.demo_report  cli.bench_report  cli.qemu_options  cli.stats_table  cli.metrics
    cli.stats_document  cli.capabilities
    cli.arguments  cli.__init__

    attack.back_judge
    attack.front_judge  attack.report
    attack.back_messages  attack.back_rings  attack.vmm_log
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

    process.daemon
    process.orders  process.back_source
    process.connector  process.fronts  process.stats_server
    process.broker
    process.control
    process.reach
    process.target
    process.program
    process.config  process.manager  process.command
    process.sockets  process.signals  process.log  process.users  process.__init__

    sandbox.enter
    sandbox.syscalls  sandbox.files  sandbox.__init__

    proxy.session
    proxy.handlers  proxy.swap
    proxy.device
    proxy.rings
    proxy.trial
    proxy.ring  proxy.relay  proxy.pool_policy
    proxy.coupling
    proxy.back_side
    proxy.drain       proxy.known  proxy.recovery
    proxy.back  proxy.inflight  proxy.dirty_log
    proxy.isolated
    proxy.front_memory  proxy.state  proxy.workers  proxy.transfer  proxy.deadline
    proxy.front_requests  proxy.ration  proxy.device_types
    proxy.config  proxy.__init__
    proxy.features  proxy.caches

    vhost.__init__
    vhost.backend  vhost.frontend       dataplane.worker
    vhost.channel                       dataplane.pump
                                        dataplane.recorded
    vhost.message  vhost.rules          dataplane.step
    vhost.wire  vhost.fds               dataplane.guest_split  dataplane.shadow_split
                                        dataplane.bounce
                                        dataplane.guest  dataplane.shadow
                                        dataplane.pool  dataplane.regions
                                        dataplane.dirty_log
                                        dataplane.mapping  dataplane.guard
                                        dataplane.copying  dataplane.polling
                                        dataplane.inflight  dataplane.faults
                                        dataplane.suspects  dataplane.window
                                        dataplane.layout  dataplane.sys
    errors  log  record  __init__  dataplane.__init__
"""
"""A module may import what stands on a line below its own."""

TRUSTED = {
    "process",
    "sandbox",
    "proxy",
    "vhost",
    "dataplane",
    "errors",
    "log",
    "record",
}
"""Packages of the processes that run with a guest's memory, or beside it."""

MAY_IMPORT = {
    "__main__": {"cli"},
    "cli": {"cli", "attack", "peers", *TRUSTED},
    "attack": {"attack", "peers", "process", "vhost", "errors"},
    "peers": {"peers", "process", "vhost", "errors", "log"},
    "process": TRUSTED,
    "sandbox": {"sandbox", "vhost", "errors", "log", "record"},
    "proxy": {"proxy", "vhost", "dataplane", "errors", "log", "record"},
    "vhost": {"vhost", "errors", "log", "record"},
    "dataplane": {"dataplane", "errors"},
}
"""Each package, and the packages that its modules may import."""

WORDS = {"dataplane.layout", "dataplane.sys", "__init__"}
"""Files that all packages share: declarations for compiled modules, and the version."""

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


def test_imports_point_down():
    wrong = [
        f"{module_of(path)} imports {target}"
        for path in FILES
        for target in imports(path)
        if not allowed(module_of(path), target)
    ]
    assert not wrong


def allowed(module: str, target: str) -> bool:
    """May `module` import `target`?"""
    if target == module:
        return True  # a .pyx and its own .pxd
    package, top = module.split(".")[0], target.split(".")[0]
    in_reach = top in MAY_IMPORT.get(package, {top}) or target in WORDS
    return in_reach and LEVEL[target] > LEVEL[module]


def test_running_an_airlock_loads_the_trusted_packages_alone():
    ours = [name for name in loaded_by_run() if name.startswith("vhost_airlock.")]
    assert {name.split(".")[1] for name in ours} == {"cli", *TRUSTED}


def test_running_an_airlock_loads_nothing_that_takes_long():
    """Each of these would take milliseconds of its start, and hundreds of KiB."""
    slow = {"dataclasses", "inspect", "logging", "subprocess", "tempfile", "traceback"}
    assert not slow & loaded_by_run()


def loaded_by_run() -> set[str]:
    code = "import sys; from vhost_airlock.cli.main import parse; parse(['run'])"
    code += "; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_each_source_file_names_its_licence():
    named = "# SPDX-License-Identifier: Apache-2.0"
    sources = [
        path
        for folder in ("src", "tests", "bench", "fuzz", "tools")
        for path in (SOURCE.parents[1] / folder).rglob("*")
        if path.suffix in {".py", ".pyx", ".pxd", ".pyi"} or path.parent.name == "tools"
    ]
    assert len(sources) > 200
    without = [
        path
        for path in sources
        if path.is_file() and named not in path.read_text().splitlines()[:2]
    ]
    assert not without


def test_no_file_names_the_host_of_a_registry():
    """Downloads come from the sources in this machine's settings of apt and pip."""
    host = re.compile(
        rb"\b(debian|ubuntu|pypi|pythonhosted|crates|npmjs|docker|ghcr|quay|golang)"
        rb"\.(org|com|io)\b"
    )
    root = SOURCE.parents[1]
    made = {".git", ".hypothesis", ".real", ".venv", "build", "dist"}
    files = [
        path
        for top in root.iterdir()
        if top.name not in made and not top.name.endswith("_cache")
        for path in [top, *top.rglob("*")]
        if path.is_file() and path.suffix not in {".so", ".pyc"}
    ]
    assert root / "tools" / "real-root" in files
    assert [path for path in files if host.search(path.read_bytes())] == []


def test_imports_are_found():
    """The test of the test: one of each way to import is seen."""
    pump = set(imports(SOURCE / "dataplane" / "pump.pyx"))
    assert {"dataplane.shadow", "dataplane.guest_split", "dataplane.layout"} <= pump
    assert "errors" in set(imports(SOURCE / "dataplane" / "worker.pyx"))
    assert "vhost.wire" in set(imports(SOURCE / "vhost" / "__init__.py"))
    assert {"process.daemon", "dataplane.pump"} <= set(
        imports(SOURCE / "cli" / "run.py")
    )
