# SPDX-License-Identifier: Apache-2.0
"""Traces that the airlock does not get through yet, and why."""

from __future__ import annotations

import pytest

FORGETS = "RESET_DEVICE makes a back-end forget its features; nobody sends them again"
HELD = "a ring that was only disabled takes no new size and base"
LEGACY = "SET_FEATURES without VERSION_1, though the rest follows, ends the session"
NO_BASE = "a ring in use, whose base nobody says, starts at 0 and not at its used index"
IMPOSSIBLE_BASE = "a ring in use starts at the base 0 that is said, which it can't have"
EARLY_STATUS = "SET_STATUS before the protocol features ends the session"

FAILS = {
    **{
        (kind, name): FORGETS
        for kind in ("fs", "forgetful")
        for name in ("QEMU", "QEMU-fs", "QEMU-net", "OpenVMM")
    },
    ("*", "Cloud-Hypervisor-2021"): HELD,
    ("*", "crosvm-2025"): LEGACY,
    ("*", "libkrun"): HELD,
    ("*", "alioth"): f"{HELD}, and none after its KICK",
    ("*", "Dragonball"): NO_BASE,
    ("*", "virtio-user"): IMPOSSIBLE_BASE,
    ("net", "virtio-user"): f"{EARLY_STATUS}; {IMPOSSIBLE_BASE}",
}
"""By the kind of device, or any, and the name of the front-end."""


def expect_failure(request: pytest.FixtureRequest, kind: str, name: str) -> None:
    """Mark the running test if it can't pass yet."""
    reason = FAILS.get((kind, name)) or FAILS.get(("*", name))
    if reason is not None:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
