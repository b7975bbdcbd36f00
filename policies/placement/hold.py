"""The load of one request at one endpoint: taken before dispatch, given back however it ends.

The only place where an endpoint's counters change. Giving back twice does nothing, so every exit path may.
"""

from backends.load import EndpointLoad


class Hold:
    """Counts from its creation to `release`."""

    __slots__ = ("_endpoint", "_uncached_tokens")

    def __init__(self, endpoint: EndpointLoad, uncached_tokens: int) -> None:
        """Before dispatch: a burst must see its own load."""
        endpoint.in_flight += 1
        endpoint.uncached_tokens += uncached_tokens
        self._endpoint: EndpointLoad | None = endpoint
        self._uncached_tokens = uncached_tokens

    def prefilled(self) -> None:
        """The first token is there: the prompt has been computed."""
        if self._endpoint is not None and self._uncached_tokens:
            self._endpoint.uncached_tokens -= self._uncached_tokens
            self._uncached_tokens = 0

    def release(self) -> None:
        if self._endpoint is not None:
            self._endpoint.in_flight -= 1
            self._endpoint.uncached_tokens -= self._uncached_tokens
            self._endpoint = None
