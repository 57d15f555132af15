# SPDX-License-Identifier: Apache-2.0
"""How long the property tests and the races run: HYPOTHESIS_PROFILE says it.

"ci" is the default, "stress" is for hours; the "hunt" ones show at once what they find,
where the others look for the smallest example first.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

settings.register_profile(
    "ci",
    max_examples=120,
    stateful_step_count=60,
    deadline=None,
    print_blob=True,
    suppress_health_check=SLOW,
)
settings.register_profile(
    # A sanitizer makes everything several times as slow.
    "asan",
    parent=settings.get_profile("ci"),
    max_examples=20,
)
settings.register_profile(
    "stress",
    parent=settings.get_profile("ci"),
    max_examples=10_000,
    stateful_step_count=200,
)
settings.register_profile(
    "ci-hunt",
    parent=settings.get_profile("ci"),
    phases=[Phase.explicit, Phase.generate],
)
settings.register_profile(
    "hunt",
    parent=settings.get_profile("stress"),
    phases=[Phase.explicit, Phase.generate],
)

SANITIZED = "ASAN_OPTIONS" in os.environ
"""Is this a run of tools/test-asan? What was freed stays in memory for a while then."""

_NAME = os.environ.get("HYPOTHESIS_PROFILE", "asan" if SANITIZED else "ci")
PROFILE = settings.get_profile(_NAME)
STRESS = _NAME in ("stress", "hunt")
"""Have tests that take time all the time they want?"""

RACE_SECONDS = float(os.environ.get("RACE_SECONDS", 60.0 if STRESS else 2.0))
"""How long each race runs."""

FD_COUNTS = range(254) if STRESS else [*range(20), 31, 32, 33, 64, 128, 252, 253]
"""How many descriptors a message has. The kernel lets no more than 253 through."""
