"""Prefill on one engine and decode on another: vLLM's KV transfer protocol, between simulators.

Owns the leases of prefilled blocks that wait to be collected, what a request's `kv_transfer_params` mean, and how the
engine that decodes gets at the one that prefilled (over HTTP, where vLLM has a side channel). No cache is copied: the
digests of its blocks are compared instead, and the way takes no time but that of the call. Knows no dialect.

Invariants: blocks that are lent are held until they are collected, given back unread, or their lease runs out; what
is lent is collected once; a request that was sent here with blocks to collect gives them back however it ends.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Iterator
from typing import Any, Final, Literal

import aiohttp
import msgspec

from local_engine.prefix_cache import BlockHasher
from local_engine.simulator.driver import EngineStoppedError
from local_engine.simulator.engine import Engine, Loaded, Sequence
from local_engine.simulator.generation import Generation, decode, refuse

_LOAD_FAILED: Final = "Internal server error"  # all that vLLM says of it
_READ_S: Final = 5.0  # after which vLLM gives a side channel up


class ExtraConfig(msgspec.Struct, kw_only=True, frozen=True):
    kv_lease_duration: float = 30.0


class TransferConfig(msgspec.Struct, kw_only=True):
    """Of vLLM's `--kv-transfer-config`, what makes a difference here."""

    kv_connector: Literal["NixlConnector"]
    kv_role: Literal["kv_both", "kv_producer", "kv_consumer"] = "kv_both"
    kv_buffer_device: str = "cpu"
    kv_load_failure_policy: Literal["fail", "recompute"] = "fail"
    kv_connector_extra_config: ExtraConfig = ExtraConfig()


class Params(msgspec.Struct, kw_only=True):
    """What a request says. To the engine that prefills: `do_remote_decode`; to the other: all that the first returned."""

    do_remote_decode: bool = False
    do_remote_prefill: bool = False
    remote_engine_id: str | None = None
    remote_request_id: str | None = None
    remote_host: str | None = None
    remote_port: int | None = None
    remote_num_tokens: int | None = None
    remote_prefill_cached_tokens: int | None = None


class _Asked(msgspec.Struct):
    kv_transfer_params: Params | None = None


class Collect(msgspec.Struct, kw_only=True):
    """From engine to engine: read what was lent under this name, or give it back."""

    remote_engine_id: str
    remote_request_id: str


_ASKED: Final = msgspec.json.Decoder(_Asked)
_COLLECT: Final = msgspec.json.Decoder(Collect)


class Connector:
    """One engine's side of transfers, prefilling and decoding."""

    def __init__(self, config: TransferConfig, engine: Engine) -> None:
        self.engine_id = uuid.uuid4().hex
        self.port = 0  # where others reach this engine; known when it listens
        self.expired = 0
        self._config = config
        self._engine = engine
        self._lent: dict[str, tuple[Sequence, asyncio.TimerHandle]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._returns: set[asyncio.Task[None]] = set()

    @property
    def lent(self) -> int:
        """Prefilled requests that nobody has collected yet."""
        return len(self._lent)

    def asked(self, body: bytes) -> Params | None:
        """What a request says of transfers; None if nothing."""
        params = decode(_ASKED, body).kv_transfer_params
        if params is None or not (params.do_remote_decode or params.do_remote_prefill):
            return None
        if params.do_remote_prefill and not (params.remote_request_id and params.remote_engine_id):
            return None  # vLLM warns, and computes the prompt itself
        return params

    def lend(self, sequence: Sequence) -> dict[str, Any]:
        """The answer's params, for a prompt that has been computed to be decoded elsewhere. The lease begins."""
        name = uuid.uuid4().hex
        lease_s = self._config.kv_connector_extra_config.kv_lease_duration
        timer = asyncio.get_running_loop().call_later(lease_s, self._expire, name)
        self._lent[name] = (sequence, timer)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(range(len(sequence.blocks)))],
            "remote_engine_id": self.engine_id,
            "remote_request_id": name,
            "remote_host": "127.0.0.1",
            "remote_port": self.port,
            "tp_size": 1,
            "remote_num_tokens": sequence.prompt_tokens,
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": sequence.cached_tokens,
        }

    def read(self, body: bytes) -> dict[str, Any]:
        """The other engine reads: how many tokens, and the digests of their blocks. ApiError 400: nothing is lent by that name."""
        collect = decode(_COLLECT, body)
        lent = self._lent.get(collect.remote_request_id)
        if lent is None or collect.remote_engine_id != self.engine_id:
            raise refuse("nothing is lent by that name, or no longer", "remote_request_id")
        sequence, timer = lent
        timer.cancel()  # it is being read: vLLM's reader keeps the lease up
        assert sequence.hasher is not None
        size = self._engine.settings.block_size
        digests = sequence.hasher.digests[: sequence.prompt_tokens // size]
        return {"tokens": sequence.prompt_tokens, "digests": [digest.hex() for digest in digests]}

    def give_back(self, body: bytes) -> dict[str, Any]:
        """The other engine is done, or does not want it."""
        self._take_back(decode(_COLLECT, body).remote_request_id)
        return {}

    async def collect(self, params: Params, generation: Generation) -> Loaded | None:
        """Before the request is queued: what of its prompt came from the other engine; None: it must be computed here.

        EngineStoppedError if it did not come, and this engine is told to fail then.
        """
        params.do_remote_prefill = False  # from here on there is nothing to give back twice
        try:
            return await self._read(params, generation)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            if self._config.kv_load_failure_policy == "recompute":
                return None
            raise EngineStoppedError(_LOAD_FAILED) from error
        finally:
            self._return_soon(params)

    @contextlib.contextmanager
    def owing(self, params: Params) -> Iterator[None]:
        """While the request is here: refused or left by its client before it collected, it gives back what it was lent."""
        try:
            yield
        finally:
            if params.do_remote_prefill:
                self._return_soon(params)

    def _return_soon(self, params: Params) -> None:
        task = asyncio.get_running_loop().create_task(self._return(params))
        self._returns.add(task)
        task.add_done_callback(self._returns.discard)

    async def close(self) -> None:
        for _, timer in self._lent.values():
            timer.cancel()
        for task in self._returns:
            task.cancel()
        if self._session is not None:
            await self._session.close()

    async def _read(self, params: Params, generation: Generation) -> Loaded:
        (prompt,) = generation.prompts
        told = await self._call("/sim/kv/read", params)
        hasher = BlockHasher(self._engine.settings.block_size, salt=generation.sampling.cache_salt)
        hasher.extend(prompt)
        if told["digests"] != [digest.hex() for digest in hasher.digests] or told["tokens"] != len(prompt):
            raise ValueError("what was lent is another prompt's")
        return Loaded(len(prompt) - 1, params.remote_prefill_cached_tokens or 0)

    async def _return(self, params: Params) -> None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            await self._call("/sim/kv/give_back", params)

    async def _call(self, path: str, params: Params) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(_READ_S))
        assert params.remote_engine_id is not None
        assert params.remote_request_id is not None
        collect = Collect(
            remote_engine_id=params.remote_engine_id, remote_request_id=params.remote_request_id
        )
        url = f"http://{params.remote_host}:{params.remote_port}{path}"
        async with self._session.post(url, data=msgspec.json.encode(collect)) as answer:
            answer.raise_for_status()
            return msgspec.json.decode(await answer.read())

    def _expire(self, name: str) -> None:
        self.expired += 1
        self._take_back(name)

    def _take_back(self, name: str) -> None:
        sequence, timer = self._lent.pop(name, (None, None))
        if timer is not None:
            timer.cancel()
        if sequence is not None:
            self._engine.release(sequence)
