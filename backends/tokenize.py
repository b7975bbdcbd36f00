"""What a prompt is in tokens, by the word of the engine that will compute it: vLLM's `/tokenize`.

Owns which members of a body make its prompt and how they are asked about. The engine renders a chat with the very
template and tokenizer it answers with, which nobody else can promise to do. Refuses to know when asking pays.
Source: vLLM `entrypoints/serve/tokenize/protocol.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from backends.adapter import head_beside
from backends.pool import Endpoint
from backends.transport import Deadlines

# Of a chat, beside its messages: what may change how they are rendered. `tools` stand before the messages.
TOOLS: Final = "tools"
_OPTIONS: Final = ("chat_template", "add_special_tokens")
_KWARGS: Final = ("documents", "reasoning_effort")
# With any of these a prompt is not what `/tokenize` says, or its blocks are named by more than tokens.
_UNTELLABLE: Final = frozenset(
    {"add_generation_prompt", "continue_final_message", "truncate_prompt_tokens", "prompt_embeds"}
    | {"mm_processor_kwargs", "media_io_kwargs"}
)
_MEDIA: Final = (
    b'"image_url"',
    b'"input_audio"',
    b'"audio_url"',
    b'"video_url"',
    b'"input_image"',
    b'"file"',
)
# Everything that makes a prompt: an edit of any other member changes no token.
PROMPT_MEMBERS: Final = (
    frozenset({"messages", "prompt", TOOLS, "tool_choice", "chat_template_kwargs", *_OPTIONS, *_KWARGS})
    | _UNTELLABLE
)
# A short conversation that stands before messages whose beginning is left out.
STUB: Final = b'{"role":"user","content":"1"}'

_ANSWER_BYTES: Final = 32 << 20
_messages: Final = msgspec.json.Decoder(list[msgspec.Raw])
_kwargs: Final = msgspec.json.Decoder(dict[str, msgspec.Raw] | None)


class _Tokens(msgspec.Struct):
    tokens: list[int]


_tokens: Final = msgspec.json.Decoder(_Tokens)


class Chat(msgspec.Struct, frozen=True):
    """A chat's prompt. `options` are members as JSON text, each with a comma before it."""

    messages: list[bytes]
    tools: bytes
    options: bytes

    def asked(self, model_json: bytes, first: int = 0, *, is_opened: bool = True) -> bytes:
        """A body for `/tokenize`: of all messages, or of those from `first` on behind a stub."""
        return self._body(
            model_json, [STUB, *self.messages[first:]] if first else self.messages, first, is_opened=is_opened
        )

    def asked_stub(self, model_json: bytes, *, is_opened: bool) -> bytes:
        return self._body(model_json, [STUB], 1, is_opened=is_opened)

    def _body(self, model_json: bytes, messages: Sequence[bytes], first: int, *, is_opened: bool) -> bytes:
        opened = b"true" if is_opened else b"false"
        return b'{"model":%b,"add_generation_prompt":%b,"messages":[%b]%b%b}' % (
            *(model_json, opened, b",".join(messages), b"" if first else self.tools, self.options),
        )


def chat_of(values: Mapping[str, msgspec.Raw]) -> Chat | None:
    """None if its tokens cannot be told."""
    if not _UNTELLABLE.isdisjoint(values):
        return None
    raw = bytes(values["messages"])
    if any(mark in raw for mark in _MEDIA):
        return None
    try:
        messages = _messages.decode(raw)
        kwargs = _kwargs.decode(values.get("chat_template_kwargs", b"null")) or {}
    except msgspec.DecodeError:
        return None
    kwargs |= {name: values[name] for name in _KWARGS if name in values}
    effort = values.get("reasoning_effort", b"null")
    if bytes(effort) != b"null" and "enable_thinking" not in kwargs:
        kwargs["enable_thinking"] = msgspec.Raw(b"false" if bytes(effort) == b'"none"' else b"true")
    options = b"".join(
        b',"%b":%b' % (name.encode(), bytes(values[name])) for name in _OPTIONS if name in values
    )
    if kwargs:
        options += b',"chat_template_kwargs":' + msgspec.json.encode(kwargs)
    tools = b""
    hides_tools = bytes(values.get("tool_choice", b"")) == b'"none"'
    if TOOLS in values and bytes(values[TOOLS]) != b"null" and not hides_tools:
        tools = b',"tools":' + bytes(values[TOOLS])
    return Chat([bytes(message) for message in messages], tools, options)


def asked_text(model_json: bytes, values: Mapping[str, msgspec.Raw]) -> bytes | list[int] | None:
    """Of a completion: a body for `/tokenize`, or the tokens if they are what was sent; None if they cannot be told."""
    prompt = bytes(values["prompt"])
    if not _UNTELLABLE.isdisjoint(values):
        return None
    if prompt[:1] == b"[":
        try:
            return msgspec.json.decode(prompt, type=list[int])
        except msgspec.DecodeError:
            return None  # several prompts
    special = bytes(values.get("add_special_tokens", b"true"))
    return b'{"model":%b,"prompt":%b,"add_special_tokens":%b}' % (model_json, prompt, special)


async def tokenize(endpoint: Endpoint, body: bytes, timeout_s: float) -> list[int]:
    """UpstreamError if the engine cannot be asked; ValueError if it cannot tell."""
    start = head_beside(endpoint, "POST", "/tokenize", len(body))
    limits = Deadlines(timeout_s, timeout_s, timeout_s, 2 * timeout_s)
    reply = await endpoint.connections.send(start, body, limits)
    answer = await reply.read(_ANSWER_BYTES)
    if reply.status != 200:
        raise ValueError(f"/tokenize was answered with {reply.status}")
    try:
        return _tokens.decode(answer).tokens
    except msgspec.DecodeError as error:
        raise ValueError("/tokenize was not answered with tokens") from error
