"""What an upstream says it used, read out of its answer into disjoint buckets.

One reader per dialect: OpenAI's formats count cached tokens inside the prompt, Anthropic's beside it. Only the
members that matter are decoded; the rest of a body is skipped in C. A number that cannot be (negative, not whole,
over 10^12, text) counts as not given; parts are cut to what their whole leaves. No usage at all is None, and
usage of zero is usage. Knows no prices.
"""

from typing import Annotated, Any, Final, TypeVar, get_args

import msgspec

from backends.dialect import EMBEDDINGS, MESSAGES, RAW, RESPONSES, Dialect
from backends.usage import Usage

_Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
_BYTES_PER_TOKEN: Final = 4
_UNREAD: Final = msgspec.Raw(b"")
# Not JSON, not UTF-8, or nested deeper than any answer is.
_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


_MAX_ID: Final = 256


class Reading(msgspec.Struct):
    """`model` and `service_tier` as the upstream named them, "" if it did not.

    `answer_id` is its name for an answer that a later request may continue: only Responses have one.
    """

    usage: Usage | None = None
    model: str = ""
    service_tier: str = ""
    answer_id: str = ""


class _CachedDetails(msgspec.Struct):
    audio_tokens: _Count | None = None


class _PromptDetails(msgspec.Struct):
    """`created_cache_tokens` (vLLM) is left out on purpose: it tells of its own memory and is not a billed write."""

    cached_tokens: _Count | None = None
    cache_write_tokens: _Count | None = None
    cache_creation_tokens: _Count | None = None  # LiteLLM's name for cache_write_tokens
    cache_read_input_tokens: _Count | None = None  # Perplexity, in Responses
    audio_tokens: _Count | None = None
    cached_tokens_details: _CachedDetails | None = None


class _OutputDetails(msgspec.Struct):
    reasoning_tokens: _Count | None = None
    audio_tokens: _Count | None = None


class _ChatUsage(msgspec.Struct):
    """Chat, legacy completions and embeddings. Below the details: where other providers put the same numbers."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    total_tokens: _Count | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _OutputDetails | None = None
    cached_tokens: _Count | None = None  # Moonshot
    prompt_cache_hit_tokens: _Count | None = None  # DeepSeek
    cache_read_input_tokens: _Count | None = None  # Databricks
    reasoning_tokens: _Count | None = None  # Perplexity, Databricks


_RESPONSES_NAMES: Final = {
    "prompt_tokens": "input_tokens",
    "completion_tokens": "output_tokens",
    "prompt_tokens_details": "input_tokens_details",
    "completion_tokens_details": "output_tokens_details",
}


class _ResponsesUsage(_ChatUsage, rename=_RESPONSES_NAMES):
    """The same under the names of Responses."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _OutputDetails | None = None


class _CacheCreation(msgspec.Struct):
    ephemeral_5m_input_tokens: _Count | None = None
    ephemeral_1h_input_tokens: _Count | None = None


class _ThinkingDetails(msgspec.Struct):
    thinking_tokens: _Count | None = None


class _Iteration(msgspec.Struct):
    type: str | None = None
    input_tokens: _Count | None = None
    cache_read_input_tokens: _Count | None = None
    cache_creation_input_tokens: _Count | None = None
    output_tokens: _Count | None = None


class MessageUsage(msgspec.Struct):
    """Anthropic's usage object. A stream sends two, the second of which replaces what it repeats."""

    input_tokens: _Count | None = None
    cache_read_input_tokens: _Count | None = None
    cache_creation_input_tokens: _Count | None = None
    cache_creation: _CacheCreation | None = None
    output_tokens: _Count | None = None
    output_tokens_details: _ThinkingDetails | None = None
    service_tier: str | None = None
    speed: str | None = None
    iterations: list[_Iteration] | None = None

    def replaced_by(self, later: "MessageUsage") -> "MessageUsage":
        """The numbers of `later`, and of this where it has none (vllm: the first event counts no cache)."""
        merged = {
            name: value if value is not None else getattr(self, name)
            for name, value in msgspec.structs.asdict(later).items()
        }
        if not later.prompt_tokens():
            # A prompt is never empty: some servers fill in zeros at the end of a stream.
            for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
                merged[name] = getattr(self, name)
        return MessageUsage(**merged)

    def prompt_tokens(self) -> int:
        return (
            (self.input_tokens or 0)
            + (self.cache_read_input_tokens or 0)
            + (self.cache_creation_input_tokens or 0)
        )

    def billed_tier(self) -> str:
        """Fast mode has its own price whatever the tier."""
        return "fast" if self.speed == "fast" else self.service_tier or ""

    def usage(self) -> Usage | None:
        if self.input_tokens is None and self.output_tokens is None:
            return None
        fresh = self.input_tokens or 0
        cache_read = self.cache_read_input_tokens or 0
        written = self.cache_creation_input_tokens or 0
        written_1h = 0
        if self.cache_creation is not None:
            written_1h = self.cache_creation.ephemeral_1h_input_tokens or 0
            written = max(written, written_1h + (self.cache_creation.ephemeral_5m_input_tokens or 0))
        output = self.output_tokens or 0
        for iteration in self.iterations or ():
            # The totals leave out what compacting the conversation took (Anthropic, context management).
            if iteration.type == "compaction":
                fresh += iteration.input_tokens or 0
                cache_read += iteration.cache_read_input_tokens or 0
                written += iteration.cache_creation_input_tokens or 0
                output += iteration.output_tokens or 0
        thinking = (
            self.output_tokens_details.thinking_tokens if self.output_tokens_details is not None else None
        )
        return Usage(fresh, cache_read, written - written_1h, written_1h, output, min(thinking or 0, output))


class _ChatAnswer(msgspec.Struct):
    model: str | None = None
    service_tier: str | None = None
    usage: _ChatUsage | None = None


class _ResponsesAnswer(msgspec.Struct):
    id: str | None = None
    model: str | None = None
    service_tier: str | None = None
    usage: _ResponsesUsage | None = None


class MessagesAnswer(msgspec.Struct):
    model: str | None = None
    usage: MessageUsage | None = None


class _Kind(msgspec.Struct):
    """What tells the formats apart where the path does not."""

    type: msgspec.Raw = _UNREAD
    object: msgspec.Raw = _UNREAD


_S = TypeVar("_S", bound=msgspec.Struct)

_chat: Final = msgspec.json.Decoder(_ChatAnswer)
_responses: Final = msgspec.json.Decoder(_ResponsesAnswer)
_messages: Final = msgspec.json.Decoder(MessagesAnswer)
_message_usage: Final = msgspec.json.Decoder(MessageUsage)
_kind: Final = msgspec.json.Decoder(_Kind)


def read_usage(dialect: Dialect, body: bytes | msgspec.Raw) -> Reading | None:
    """Usage, model and tier of a whole answer; None if it is not a JSON object."""
    if dialect is RAW:
        dialect = _dialect_of(body)
    if dialect is MESSAGES:
        message = read_message(body)
        if message is None:
            return None
        if message.usage is None:
            return Reading(None, message.model or "")
        return Reading(message.usage.usage(), message.model or "", message.usage.billed_tier())
    answer: _ChatAnswer | _ResponsesAnswer | None
    answer = _decode(_responses, body) if dialect is RESPONSES else _decode(_chat, body)
    if answer is None:
        return None
    usage: Usage | None = None
    if answer.usage is not None:
        usage = _embedded(answer.usage) if dialect is EMBEDDINGS else _inclusive(answer.usage)
    answer_id = (answer.id or "")[:_MAX_ID] if isinstance(answer, _ResponsesAnswer) else ""
    return Reading(usage, answer.model or "", answer.service_tier or "", answer_id)


def read_message(body: bytes | msgspec.Raw) -> MessagesAnswer | None:
    """An Anthropic message, whole or as a stream's `message_start` has it."""
    return _decode(_messages, body)


def read_message_usage(usage: bytes | msgspec.Raw) -> MessageUsage | None:
    """The usage object of a `message_delta`."""
    return _decode(_message_usage, usage)


def estimate_input(prompt_bytes: int) -> Usage:
    """For a request that was withdrawn before anything came back: four bytes a token, all of them fresh."""
    return Usage(input_tokens=-(-prompt_bytes // _BYTES_PER_TOKEN))


def _dialect_of(body: bytes | msgspec.Raw) -> Dialect:
    kind = _decode(_kind, body)
    if kind is not None and bytes(kind.type) == b'"message"':
        return MESSAGES
    if kind is not None and bytes(kind.object) == b'"response"':
        return RESPONSES
    return RAW


def _embedded(usage: _ChatUsage) -> Usage | None:
    """An embedding has no output; some providers give the total alone."""
    tokens = usage.prompt_tokens if usage.prompt_tokens is not None else usage.total_tokens
    return Usage(tokens) if tokens is not None else None


def _inclusive(usage: _ChatUsage) -> Usage | None:
    """OpenAI's convention: cached, written and audio tokens are parts of the prompt, reasoning of the output."""
    prompt = usage.prompt_tokens
    output = usage.completion_tokens
    total = usage.total_tokens
    if prompt is None or output is None:
        if (prompt, output, total).count(None) > 1:
            return None  # two of them tell the third; half of it is not nothing
        if prompt is None:
            prompt = max(0, (total or 0) - (output or 0))
        else:
            output = max(0, (total or 0) - prompt)
        assert output is not None
    cached = usage.cached_tokens or usage.prompt_cache_hit_tokens or usage.cache_read_input_tokens or 0
    written = audio = cached_audio = output_audio = 0
    reasoning = usage.reasoning_tokens or 0
    details = usage.prompt_tokens_details
    if details is not None:
        cached = details.cached_tokens or details.cache_read_input_tokens or cached
        written = details.cache_write_tokens or details.cache_creation_tokens or 0
        audio = details.audio_tokens or 0
        if details.cached_tokens_details is not None:
            cached_audio = details.cached_tokens_details.audio_tokens or 0
    parts = usage.completion_tokens_details
    if parts is not None:
        reasoning = parts.reasoning_tokens or reasoning
        output_audio = parts.audio_tokens or 0
    beside = total - prompt - output if total else 0
    if beside > 0 and beside == cached + written:
        prompt += beside  # the cache is counted beside the prompt, Anthropic's way under OpenAI's names
    elif beside > 0 and reasoning in (0, beside):
        # Reasoning beside the completion, not in it (xAI), or told of by the total only (Gemini's chat format).
        output += beside
        reasoning = beside
    elif reasoning > output:
        output += reasoning  # it cannot be a part of the completion (Perplexity)
    if not (audio or output_audio) and cached + written <= prompt:
        return Usage(prompt - cached - written, cached, written, 0, output, reasoning)
    cached = min(cached, prompt)
    written = min(written, prompt - cached)
    fresh = prompt - cached - written
    audio = min(audio, fresh + cached)
    cached_audio = min(max(cached_audio, audio - fresh), cached, audio)
    output_audio = min(output_audio, output - reasoning)
    return Usage(
        fresh, cached, written, 0, output, reasoning, audio - cached_audio, cached_audio, output_audio
    )


def _decode(decoder: msgspec.json.Decoder[_S], body: bytes | msgspec.Raw) -> _S | None:
    try:
        return decoder.decode(body)
    except (msgspec.ValidationError, UnicodeDecodeError):
        return _decode_what_fits(decoder.type, body)
    except _UNREADABLE:
        return None


def _decode_what_fits(kind: type[_S], body: bytes | msgspec.Raw) -> _S | None:
    """For an answer with a member of the wrong type: every member that has the right one, or can be read as it."""
    try:
        members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except _UNREADABLE:
        return None
    document: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        try:
            document[field.encode_name] = msgspec.json.decode(members.get(field.encode_name, b"null"))
        except _UNREADABLE:
            continue
    return _fitting(kind, document)


def _fitting(kind: type[_S], document: Any) -> _S | None:
    if not isinstance(document, dict):
        return None
    given: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        value = document.get(field.encode_name)
        nested = [t for t in get_args(field.type) if isinstance(t, type) and issubclass(t, msgspec.Struct)]
        if nested:
            given[field.name] = _fitting(nested[0], value)
            continue
        try:
            given[field.name] = msgspec.convert(value, field.type, strict=False)
        except msgspec.ValidationError:
            continue
    return kind(**given)
