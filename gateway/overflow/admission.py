"""What the queue accepts: a wish is judged as a request would be that came now, as far as that cannot change by waiting.

A model that does not exist, a body that cannot be read or a budget that is used up refuse a wish; a rate that is used
up does not, for the job will wait anyway. Nothing is reserved here: a job reserves when it runs, like every request, so
that no reservation lasts for a day and no budget is exceeded (decision 0024). Knows no store.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from backends.dialect import DIALECTS, Dialect
from gateway.config import Config
from gateway.http_rules import Refusal
from gateway.intake import Message, read_tags, take_in
from gateway.overflow.config import QueueConfig
from gateway.overflow.job import TenantLimits
from gateway.overflow.submit import Admitted, Wish
from gateway.runtime import Runtime
from policies.exchange import Exchange
from policies.limits.refusals import BUDGET_EXCEEDED
from policies.policy import Admit
from policies.verdict import Denial

BY_PATH: Final[Mapping[str, Dialect]] = {d.path: d for d in DIALECTS.values() if d.is_billed}
# What was wished for an ordinary request means nothing to a job.
_NOT_KEPT: Final = frozenset({b"x-headgate-on-full", b"x-headgate-priority", b"x-headgate-webhook"})
_BYTES_PER_TOKEN: Final = 4
_LEAST_TOKENS: Final = 16
_decode_headers = msgspec.json.Decoder(list[tuple[str, str]]).decode


class QueueAdmission:
    """Judges wishes by the configuration that is in force. One per worker.

    `budget_used` says how much of the caller's tightest budget is spent; 1.0 is all of it.
    """

    def __init__(
        self,
        runtime: Callable[[], Runtime],
        config: Callable[[], Config],
        budget_used: Callable[[Exchange], float],
    ) -> None:
        self._runtime = runtime
        self._config = config
        self._budget_used = budget_used
        self._names: tuple[Config, frozenset[bytes]] | None = (
            None  # of the configuration they were worked out for
        )

    async def admit(self, wish: Wish) -> Admitted | Denial:
        """What cannot change by waiting refuses it."""
        dialect = BY_PATH.get(wish.path)
        if dialect is None:
            paths = ", ".join(f"`{path}`" for path in BY_PATH)
            return Denial(400, "path_not_queued", f"`{wish.path}` cannot be run later; these can: {paths}")
        runtime, config = self._runtime(), self._config()
        if len(wish.body) > runtime.body_bytes:
            return Denial(413, "body_too_large", f"the request body may take {runtime.body_bytes} bytes")
        headers = self._kept(wish.headers, config)
        exchange = Exchange("", dialect, time.perf_counter(), time.time())
        exchange.caller = wish.caller
        try:
            fill(exchange, headers, wish.body, runtime)
        except Refusal as refusal:
            return Denial(refusal.status, refusal.code, refusal.message, refusal.param)
        denial = self._judge(exchange, runtime)
        if denial is not None:
            return denial
        assert exchange.model is not None  # access refuses names nobody serves
        if not exchange.model.groups(dialect, exchange.targets):
            return Denial(
                400,
                "dialect_not_supported",
                f"the model `{exchange.model_name}` is not served on `{dialect.path}`",
                param="model",
            )
        return self._admitted(wish, exchange, headers, config)

    def give_back(self, admitted: Admitted) -> None:
        """Nothing was taken."""

    def _kept(self, headers: Sequence[tuple[bytes, bytes]], config: Config) -> dict[bytes, bytes]:
        if self._names is None or self._names[0] is not config:
            self._names = (config, _names_kept(config))
        names = self._names[1]
        return {
            name: value
            for name, value in headers
            if name in names or (name.startswith(b"x-headgate-") and name not in _NOT_KEPT)
        }

    def _judge(self, exchange: Exchange, runtime: Runtime) -> Denial | None:
        now = time.perf_counter()
        try:
            denial = _first_denial(exchange, runtime.hooks.admit, now)
            if denial is not None:
                return denial if denial.status != 429 or denial.code == BUDGET_EXCEEDED else None
            if self._budget_used(exchange) >= 1.0:
                return Denial(
                    429, BUDGET_EXCEEDED, "the budget is used up, so a job could not run; it was not accepted"
                )
            return None
        finally:  # never sent, so all of it comes back
            for settle in runtime.hooks.settle:
                settle(exchange, now)

    def _admitted(
        self, wish: Wish, exchange: Exchange, headers: Mapping[bytes, bytes], config: Config
    ) -> Admitted:
        assert exchange.model is not None
        settings = config.queue
        tokens = exchange.body_bytes // _BYTES_PER_TOKEN
        if exchange.dialect.name != "embeddings":
            answer = config.limits.output_tokens if exchange.max_tokens is None else exchange.max_tokens
            tokens += answer * exchange.choices
        return Admitted(
            lane=exchange.model.name,
            model=exchange.model_name,
            estimate=max(_LEAST_TOKENS, tokens),
            limits=tenant_limits(settings, wish.caller.tenant),
            expires_in_s=wish.expires_in_s or settings.expires_s,
            keep_s=wish.keep_s or settings.result_s,
            max_attempts=settings.attempts,
            caller=b"",  # looked up when it runs: a key that was revoked meanwhile runs nothing
            headers=encode_headers(headers),
        )


def tenant_limits(settings: QueueConfig, tenant: str) -> TenantLimits:
    """What this tenant may have waiting, and its weight."""
    caps = settings.tenants
    return TenantLimits(caps.queued_jobs, caps.queued_bytes, caps.weights.get(tenant, 1.0))


def fill(exchange: Exchange, headers: Mapping[bytes, bytes], body: bytes, runtime: Runtime) -> Message:
    """An exchange with its caller, filled from what would have been read from a client. Refusal."""
    caller = exchange.caller
    exchange.tags = caller.tags if caller is not None else ()
    read_tags(exchange, headers)
    exchange.body_bytes = len(body)
    message = take_in(exchange, headers, body, runtime)
    exchange.on_full = ""
    return message


def _names_kept(config: Config) -> frozenset[bytes]:
    """Client headers that mean something when a job runs, besides ours: session ids, and what providers may see."""
    names = set(config.sessions.headers)
    for upstream in (*config.enabled_providers().values(), *config.enabled_pools().values()):
        names |= upstream.provider.forwards
    if config.limits.end_users.header is not None:
        names.add(config.limits.end_users.header)
    return frozenset(name.encode() for name in names)


def encode_headers(headers: Mapping[bytes, bytes]) -> bytes:
    return msgspec.json.encode([(n.decode("latin-1"), v.decode("latin-1")) for n, v in headers.items()])


def decode_headers(kept: bytes) -> dict[bytes, bytes]:
    """What `encode_headers` wrote; nothing was written for a door without headers."""
    if not kept:
        return {}
    return {name.encode("latin-1"): value.encode("latin-1") for name, value in _decode_headers(kept)}


def _first_denial(exchange: Exchange, hooks: tuple[Admit, ...], now: float) -> Denial | None:
    for admit in hooks:
        denial = admit(exchange, now)
        if denial is not None:
            return denial
    return None
