# SPDX-License-Identifier: Apache-2.0
"""The documents against the code: commands, examples, tables, links and names."""

import argparse
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.real.processes import Process, listening
from tests.support.airlock import Airlock
from tests.support.sessions import small_guest
from tests.support.talk import Talked, talking_back, talking_guest
from vhost_airlock.cli import main as cli
from vhost_airlock.cli import qemu, run
from vhost_airlock.cli.attack import GROUPS
from vhost_airlock.cli.metrics import OF_COUNTERS
from vhost_airlock.dataplane.pool import Pool
from vhost_airlock.dataplane.pump import FAULTS, POLICIES, Pump
from vhost_airlock.dataplane.regions import GuestMemory
from vhost_airlock.dataplane.worker import Worker
from vhost_airlock.proxy.device_types import TYPES
from vhost_airlock.proxy.features import (
    DEVICE,
    back_features,
    back_protocol,
    front_offer,
    front_protocol_offer,
)
from vhost_airlock.proxy.handlers import HANDLED, PASSED
from vhost_airlock.proxy.state import TABLE, Action, Event, State
from vhost_airlock.vhost.fds import eventfd
from vhost_airlock.vhost.wire import (
    BackendRequest,
    Feature,
    ProtocolFeature,
    Request,
)

PROJECT = Path(__file__).parents[2]
DOCUMENTS = [PROJECT / "README.md", PROJECT / "CHANGELOG.md"]
DOCUMENTS += sorted(PROJECT.glob("docs/*.md"))
README = (PROJECT / "README.md").read_text()
TESTS = "".join(path.read_text() for path in PROJECT.glob("tests/*/test_*.py"))
PATIENCE = 30.0


def doc(name: str) -> str:
    return (PROJECT / "docs" / name).read_text()


PROTOCOL, ARCHITECTURE = doc("protocol.md"), doc("architecture.md")
OPERATING, TUNING = doc("operating.md"), doc("tuning.md")
LIBRARY = doc("library.md")


def section(text: str, title: str) -> str:
    """The text below a heading, up to the next one of its level."""
    match = re.search(
        rf"^(#+) {re.escape(title)}$\n(.*?)(?=^#{{1,2}} |\Z)", text, re.M | re.S
    )
    assert match, f"no heading {title!r}"
    return match[2]


def rows(text: str) -> list[list[str]]:
    """The cells of the tables in a text, without their heads."""
    found = []
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        for line in table.splitlines()[2:]:
            cells = re.split(r"(?<!\\)\|", line.strip()[1:-1])
            found.append([cell.strip() for cell in cells])
    return found


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


# Commands and options.

COMMANDS = [
    re.sub(r"^exec ", "", line)
    for block in blocks("sh", README)
    for line in block.replace("\\\n", "").splitlines()
    if re.match(r"(exec )?vhost-airlock ", line)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_in_the_readme_is_one(command):
    program, *argv = shlex.split(command.replace('"$fd"', "3"))
    assert program == "vhost-airlock"
    options = cli.parse(argv)
    if options.chosen != "run":
        return
    config = run.config_of(options)
    assert any((config.backend, config.backend_listen, config.command))


def test_commands_are_found():
    assert len(COMMANDS) > 6


def test_every_option_of_run_is_described():
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    options = set(re.findall(r"(?<!\S)(--?[a-z][a-z-]*)", parser.format_help()))
    table = section(OPERATING, "Options of `vhost-airlock run`")
    described = {names(row[0])[0].split()[0] for row in rows(table)}
    assert described - {"--"} == options - {"-h", "--help"}
    runs = [command for command in COMMANDS if "airlock run " in command]
    mentioned = set(re.findall(r"(--[a-z][a-z-]+)", "".join(runs)))
    for text in [OPERATING, TUNING, ARCHITECTURE]:
        mentioned |= set(re.findall(r"`(--[a-z][a-z-]+)", text))
    foreign = {"--reuid", "--regid", "--clear-groups", "--no-new-privs", "--shared-dir"}
    foreign |= {"--migration-mode", "--modcaps"}
    assert mentioned - foreign - {"--foreground", "--vhost-user"} <= options


def test_every_option_of_qemu_is_described():
    parser = argparse.ArgumentParser()
    qemu.add_arguments(parser)
    parser.usage = parser.description = None
    options = set(re.findall(r"(?<!\S)(--[a-z][a-z-]*)", parser.format_help()))
    described = [names(row[0]) for row in rows(section(doc("qemu.md"), "Options"))]
    found = {name.split()[0] for cell in described for name in cell}
    assert found - {"vhost-airlock"} == options - {"--help"}


# Examples of the library.

BACK_END, FRONT_END, GUEST = blocks("python", LIBRARY)


@pytest.fixture
def folder(tmp_path_factory):
    """Its path is short enough for sockets."""
    return tmp_path_factory.mktemp("docs")


def python(folder: Path, log: str, *argv: str) -> Process:
    """Python with these arguments, in a folder."""
    interpreter = str(Path(sys.executable).absolute())
    command = ["env", f"--chdir={folder}", interpreter, *argv]
    return Process(command, folder / log)


def said(folder: Path, code: str) -> str:
    """The output of a program, whose status has to be 0."""
    with python(folder, "log", "-c", code) as process:
        assert process.wait(PATIENCE) == 0, process.describe()
        return process.output()


def at(folder: Path, text: str) -> str:
    """With whole paths of sockets: other runs of these tests have the same names."""
    return re.sub(r"\w+\.sock\b", lambda name: f"{folder}/{name[0]}", text)


def test_examples_of_both_roles_talk_to_each_other(folder):
    with python(folder, "back.log", "-c", at(folder, BACK_END)) as back:
        back.wait_until(lambda: listening(folder / "hello.sock"))
        assert said(folder, at(folder, FRONT_END)) == "features 0x140000000: hello\n"
        assert back.wait(PATIENCE) == 0, back.describe()


def test_examples_of_both_roles_talk_through_an_airlock(folder):
    front = folder / "front"
    front.mkdir()
    options = [f"--socket-path={front}/hello.sock", f"--backend={folder}/hello.sock"]
    command = ["-m", "vhost_airlock", "run", *options]
    with python(folder, "back.log", "-c", at(folder, BACK_END)) as back:
        back.wait_until(lambda: listening(folder / "hello.sock"))
        with python(folder, "airlock.log", *command) as airlock:
            airlock.wait_until(lambda: listening(front / "hello.sock"))
            assert said(front, at(front, FRONT_END)) == "features 0x164000000: hello\n"
            assert back.wait(PATIENCE) == 0, back.describe()
            assert airlock.stop() == 0, airlock.describe()


def test_example_of_a_guest_writes_to_the_disk(folder):
    command = "-m vhost_airlock.peers.blk --socket-path=blk.sock --blk-file=disk.img"
    assert f"python {command}\n" in LIBRARY
    disk = folder / "disk.img"
    disk.write_bytes(bytes(4096))
    with python(folder, "back.log", *at(folder, command).split()) as back:
        back.wait_until(lambda: listening(folder / "blk.sock"))
        assert said(folder, at(folder, GUEST)) == "8 sectors, one written\n"
        assert back.stop() == 0, back.describe()
    assert disk.read_bytes() == b"hello".ljust(4096, b"\0")


# Tables.

YES = (1 << 64) - 1


def test_every_request_is_in_the_protocols_table():
    table = rows(section(PROTOCOL, "Requests of the front"))
    told = {(int(row[0]), names(row[1])[0]): row[2] for row in table}
    assert len(told) == len(table)
    assert told == {
        (int(request), request.name): "handled"
        if request in HANDLED
        else "passed on"
        if request in PASSED
        else "refused"
        for request in Request
    }


def test_every_request_of_the_back_is_in_the_protocols_table():
    table = rows(section(PROTOCOL, "Requests of the back"))
    told = {(int(row[0]), names(row[1])[0]): row[2] for row in table}
    with (
        Airlock(back := talking_back()) as airlock,
        talking_guest() as guest,
        Talked(airlock, back, guest) as talk,
    ):
        assert told == {
            (int(request), request.name): "refused"
            if talk.refused(request)
            else "handled"
            for request in BackendRequest
        }


def bits(text: str) -> list[int]:
    """The numbers in '7', '0 to 23', '25, 31'."""
    found: list[int] = []
    for part in text.split(", "):
        first, _, last = part.partition(" to ")
        found += range(int(first), int(last or first) + 1)
    return found


def told_of_bits(title: str) -> dict[int, list[str]]:
    found = {}
    for row in rows(section(PROTOCOL, title)):
        for bit in bits(row[0]):
            assert bit not in found, f"bit {bit} is there twice"
            found[bit] = [*names(row[1]), *row[2:4]]
    return found


def fate_of_protocol_feature(bit: int) -> list[str]:
    mask = 1 << bit
    if front_protocol_offer(0) & mask:
        offered = "always"
    elif front_protocol_offer(mask) & mask:
        offered = "if the back has it"
    elif front_protocol_offer(mask | ProtocolFeature.CONFIG) & mask:
        offered = "if the back has it, and CONFIG"
    else:
        offered = "no"
    if back_protocol(ProtocolFeature(0), YES) & mask:
        used = "always"
    elif back_protocol(ProtocolFeature(mask), YES) & mask:
        used = "if the front does"
    else:
        used = "no"
    return [offered, used]


def fate_of_feature(bit: int) -> list[str]:
    mask = 1 << bit
    if front_offer(Feature.VERSION_1) & mask & ~Feature.VERSION_1:
        offered = "always"
    elif front_offer(Feature.VERSION_1 | mask) & mask:
        offered = "if the back has it"
    else:
        offered = "no"
    if back_features(0, YES) & mask:
        used = "always"
    elif back_features(mask, YES) & mask:
        used = "if the front does"
    elif back_features(mask, YES, ProtocolFeature.DEVICE_STATE) & mask:
        used = "if the front does, and DEVICE_STATE"
    else:
        used = "no"
    return [offered, used]


def test_every_protocol_feature_is_in_the_protocols_table():
    told = told_of_bits("Protocol features")
    named = {flag.bit_length() - 1: flag.name for flag in ProtocolFeature}
    assert set(told) == set(range(64))
    for bit, (*name, offered, used) in told.items():
        assert [offered, used] == fate_of_protocol_feature(bit), f"bit {bit}"
        assert name == [named[bit]] if bit in named else not name


def test_features_that_the_airlock_adds_for_the_guest_are_told():
    """A guest that has them can only move where they are offered."""
    table = rows(section(doc("migration.md"), "Hosts that differ"))
    told = {name: int(mask, 16) for (name, mask, *_) in table}
    bits = [1 << bit for bit in range(64) if not DEVICE >> bit & 1]
    passed = [Feature.VERSION_1, Feature.ANY_LAYOUT]
    of_the_connection = [Feature.PROTOCOL_FEATURES, Feature.LOG_ALL]
    found = [
        Feature(bit)
        for bit in bits
        if front_offer(Feature.VERSION_1 | bit) & bit
        and bit not in (*passed, *of_the_connection)
    ]
    assert told == {f"`{each.name}`": each.value for each in found}


def test_every_feature_is_in_the_protocols_table():
    told = told_of_bits("Features")
    named = {flag.bit_length() - 1: flag.name for flag in Feature}
    assert set(told) == set(range(64))
    for bit, (*name, offered, used) in told.items():
        assert [offered, used] == fate_of_feature(bit), f"bit {bit}"
        assert name == [named[bit]] if bit in named else not name


def test_every_change_of_a_rings_state_is_in_the_architectures_table():
    found = section(ARCHITECTURE, "The life of a ring")
    header = next(line for line in found.splitlines() if line.startswith("| state |"))
    events = [cell.strip() for cell in header.strip("|").split("|")[1:]]
    assert events == [event.name for event in Event]
    told = {
        (State[state.upper()], Event[event]): cell
        for state, *cells in rows(found)
        for event, cell in zip(events, cells, strict=True)
        if cell
    }
    assert told == {key: in_a_cell(key[0], change) for key, change in TABLE.items()}


def in_a_cell(state, change):
    """How the architecture's table says it."""
    words = [] if change.state is state else [change.state.name.lower()]
    if change.action is not Action.NONE:
        words.append(change.action.name.lower())
    return ": ".join(words)


def test_every_fault_is_in_the_architectures_table():
    whose = {"the guest's", "the back's", "nobody's"}
    table = rows(section(ARCHITECTURE, "What an error ends"))
    told = {text for text, blamed in table if blamed in whose}
    assert told == set(FAULTS.values())


def test_every_device_type_that_is_refused_is_in_the_threat_model():
    table = rows(section(doc("threat-model.md"), "Devices that can't be isolated"))
    told = dict(table)
    assert told == {kind.name: kind.refused for kind in TYPES if kind.refused}
    assert f"({', '.join(told)})" in README


@pytest.mark.parametrize(
    ("title", "least"),
    [
        ("A hostile back-end", 30),
        ("A hostile guest", 18),
        ("An airlock that was taken over", 7),
        ("A faulty VMM", 1),
        ("The process", 8),
        ("Failures of others", 25),
    ],
)
def test_every_row_of_the_threat_model_has_a_test(title, least):
    table = rows(section(doc("threat-model.md"), title))
    assert len(table) >= least
    for *cells, tests in table:
        assert all(cells)
        assert names(tests), cells
        for name in names(tests):
            assert f"def {name}(" in TESTS, name


def test_every_failure_of_others_is_there_once():
    """The anchors that are numbered: none is left out."""
    table = rows(section(doc("threat-model.md"), "Failures of others"))
    anchors = [row[0].partition(":")[0] for row in table if row[0][1].isdigit()]
    last = {"M": 4, "R": 2, "F": 7, "G": 9, "B": 4}
    assert anchors == [
        f"{c}{n}" for c, most in last.items() for n in range(1, most + 1)
    ]


def test_every_copy_policy_is_described():
    table = rows(section(TUNING, "How much is copied back"))
    assert {names(row[0])[0] for row in table} == set(POLICIES)


def test_every_counter_is_described():
    table = rows(section(TUNING, "Counters"))
    told = {(row[0], names(row[1])[0]) for row in table}
    pool = Pool(4096, largest=4096)
    with eventfd() as events:
        worker = Worker(events.fileno())
    counted = {("ring", name) for name in Pump(0, GuestMemory(), pool).counters()}
    counted |= {("worker", name) for name in worker.counters()}
    with Airlock() as airlock, small_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        counters = airlock.session.device.counters()
        counted |= {(of, name) for of in ("pool", "backend") for name in counters[of]}
    assert told == counted == set(OF_COUNTERS)


# Style.

OPENER = re.compile(
    r'(?:^|[.:;?!] +|\| +|"""|# |- |\*\*)'
    r"((?:Who|Whom|Whose|What|Whoever|Whatever|Such)\b[^.?!|\"]*[.?!|\"]?)",
    re.M,
)
"""The beginning of a sentence that leaves its subject out, unless it is a question."""


def without_subject(text: str) -> list[str]:
    return [each for each in OPENER.findall(text) if not each.endswith("?")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_sentences_begin_with_their_subject(path):
    text = re.sub(r"^```.*?^```|^#+ [^\n]*", "", path.read_text(), flags=re.M | re.S)
    assert without_subject(text) == []


def test_comments_begin_with_their_subject():
    sources = [
        path
        for kind in ("py", "pyi", "pyx", "pxd")
        for path in PROJECT.glob(f"src/**/*.{kind}")
    ]
    wrong = {
        str(path.relative_to(PROJECT)): found
        for path in sources
        if (found := without_subject(path.read_text()))
    }
    assert wrong == {}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("What was not written is zero.", True),
        ("It stops. Who polls holds up others.", True),
        ("| `full` | Whatever is said |", True),
        ('"""What the guest waits for."""', True),
        ("Who may connect?", False),
        ("The guest gets what it asked for.", False),
    ],
)
def test_sentence_without_a_subject_is_found(text, wrong):
    assert bool(without_subject(text)) == wrong


# Names and links.


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        name, _, heading = target.partition("#")
        if name.startswith("https:"):
            continue
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)", linked.read_text(), re.M)
            assert heading in map(anchor, titles), target


def anchor(title: str) -> str:
    """The name of a heading in links."""
    return re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_contents_are_all_sections_in_their_order(path):
    text = path.read_text()
    contents = re.findall(r"^- \[(.*)\]\(#", text.partition("\n## ")[0], re.M)
    if contents:
        assert contents == re.findall(r"^## (.*)", text, re.M)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_names_of_files_are_right(path):
    for name in re.findall(r"`([\w./]+/[\w.]+\.\w+)`", path.read_text()):
        if name.startswith("build/"):
            continue  # what the project makes is not there in a fresh clone
        places = (PROJECT, PROJECT / "src" / "vhost_airlock")
        assert any((place / name).exists() for place in places), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tests_that_are_named_exist(path):
    for name in re.findall(
        r"`(?:[\w/]+\.py::)?(?:\w+::)?(test_\w+)`", path.read_text()
    ):
        assert f"def {name}(" in TESTS, name


@pytest.mark.parametrize(
    ("title", "attacks"),
    list(zip(("As a guest", "As a VMM", "As a back-end"), GROUPS, strict=True)),
)
def test_attacks_are_those_of_the_catalogue(title, attacks):
    told = [
        (names(row[0])[0], row[1]) for row in rows(section(doc("attacks.md"), title))
    ]
    assert told == [(attack.name, attack.what) for attack in attacks[1]]


def test_modules_of_the_architecture_exist():
    package = PROJECT / "src" / "vhost_airlock"
    cells = [row[0] for row in rows(section(ARCHITECTURE, "Where to find what"))]
    for name in names(" ".join(cells)):
        assert list(package.glob(f"{name}.p[xy]*")) or (package / name).is_dir(), name
