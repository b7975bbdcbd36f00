"""A session's identity, and its tenant's part of a cache.

The session key is hashed under a secret and scoped to the tenant, so that nobody can aim at another tenant's
endpoint; so is the salt of prefix caches, so that nobody can ask what another tenant's cache holds. Knows nothing of
where the key was found.
"""

import hashlib
from typing import Final

from backends.adapter import Edits
from policies.exchange import Caller, Exchange

_SALT: Final = "cache_salt"


def session_secret(pepper: bytes) -> bytes:
    """The secret of session hashes, from the secret that keys are hashed under: the same in every process."""
    return hashlib.blake2b(pepper, person=b"session", digest_size=32).digest()


def session_hash(secret: bytes, caller: Caller, key: bytes) -> int:
    """64 bits, never 0 (0 means: no session)."""
    tenant = (caller.team or caller.key_id).encode()
    digest = hashlib.blake2b(tenant + b"\0" + key, digest_size=8, key=secret).digest()
    return int.from_bytes(digest, "big") or 1


def cache_salt(secret: bytes, caller: Caller, asked: bytes) -> str:
    """What vLLM takes as `cache_salt`: the tenant's, combined with the one the client asked for, if any."""
    tenant = (caller.team or caller.key_id).encode()
    return hashlib.blake2b(
        tenant + b"\0" + asked, person=b"cache salt", digest_size=16, key=secret
    ).hexdigest()


def salted(exchange: Exchange, secret: bytes) -> Edits | None:
    """The request's changes to its body, and the tenant's salt; no rule's change touches that."""
    edits, caller, document = exchange.edits, exchange.caller, exchange.document
    if caller is None or document is None:
        return edits
    salt = cache_salt(secret, caller, bytes(document.values.get(_SALT, b"")))
    member = b'"%b":"%b"' % (_SALT.encode(), salt.encode())
    if edits is None:
        return Edits(frozenset(), {_SALT: member})
    return Edits(edits.drops - {_SALT}, {**edits.sets, _SALT: member})
