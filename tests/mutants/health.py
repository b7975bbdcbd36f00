"""Broken builds of health and retries that the tests of sick replicas must catch. Loaded by those tests only."""

from backends import probes
from gateway.settle import Settler
from policies.health.book import HealthBook
from policies.health.endpoint import EndpointHealth
from policies.retry import RetryBudget


def never_ejects() -> None:
    """Whatever is seen of an endpoint, it stays."""
    EndpointHealth.eject = lambda self, now, reason: None


def never_comes_back() -> None:
    """Once out, always out."""
    EndpointHealth._come_back = lambda self, now: None


def retries_without_measure() -> None:
    """Every failed attempt is followed by another, whatever is known of the others."""
    RetryBudget.take = lambda self, now: True
    HealthBook.may_retry_at = lambda self, endpoint, now: True


def keeps_the_load_of_failed_attempts() -> None:
    """Only the last attempt's load is given back."""
    Settler.attempt_failed = lambda self, exchange, failure: None


def trusts_the_health_page() -> None:
    """A process that answers its health page is taken for one that can generate."""

    async def page(endpoint, model: str, timeout_s: float) -> probes.Probe:
        return await probes.look(endpoint, "/health", timeout_s)

    probes.generate = page


MUTANTS = {
    mutant.__name__: mutant
    for mutant in (
        never_ejects,
        never_comes_back,
        retries_without_measure,
        keeps_the_load_of_failed_attempts,
        trusts_the_health_page,
    )
}
