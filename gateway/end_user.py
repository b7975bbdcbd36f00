"""Who a request says it is for, where its key is trusted to say so.

An end user's id means one person within a tenant (organisation, else team, else key), so it is kept with it. Only for
limits and reports: it proves nothing, and identifies nobody to anybody else.
"""

from collections.abc import Mapping
from typing import Final

import msgspec

from gateway.http_rules import Refusal
from gateway.limits_config import EndUsersConfig
from policies.access import is_listed
from policies.exchange import Caller

_MAX_ID_CHARACTERS: Final = 256
_text = msgspec.json.Decoder(str).decode


class _Metadata(msgspec.Struct):
    user_id: str | None = None


_metadata = msgspec.json.Decoder(_Metadata | None).decode


class EndUsers:
    """The rule of one configuration, worked out once."""

    def __init__(self, settings: EndUsersConfig) -> None:
        self._fields = settings.fields
        self._header = settings.header.encode() if settings.header else b""
        self._keys = settings.keys
        self._is_required = settings.required
        self.is_on = bool(self._fields or self._header)

    def read(self, caller: Caller, headers: Mapping[bytes, bytes], values: Mapping[str, msgspec.Raw]) -> str:
        """`{tenant}/{id}`, or "" if the key is not trusted or says nothing. Refusal when it must be said, or well."""
        if not is_listed(caller.name, self._keys):
            return ""
        found = headers.get(self._header, b"").decode("utf-8", "replace")
        for field in self._fields:
            if found:
                break
            found = _said(field, values)
        if not found:
            if self._is_required:
                places = [*([self._header.decode()] if self._header else []), *self._fields]
                raise Refusal(
                    400, "end_user_missing", f"say who this request is for, in {' or '.join(places)}", "user"
                )
            return ""
        if len(found) > _MAX_ID_CHARACTERS or not found.isprintable():
            raise Refusal(
                400,
                "invalid_end_user",
                f"an end user's id has up to {_MAX_ID_CHARACTERS} printable characters",
                "user",
            )
        return f"{caller.tenant}/{found}"


def _said(field: str, values: Mapping[str, msgspec.Raw]) -> str:
    """What is no text says nothing: whether it is acceptable is the upstream's business."""
    name, _, inner = field.partition(".")
    raw = values.get(name)
    if raw is None:
        return ""
    try:
        if not inner:
            return _text(raw)
        metadata = _metadata(raw)
    except msgspec.DecodeError:
        return ""
    return (metadata and metadata.user_id) or ""
