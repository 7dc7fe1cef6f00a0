"""The same examples on each run: a commit that passed once passes always."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "snatd",
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("snatd")
