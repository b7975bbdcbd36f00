"""Answers chosen by the request itself: what a well-behaved provider would say, and variations by model name.

A model named like an entry here (`crlf`, `cut-after-3`, `tools`, ...; several joined by `+`) gets that variation, so
that a client in another language or process can pick its fault. Any other model gets the plausible answer.
"""

import re
from collections.abc import Callable
from typing import Any

from tests.support import recordings
from tests.support.recordings import Tokens, ToolCall
from tests.support.scripted_answer import Answer, Pause

TWO_TOOLS = (ToolCall(), ToolCall("get_time", '{"zone":"Europe/Paris"}', "call_2"))
STRUCTURED = '{"name":"Ada","age":36,"tags":["a","é"]}'
HUGE_LINE = "x" * 1_000_000

# What is said.
CONTENTS: dict[str, dict[str, Any]] = {
    "tools": {"text": None, "tools": TWO_TOOLS[:1]},
    "parallel-tools": {"text": None, "tools": TWO_TOOLS},
    "reasoning": {"reasoning": "Let me think about it", "tokens": Tokens(reasoning=4)},
    "structured": {"text": STRUCTURED},
    "no-usage": {"tokens": None},
    "zero-usage": {"tokens": Tokens(0, 0)},
    "cached": {"tokens": Tokens(prompt=1200, output=8, cached=1024, cache_write=128)},
    "usage-every": {"usage_in": "every"},
    "usage-finish": {"usage_in": "finish"},
    "huge-line": {"text": HUGE_LINE},
    "unicode": {"text": "Grüße 日本語 🎉 naïve"},
}
# How it goes out; `N` in a name is a number.
DELIVERIES: dict[str, Callable[[Answer, int], Answer]] = {
    "hang": lambda answer, _: answer.hang_before_head(),
    "hang-after-N": lambda answer, n: answer.hang_after(n),
    "reset": lambda answer, _: answer.reset_before_head(),
    # A moment later: a reset destroys what the peer has not read yet.
    "reset-after-N": lambda answer, n: answer.insert(n, Pause(0.03)).reset_after(n + 1),
    "cut": lambda answer, _: answer.cut_before_head(),
    "cut-after-N": lambda answer, n: answer.cut_after(n),
    "ending-after-N": lambda answer, n: answer.ending_after(n),
    "crlf": lambda answer, _: answer.crlf(),
    "comments": lambda answer, _: answer.with_comments(),
    "no-space": lambda answer, _: answer.without_space(),
    "split-N": lambda answer, n: answer.split(n),
    "joined": lambda answer, _: answer.joined(),
    "trickle-N": lambda answer, n: answer.trickle(n / 1000),
    "late-N": lambda answer, n: answer.late(n / 1000),
    "close-framed": lambda answer, _: answer.framed("close"),
    "bad-json-after-N": lambda answer, n: answer.insert(n, b"data: {not json\n\n"),
    "huge-header": lambda answer, _: answer.with_headers(x_huge="h" * 200_000),
    "claims-N": lambda answer, n: answer.framed("length").claiming(n),
}


def answer_for(dialect: str | None, body: dict[str, Any]) -> Answer:
    """The answer to a request of `dialect`, as its model name and its fields ask for it."""
    family = "anthropic" if dialect in ("messages", "count_tokens") else "openai"
    contents: dict[str, Any] = {}
    deliveries: list[Callable[[Answer], Answer]] = []
    for name in str(body.get("model") or "").split("+"):
        if status := re.fullmatch(r"status-(\d{3})", name):
            return Answer.of_error(int(status[1]), family)
        if failing := re.fullmatch(r"error(-done)?-after-(\d+)", name):
            at, done = int(failing[2]), bool(failing[1])
            deliveries.append(lambda answer, at=at, done=done: answer.error_after(at, family, done=done))
        elif name in CONTENTS:
            contents |= CONTENTS[name]
        else:
            deliveries += _delivery(name)
    answer = plausible(dialect, body, contents)
    for change in deliveries:
        answer = change(answer)
    return answer


def _delivery(name: str) -> list[Callable[[Answer], Answer]]:
    found = re.search(r"\d+$", name)
    change = DELIVERIES.get(re.sub(r"\d+$", "N", name))
    return [] if change is None else [lambda answer: change(answer, int(found[0]) if found else 0)]


def plausible(dialect: str | None, body: dict[str, Any], contents: dict[str, Any] | None = None) -> Answer:
    """What a well-behaved provider says: streamed if asked, usage on chat and completion streams only if asked."""
    said = {"model": body.get("model") or recordings.MODEL, **(contents or {})}
    is_streamed = bool(body.get("stream"))
    if is_streamed and dialect in ("chat", "completions"):
        is_asked = bool((body.get("stream_options") or {}).get("include_usage"))
        said.setdefault("tokens", Tokens() if is_asked or "usage_in" in said else None)
    whole, events, understood = {
        "chat": (recordings.chat, recordings.chat_events, {"text", "tokens", "tools", "reasoning"}),
        "completions": (recordings.completion, recordings.completion_events, {"text", "tokens"}),
        "responses": (recordings.response, recordings.response_events, {"text", "tokens", "tools"}),
        "messages": (recordings.message, recordings.message_events, {"text", "tokens", "tools"}),
    }.get(dialect or "", (None, None, set()))
    if whole is None or events is None:
        return _simple(dialect, body)
    if dialect == "chat" and is_streamed:
        understood = understood | {"usage_in"}
    said = {name: value for name, value in said.items() if name in understood | {"model"}}
    if dialect != "chat" and "text" in said and said["text"] is None:
        said["text"] = ""
    return Answer.of_events(events(**said)) if is_streamed else Answer.of_json(whole(**said))


def _simple(dialect: str | None, body: dict[str, Any]) -> Answer:
    if dialect == "embeddings":
        inputs = body.get("input")
        count = len(inputs) if isinstance(inputs, list) and inputs and not isinstance(inputs[0], int) else 1
        vectors = [[0.25, -0.5, float(number)] for number in range(count)]
        return Answer.of_json(recordings.embeddings(vectors, encoding=body.get("encoding_format") or "float"))
    if dialect == "count_tokens":
        return Answer.of_json({"input_tokens": 25})
    if dialect == "models":
        card = {"id": recordings.MODEL, "object": "model", "created": recordings.CREATED, "owned_by": "tests"}
        return Answer.of_json({"object": "list", "data": [card]})
    return Answer.of_error(404)
