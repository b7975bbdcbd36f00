"""`/v1/completions`: prompts as text or token ids, several at once, echo.

Owns that dialect's fields and chunks. Knows no HTTP and no engine.
"""

from typing import Any, Final

import msgspec

from local_engine.simulator import FINGERPRINT, tokenizer
from local_engine.simulator.driver import Event, Tally
from local_engine.simulator.generation import (
    ApiError,
    Common,
    Generation,
    Served,
    check,
    decode,
    refuse,
    saying_for,
)
from local_engine.simulator.reply import DONE, Label, Said, openai_usage, running_usage, sse

_DEFAULT_MAX_TOKENS: Final = 16
_MAX_PROMPTS: Final = 2048


class Request(Common, kw_only=True):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = False


_REQUEST: Final = msgspec.json.Decoder(Request)


def prompts_of(prompt: str | list[str | int | list[int]], param: str = "prompt") -> list[list[int]]:
    """A text, token ids, or a list of either, as token ids."""
    if isinstance(prompt, str):
        return [tokenizer.encode(prompt)]
    if prompt and all(isinstance(item, int) for item in prompt):
        return [_valid([item for item in prompt if isinstance(item, int)], param)]
    prompts = []
    for item in prompt:
        if isinstance(item, int):
            raise refuse(f"`{param}` mixes token ids with texts or lists.", param)
        prompts.append(tokenizer.encode(item) if isinstance(item, str) else _valid(item, param))
    if not 1 <= len(prompts) <= _MAX_PROMPTS:
        raise refuse(f"`{param}` must hold 1 to {_MAX_PROMPTS} items, got {len(prompts)}.", param)
    return prompts


def _valid(tokens: list[int], param: str) -> list[int]:
    if any(not 0 <= token <= tokenizer.MAX_TOKEN for token in tokens):
        raise refuse(f"`{param}` has a token id outside 0 to {tokenizer.MAX_TOKEN}.", param)
    return tokens


class CompletionReply:
    """One legacy completion call."""

    def __init__(self, body: bytes, served: Served, label: Label) -> None:
        request = decode(_REQUEST, body)
        # `n` prompts of one sample each default to 16 tokens, as OpenAI's API and vLLM do.
        sampling = request.sampling(_DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens)
        options = request.stream_options or {}
        if options and not request.stream:
            raise refuse("`stream_options` are only allowed when `stream` is true.", "stream_options")
        prompts = prompts_of(request.prompt)
        self.generation = Generation(
            prompts=prompts,
            saying=saying_for(request.wish(), sampling, []),
            sampling=sampling,
            stream=bool(request.stream),
            include_usage=bool(options.get("include_usage")),
            continuous_usage=bool(options.get("include_usage") and options.get("continuous_usage_stats")),
            echoes=[tokenizer.decode(prompt) for prompt in prompts] if request.echo else [],
        )
        check(self.generation.prompts, sampling, request.model, served)
        self._label = label
        self._sent_tokens = 0
        self._begun: set[int] = set()

    def begin(self) -> bytes:
        return b""

    def event(self, event: Event) -> bytes:
        self._sent_tokens += 1
        text = event.piece.text
        if event.choice not in self._begun:
            self._begun.add(event.choice)
            text = self._echo(event.choice) + text
        chunk = {**self._head(), "choices": [self._choice(event.choice, text, event.finish)]}
        if self.generation.continuous_usage:
            prompt_tokens = sum(map(len, self.generation.prompts))
            chunk["usage"] = running_usage(prompt_tokens, self._sent_tokens)
        return sse(chunk)

    def end(self, tally: Tally) -> bytes:
        if not self.generation.include_usage:
            return DONE
        return sse({**self._head(), "choices": [], "usage": openai_usage(tally, has_created=False)}) + DONE

    def failure(self, error: ApiError) -> bytes:
        return sse(error.body()) + DONE

    def whole(self, choices: list[Said], tally: Tally) -> dict[str, Any]:
        told = [self._choice(n, self._echo(n) + said.text, said.finish) for n, said in enumerate(choices)]
        return {**self._head(), "choices": told, "usage": openai_usage(tally, has_created=False)}

    def _echo(self, choice: int) -> str:
        return self.generation.echoes[choice // self.generation.sampling.n] if self.generation.echoes else ""

    def _choice(self, number: int, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}

    def _head(self) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self._label.key}",
            "object": "text_completion",
            "created": self._label.created_time,
            "model": self._label.model,
            "system_fingerprint": FINGERPRINT,
        }
