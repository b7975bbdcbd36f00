"""How the supervisor speaks to an engine: is it up, does it generate, does it get on, sleep and wake.

Owns the requests and what is read of the answers; a failure is an answer here, never an exception. Refuses to decide
anything. Source: vLLM's OpenAI server, `/metrics`, `/sleep` and `/wake_up` (development mode).
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import aiohttp

from local_engine.plan import ReplicaPlan
from local_engine.surroundings import Work

_QUICK_S: Final = 5.0
_GENERATE_S: Final = 60.0  # the first token of a cold engine, on a busy machine
_SLEEP_S: Final = 120.0  # weights go to memory and back
_PAGE_BYTES: Final = 8 << 20
_SMALLEST: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "completion": ("/v1/completions", {"prompt": "1", "max_tokens": 1}),
    "embedding": ("/v1/embeddings", {"input": "1"}),
}
# Those that compute, and any that says that a step was made; a label `engine` for each data-parallel rank.
_REQUESTS: Final = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_STEPS: Final = (
    "vllm:iteration_tokens_total_sum",
    "vllm:iteration_tokens_total_count",
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
)
# A reranker or a speech model: it has none of these routes, or refuses the task, and that is all one can ask of it.
_NOT_OFFERED: Final = frozenset({400, 404, 405, 501})
_SAMPLE: Final = re.compile(r"(?P<name>[a-z:_]+)(?:\{(?P<labels>[^}]*)\})? (?P<value>[0-9.eE+-]+)")
_ENGINE: Final = re.compile(r'engine="([^"]*)"')


class HttpProber:
    """Over HTTP, a connection each: engines come and go. Close it at the end."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))

    async def close(self) -> None:
        await self._session.close()

    async def is_up(self, plan: ReplicaPlan) -> bool:
        """`/health` of every address it has."""
        for root in _roots(plan):
            status, _ = await self._ask("GET", f"{root}/health", plan, _QUICK_S)
            if status != 200:
                return False
        return True

    async def generate(self, plan: ReplicaPlan) -> str:
        """One token (or one vector) of every address."""
        for root in _roots(plan):
            path, body = _SMALLEST["embedding" if plan.probes_embedding else "completion"]
            body = {"model": plan.probe_model, **body}
            status, answer = await self._ask("POST", root + path, plan, _GENERATE_S, body)
            if status != 200 and status not in _NOT_OFFERED:
                return f"{status}: {answer[:200]}" if status else answer
        return ""

    async def work(self, plan: ReplicaPlan) -> Mapping[str, Work] | None:
        found: dict[str, Work] = {}
        for number, root in enumerate(_roots(plan)):
            status, page = await self._ask("GET", f"{root}/metrics", plan, _QUICK_S)
            if status != 200:
                return None
            for engine, work in read_work(page).items():
                found[f"{number}/{engine}"] = work
        return found

    async def sleep(self, plan: ReplicaPlan) -> bool:
        return await self._all(plan, "/sleep?level=1")

    async def wake(self, plan: ReplicaPlan) -> bool:
        return await self._all(plan, "/wake_up")

    async def _all(self, plan: ReplicaPlan, path: str) -> bool:
        for root in _roots(plan):
            status, _ = await self._ask("POST", root + path, plan, _SLEEP_S)
            if status != 200:
                return False
        return True

    async def _ask(
        self, method: str, url: str, plan: ReplicaPlan, timeout_s: float, body: dict[str, Any] | None = None
    ) -> tuple[int, str]:
        """Status and text; status 0 with the reason when there is no answer."""
        headers = {"authorization": f"Bearer {plan.api_key}"} if plan.api_key else {}
        try:
            async with self._session.request(
                method, url, json=body, headers=headers, timeout=aiohttp.ClientTimeout(timeout_s)
            ) as answer:
                content = await answer.content.read(_PAGE_BYTES)
                while chunk := await answer.content.read(_PAGE_BYTES):
                    if len(content) >= _PAGE_BYTES:
                        break
                    content += chunk
                return answer.status, content.decode(errors="replace")
        except TimeoutError:
            return 0, f"no answer within {timeout_s:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return 0, type(error).__name__


def read_work(page: str) -> dict[str, Work]:
    """By the label `engine`, from a metrics page in Prometheus' text format."""
    requests: dict[str, float] = {}
    steps: dict[str, float] = {}
    for line in page.splitlines():
        sample = _SAMPLE.match(line)
        if sample is None or not line.startswith("vllm:"):
            continue
        labelled = _ENGINE.search(sample["labels"] or "")
        engine = labelled[1] if labelled is not None else ""
        if sample["name"] in _REQUESTS:
            requests[engine] = requests.get(engine, 0.0) + float(sample["value"])
        elif sample["name"] in _STEPS:
            steps[engine] = steps.get(engine, 0.0) + float(sample["value"])
    return {engine: Work(round(count), steps.get(engine, 0.0)) for engine, count in requests.items()}


def _roots(plan: ReplicaPlan) -> list[str]:
    """Its addresses, without the API's path."""
    return list(dict.fromkeys(endpoint.base_url.removesuffix("/v1") for endpoint in plan.endpoints))
