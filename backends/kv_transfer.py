"""The two calls of disaggregated prefill as bytes: what each says, and what comes back.

vLLM's protocol (`kv_transfer_params`, as its own proxy example for the NIXL connector has it): the first engine computes
the prompt and one token, and its answer says where the prompt's cache is; the second gets the request as it was, and
that word for word. Knows neither who is asked nor when.
"""

from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from backends.adapter import Edits
from backends.dialect import COMPLETIONS, MESSAGES, RESPONSES, Dialect

_NAME: Final = "kv_transfer_params"
_COMPUTE: Final = (
    b'"kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,'
    b'"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)
# Nothing of these is in the prompt, and a single token cannot obey them.
_LEFT_OUT: Final = frozenset(
    {
        *("stream", "stream_options", "min_tokens", "logprobs", "top_logprobs", "background"),
        *("response_format", "structured_outputs"),
    }
)
_EDITED: Final = Edits(frozenset(), {})


class _Answer(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")


_ANSWER: Final = msgspec.json.Decoder(_Answer)


def brief(dialect: Dialect, values: Mapping[str, msgspec.Raw], edits: Edits | None) -> Edits:
    """The changes that make a request one for its prompt and a single token, on top of `edits`."""
    given = edits or _EDITED
    limits = ["max_output_tokens"] if dialect is RESPONSES else ["max_tokens"]
    if "max_completion_tokens" in values:
        limits.append("max_completion_tokens")
    sets = {name: member for name, member in given.sets.items() if name not in _LEFT_OUT}
    sets |= {name: b'"%b":1' % name.encode() for name in limits}
    return Edits(given.drops - set(limits) | _LEFT_OUT, sets, given.reserved)


def to_compute(brief_edits: Edits) -> Edits:
    """For the engine that computes the prompt."""
    return msgspec.structs.replace(brief_edits, reserved={**brief_edits.reserved, _NAME: _COMPUTE})


def to_collect(params: bytes, edits: Edits | None) -> Edits:
    """For the engine that answers. `params` as they came; they are good for one request."""
    given = edits or _EDITED
    member = b'"%b":%b' % (_NAME.encode(), params)
    return msgspec.structs.replace(given, reserved={**given.reserved, _NAME: member})


def params_in(answer: bytes) -> bytes | None:
    """Where the prompt's cache is, undecoded; None if the answer does not say."""
    try:
        params = bytes(_ANSWER.decode(answer).kv_transfer_params)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return params if params[:1] == b"{" else None


def has_begun(dialect: Dialect) -> Callable[[bytes], bool]:
    """Whether a stream's beginning is more than what an engine sends before it has the prompt's cache.

    A load that fails is told in band: in a chat after the chunk with the role (vLLM 0.32), with nothing before it elsewhere.
    """
    if dialect is COMPLETIONS:
        return bool
    if dialect is MESSAGES:
        return lambda data: b"content_block_" in data or b"error" in data
    if dialect is RESPONSES:
        return lambda data: b".delta" in data or b"error" in data or b"response.failed" in data
    return lambda data: data.count(b"\ndata:") > 0
