# SPDX-License-Identifier: Apache-2.0
"""The back-end's user, compared with the airlock's and the VMM's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.tables import each_row
from vhost_airlock.errors import SessionError
from vhost_airlock.log import Logger
from vhost_airlock.process.users import UNKNOWN, Users

LOG = Logger("device")
AIRLOCK, VMM, BACK = 1001, 1002, 1003
ROOT_TOLD = "it runs as root"
UNKNOWN_TOLD = "its user is not known here, and may be root or the VMM's"
VMM_TOLD = r"it runs as the VMM's user \(1002\)"
AIRLOCK_TOLD = r"it runs as the airlock's user \(1001\)"

JUDGED: list[tuple[set[int], int, bool, str]] = [
    ({BACK}, VMM, True, ""),
    ({BACK}, AIRLOCK, True, ""),  # VMM and airlock may be one user
    ({BACK, BACK + 1}, VMM, False, ""),
    ({0}, VMM, True, ROOT_TOLD),
    ({0}, 0, True, ROOT_TOLD),
    ({BACK, 0}, VMM, True, ROOT_TOLD),  # it can become root again
    ({VMM}, VMM, True, VMM_TOLD),
    ({BACK, VMM}, VMM, True, VMM_TOLD),
    ({AIRLOCK}, VMM, True, AIRLOCK_TOLD),
    ({AIRLOCK}, AIRLOCK, True, r"it runs as the VMM's user \(1001\)"),
    (set(), VMM, True, UNKNOWN_TOLD),
    ({UNKNOWN}, VMM, False, UNKNOWN_TOLD),
    ({UNKNOWN}, UNKNOWN, False, UNKNOWN_TOLD),
    ({UNKNOWN}, VMM, True, ""),  # it is nobody
    ({UNKNOWN}, UNKNOWN, True, r"it runs as the VMM's user \(65534\)"),
    ({BACK}, UNKNOWN, False, ""),
]


def judge(*, require: bool, all_known: bool = True) -> Users:
    users = Users(LOG, require=require)
    users.own = frozenset({AIRLOCK})
    users.all_known = all_known
    return users


@each_row(JUDGED)
def test_back_end_that_is_not_isolated_is_told(
    back: set[int],
    front: int,
    all_known: bool,
    text: str,
    *,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.clear()
    judge(require=False, all_known=all_known).check(back, front)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == bool(text)
    strict = judge(require=True, all_known=all_known)
    if text:
        with pytest.raises(SessionError, match=f"^back-end: refused, since {text}"):
            strict.check(back, front)
        assert told[0].startswith("back-end: isolated in vain, since it")
        assert caplog.records[0].levelname == "WARNING"
    else:
        strict.check(back, front)


def test_it_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    users = judge(require=False)
    for back in (BACK, AIRLOCK, VMM, 0):
        users.check({back}, VMM)
    (record,) = caplog.records
    assert "as the airlock's user (1001)" in record.getMessage()


def test_it_is_refused_each_time() -> None:
    users = judge(require=True)
    for _ in range(2):
        with pytest.raises(SessionError):
            users.check({VMM}, VMM)


def test_own_users_are_the_process_s() -> None:
    assert Users(LOG, require=False).own == set(os.getresuid())


def test_user_namespace_without_every_user_is_noticed() -> None:
    """Where there can be one, `unshare` makes it."""
    ask = "from vhost_airlock.process import users"
    ask += "; print(users._maps_every_user())"
    for prefix, known in (([], "True"), (["unshare", "--user"], "False")):
        done = subprocess.run(
            [*prefix, sys.executable, "-c", ask],
            capture_output=True,
            text=True,
            check=False,
        )
        if "unshare: " in done.stderr:
            pytest.skip(done.stderr.strip())
        assert done.stdout.strip() == known
