"""Public models, the targets that serve them, and the candidates of one request.

A target is a model's way to be served: a pool and the name the upstream knows the model by. A candidate is
one endpoint of one target, a group all of one target's. The catalog is immutable: a reload builds another one.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from backends.dialect import Dialect
from backends.load import EndpointLoad
from backends.pool import Endpoint, Pool
from backends.transport import Deadlines
from policies.placement.block_index import BlockIndex
from policies.placement.placer import Placer
from policies.prices import Price

if TYPE_CHECKING:
    from policies.placement.prefill import Prefillers
    from policies.rules.fallback import ModelRouting

# What is to happen when all of its endpoints are full, unless client or rule say it. `hold`: it becomes a job of the
# queue while its client waits on the connection. "": the gateway's order.
ModelOnFull = Literal["", "wait", "fallback", "queue", "reject", "hold"]

# Rules choose among a model's targets in as many orders as they are written; anything beyond is thrown away and made again.
_MAX_GROUPINGS: Final = 256


class Target:
    """A pool, the upstream's name for the model, what it costs there, and how its endpoint is chosen.

    `placer` is None where there is nothing to choose: the pool has one endpoint. `blocks` is what its engines hold, where
    they tell. `prefillers` is nearly always None: who answers computes the prompt.
    """

    __slots__ = (
        "async_price",
        "blocks",
        "deadlines",
        "model_json",
        "name",
        "patience_s",
        "placer",
        "pool",
        "prefillers",
        "price",
        "upstream_model",
    )

    def __init__(
        self, name: str, pool: Pool, upstream_model: str, price: Price, placer: Placer | None = None
    ) -> None:
        self.name = name
        self.blocks: BlockIndex | None = None
        self.patience_s = 0.0  # for the tokens of a prompt, where there are blocks to compare them with
        self.pool = pool
        self.upstream_model = upstream_model
        self.model_json = msgspec.json.encode(upstream_model)  # as it stands in a request
        self.price = price
        self.async_price = price  # for who came through the queue
        self.placer = placer
        self.deadlines: Deadlines | None = None  # its own, instead of the endpoint's
        self.prefillers: Prefillers | None = None


class Candidate:
    """One endpoint of one target: where an attempt may go. `order` is the target's place in the model's list."""

    __slots__ = ("endpoint", "order", "target")

    def __init__(self, target: Target, endpoint: Endpoint, order: int) -> None:
        self.target = target
        self.endpoint = endpoint
        self.order = order


class Group:
    """A target's endpoints that speak one dialect."""

    __slots__ = ("candidates", "endpoints", "target")

    def __init__(self, target: Target, endpoints: tuple[Endpoint, ...], order: int) -> None:
        self.target = target
        self.endpoints = endpoints
        self.candidates: dict[EndpointLoad, Candidate] = {
            endpoint: Candidate(target, endpoint, order) for endpoint in endpoints
        }


class Model:
    """A public model: its targets in order of preference.

    `routing` is what the configuration says of it beyond them; it names other models, so it is set when all are there.
    """

    __slots__ = ("_groups", "created_time", "is_indexed", "name", "on_full", "owner", "routing", "targets")

    def __init__(
        self, name: str, targets: tuple[Target, ...], owner: str = "headgate", created_time: int = 0
    ) -> None:
        self.name = name
        self.targets = targets
        self.owner = owner
        self.created_time = created_time
        self.routing: ModelRouting | None = None
        self.on_full: ModelOnFull = ""
        self.is_indexed = any(target.blocks is not None for target in targets)
        self._groups: dict[tuple[str, tuple[Target, ...] | None], tuple[Group, ...]] = {}

    def groups(self, dialect: Dialect, targets: tuple[Target, ...] | None = None) -> tuple[Group, ...]:
        """What speaks this dialect, target by target; `targets` in place of the model's own. Prepared once."""
        key = (dialect.name, targets)
        prepared = self._groups.get(key)
        if prepared is None:
            prepared = tuple(
                Group(target, endpoints, order)
                for order, target in enumerate(self.targets if targets is None else targets)
                if (endpoints := tuple(e for e in target.pool.endpoints if e.speaks(dialect)))
            )
            if len(self._groups) >= _MAX_GROUPINGS:
                self._groups.clear()
            self._groups[key] = prepared
        return prepared

    def candidates(self, dialect: Dialect) -> tuple[Candidate, ...]:
        """Every endpoint that speaks this dialect, the preferred target's first."""
        return tuple(candidate for group in self.groups(dialect) for candidate in group.candidates.values())

    def dialects(self) -> list[str]:
        """The wire formats at least one target speaks."""
        return sorted(
            {name for target in self.targets for e in target.pool.endpoints for name in e.provider.paths}
        )


class Catalog:
    """All models by public name; names the catalog does not list may be resolved by a provider's wildcard."""

    __slots__ = ("_models", "_resolve")

    def __init__(self, models: Iterable[Model], resolve: Callable[[str], Model | None] | None = None) -> None:
        self._models = {model.name: model for model in models}
        self._resolve = resolve

    def find(self, name: str) -> Model | None:
        model = self._models.get(name)
        if model is None and self._resolve is not None:
            model = self._resolve(name)
        return model

    def models(self) -> list[Model]:
        """The listed ones, in order of name."""
        return sorted(self._models.values(), key=lambda model: model.name)
