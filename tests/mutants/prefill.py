"""Broken builds of disaggregated prefill: a prompt that was computed elsewhere, and is not to be had."""

from backends.errors import UpstreamError
from gateway.prefilling import Prefilling, UncollectedError


def fails_with_the_engine_that_computed() -> None:
    """What could not be collected is taken for the end of the request."""
    collect = Prefilling.collect

    async def brittle(self, *call):
        try:
            return await collect(self, *call)
        except UncollectedError as error:
            raise UpstreamError("total_timeout", "the prompt's cache did not come") from error

    Prefilling.collect = brittle


MUTANTS = {mutant.__name__: mutant for mutant in (fails_with_the_engine_that_computed,)}
