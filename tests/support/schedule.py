# SPDX-License-Identifier: Apache-2.0
"""Which process runs which tests, and when, where several processes share the work.

Tests of one file stay together. Those with guests begin, for they take the longest, and
at most two processes have them at a time: a guest wants a core of its own. Those that
measure time (the marker `timing`) come last, when no other test runs any more.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

TIMING = "timing"
WITH_GUESTS = ("tests.guest.machine", "tests.guest.booted", "tests.real.libvirt")
MOST_GUESTS = 2
"""How many processes may have guests at a time."""


@cache
def has_guests(file: Path) -> bool:
    """Do tests of this file boot guests, as far as its imports say?"""
    text = file.read_text()
    return any(f"from {module}" in text for module in WITH_GUESTS)


@cache
def marked_timing(file: Path) -> frozenset[str]:
    """The tests of a file with the marker `timing`; "" if all have it.

    Read from the source, for the process that schedules does not collect.
    """
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if any(map(is_timing, node.decorator_list)):
                found.add(node.name)
        elif isinstance(node, ast.Assign) and is_timing(node.value):
            found.add("")
    return frozenset(found)


def is_timing(mark: ast.expr) -> bool:
    return ast.unparse(mark) == "pytest.mark.timing"


def measures_time(root: Path, nodeid: str) -> bool:
    file, *names = nodeid.partition("[")[0].split("::")
    return not marked_timing(root / file).isdisjoint(["", *names])


class Scheduler(LoadFileScheduling):  # type: ignore[misc]
    """As the module says."""

    def _split_scope(self, nodeid: str) -> str:
        if measures_time(self.config.rootpath, nodeid):
            return TIMING
        return str(super()._split_scope(nodeid))

    def _assign_work_unit(self, node: WorkerController) -> None:
        if self._only_timing_is_left() and not self._is_alone(node):
            return
        best = self._best_for(node)
        if self._has_guests(best) and self._others_with_guests(node) >= MOST_GUESTS:
            return
        self.workqueue.move_to_end(best, last=False)
        super()._assign_work_unit(node)

    def _best_for(self, node: WorkerController) -> str:
        """A file with guests, unless enough processes have some; what measures time if
        nothing else is left."""
        enough = self._others_with_guests(node) >= MOST_GUESTS
        queue: list[str] = [*self.workqueue]
        return min(
            queue,
            key=lambda scope: (
                scope == TIMING,
                self._has_guests(scope) == enough,
            ),
        )

    def _others_with_guests(self, node: WorkerController) -> int:
        """Return how many other processes have tests with guests to do."""
        return sum(
            any(
                self._has_guests(scope) and not all(unit.values())
                for scope, unit in work.items()
            )
            for other, work in self.assigned_work.items()
            if other is not node
        )

    def _has_guests(self, scope: str) -> bool:
        return scope != TIMING and has_guests(self.config.rootpath / scope)

    def _reschedule(self, node: WorkerController) -> None:
        super()._reschedule(node)
        if not self.workqueue:
            for each in self.nodes:  # also those that had nothing to do for a while
                if not each.shutting_down and not self._pending_of_node(each):
                    each.shutdown()
        if self._only_timing_is_left():
            # One process is enough now. It waits for the end of the others.
            idle = [each for each in self.nodes if not each.shutting_down]
            for other in idle[1:]:
                other.shutdown()
            for last in idle[:1]:
                super()._reschedule(last)

    def _only_timing_is_left(self) -> bool:
        return [*self.workqueue] == [TIMING]

    def _is_alone(self, node: WorkerController) -> bool:
        """Have all other processes done all they had to?"""
        return not any(
            self._pending_of_node(other)
            for other in self.assigned_work
            if other is not node
        )

    def _pending_of_node(self, node: WorkerController) -> int:
        """Return how many tests a process has still to do."""
        return int(self._pending_of(self.assigned_work[node]))
