"""Where answers for `Idempotency-Key` are kept: in the database of this machine, or in Redis for several nodes."""

import importlib
from typing import cast

from gateway.config import Config
from gateway.idempotency import AnswerStore, SqliteAnswers
from gateway.limit_storage import connect


def open_answers(config: Config) -> AnswerStore:
    """Nothing is opened or sent before the first request with a key."""
    redis = config.storage.redis
    if redis is None:
        return SqliteAnswers(config.storage.directory)
    module = importlib.import_module("gateway.stores.answers_redis")
    connection = connect(redis, timeout_s=redis.timeout_ms / 1000)
    return cast("AnswerStore", module.RedisAnswers(connection, config.idempotency.total_bytes))
