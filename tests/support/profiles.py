"""How long the property tests run: HYPOTHESIS_PROFILE is "ci" (default) or "stress"."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

settings.register_profile(
    "ci",
    max_examples=300,
    stateful_step_count=60,
    deadline=None,
    print_blob=True,
    suppress_health_check=SLOW,
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
    # Finds no smaller example, but shows at once what it has found.
    "hunt",
    parent=settings.get_profile("stress"),
    phases=[Phase.explicit, Phase.generate],
)

_NAME = os.environ.get("HYPOTHESIS_PROFILE", "ci")
PROFILE = settings.get_profile(_NAME)
STRESS = not _NAME.startswith("ci")
"""Have tests that take time all the time they want?"""
