"""The SQLite schema, as forward steps.

`PRAGMA user_version` is the number of steps a database has had. A step that was released is never edited: a
change is another step. Columns of the ledger are only ever added at the end, with a default, so that rows
waiting in the in-flight files of an older version still fit.
"""

from typing import Final

_LEDGER: Final = """
CREATE TABLE ledger (
    request_id TEXT PRIMARY KEY NOT NULL,
    received_time_us INTEGER NOT NULL,
    worker TEXT NOT NULL,
    key_id TEXT NOT NULL,
    key_name TEXT NOT NULL,
    team TEXT NOT NULL,
    tags TEXT NOT NULL,
    session_hash INTEGER NOT NULL,
    dialect TEXT NOT NULL,
    is_stream INTEGER NOT NULL,
    requested_model TEXT NOT NULL,
    provider TEXT NOT NULL,
    target TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    served_model TEXT NOT NULL,
    status INTEGER NOT NULL,
    ended TEXT NOT NULL,
    error_kind TEXT NOT NULL,
    input_tokens INTEGER,
    cache_read_tokens INTEGER,
    cache_write_5m_tokens INTEGER,
    cache_write_1h_tokens INTEGER,
    output_tokens INTEGER,
    reasoning_tokens INTEGER,
    input_audio_tokens INTEGER,
    cache_read_audio_tokens INTEGER,
    output_audio_tokens INTEGER,
    is_estimated INTEGER NOT NULL,
    service_tier TEXT NOT NULL,
    cost_nanousd INTEGER,
    saved_nanousd INTEGER,
    price_source TEXT NOT NULL,
    price_kind TEXT NOT NULL,
    card_hash TEXT NOT NULL,
    ttft_us INTEGER,
    duration_us INTEGER,
    overhead_us INTEGER
) STRICT;
CREATE INDEX ledger_by_time ON ledger (received_time_us);
CREATE INDEX ledger_by_key ON ledger (key_id, received_time_us);
CREATE TRIGGER ledger_refuses_update BEFORE UPDATE ON ledger
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_refuses_delete BEFORE DELETE ON ledger
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""

# `hash` is HMAC-SHA256(pepper, key). After a rotation the key before stays valid until `previous_expires_time`.
_KEYS: Final = """
CREATE TABLE api_key (
    id TEXT PRIMARY KEY NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('caller', 'operator')),
    hash BLOB NOT NULL UNIQUE,
    pepper_id TEXT NOT NULL,
    previous_hash BLOB,
    previous_expires_time INTEGER,
    name TEXT NOT NULL,
    team TEXT NOT NULL,
    models TEXT,
    tags TEXT NOT NULL,
    created_time INTEGER NOT NULL,
    expires_time INTEGER,
    revoked_time INTEGER,
    revision INTEGER NOT NULL
) STRICT;
CREATE INDEX api_key_by_revision ON api_key (revision);
CREATE UNIQUE INDEX api_key_by_name ON api_key (kind, name) WHERE revoked_time IS NULL;
"""

# Answers kept for `Idempotency-Key`. `status` is NULL while the request runs; a small row first, then what is large.
_KEPT_ANSWERS: Final = """
CREATE TABLE kept_answer (
    scope BLOB PRIMARY KEY NOT NULL,
    fingerprint BLOB NOT NULL,
    tenant TEXT NOT NULL,
    owner TEXT NOT NULL,
    lease_until_time REAL NOT NULL,
    expires_time REAL NOT NULL,
    status INTEGER,
    is_stream INTEGER NOT NULL DEFAULT 0,
    request_id TEXT NOT NULL DEFAULT '',
    headers BLOB NOT NULL DEFAULT x'',
    body BLOB NOT NULL DEFAULT x''
) STRICT;
CREATE INDEX kept_answer_by_expiry ON kept_answer (expires_time);
CREATE INDEX kept_answer_running ON kept_answer (owner) WHERE status IS NULL;
"""

# Teams and limits that operators set beside the configuration; NULL in a team: what the configuration says.
# `revision` rises with every change of either, so that a reader sees cheaply that nothing has changed.
_TENANTS: Final = """
CREATE TABLE team (
    name TEXT PRIMARY KEY NOT NULL,
    organisation TEXT,
    models TEXT,
    is_blocked INTEGER,
    created_time INTEGER NOT NULL
) STRICT;
CREATE TABLE stored_limit (
    scope TEXT NOT NULL,
    name TEXT NOT NULL,
    spec TEXT NOT NULL,
    created_time INTEGER NOT NULL,
    PRIMARY KEY (scope, name)
) STRICT;
CREATE TABLE raised_limit (
    scope TEXT NOT NULL,
    name TEXT NOT NULL,
    amount INTEGER NOT NULL,
    until_time INTEGER NOT NULL,
    PRIMARY KEY (scope, name)
) STRICT;
CREATE TABLE tenants_revision (revision INTEGER NOT NULL) STRICT;
INSERT INTO tenants_revision VALUES (0);
ALTER TABLE api_key ADD COLUMN blocked_time INTEGER;
ALTER TABLE ledger ADD COLUMN organisation TEXT NOT NULL DEFAULT '';
ALTER TABLE ledger ADD COLUMN end_user TEXT NOT NULL DEFAULT '';
"""

_WASTE: Final = """
ALTER TABLE ledger ADD COLUMN failed_attempts TEXT NOT NULL DEFAULT '[]';
ALTER TABLE ledger ADD COLUMN wasted_nanousd INTEGER DEFAULT 0;
"""

_PLACEMENT: Final = """
ALTER TABLE ledger ADD COLUMN session_state TEXT NOT NULL DEFAULT 'none';
ALTER TABLE ledger ADD COLUMN place_reason TEXT NOT NULL DEFAULT '';
ALTER TABLE ledger ADD COLUMN predicted_cached_tokens INTEGER;
ALTER TABLE ledger ADD COLUMN waited_us INTEGER NOT NULL DEFAULT 0;
ALTER TABLE ledger ADD COLUMN answer_id TEXT NOT NULL DEFAULT '';
CREATE INDEX ledger_by_answer ON ledger (answer_id) WHERE answer_id != '';
"""

# Rows of other nodes are in the ledger, too; those of this one have no node. What was collected so far: of each node up
# to which of its rows, and up to which entry of the stream they came by.
_NODES: Final = """
ALTER TABLE ledger ADD COLUMN node TEXT NOT NULL DEFAULT '';
CREATE TABLE ledger_node (node TEXT PRIMARY KEY NOT NULL, position INTEGER NOT NULL) STRICT;
CREATE TABLE ledger_reader (
    one INTEGER PRIMARY KEY CHECK (one = 1), epoch TEXT NOT NULL, entry TEXT NOT NULL
) STRICT;
"""

# `next_time` NULL: delivered or given up, `error` says which.
_ALERTS: Final = """
CREATE TABLE alert (
    id TEXT PRIMARY KEY NOT NULL,
    payload BLOB NOT NULL,
    raised_time INTEGER NOT NULL
) STRICT;
CREATE INDEX alert_by_time ON alert (raised_time);
CREATE TABLE alert_delivery (
    alert_id TEXT NOT NULL REFERENCES alert (id) ON DELETE CASCADE,
    receiver TEXT NOT NULL,
    next_time REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (alert_id, receiver)
) STRICT;
CREATE INDEX alert_delivery_due ON alert_delivery (next_time) WHERE next_time IS NOT NULL;
"""

# Receivers of the queue's webhooks; `record` is JSON.
_WEBHOOK_ENDPOINTS: Final = """
CREATE TABLE webhook_endpoint (id TEXT PRIMARY KEY NOT NULL, record BLOB NOT NULL) STRICT;
"""

# Jobs whose callers wait on a connection, or did until a moment ago.
_HELD: Final = """
CREATE TABLE held (
    job_id TEXT PRIMARY KEY NOT NULL,
    tenant TEXT NOT NULL,
    scope BLOB NOT NULL,
    since_time REAL NOT NULL,
    until_time REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX held_by_scope ON held (scope, since_time);
CREATE INDEX held_by_end ON held (until_time);
"""

_PREFILL: Final = """
ALTER TABLE ledger ADD COLUMN prefill_endpoint TEXT NOT NULL DEFAULT '';
ALTER TABLE ledger ADD COLUMN prefill_us INTEGER NOT NULL DEFAULT 0;
"""

STEPS: Final[tuple[str, ...]] = (
    _LEDGER,
    _KEYS,
    _KEPT_ANSWERS,
    _TENANTS,
    _WASTE,
    _PLACEMENT,
    _NODES,
    _ALERTS,
    _WEBHOOK_ENDPOINTS,
    _HELD,
    _PREFILL,
)
