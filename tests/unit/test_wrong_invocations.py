# SPDX-License-Identifier: Apache-2.0
"""Wrong invocations, and what is said of them: one line, which names what is wrong."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.tables import each_row

LONG = "x" * 108
"""A path that is one byte too long."""

# ruff: noqa: E501 (lines of output)
WRONG = r"""
$ vhost-airlock
2 vhost-airlock: the following arguments are required: COMMAND (see vhost-airlock --help)
$ vhost-airlock fly
2 vhost-airlock: argument COMMAND: invalid choice: 'fly' (choose from ...) (see vhost-airlock --help)

$ vhost-airlock run
2 vhost-airlock: one of --socket-path, --fd, --front-connect is needed
$ vhost-airlock run --socket-path=F
2 vhost-airlock: one of --backend, --backend-listen, --backend-fd, -- COMMAND is needed
$ vhost-airlock run --socket-path=F --fd=3 --backend=S
2 vhost-airlock: --socket-path and --fd exclude each other
$ vhost-airlock run --socket-path=F --backend=S -- prog {fd}
2 vhost-airlock: --backend and -- COMMAND exclude each other
$ vhost-airlock run --socket-path=F --
2 vhost-airlock: no command after --
$ vhost-airlock run --socket=F --backend=S
2 vhost-airlock: unknown arguments: --socket=F (see vhost-airlock run --help)
$ vhost-airlock run --socket-path=F --backend=S more
2 vhost-airlock: unknown arguments: more (see vhost-airlock run --help)
$ vhost-airlock run --backend=S --socket-path
2 vhost-airlock: argument --socket-path: expected one argument (see vhost-airlock run --help)
$ vhost-airlock run --socket-path=F --backend=S --no-wait=1
2 vhost-airlock: argument --no-wait: takes no value: '1' (see vhost-airlock run --help)
$ vhost-airlock run --fd=three --backend=S
2 vhost-airlock: argument --fd: three: no number from 0 to 2147483647 (see vhost-airlock run --help)
$ vhost-airlock run --socket-path=F --backend=S --pool-limit=64X
2 vhost-airlock: argument --pool-limit: 64X: no size from 4K to 4G (see vhost-airlock run --help)
$ vhost-airlock run --socket-path=F --backend=S --pool-limit=1T
2 vhost-airlock: argument --pool-limit: 1T: no size from 4K to 4G (see vhost-airlock run --help)
$ vhost-airlock run --socket-path=F --backend=S --workers=0
2 vhost-airlock: argument --workers: 0: no number from 1 to 64 (see vhost-airlock run --help)
$ vhost-airlock run --socket-path=F --backend=S --worker-cpus=7000
2 vhost-airlock: argument --worker-cpus: 7000: may not run on processor 7000 (see vhost-airlock run --help)
$ vhost-airlock run --socket-path=F --backend=S --timeout=0
2 vhost-airlock: argument --timeout: 0: no number of seconds up to 3600 (see vhost-airlock run --help)
$ vhost-airlock run --socket-path=F --backend=S --copy=all
2 vhost-airlock: argument --copy: invalid choice: 'all' (choose from ...) (see vhost-airlock run --help)
$ vhost-airlock run --socket-path=F --backend=S --sandbox=maybe
2 vhost-airlock: argument --sandbox: maybe: neither on nor off (see vhost-airlock run --help)
$ vhost-airlock run --socket-path=F --backend=S --withhold-features=EVENT
2 vhost-airlock: argument --withhold-features: EVENT: no name of a feature, and no mask as 0x20000000 (see vhost-airlock run --help)
$ vhost-airlock run --socket-path=F --backend=S --withhold-features=MQ,VERSION_1
2 vhost-airlock: argument --withhold-features: VERSION_1: nothing works without VERSION_1 (see vhost-airlock run --help)
$ vhost-airlock run --socket-path=F --backend=S --name=
2 vhost-airlock: argument --name: '': no name of 1 to 64 printable characters (see vhost-airlock run --help)
$ vhost-airlock run --socket-path=F --backend=S --socket-mode=rw
2 vhost-airlock: argument --socket-mode: rw: no mode in octal digits, as 0660 (see vhost-airlock run --help)
$ vhost-airlock run --socket-path=F --backend=S --socket-group=no-such
2 vhost-airlock: argument --socket-group: no-such: there is no such group (see vhost-airlock run --help)
$ vhost-airlock run --socket-path=F --backend=S --device-type=toaster
2 vhost-airlock: --device-type toaster: not one of net, ...
$ vhost-airlock run --socket-path=F --backend=S --device-type=gpu
1 vhost-airlock: a gpu device can't be isolated: its requests carry guest addresses
$ vhost-airlock run --print-capabilities
2 vhost-airlock: --print-capabilities needs --device-type TYPE or -- COMMAND

$ vhost-airlock run --socket-path=F --backend=S --stats-path=./F
2 vhost-airlock: --socket-path F and --stats-path ./F are the same socket
$ vhost-airlock run --socket-path=S --backend=S
2 vhost-airlock: --socket-path S and --backend S are the same socket
$ vhost-airlock run --socket-path=LONG --backend=S
2 vhost-airlock: --socket-path LONG: a socket's path has at most 107 bytes
$ vhost-airlock run --socket-path=FILE --backend=S
1 vhost-airlock FILE: error: can't listen at FILE: it is there and no socket
$ vhost-airlock run --socket-path=NO/F --backend=S
1 vhost-airlock F: error: can't listen at NO/F: No such file or directory
$ vhost-airlock run --socket-path= --backend=S
2 vhost-airlock: --socket-path: no path
$ vhost-airlock run --socket-path=S --backend=NONE
1 vhost-airlock S: error: can't listen at S: another process does
$ vhost-airlock run --socket-path=F --backend=S --stats-path=FILE
1 vhost-airlock F: error: can't listen at FILE: it is there and no socket
$ vhost-airlock run --fd=9999 --backend=S
1 vhost-airlock fd 9999: error: descriptor 9999: Bad file descriptor
$ vhost-airlock run --socket-path=F --backend=S --exit-with-pipe=9999
1 vhost-airlock F: error: descriptor 9999: Bad file descriptor
$ vhost-airlock run --socket-path=F --backend=FILE
1 vhost-airlock F: error: no back-end at FILE: it is no socket
$ vhost-airlock run --socket-path=F --backend=NONE --no-wait
1 vhost-airlock F: error: no back-end at NONE: No such file or directory
$ vhost-airlock run --socket-path=F -- prog --fd=3
2 vhost-airlock: the back-end's command must have either {fd} or {listen-fd} in it: prog --fd=3
$ vhost-airlock run --socket-path=F -- /no/prog {fd}
1 vhost-airlock F: error: no back-end: there is no program /no/prog
$ vhost-airlock run --socket-path=F -- ./FILE {fd}
1 vhost-airlock F: error: no back-end: ./FILE is no file that may be executed
$ vhost-airlock run --socket-path=F -- ./SCRIPT {fd}
1 vhost-airlock F: error: no back-end: ./SCRIPT is a script for /no/shell, which is not there

$ vhost-airlock qemu
2 vhost-airlock: no command of QEMU (see vhost-airlock qemu --help)
$ vhost-airlock qemu --socket-path=F -- /bin/true
2 vhost-airlock: --socket-path can't be the same for all airlocks (see vhost-airlock qemu --help)
$ vhost-airlock qemu -- /no/qemu
127 vhost-airlock: can't run /no/qemu: No such file or directory

$ vhost-airlock stats
2 vhost-airlock: the following arguments are required: PATH (see vhost-airlock stats --help)
$ vhost-airlock stats NONE
1 vhost-airlock: no airlock's stats at NONE: No such file or directory
$ vhost-airlock stats FILE
1 vhost-airlock: no airlock's stats at FILE: no process listens there
$ vhost-airlock stats S
1 vhost-airlock: no airlock's stats at S: the socket is a VMM's or a back-end's; see run --stats-path
$ vhost-airlock stats .
1 vhost-airlock: no airlock's stats at .
$ vhost-airlock stats S --count=1
2 vhost-airlock: --count goes with --interval
$ vhost-airlock stats S --interval=0
2 vhost-airlock: argument --interval: 0: no number of seconds up to a day (see vhost-airlock stats --help)
$ vhost-airlock stats S --json --prometheus
2 vhost-airlock: argument --prometheus: not allowed with argument --json (see vhost-airlock stats --help)

$ vhost-airlock bench
2 vhost-airlock: the following arguments are required: --socket-path (see vhost-airlock bench --help)
$ vhost-airlock bench --socket-path=NONE
1 vhost-airlock: back-end: can't connect to NONE: No such file or directory
$ vhost-airlock bench --socket-path=S --mode=sideways
2 vhost-airlock: argument --mode: sideways: none of randread, randwrite, read, write (see vhost-airlock bench --help)

$ vhost-airlock attack
2 vhost-airlock: one of --as-guest, --as-vmm, --as-backend, --list is needed
$ vhost-airlock attack --as-guest=S --as-vmm=S
2 vhost-airlock: --as-guest, --as-vmm and --as-backend exclude each other
$ vhost-airlock attack --as-backend=B
2 vhost-airlock: --as-backend and --front go together
$ vhost-airlock attack --as-guest=S nonsense
2 vhost-airlock: no attack here is called nonsense
$ vhost-airlock attack --as-guest=NONE
1 vhost-airlock: no process listens at NONE
$ vhost-airlock attack --as-vmm=NONE -- /no/prog
1 vhost-airlock: there is no program /no/prog
$ vhost-airlock attack --as-guest=NONE --log=NO/log
1 vhost-airlock: --log NO/log: No such file or directory
$ vhost-airlock demo more
2 vhost-airlock: unknown arguments: more (see vhost-airlock demo --help)
"""
"""Each invocation; its status, and all that it prints. `...` stands for any text."""

ROWS = [
    tuple(row.strip().split("\n"))
    for row in re.split(r"^\$ ", WRONG.replace("LONG", LONG), flags=re.M)[1:]
]

RUN_ALL = """
import json, os, sys, tempfile, traceback
from vhost_airlock.cli import attack, bench, demo, qemu, run, stats  # once for all
from vhost_airlock.cli.main import main

def result(arguments):
    "In a process of its own, as if it were started: (status, output, files after it)."
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = 99
            try:
                status = main(arguments)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        return status, output.read().decode(), sorted(os.listdir())

json.dump([result(arguments) for arguments in json.load(sys.stdin)], sys.stdout)
"""


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What came of each invocation, in a folder with a file, a script without its
    shell, and a socket in use."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as used:
        Path(folder, "FILE").write_text("precious")
        Path(folder, "SCRIPT").write_text("#!/no/shell\n")
        Path(folder, "SCRIPT").chmod(0o755)
        used.bind(f"{folder}/S")
        used.listen()
        used.setblocking(False)
        invocations = [command.split(" ")[1:] for command, _ in ROWS]
        done = subprocess.run(
            [sys.executable, "-c", RUN_ALL],
            input=json.dumps(invocations),
            stdout=subprocess.PIPE,
            cwd=folder,
            text=True,
            timeout=100,
            check=True,
        )
        with pytest.raises(BlockingIOError):
            used.accept()
        assert Path(folder, "FILE").read_text() == "precious"
        found = json.loads(done.stdout)
    return dict(zip((command for command, _ in ROWS), found, strict=True))


def test_table_has_forty_invocations() -> None:
    assert len({command for command, _ in ROWS}) == len(ROWS) >= 40


@each_row(ROWS)
def test_wrong_invocation_is_told_in_one_line(
    command: str, expected: str, *, results: dict[str, Any]
) -> None:
    status, output, files = results[command]
    pattern = re.escape(expected).replace(r"\.\.\.", ".*")
    assert re.fullmatch(f"{pattern}\n", f"{status} {output}"), f"{status} {output}"
    assert files == ["FILE", "S", "SCRIPT"], "nothing is left behind"


def test_operators_find_what_is_said() -> None:
    """Each line of the manual's table ends a line of the table here."""
    manual = Path(__file__).parents[2].joinpath("docs", "operating.md").read_text()
    section = manual.split("## When it does not start\n")[1].split("\n## ")[0]
    told = re.findall(r"^\| `(.+?)` \|", section, re.M)
    assert len(told) >= 10
    for line in told:
        pattern = re.sub(
            r"\b(PATH|PROGRAM|INTERPRETER|COMMAND|N)\b", ".+", re.escape(line)
        )
        assert re.search(f"{pattern}$", WRONG, re.M), line
