"""API keys: their form, how they are made and hashed, and the ring of those in force.

A key is shown once, when it is made; kept is its HMAC under a pepper that lies outside the database. Invariants:
finding a key is memory only, and costs one HMAC whether the key exists or not, until it was found once; a caller's key never stands in
for an operator's or the other way round; no key is in a log, a message or a repr.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import string
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from gateway.stores import key_table
from gateway.stores.key_table import KeyKind, KeyRecord, NameTakenError
from gateway.stores.sqlite import (
    DATABASE_NAME,
    Connection,
    StorageError,
    explained,
    open_database,
    prepare_directory,
)
from gateway.tenants import Team, narrowed
from policies.exchange import Caller
from policies.placement.priority import DEFAULT

KeyProblem = Literal["unknown", "expired", "revoked", "blocked"]

PEPPER_NAME: Final = "pepper"
_ALPHABET: Final = string.digits + string.ascii_letters
_PREFIX: Final[dict[KeyKind, str]] = {"caller": "sk-hg-", "operator": "op-hg-"}
_ID_CHARS: Final = 8
_SECRET_CHARS: Final = 43  # 256 bits
_CHECK_CHARS: Final = 6
_PAIRS: Final = [(a + b).encode() for a in _ALPHABET for b in _ALPHABET]  # two base 62 digits at a time
_SHAPE: Final = re.compile(rb"(?:sk|op)-hg-[0-9A-Za-z]{8}_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}")
_LONGEST_KEY: Final = 512
_SHORTEST_KEY: Final = 20
_EXAMPLES: Final = (
    "sk-1234",
    "changeme",
    "change-me",
    "change_me",
    "your-",
    "your_",
    "example",
    "placeholder",
    "xxxx",
)
_POLL_S: Final = 1.0
_MAX_RECENT: Final = 1024

_log = logging.getLogger(__name__)


def mint(kind: KeyKind, key_id: str | None = None) -> tuple[str, str]:
    """A new key and its id (given when a key is rotated): `sk-hg-<id>_<secret>_<checksum>`."""
    key_id = key_id or _random(_ID_CHARS)
    body = f"{_PREFIX[kind]}{key_id}_{_random(_SECRET_CHARS)}"
    return f"{body}_{_checksum(body.encode()).decode()}", key_id


def is_well_formed(key: bytes) -> bool:
    """Our own form, checksum included: a typing error costs no look-up, and scanners find leaked keys."""
    return _SHAPE.fullmatch(key) is not None and _checksum(key[: -_CHECK_CHARS - 1]) == key[-_CHECK_CHARS:]


def hash_of(key: bytes, pepper: bytes) -> bytes:
    """What is stored of a key. Keys are random, so a fast keyed hash is the right one."""
    return hmac.digest(pepper, key, hashlib.sha256)


def pepper_id_of(pepper: bytes) -> str:
    """Tells peppers apart without giving them away."""
    return hash_of(b"pepper id", pepper).hex()[:8]


def load_pepper(storage: Path, supplied: str | None = None) -> bytes:
    """The pepper supplied, else the one in the storage directory, made on first use. StorageError says why not."""
    if supplied:
        if len(supplied) < 32:
            raise StorageError("The pepper is too short: give at least 32 random characters.")
        return supplied.encode()
    path = storage / PEPPER_NAME
    try:
        if not path.exists():
            _create_pepper(path)
        pepper = path.read_bytes().strip()
    except OSError as error:
        raise StorageError(f"Cannot use the pepper file {path}: {error.strerror}.") from error
    if len(pepper) < 32:
        raise StorageError(f"The pepper file {path} is damaged: restore it, or every key must be made anew.")
    return pepper


def _create_pepper(path: Path) -> None:
    prepare_directory(path.parent)
    draft = path.with_name(f".{PEPPER_NAME}-{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, secrets.token_hex(32).encode() + b"\n")
        os.fsync(descriptor)
        os.link(draft, path)  # whole or not at all, and the first of two processes wins
    except FileExistsError:
        pass
    finally:
        os.close(descriptor)
        draft.unlink()


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def _checksum(body: bytes) -> bytes:
    """CRC-32 in base 62, always six digits."""
    rest, low = divmod(zlib.crc32(body), len(_PAIRS))
    high, middle = divmod(rest, len(_PAIRS))
    return _PAIRS[high] + _PAIRS[middle] + _PAIRS[low]


class NewKey(NamedTuple):
    """What a key to be made is for. `expires_time` in wall clock seconds; None: never. `models` None: every one."""

    name: str
    kind: KeyKind = "caller"
    team: str = ""
    models: tuple[str, ...] | None = None
    tags: tuple[str, ...] = ()
    expires_time: int | None = None


def create_key(connection: Connection, pepper: bytes, new: NewKey, now_time: int) -> tuple[str, KeyRecord]:
    """Makes and stores a key: the key itself, which nobody can tell again, and its record.

    ValueError with a sentence when an unrevoked key of the kind has the name already.
    """
    if not new.name or not new.name.isprintable():
        raise ValueError("A key needs a name, so that reports can show it.")
    key, key_id = mint(new.kind)
    record = KeyRecord(
        id=key_id,
        kind=new.kind,
        hash=hash_of(key.encode(), pepper),
        pepper_id=pepper_id_of(pepper),
        name=new.name,
        team=new.team,
        models=new.models,
        tags=new.tags,
        created_time=now_time,
        expires_time=new.expires_time,
    )
    try:
        key_table.insert(connection, record)
    except NameTakenError as error:
        raise ValueError(
            f"There is a key named {new.name!r} already: rotate or revoke that one first."
        ) from error
    return key, record


def rotate_key(
    connection: Connection,
    pepper: bytes,
    record: KeyRecord,
    expires_time: int | None,
    old_until_time: int,
) -> str:
    """Gives the holder a new key; id, name, limits and history stay. The old key is good until `old_until_time`."""
    key, _ = mint(record.kind, record.id)
    if record.expires_time is not None:
        old_until_time = min(old_until_time, record.expires_time)
    changed = msgspec.structs.replace(
        record, hash=hash_of(key.encode(), pepper), pepper_id=pepper_id_of(pepper), expires_time=expires_time
    )
    key_table.rotate(connection, changed, old_until_time)
    return key


def expiry_of(text: str, now_time: float) -> int | None:
    """`90d`, `12h`, a day or a time (UTC unless it says otherwise), or `never`; ValueError with a sentence."""
    if text == "never":
        return None
    span = re.fullmatch(r"(\d{1,5})([hd])", text)
    if span is not None:
        return int(now_time) + int(span[1]) * (3600 if span[2] == "h" else 86_400)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is no expiry: write 90d, 12h, 2027-01-31 or never.") from None
    expires_time = int((moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp())
    if expires_time <= now_time:
        raise ValueError(f"{text!r} is in the past.")
    return expires_time


class DeclaredKey(NamedTuple):
    """A key that the operator chose and declared in the configuration. Never stored."""

    name: str
    value: str
    kind: KeyKind = "caller"
    team: str = ""
    models: frozenset[str] | None = None
    expires_time: float | None = None  # wall clock seconds
    tags: tuple[str, ...] = ()
    priority: int = DEFAULT  # place in policies.placement.priority.PRIORITIES

    def __repr__(self) -> str:
        return f"DeclaredKey({self.name!r})"


class Operator(NamedTuple):
    """Who manages the gateway. Another type than a Caller, so that one is never taken for the other."""

    key_id: str
    name: str


class _Entry(NamedTuple):
    holder: Caller | Operator
    expires_time: float | None
    is_revoked: bool
    is_blocked: bool = False


def _standing(entry: _Entry) -> Caller | None:
    """The caller, if nothing but a change of the key can turn it away."""
    is_bounded = entry.is_revoked or entry.is_blocked or entry.expires_time is not None
    return entry.holder if isinstance(entry.holder, Caller) and not is_bounded else None


def refusal_of(value: str) -> str | None:
    """Why a chosen key is not acceptable, as the end of a sentence; None when it is."""
    if len(value) < _SHORTEST_KEY:
        return f"is too short: use at least {_SHORTEST_KEY} random characters"
    if len(value) > _LONGEST_KEY:
        return f"is too long: use at most {_LONGEST_KEY} characters"
    if not (value.isascii() and value.isprintable()) or " " in value:
        return "has characters that cannot be sent in a header: use letters, digits, '-' and '_'"
    if any(example in value.lower() for example in _EXAMPLES) or len(set(value)) < 8:
        return "is an example, not a secret: use random characters"
    if value.startswith(tuple(_PREFIX.values())) and not is_well_formed(value.encode()):
        return "looks like one of ours, but its checksum is wrong: copy it again"
    return None


class Keyring:
    """The keys in force: those of the database, followed by a thread, and those declared in the configuration.

    While the database is away, the last known set stands. `clock` gives wall clock seconds.
    """

    def __init__(
        self,
        storage: Path,
        pepper: bytes,
        declared: Iterable[DeclaredKey] = (),
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.refresh_failures = 0
        self._path = storage / DATABASE_NAME
        self._pepper = pepper
        self._pepper_id = pepper_id_of(pepper)
        self._clock = clock
        self._stored: dict[bytes, _Entry] = {}
        self._hashes_of: dict[str, tuple[bytes, ...]] = {}
        self._declared: dict[bytes, _Entry] = {}
        self._teams: Mapping[str, Team] = {}
        # Keys that were found since the ring last changed, so that a busy caller costs no hash. In memory only, like
        # the request that brought them.
        # A caller instead of its entry is one whom no passing of time, only another ring, turns away.
        self._recent: dict[bytes, _Entry | Caller] = {}
        self._revision = 0
        self._stop = threading.Event()
        self.declare(declared)
        self._connection: Connection | None = None
        self.refresh()
        self._follower = threading.Thread(target=self._follow, name="keyring", daemon=True)
        self._follower.start()

    def __repr__(self) -> str:
        return f"Keyring({len(self._hashes_of)} stored, {len(self._declared)} declared)"

    def find(self, token: bytes) -> Caller | KeyProblem:
        """Whose key this is, among callers."""
        known = self._recent.get(token)
        if isinstance(known, Caller):
            return known
        holder = self._find(token)
        return "unknown" if isinstance(holder, Operator) else holder

    def find_operator(self, token: bytes) -> Operator | KeyProblem:
        """Whose key this is, among operators."""
        holder = self._find(token)
        return "unknown" if isinstance(holder, Caller) else holder

    def _find(self, token: bytes) -> Caller | Operator | KeyProblem:
        recent = self._recent
        entry = recent.get(token)
        if isinstance(entry, Caller):
            return entry
        if entry is None:
            if not (is_well_formed(token) or (self._declared and len(token) <= _LONGEST_KEY)):
                return "unknown"
            # What is compared are hashes under a secret: how long a comparison takes says nothing about any key.
            digest = hash_of(token, self._pepper)
            entry = self._stored.get(digest) or self._declared.get(digest)
            if entry is None:
                return "unknown"
            entry = _in_team(entry, self._teams)
            if len(recent) >= _MAX_RECENT:
                recent.clear()
            # Into the dict from before the look-up: if the ring changed meanwhile, it has been replaced already.
            recent[token] = _standing(entry) or entry
        return self._judged(entry)

    def find_by_id(self, key_id: str) -> Caller | KeyProblem:
        """As whom work runs that this key handed in earlier; its holder is not there to show it."""
        stored, declared = self._stored, self._declared
        hashes = self._hashes_of.get(key_id, ())
        entries = [stored[h] for h in hashes if h in stored] or [
            entry for entry in declared.values() if entry.holder.key_id == key_id
        ]
        if not entries:
            return "unknown"
        # The first is the newest: the key from before a rotation is good for a while only.
        holder = self._judged(_in_team(entries[0], self._teams))
        return "unknown" if isinstance(holder, Operator) else holder

    def _judged(self, entry: _Entry) -> Caller | Operator | KeyProblem:
        if entry.is_revoked:
            return "revoked"
        if entry.expires_time is not None and entry.expires_time <= self._clock():
            return "expired"
        return "blocked" if entry.is_blocked else entry.holder

    def use_teams(self, teams: Mapping[str, Team]) -> None:
        """What holds for all keys of a team, from now on. Any thread."""
        self._teams = teams
        self._recent = {}

    def declare(self, keys: Iterable[DeclaredKey]) -> None:
        """Replaces the declared keys, all at once. ValueError with a sentence when one is not acceptable."""
        entries: dict[bytes, _Entry] = {}
        names = set()
        for key in keys:
            refusal = refusal_of(key.value)
            if refusal is not None:
                raise ValueError(f"The key {key.name!r} {refusal}.")
            digest = hash_of(key.value.encode(), self._pepper)
            if key.name in names or digest in entries:
                raise ValueError(f"The key {key.name!r} is declared twice: names and keys must differ.")
            names.add(key.name)
            key_id = f"config:{key.name}"
            holder = (
                Operator(key_id, key.name)
                if key.kind == "operator"
                else Caller(
                    key_id,
                    key.name,
                    key.team,
                    key.models,
                    key.expires_time,
                    key.tags,
                    priority=key.priority,
                )
            )
            entries[digest] = _Entry(holder, key.expires_time, is_revoked=False)
        self._declared = entries
        self._recent = {}

    def refresh(self) -> None:
        """Takes up what changed in the database since the last time. StorageError when it cannot be read."""
        if self._connection is None:
            self._connection = open_database(self._path)
        with explained(self._path):
            if key_table.latest_revision(self._connection) < self._revision:
                # An older database was restored: what is known is of no use with it.
                changes = key_table.changed_since(self._connection, 0)
                self._revision, self._hashes_of = 0, {}
                self._stored = self._merged({}, changes)
            else:
                changes = key_table.changed_since(self._connection, self._revision)
                self._stored = self._merged(self._stored, changes)
        if changes:
            self._recent = {}

    def close(self) -> None:
        """Ends the thread; keys are still found afterwards."""
        self._stop.set()
        self._follower.join()
        if self._connection is not None:
            self._connection.close()

    def _merged(self, known: dict[bytes, _Entry], changes: list[KeyRecord]) -> dict[bytes, _Entry]:
        """The ring with the changes; a new one, since `find` may be looking at the known one."""
        ring = dict(known) if changes else known
        for record in changes:
            if record.pepper_id != self._pepper_id and record.revoked_time is None:
                _log.error("key %s was made with another pepper and cannot be used: make it anew", record.id)
            for outdated in self._hashes_of.get(record.id, ()):
                del ring[outdated]
            entries = _entries_of(record)
            ring.update(entries)
            self._hashes_of[record.id] = tuple(entries)
            self._revision = record.revision
        return ring

    def _follow(self) -> None:
        is_failing = False
        while not self._stop.wait(_POLL_S):
            try:
                self.refresh()
                is_failing = False
            except Exception as error:  # noqa: BLE001 - a thread that died would miss every later revocation
                if not is_failing:
                    _log.error("keys: what is known so far stays in force: %s", error)
                is_failing = True
                self.refresh_failures += 1
                if self._connection is not None:
                    self._connection.close()
                    self._connection = None


def _entries_of(record: KeyRecord) -> dict[bytes, _Entry]:
    holder: Caller | Operator
    if record.kind == "operator":
        holder = Operator(record.id, record.name)
    else:
        models = None if record.models is None else frozenset(record.models)
        holder = Caller(record.id, record.name, record.team, models, record.expires_time, record.tags)
    is_revoked, is_blocked = record.revoked_time is not None, record.blocked_time is not None
    entries = {record.hash: _Entry(holder, record.expires_time, is_revoked, is_blocked)}
    if record.previous_hash is not None:
        entries[record.previous_hash] = _Entry(holder, record.previous_expires_time, is_revoked, is_blocked)
    return entries


def _in_team(entry: _Entry, teams: Mapping[str, Team]) -> _Entry:
    """The entry with what its team adds to it and takes away."""
    holder = entry.holder
    if not isinstance(holder, Caller) or holder.team not in teams:
        return entry
    team = teams[holder.team]
    return entry._replace(holder=caller_in_team(holder, team), is_blocked=entry.is_blocked or team.is_blocked)


def caller_in_team(caller: Caller, team: Team) -> Caller:
    """The caller with its team's organisation and models."""
    return Caller(
        caller.key_id,
        caller.name,
        caller.team,
        narrowed(caller.models, team.models),
        caller.expires_time,
        caller.tags,
        team.organisation,
        caller.priority,
    )
