"""Settings of tests whose cases Hypothesis draws: few, the same each time, as fast as other tests."""

from hypothesis import HealthCheck, settings

SLOWEST = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


def cases(count: int) -> settings:
    """So many cases, without a limit on time."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=SLOWEST)
