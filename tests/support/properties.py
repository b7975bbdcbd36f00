"""Settings for property tests on machines that are busy: a slow example is not a failed one."""

from hypothesis import HealthCheck, settings

STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
