"""How many cases: a short slice with the other tests, many with `make fuzz` (`--hypothesis-profile=long`)."""

from hypothesis import HealthCheck, settings

_ANY = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
settings.register_profile("slice", max_examples=60, derandomize=True, **_ANY)
settings.register_profile("long", max_examples=3000, **_ANY)
settings.load_profile("slice")
