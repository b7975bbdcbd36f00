"""Endpoints and pools: the addresses a request may be sent to.

An endpoint is one address (one provider account, one engine replica); a pool is the endpoints that are
interchangeable for a model. What is known of its load and health it has from EndpointLoad.
"""

from typing import Literal

from backends.dialect import RAW, Dialect
from backends.load import EndpointLoad
from backends.orca import Orca
from backends.provider import Provider
from backends.transport import ConnectionPool, Deadlines


class Endpoint(EndpointLoad):
    """One address, its connections and its load.

    `name` is opaque to clients (`demo/0`): it never holds an address or a key.
    """

    __slots__ = (
        "api_key",
        "base_path",
        "client_headers",
        "connections",
        "deadlines",
        "heads",
        "key_pauses",
        "orca",
        "provider",
        "rank",
    )

    def __init__(
        self,
        name: str,
        provider: Provider,
        connections: ConnectionPool,
        base_path: str,
        api_key: str | None,
        deadlines: Deadlines,
    ) -> None:
        # Sessions are hashed with the address: it stays the same wherever in the pool's list it stands.
        super().__init__(name, f"{connections.origin}{base_path}".encode())
        self.rank: int | None = None  # of a data-parallel group behind one address
        self.provider = provider
        self.connections = connections
        self.base_path = base_path  # the path of the base URL, no trailing slash
        self.api_key = api_key  # the one in use
        self.key_pauses: dict[str, float] = {}  # all keys, each with the moment from which it may be used
        self.deadlines = deadlines
        self.orca: Orca | None = None  # asks for its load with some requests
        self.client_headers = provider.client_headers()
        self.heads: dict[
            str, bytes
        ] = {}  # the unchanging start of a request head, by path (backends.adapter)

    def be_rank(self, rank: int) -> None:
        """One of several behind this address, each with a cache of its own. Before the first request."""
        self.rank = rank
        self.hash_key += b"#%d" % rank

    def take_keys(self, keys: tuple[str, ...]) -> None:
        """Further keys of the same account or of others, used when one is refused. Before the first request."""
        self.key_pauses = dict.fromkeys((self.api_key, *keys), 0.0) if self.api_key else {}

    def rotate(self, refused: str | None, now: float, for_s: float) -> bool:
        """Lets a refused key rest, and takes the next; False if there is none that is not resting.

        Of many requests that were refused with the same key, the first one changes it.
        """
        if refused is None or len(self.key_pauses) < 2:
            return False
        self.key_pauses[refused] = now + for_s
        if self.api_key != refused:
            return True
        rested = [key for key, until_at in self.key_pauses.items() if until_at <= now]
        if not rested:
            return False
        self.api_key = rested[0]
        self.heads.clear()
        return True

    def speaks(self, dialect: Dialect) -> bool:
        """Whether the upstream's own API has this wire format; anything can be passed through raw."""
        return dialect is RAW or dialect.name in self.provider.paths


EnginePriority = Literal["", "class", "client"]


class Pool:
    """Endpoints that serve the same models. `is_salted`: no tenant's prefix cache is another's.

    `priority` is who says in which order its engines run requests: their `class`, the `client` if it does, or nobody.

    `prefillers` compute prompts for `endpoints`, and answer nobody themselves; nearly always there are none.

    `is_plain`: its engines are told nothing of a request beyond what its client and its rules say.
    """

    __slots__ = ("endpoints", "is_plain", "is_salted", "name", "prefillers", "priority")

    def __init__(
        self,
        name: str,
        endpoints: tuple[Endpoint, ...],
        *,
        is_salted: bool = False,
        priority: EnginePriority = "",
        prefillers: tuple[Endpoint, ...] = (),
    ) -> None:
        self.name = name
        self.endpoints = endpoints
        self.is_salted = is_salted
        self.priority = priority
        self.is_plain = not (is_salted or priority)
        self.prefillers = prefillers

    @property
    def members(self) -> tuple[Endpoint, ...]:
        """All of them, whatever they are for."""
        return (*self.prefillers, *self.endpoints)
