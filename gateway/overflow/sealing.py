"""Bodies sealed with AES-256-GCM (NIST SP 800-38D), for `gateway.overflow.bodies`.

Needs the optional `cryptography`, so nothing imports this module unless a key is set. Each place has a key of its own,
derived from the operator's, so that random nonces never come near the bound of one key; the place is authenticated.
A sealed body is: 8 bytes of the key's id, 12 of nonce, the ciphertext and its tag.
"""

import hashlib
import hmac
import os
from collections.abc import Sequence
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from gateway.overflow.bodies import BodyError

_ID_BYTES: Final = 8
_NONCE_BYTES: Final = 12


class AesSeal:
    """The first key seals, every one unseals."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = {_id_of(key): key for key in keys}
        self._newest = keys[0]

    def seal(self, body: bytes, place: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        sealed = AESGCM(_derived(self._newest, place)).encrypt(nonce, body, place)
        return _id_of(self._newest) + nonce + sealed

    def unseal(self, sealed: bytes, place: bytes) -> bytes:
        key_id, rest = sealed[:_ID_BYTES], sealed[_ID_BYTES:]
        key = self._keys.get(key_id)
        if key is None:
            raise BodyError(
                f"A stored body is encrypted with the key {key_id.hex()}, which is not in `queue.encryption`: "
                "add it behind the new one."
            )
        try:
            return AESGCM(_derived(key, place)).decrypt(rest[:_NONCE_BYTES], rest[_NONCE_BYTES:], place)
        except (InvalidTag, ValueError):
            raise BodyError("A stored body is damaged, or was moved from another place.") from None


def _id_of(key: bytes) -> bytes:
    """Tells keys apart without giving them away."""
    return hmac.digest(key, b"headgate key id", hashlib.sha256)[:_ID_BYTES]


def _derived(key: bytes, place: bytes) -> bytes:
    return hmac.digest(key, b"headgate body\0" + place, hashlib.sha256)
