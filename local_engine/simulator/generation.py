"""One generation as the engine side sees it, whatever dialect asked for it.

Owns what the dialects share: decoding a body with vLLM's errors, the chat template, the limits of the context, and
the choice of what to say. A dialect module turns its body into a `Generation` and a `Generation`'s events into its
answer. Knows no HTTP beyond a status code.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from local_engine.simulator import tokenizer
from local_engine.simulator.schema import UnsatisfiableError, instance
from local_engine.simulator.speech import Saying, Text, ToolCall, Words

T = TypeVar("T")
_SALT_REFUSED = re.compile(r"[@/\\\0]")


class ApiError(Exception):
    """An answer with an error status, in vLLM's envelope."""

    def __init__(
        self, status: int, message: str, *, kind: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind or HTTPStatus(status).phrase
        self.param = param

    def body(self) -> dict[str, Any]:
        return {
            "error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        }


def refuse(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, kind="BadRequestError", param=param)


class Served(NamedTuple):
    """What this process serves."""

    model: str
    max_model_len: int
    seed: int


class Turn(NamedTuple):
    role: str
    text: str


@dataclass(slots=True, kw_only=True)
class Sampling:
    """How to say it. Field for field what vLLM takes; what only shapes probabilities is accepted and ignored."""

    max_tokens: int | None = None
    n: int = 1
    seed: int | None = None
    stops: tuple[str, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    priority: int = 0
    cache_salt: str | None = None


@dataclass(slots=True, kw_only=True)
class Generation:
    """Prompts to answer and how to deliver the answers. Choice number = prompt number * n + sample number."""

    prompts: list[list[int]]
    saying: Saying
    sampling: Sampling
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echoes: list[str] = field(default_factory=list)  # one a prompt, said before its answers
    # A tool call forced by name ends with `stop` in the OpenAI dialects, any other with `tool_calls`.
    is_tool_named: bool = False


@dataclass(slots=True, kw_only=True)
class Wish:
    """What shape of answer was asked for. `tools` maps a name to the schema of its arguments."""

    tools: Mapping[str, Any] = field(default_factory=dict)
    tool_choice: Literal["auto", "none", "required", "named"] = "auto"
    tool_name: str | None = None
    schema: Any = None
    wants_object: bool = False
    choices: list[str] = field(default_factory=list)


class JsonSchema(msgspec.Struct):
    schema: Any


class ResponseFormat(msgspec.Struct):
    type: str
    json_schema: JsonSchema | None = None


class Common(msgspec.Struct, kw_only=True):
    """Request fields that chat and legacy completions share."""

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    priority: int = 0
    cache_salt: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    logprobs: bool | int | None = None
    prompt_logprobs: int | None = None

    def sampling(self, max_tokens: int | None) -> Sampling:
        if self.logprobs or self.prompt_logprobs is not None:
            raise refuse(
                "The simulator has no log-probabilities to report: leave out `logprobs`.", "logprobs"
            )
        return Sampling(
            max_tokens=max_tokens,
            n=1 if self.n is None else self.n,
            seed=self.seed,
            stops=stop_strings(self.stop),
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            priority=self.priority,
            cache_salt=self.cache_salt,
        )

    def wish(self) -> Wish:
        wish = Wish()
        match self.response_format:
            case None | ResponseFormat("text"):
                pass
            case ResponseFormat("json_object"):
                wish.wants_object = True
            case ResponseFormat("json_schema", JsonSchema(schema)):
                wish.schema = schema
            case other:
                message = (
                    f"`response_format` of type {other.type!r} is not known, or lacks its `json_schema`."
                )
                raise refuse(message, "response_format")
        for key, value in (self.structured_outputs or {}).items():
            if key == "json" and isinstance(value, dict):
                wish.schema = value
            elif key == "choice" and isinstance(value, list) and value and isinstance(value[0], str):
                wish.choices = value
            elif value not in (None, False):
                message = f"The simulator does not support this `structured_outputs.{key}`."
                raise refuse(message, "structured_outputs")
        return wish


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """The body as the decoder's type; ApiError 400 with the place of the first mistake."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        place = re.search(r"`\$\.?([^`]*)`", str(error))
        raise refuse(str(error), (place.group(1) or None) if place else None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise refuse(f"The request body is not valid JSON: {error}") from error


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in stops:
        raise refuse("`stop` must not contain an empty string.", "stop")
    return stops


def compact(value: Any) -> str:
    """JSON text as models write it. Not orjson: it refuses the large integers that JSON allows."""
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    except RecursionError as error:
        raise refuse("The request nests too deeply.") from error


def render(turns: Iterable[Turn], tools: Any = None) -> list[int]:
    """The chat template: turns between special tokens, tools in a turn of their own first, an open answer last."""
    tokens: list[int] = []
    if tools:
        turns = (Turn("tools", compact(tools)), *turns)
    for turn in turns:
        tokens.append(tokenizer.TURN_START)
        tokens += tokenizer.encode(turn.role)
        tokens.append(tokenizer.ROLE_END)
        tokens += tokenizer.encode(turn.text)
        tokens.append(tokenizer.TURN_END)
    return [*tokens, tokenizer.TURN_START, *tokenizer.encode("assistant"), tokenizer.ROLE_END]


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or text parts in any dialect's spelling."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise refuse("A message's content must be a text or a list of parts.", "content")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise refuse(
                f"The simulator reads text only, and a part of type {kind!r} is not text.", "content"
            )
        texts.append(text)
    return "".join(texts)


def saying_for(wish: Wish, sampling: Sampling, turns: list[Turn]) -> Saying:
    """Tool first, then structure, then words.

    With `auto`, a tool is called when the last turn is the user's and mentions its name.
    """
    if wish.tool_choice == "named" and wish.tool_name not in wish.tools:
        raise refuse(f"`tool_choice` names {wish.tool_name!r}, which is not among `tools`.", "tool_choice")
    if wish.tool_choice == "required" and not wish.tools:
        raise refuse("`tool_choice` is `required`, but there are no `tools`.", "tool_choice")
    name = wish.tool_name
    if wish.tool_choice == "required":
        name = next(iter(wish.tools))
    elif wish.tool_choice == "auto" and turns and turns[-1].role == "user":
        name = next((tool for tool in wish.tools if tool in turns[-1].text), None)
    if name is not None and wish.tool_choice != "none":
        return ToolCall(name, compact(_instance(wish.tools[name], "tools")))
    if wish.schema is not None:
        return Text(compact(_instance(wish.schema, "response_format")))
    if wish.wants_object:
        return Text('{"simulator":"headgate"}')
    if wish.choices:
        return Text(wish.choices[0])
    return Words(min_tokens=sampling.min_tokens, never_ends=sampling.ignore_eos)


def _instance(schema: Any, param: str) -> Any:
    try:
        return instance(schema if schema is not None else {"type": "object"})
    except UnsatisfiableError as error:
        raise refuse(f"No answer can be made for this JSON schema: {error}.", param) from error


def check(prompts: list[list[int]], sampling: Sampling, model: str | None, served: Served) -> None:
    """Refuse what vLLM refuses before it queues anything; fills in the default `max_tokens`."""
    if model not in (None, served.model):
        raise ApiError(404, f"The model `{model}` does not exist.", kind="NotFoundError", param="model")
    if not 1 <= sampling.n <= 128:
        raise refuse(f"`n` must be between 1 and 128, got {sampling.n}.", "n")
    if sampling.max_tokens is not None and sampling.max_tokens < 1:
        raise refuse(f"max_tokens must be at least 1, got {sampling.max_tokens}.", "max_tokens")
    if sampling.min_tokens < 0:
        raise refuse("min_tokens must not be negative.", "min_tokens")
    salt = sampling.cache_salt
    if salt is not None and (not salt or len(salt) > 128 or _SALT_REFUSED.search(salt)):
        raise refuse("`cache_salt` must be 1 to 128 characters, none of them @ / \\ or NUL.", "cache_salt")
    longest = max(map(len, prompts))
    if not all(prompts):
        raise refuse("The prompt must not be empty.", "prompt")
    asked = sampling.max_tokens or 1
    if longest + asked > served.max_model_len:
        raise refuse(
            f"This model's maximum context length is {served.max_model_len} tokens. However, you requested {asked} "
            f"output tokens and your prompt contains at least {longest} input tokens, for a total of at least "
            f"{longest + asked} tokens. Please reduce the length of the input prompt or the number of requested "
            "output tokens.",
            "input_tokens",
        )
    if sampling.max_tokens is None:
        sampling.max_tokens = served.max_model_len - longest
