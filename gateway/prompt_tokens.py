"""Prompts in tokens for pools whose caches are known exactly: asked of the engines, before a request is placed.

Owns whom to ask, how long that may take and what is done without an answer: then the approximate index places the
request. A conversation that goes on costs its new messages, not all of them (`policies.placement.conversations`). A
request of any other pool never comes here.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec

from backends.errors import UpstreamError
from backends.kv_blocks import Chain
from backends.pool import Endpoint
from backends.tokenize import PROMPT_MEMBERS, Chat, asked_text, chat_of, tokenize
from policies.exchange import Exchange
from policies.placement.block_index import BlockIndex
from policies.placement.conversations import Conversations, Known, Template, message_keys
from policies.routing import Target
from policies.session import cache_salt

# Of one worker, whatever its pools.
_REMEMBERED_BYTES: Final = 32 << 20
# What is rendered whole; a longer prompt is known only by the turns that made it long.
_WHOLE_BYTES: Final = 256 << 10
# What is split into messages at all: a millisecond's work.
_MOST_BYTES: Final = 1 << 20
_PREAMBLE_BYTES: Final = 4096
# Hashed without a pause: less than a millisecond.
_STEP_TOKENS: Final = 4096


class PromptTokens:
    """One per worker. `counts`: prompts of indexed pools, by how they were told or why they could not be."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._known = Conversations(_REMEMBERED_BYTES)

    async def read(self, exchange: Exchange, secret: bytes) -> None:
        """Leaves `exchange.known`, or None where the tokens cannot be had in time."""
        model = exchange.model
        assert model is not None
        for target in exchange.targets or model.targets:
            if target.blocks is not None:
                break
        else:
            return
        outcome = "untellable"
        try:
            async with asyncio.timeout(target.patience_s):
                outcome = await self._read(exchange, target, target.blocks, secret)
        except TimeoutError:
            outcome = "late"
        except (UpstreamError, ValueError):
            outcome = "failed"
        self.counts[outcome] = self.counts.get(outcome, 0) + 1

    async def _read(self, exchange: Exchange, target: Target, index: BlockIndex, secret: bytes) -> str:
        document, edits = exchange.document, exchange.edits
        dialect = exchange.dialect.name
        if document is None or dialect not in {"chat", "completions"}:
            return "untellable"
        if edits is not None and not (edits.drops | edits.sets.keys()).isdisjoint(PROMPT_MEMBERS):
            return "untellable"
        if not index.block_size or not exchange.is_affine:
            return "unindexed"
        if len(document.body) > _MOST_BYTES:
            return "too_long"
        asked = min(target.pool.endpoints, key=lambda endpoint: (endpoint.health <= 0, endpoint.in_flight))
        empty = Chain(
            index.block_size,
            every=target.upstream_model if target.upstream_model in index.adapters else None,
            first=_salt_of(exchange, target, secret),
        )
        conversation = _Conversation(self._known, asked, target, empty)
        if dialect == "completions":
            return await conversation.read_text(exchange)
        chat = chat_of(document.values)
        return (
            "untellable"
            if chat is None or not chat.messages
            else await conversation.read_chat(exchange, chat)
        )


class _Conversation:
    """One prompt being read."""

    def __init__(self, known: Conversations, endpoint: Endpoint, target: Target, empty: Chain) -> None:
        self._known = known
        self._endpoint = endpoint
        self._target = target
        self._empty = empty

    async def read_text(self, exchange: Exchange) -> str:
        assert exchange.document is not None
        asked = asked_text(self._target.model_json, exchange.document.values)
        if asked is None:
            return "untellable"
        template = self._known.template(self._seed(b"completions"))
        if not template.is_useful():
            return "refuted"
        if isinstance(asked, list):
            return self._found(exchange, await _extended(self._empty, asked), template)
        if len(asked) > _WHOLE_BYTES:
            return "too_long"
        (key,) = message_keys(self._seed(b"text"), [asked])
        _, chain = self._known.longest([key], self._empty.block_size)
        if chain is None:
            chain = await _extended(self._empty, await self._ask(asked))
            self._known.remember(key, chain)
        return self._found(exchange, chain, template)

    async def read_chat(self, exchange: Exchange, chat: Chat) -> str:
        seed = self._seed(chat.tools + b"\0" + chat.options)
        template = self._known.template(seed)
        if not template.is_useful():
            return "refuted"
        keys = message_keys(seed, chat.messages)
        count, known = self._known.longest(keys, self._empty.block_size)
        if not template.is_joined:
            count, known = 0, None
        if known is not None and count == len(keys):
            return self._found(exchange, known.extended(template.opening or ()), template)
        size = sum(map(len, chat.messages[count:]))
        if size > _WHOLE_BYTES:
            return "too_long"
        parts: Chain | None = None
        if known is None:
            tokens = await self._ask_whole(chat, template)
            await self._learn_first(chat, keys[0], template, tokens)
        else:
            added = await self._ask_end(chat, count, template)
            messages = None if added is None else template.without_opening(added)
            if messages is not None:
                parts = await _extended(known, messages)
                if not template.wants_proof():
                    return self._remember(exchange, keys[-1], parts, template)
            tokens = await self._ask(chat.asked(self._target.model_json))
        messages = template.without_opening(tokens)
        chain = await _extended(self._empty, tokens if messages is None else messages)
        if parts is not None:
            template.compared(is_same=messages is not None and chain.is_same(parts))
        if messages is None or not template.is_joined:
            return self._found(exchange, await _extended(self._empty, tokens), template)
        return self._remember(exchange, keys[-1], chain, template)

    async def _ask_whole(self, chat: Chat, template: Template) -> list[int]:
        """All of the prompt, and, the first time, how this model begins an answer."""
        model = self._target.model_json
        if template.is_known or not template.is_joined:
            return await self._ask(chat.asked(model))
        whole, stub, opened = await asyncio.gather(
            self._ask(chat.asked(model)),
            self._ask(chat.asked_stub(model, is_opened=False)),
            self._ask(chat.asked_stub(model, is_opened=True)),
            return_exceptions=True,
        )
        if isinstance(whole, BaseException):
            raise whole
        if isinstance(stub, BaseException) or isinstance(opened, BaseException):
            template.is_joined = False  # it does not bear so short a conversation
        else:
            template.learn(stub, opened)
        return whole

    async def _learn_first(self, chat: Chat, key: int, template: Template, whole: list[int]) -> None:
        """A long preamble is what other conversations will begin with, too."""
        if len(chat.messages) < 2 or len(chat.messages[0]) + len(chat.tools) < _PREAMBLE_BYTES:
            return
        if not template.is_joined:
            return
        first = Chat(chat.messages[:1], chat.tools, chat.options)
        try:
            tokens = await self._ask(first.asked(self._target.model_json, is_opened=False))
        except ValueError:
            return  # its template wants more than one message
        if whole[: len(tokens)] == tokens:
            self._known.remember(key, await _extended(self._empty, tokens))

    async def _ask_end(self, chat: Chat, first: int, template: Template) -> list[int] | None:
        """The messages from `first` on, and the opening; None if this model cannot be asked so."""
        stub = template.stub
        if stub is None:
            return None
        try:
            tokens = await self._ask(chat.asked(self._target.model_json, first))
        except ValueError:
            tokens = []  # it minds who speaks after whom
        if tokens[: len(stub)] != list(stub):
            template.is_joined = False
            return None
        return tokens[len(stub) :]

    async def _ask(self, body: bytes) -> list[int]:
        return await tokenize(self._endpoint, body, self._target.patience_s)

    def _remember(self, exchange: Exchange, key: int, messages: Chain, template: Template) -> str:
        self._known.remember(key, messages)
        return self._found(exchange, messages.extended(template.opening or ()), template)

    def _found(self, exchange: Exchange, chain: Chain, template: Template) -> str:
        exchange.known = Known(self._target.pool.name, chain, template)
        return "told"

    def _seed(self, options: bytes) -> int:
        """Of everything before the first message: the pool and its model, the tenant, tools and options."""
        pool = self._target.pool.name.encode()
        (seed,) = message_keys(self._empty.root, [b"\0".join((pool, self._target.model_json, options))])
        return seed


async def _extended(chain: Chain, tokens: Sequence[int]) -> Chain:
    """In steps between which others have their turn."""
    if len(tokens) <= _STEP_TOKENS:
        return chain.extended(tokens)
    for start in range(0, len(tokens), _STEP_TOKENS):
        chain = chain.extended(tokens[start : start + _STEP_TOKENS])
        await asyncio.sleep(0)
    return chain


def _salt_of(exchange: Exchange, target: Target, secret: bytes) -> str | None:
    """What the engine will get as `cache_salt`."""
    assert exchange.document is not None
    asked = bytes(exchange.document.values.get("cache_salt", b""))
    if target.pool.is_salted:
        assert exchange.caller is not None
        return cache_salt(secret, exchange.caller, asked)
    if not asked or asked == b"null":
        return None
    try:
        return msgspec.json.decode(asked, type=str)
    except msgspec.DecodeError:
        return None  # the engine refuses it
