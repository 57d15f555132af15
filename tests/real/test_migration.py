# SPDX-License-Identifier: Apache-2.0
"""A guest moves from one QEMU to another, with a disk and a shared folder in use.

Each place has back-ends of its own, on the same image and folder, and QEMU reaches them
directly or through airlocks. After each move, all of the guest's memory is compared.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.guest.inside import cached, files, load, pages
from tests.guest.machine import Guest
from tests.guest.migration import PATIENCE, move_by_file, wait_for
from tests.real.journey import (
    CACHED,
    CACHED_AT,
    CPUS,
    SEED,
    WITHHELD,
    Journey,
    Place,
)
from tests.real.programs import Programs, new_folder
from tests.support.profiles import STRESS
from vhost_airlock.vhost.wire import Feature

ROUNDS = 50 if STRESS else 1


@pytest.fixture(scope="module")
def journey(programs: Programs) -> Iterator[Journey]:
    """One guest for all tests. Each leaves it somewhere, at its work."""
    with new_folder() as folder:
        journey = Journey(programs, folder)
        try:
            yield journey
            if not journey.lost:
                journey.end()
        finally:
            journey.close()


@pytest.fixture(autouse=True)
def failure_ends_the_guest(
    request: pytest.FixtureRequest, journey: Journey
) -> Iterator[None]:
    """It may not answer any more, and all that comes later would wait for it."""
    assert not journey.lost, "the guest has ended with a test that failed"
    before = request.session.testsfailed
    yield
    if request.session.testsfailed > before:
        journey.lose()


@pytest.mark.parametrize("number", range(ROUNDS))
def test_there_and_back(journey, number):
    """From an airlock to a direct place, to another one, and back behind an airlock.

    When all memory was sent once, the disk writes pages that nobody else does.
    """
    for via in ("direct", "direct", "airlock"):
        with journey.moving(via) as (there, moving):
            journey.guest.call(pages.go_on)
            moving.send_all()
            found = journey.guest.call(cached.read_anew, CACHED_AT, CACHED)
            assert found == journey.cached
            moving.finish()
        journey.arrive(there)


@pytest.mark.parametrize("end", ["source", "destination"])
def test_airlock_is_killed_in_the_middle(journey, end):
    """And is started again. QEMU connects again, and the migration goes on.

    The place to go to lacks the feature that the guest does without.
    """
    with journey.moving("airlock", WITHHELD) as (there, moving):
        (journey.place if end == "source" else there).kill_disk_airlock()
        journey.guest.call(pages.go_on)
        moving.finish()
    journey.arrive(there)


def test_cancelled(journey):
    with journey.moving() as (there, moving):
        moving.cancel()
    journey.stay(there)


def test_destination_dies(journey):
    with journey.moving() as (there, _):
        there.guest.kill()
    wait_for(journey.guest, "failed")
    journey.stay(there)


def test_destination_lacks_a_feature_that_the_guest_uses(journey):
    """QEMU says so, and which ones are there."""
    with journey.moving("airlock", "--withhold-features=EVENT_IDX") as (there, moving):
        moving.let_fail()
    said = there.guest.output()
    found = re.search(r"Features 0x\w+ unsupported. Allowed features: 0x(\w+)", said)
    assert found, said
    assert not int(found[1], 16) & Feature.EVENT_IDX
    journey.stay(there)


def test_saved_in_a_file(journey):
    """As virsh save does."""
    there = Place(journey, "airlock", journey.guest)
    try:
        move_by_file(journey.guest, there.guest, journey.folder / "saved")
    except BaseException:
        there.close()
        raise
    journey.arrive(there)


def test_snapshot(journey):
    """It has the guest's memory and the state of its devices, and goes back to them.

    The data of disk and folder is not in it: so the guest writes nothing in between.
    And virtiofsd lets go of its files before it finds them again, which it can't if one
    has no name any more.
    """
    guest = journey.guest
    guest.call(files.let_go)
    assert guest.call(load.stop) >= 1
    guest.call(pages.check, SEED)
    path = journey.folder / "snapshots"
    qemu_img = journey.programs("qemu-img", "create", "-f", "qcow2", str(path), "1G")
    subprocess.run(qemu_img, check=True, stdout=subprocess.DEVNULL)
    file = {"driver": "file", "filename": str(path)}
    guest.qmp("blockdev-add", driver="qcow2", node_name="snapshots", file=file)
    snapshot(guest, "snapshot-save")
    guest.sh("echo later > /tmp/later")
    guest.call(cached.read_anew, CACHED_AT, CACHED)
    snapshot(guest, "snapshot-load")
    guest.sh("test ! -e /tmp/later")
    guest.call(load.start, CPUS)
    guest.call(pages.start)
    journey.check()


def snapshot(guest: Guest, command: str) -> None:
    """Do this with the guest's snapshot, and wait until it is done."""
    nodes = {"vmstate": "snapshots", "devices": ["snapshots"]}
    guest.qmp.forget()
    guest.qmp(command, job_id="job", tag="now", **nodes)
    guest.qmp.wait_for("JOB_STATUS_CHANGE", PATIENCE, id="job", status="concluded")
    (job,) = guest.qmp("query-jobs")
    assert "error" not in job, job
    guest.qmp("job-dismiss", id="job")
