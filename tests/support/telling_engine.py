"""An engine that says little and tells much: how it tokenises, and where it publishes KV events."""

from typing import Any

from aiohttp import web

OPENING = [900, 901]


class TellingEngine:
    """Start with `async with`. A word is a token, a message is `[role, words ..., 2]`.

    `sources` is what `/kv_event_sources` answers; `asked` are the bodies of `/tokenize`. With `forgetful` the template
    leaves out what assistants said before the last question, as some do with their thoughts.
    """

    def __init__(self) -> None:
        self.sources: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []
        self.forgetful = False
        self.minds_beginnings = False
        self.status = 200
        self.cached_tokens = 0  # what its answers say of their prompts
        self.waiting = 0  # what their heads say of its queue, to those who ask
        self.answers = 0
        self.asked_for_load = 0
        self._words: dict[str, int] = {}

    @property
    def base_url(self) -> str:
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}/v1"

    def tokens(self, body: dict[str, Any]) -> list[int]:
        if "prompt" in body:
            return [self._token(word) for word in body["prompt"].split()]
        tokens = [self._token(str(body["tools"]))] if body.get("tools") else []
        messages = body["messages"]
        for place, message in enumerate(messages):
            is_last = not any(after["role"] == "user" for after in messages[place + 1 :])
            words = message["content"].split()
            if self.forgetful and message["role"] == "assistant" and not is_last:
                words = []
            tokens += [self._token(message["role"]), *map(self._token, words), 2]
        return tokens + (OPENING if body.get("add_generation_prompt", True) else [])

    def _token(self, word: str) -> int:
        return self._words.setdefault(word, 1000 + len(self._words))

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body)
        roles = [message["role"] for message in body.get("messages", [])]
        is_odd = self.minds_beginnings and roles[:2] == ["user", "user"]
        if self.status != 200 or is_odd:
            return web.json_response({"error": {"message": "no"}}, status=400 if is_odd else self.status)
        return web.json_response({"tokens": self.tokens(body)})

    async def _chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        prompt = len(self.tokens(body | {"add_generation_prompt": True}))
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "So it is."},
        }
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": 3,
            "total_tokens": prompt + 3,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        headers = {}
        self.answers += 1
        if request.headers.get("endpoint-load-metrics-format") == "TEXT":
            self.asked_for_load += 1
            headers["endpoint-load-metrics"] = f"TEXT named_metrics.num_requests_waiting={self.waiting}.0"
        return web.json_response(
            {"id": "c", "object": "chat.completion", "created": 1, "model": body["model"]}
            | {"choices": [choice], "usage": usage},
            headers=headers,
        )

    async def _healthy(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _sources(self, _: web.Request) -> web.Response:
        return web.json_response(self.sources)

    async def __aenter__(self) -> "TellingEngine":
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/kv_event_sources", self._sources)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/health", self._healthy)
        self._runner = web.AppRunner(app, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
