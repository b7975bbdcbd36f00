"""Where the queue keeps what it has: on this machine, or in Redis for several nodes. Chosen by the configuration.

Owns, too, by what name a process has leases: the parent knows it of each of its workers, and gives their leases back when
they die.
"""

import importlib
from typing import Final, cast

from gateway.config import Config
from gateway.limit_storage import connect
from gateway.overflow.bodies import Bodies
from gateway.overflow.endpoints import EndpointStore
from gateway.overflow.held import HeldStore
from gateway.overflow.shelf import Shelf
from gateway.overflow.store import QueueStore
from gateway.redis_config import RedisConfig, node_name
from gateway.stores.endpoint_table import SqliteEndpoints
from gateway.stores.held_sqlite import SqliteHeldStore
from gateway.stores.queue_content import Content
from gateway.stores.queue_sqlite import SqliteQueueStore
from gateway.stores.sqlite import StorageError

_TIMEOUT_S: Final = 2.0


def redis_of(config: Config) -> RedisConfig | None:
    """None: everything is on this machine. StorageError where the two settings contradict each other."""
    redis = config.storage.redis
    store = config.queue.store
    if store == "redis" and redis is None:
        raise StorageError("`queue.store` is redis: say where it is, in `storage.redis`.")
    return None if store == "sqlite" else redis


def node_of(config: Config) -> str:
    """This machine among others; the owners of leases begin with it."""
    redis = config.storage.redis
    return "local" if redis is None else node_name(config.storage.directory, redis)


def owner_name(node: str, worker: str, pid: int) -> str:
    """As whom a worker claims. No process before or after it has the same name."""
    return f"{node}:{worker}@{pid}"


def open_store(config: Config, bodies: Bodies) -> QueueStore:
    """StorageError when it cannot be used at all; that Redis is away now is no reason."""
    redis = redis_of(config)
    if redis is None:
        return SqliteQueueStore(
            config.storage.directory, bodies=bodies, result_folder=config.queue.result_folder
        )
    module = importlib.import_module("gateway.stores.queue_redis")
    content = Content(bodies, config.queue.result_folder)
    store = module.open_queue(redis, config.storage.directory, content, replicas=config.queue.replicas)
    return cast("QueueStore", store)


def open_held(config: Config) -> HeldStore:
    """Nothing is opened or sent before the first request that is held."""
    redis = redis_of(config)
    if redis is None:
        return SqliteHeldStore(config.storage.directory)
    module = importlib.import_module("gateway.stores.held_redis")
    return cast("HeldStore", module.RedisHeldStore(connect(redis, _TIMEOUT_S)))


def open_endpoints(config: Config) -> EndpointStore:
    """Receivers of webhooks that operators made."""
    redis = redis_of(config)
    if redis is None:
        return SqliteEndpoints(config.storage.directory)
    module = importlib.import_module("gateway.stores.endpoint_redis")
    return cast("EndpointStore", module.RedisEndpoints(connect(redis, _TIMEOUT_S)))


def open_shelf(config: Config, bodies: Bodies) -> Shelf:
    """The directory of files."""
    return Shelf(config.queue.files.directory or config.storage.directory / "files", bodies)
