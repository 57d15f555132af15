# SPDX-License-Identifier: Apache-2.0
"""Traces that the airlock does not get through yet, and why."""

from __future__ import annotations

import pytest

EARLY_STATUS = "SET_STATUS before the protocol features ends the session"

FAILS = {
    ("net", "virtio-user"): EARLY_STATUS,
}
"""By the kind of device, or any, and the name of the front-end."""


def expect_failure(request: pytest.FixtureRequest, kind: str, name: str) -> None:
    """Mark the running test if it can't pass yet."""
    reason = FAILS.get((kind, name)) or FAILS.get(("*", name))
    if reason is not None:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
