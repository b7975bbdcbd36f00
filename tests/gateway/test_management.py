import asyncio
import json
import socket
import sqlite3
from collections.abc import AsyncIterator

import pytest
from aiohttp import ClientResponse, ClientSession, web

from gateway.exposition import CONTENT_TYPE
from gateway.first_start import make_first_keys
from gateway.keys import Keyring, load_pepper
from gateway.limits_config import TeamConfig
from gateway.management import answers
from gateway.management import app as management
from gateway.management.app import Plane
from gateway.reload import Reloaded
from gateway.tenants import Declared


class FakeService:
    """What is managed: here only what was asked of it."""

    def __init__(self) -> None:
        self.is_ready = True
        self.has_open_metrics = False
        self.details: dict[str, str] = {}
        self.is_restarting = False
        self.webhooks = None
        self.declared = Declared({"research": TeamConfig(organisation="acme")}, ())
        self.declared_key_names = frozenset({"ci"})
        self.result: Reloaded | Exception = Reloaded(config=None)  # type: ignore[arg-type]

    def readiness(self) -> dict[str, str]:
        return self.details

    async def metrics(self) -> bytes:
        return b"headgate_workers 1.0\n"

    def status(self) -> dict[str, object]:
        return {"version": "1.2.3"}

    async def reload(self) -> Reloaded:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def restart(self) -> bool:
        was, self.is_restarting = self.is_restarting, True
        return not was


class Client:
    """An operator at the management plane."""

    def __init__(self, tmp_path) -> None:
        self.storage = tmp_path
        self.pepper = load_pepper(tmp_path)
        self.keys = make_first_keys(tmp_path, self.pepper, ())
        self.keyring = Keyring(tmp_path, self.pepper)
        self.service = FakeService()

    async def ask(self, method: str, path: str, key: str | None = "", **options) -> ClientResponse:
        headers = options.pop("headers", {})
        token = self.keys.operator if key == "" else key
        if token is not None:
            headers = {"authorization": f"Bearer {token}", **headers}
        response = await self.session.request(method, self.url + path, headers=headers, **options)
        await response.read()
        return response

    async def get(self, path: str, key: str | None = "", **options) -> ClientResponse:
        return await self.ask("GET", path, key, **options)


@pytest.fixture
async def client(tmp_path) -> AsyncIterator[Client]:
    client = Client(tmp_path)
    plane = Plane(client.service, client.keyring, client.storage, client.pepper)
    runner = web.AppRunner(plane.application(), access_log=None, auto_decompress=False)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listener).start()
    client.port = listener.getsockname()[1]
    client.url = f"http://127.0.0.1:{client.port}"
    async with ClientSession() as client.session:
        yield client
    await runner.cleanup()
    client.keyring.close()


async def error_of(response: ClientResponse) -> dict[str, object]:
    error = (await response.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_liveness_and_readiness_are_open_and_say_only_ok_or_not(client):
    assert await (await client.get("/livez", None)).json() == {"status": "ok"}
    assert (await client.get("/readyz", None)).status == 200
    client.service.is_ready = False
    response = await client.get("/readyz", None)
    assert response.status == 503
    assert await response.json() == {"status": "not ready"}
    assert (await client.get("/livez", None)).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/metrics"),
        ("GET", "/api/status"),
        ("GET", "/api/costs"),
        ("POST", "/api/reload"),
        ("POST", "/api/restart"),
        ("GET", "/api/keys"),
        ("POST", "/api/keys"),
        ("GET", "/api/keys/x"),
        ("DELETE", "/api/keys/x"),
        ("PATCH", "/api/keys/x"),
        ("POST", "/api/keys/x/rotate"),
        ("GET", "/api/teams"),
        ("POST", "/api/teams"),
        ("GET", "/api/teams/x"),
        ("PATCH", "/api/teams/x"),
        ("DELETE", "/api/teams/x"),
        ("GET", "/api/limits"),
        ("PUT", "/api/limits"),
        ("DELETE", "/api/limits"),
        ("PUT", "/api/limits/raised"),
        ("DELETE", "/api/limits/raised"),
        ("GET", "/anything"),
    ],
)
async def test_everything_else_wants_an_operators_key(client, method, path):
    missing = await client.ask(method, path, None)
    assert missing.status == 401
    assert missing.headers["www-authenticate"] == "Bearer"
    assert (await error_of(missing))["code"] == "missing_api_key"
    unknown = await client.ask(method, path, "op-hg-nonsense")
    assert (await error_of(unknown))["code"] == "invalid_api_key"
    caller = await client.ask(method, path, client.keys.caller)
    assert caller.status == 403
    error = await error_of(caller)
    assert error["code"] == "wrong_plane"
    assert "data plane" in error["message"]


async def test_a_key_may_come_as_x_api_key(client):
    response = await client.get("/api/status", None, headers={"x-api-key": client.keys.operator})
    assert await response.json() == {"version": "1.2.3"}


async def test_metrics_are_text_and_open_only_if_the_operator_says_so(client):
    response = await client.get("/metrics")
    assert response.headers["content-type"] == CONTENT_TYPE
    assert await response.text() == "headgate_workers 1.0\n"
    client.service.has_open_metrics = True
    assert (await client.get("/metrics", None)).status == 200
    assert (await client.get("/api/status", None)).status == 401


async def test_answers_name_their_request_and_not_the_server(client):
    for response in (await client.get("/livez", None), await client.get("/nowhere")):
        assert response.headers["x-request-id"].startswith("req_")
        assert response.headers["cache-control"] == "no-store"
        assert "server" not in response.headers
        assert not any(name.lower().startswith("access-control") for name in response.headers)


async def test_keys_are_made_listed_rotated_and_revoked(client):
    wanted = {"name": "bob", "team": "red", "models": ["demo"], "tags": ["x"], "expires": "12h"}
    made = await client.ask("POST", "/api/keys", json=wanted)
    assert made.status == 201
    record = await made.json()
    key = record.pop("key")
    assert key.startswith("sk-hg-")
    assert {name: record[name] for name in ("name", "team", "models", "tags", "kind", "state")} == {
        **{name: wanted[name] for name in ("name", "team", "models", "tags")},
        "kind": "caller",
        "state": "active",
    }
    assert await (await client.get("/api/keys/bob")).json() == record
    listed = await (await client.get("/api/keys")).json()
    assert [each["name"] for each in listed] == ["bob", "first caller", "first operator"]
    assert key not in json.dumps(listed)

    rotated = await (
        await client.ask("POST", f"/api/keys/{record['id']}/rotate", json={"grace": "1h"})
    ).json()
    assert rotated["id"] == record["id"]
    assert rotated["key"] != key

    assert (await (await client.ask("DELETE", "/api/keys/bob")).json())["state"] == "revoked"
    assert len(await (await client.get("/api/keys")).json()) == 2
    assert len(await (await client.get("/api/keys?all=1")).json()) == 3
    again = await client.ask("POST", f"/api/keys/{record['id']}/rotate")
    assert again.status == 400


async def test_an_operator_can_end_an_operators_key_and_it_is_refused_within_seconds(client):
    made = await (await client.ask("POST", "/api/keys", json={"name": "eve", "kind": "operator"})).json()
    client.keyring.refresh()
    assert (await client.get("/api/status", made["key"])).status == 200
    await client.ask("DELETE", "/api/keys/eve")
    client.keyring.refresh()
    refused = await client.get("/api/status", made["key"])
    assert refused.status == 401
    assert (await error_of(refused))["code"] == "revoked_api_key"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "hint"),
    [
        ("POST", "/api/keys", "{", 400, "JSON"),
        ("POST", "/api/keys", "[]", 400, "object"),
        ("POST", "/api/keys", "", 400, "JSON"),
        ("POST", "/api/keys", '{"name": ""}', 400, "name"),
        ("POST", "/api/keys", '{"name": 7}', 400, "name"),
        ("POST", "/api/keys", '{"name": "a\\nb"}', 400, "name"),
        ("POST", "/api/keys", '{"name": "x", "kind": "root"}', 400, "kind"),
        ("POST", "/api/keys", '{"name": "x", "nmae": 1}', 400, "nmae"),
        ("POST", "/api/keys", '{"name": "x", "expires": "soon"}', 400, "soon"),
        ("POST", "/api/keys", '{"name": "x", "models": "demo"}', 400, "models"),
        ("POST", "/api/keys", '{"name": "first caller"}', 400, "already"),
        ("POST", "/api/keys/first caller/rotate", '{"grace": "never"}', 400, "24h"),
        ("GET", "/api/keys/nobody", "", 404, "no such key"),
        ("DELETE", "/api/keys/nobody", "", 404, "no such key"),
        ("GET", "/api/costs?by=colour", "", 400, "provider"),
        ("GET", "/api/costs?since=yesterday-ish", "", 400, "7d"),
        ("GET", "/api", "", 404, "/api"),
        ("PUT", "/api/keys", "{}", 405, "PUT"),
        ("POST", "/api/keys", "x" * (management.BODY_BYTES + 1), 413, "bytes"),
    ],
)
async def test_bad_input_gets_a_sentence_that_says_what_to_change(client, method, path, body, status, hint):
    response = await client.ask(method, path, data=body)
    assert response.status == status
    assert hint in (await error_of(response))["message"]


async def test_bodies_with_a_content_encoding_are_refused_unread(client):
    response = await client.ask("POST", "/api/keys", data=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    assert response.status == 415


async def test_a_body_that_does_not_arrive_is_given_up(client, monkeypatch):
    monkeypatch.setattr(answers, "BODY_S", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    head = f"POST /api/keys HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\nauthorization: Bearer {client.keys.operator}"
    writer.write(head.encode() + b"\r\n\r\n{")
    assert (await reader.readline()).startswith(b"HTTP/1.1 408")
    writer.close()
    await writer.wait_closed()


async def test_costs_are_summed_as_asked(client):
    response = await client.get("/api/costs?by=team&since=24h&until=1h")
    body = await response.json()
    assert body["by"] == "team"
    assert body["groups"] == []
    assert body["total"]["cost_nanousd"] == 0


async def test_a_reload_tells_what_was_wrong_or_waits_for_a_restart(client):
    client.service.result = Reloaded(None, (), ("server.port",))
    good = await client.ask("POST", "/api/reload")
    assert await good.json() == {"applied": True, "problems": [], "needs_restart": ["server.port"]}
    client.service.result = Reloaded(None, ("config.yaml:3: server.prot: unknown key",))
    bad = await client.ask("POST", "/api/reload")
    assert bad.status == 422
    assert (await bad.json())["problems"] == ["config.yaml:3: server.prot: unknown key"]
    client.service.result = RuntimeError("worker w0-1 keeps its old configuration: KeyError")
    failed = await client.ask("POST", "/api/reload")
    assert failed.status == 500
    assert (await failed.json())["applied"] is False


async def test_a_restart_is_begun_once(client):
    assert (await client.ask("POST", "/api/restart")).status == 202
    assert (await client.ask("POST", "/api/restart")).status == 409


async def test_a_database_that_cannot_be_used_is_a_503_with_the_reason(client):
    (client.storage / "headgate.db").unlink()
    response = await client.get("/api/keys")
    assert response.status == 503
    assert "There is no database" in (await error_of(response))["message"]


async def test_a_bug_is_a_500_that_names_the_request_and_nothing_else(client, caplog):
    client.service.result = KeyError("sk-secret")
    response = await client.ask("POST", "/api/reload")
    assert response.status == 500
    text = await response.text()
    assert "sk-secret" not in text
    assert response.headers["x-request-id"] in text
    assert caplog.records[-1].request_id == response.headers["x-request-id"]


async def test_no_key_is_in_the_database(client):
    made = await (await client.ask("POST", "/api/keys", json={"name": "bob"})).json()
    database = sqlite3.connect(client.storage / "headgate.db")
    dump = "\n".join(database.iterdump())
    database.close()
    assert made["key"] not in dump
    assert made["key"].rpartition("_")[0].partition("_")[2] not in dump


async def test_a_key_is_changed_and_blocked(client):
    await client.ask("POST", "/api/keys", json={"name": "app"})
    changed = await client.ask(
        "PATCH", "/api/keys/app", json={"team": "web", "models": ["m*"], "expires": "never", "blocked": True}
    )
    told = await changed.json()
    assert (told["team"], told["models"], told["expires"], told["state"]) == ("web", ["m*"], None, "blocked")
    told = await (await client.ask("PATCH", "/api/keys/app", json={"models": ["*"], "blocked": False})).json()
    assert (told["models"], told["state"], told["team"]) == (None, "active", "web")


async def test_teams_are_made_changed_and_forgotten(client):
    made = await client.ask("POST", "/api/teams", json={"name": "web", "models": ["m1"]})
    assert (made.status, await made.json()) == (
        201,
        {"name": "web", "organisation": "", "models": ["m1"], "blocked": False},
    )
    assert (await client.ask("POST", "/api/teams", json={"name": "research"})).status == 400
    told = await (await client.ask("PATCH", "/api/teams/research", json={"blocked": True})).json()
    assert (told["organisation"], told["blocked"]) == ("acme", True)
    assert [team["name"] for team in await (await client.get("/api/teams")).json()] == ["research", "web"]
    await client.ask("DELETE", "/api/teams/web")
    missing = await client.get("/api/teams/web")
    assert missing.status == 404
    assert "no such team" in (await error_of(missing))["message"]


async def test_limits_are_set_raised_and_unset(client):
    wanted = {"scope": "team:research", "usd": "12.5", "per": "month", "zone": "Europe/Berlin"}
    told = await (await client.ask("PUT", "/api/limits", json=wanted)).json()
    assert (told["name"], told["amount"], told["source"]) == ("money-month", "12.5", "database")
    which = {"scope": "team:research", "name": "money-month"}
    raised = {**which, "amount": 20, "until": "12h"}
    told = await (await client.ask("PUT", "/api/limits/raised", json=raised)).json()
    assert (told["amount"], told["usual_amount"]) == ("20", "12.5")
    assert await (await client.get("/api/limits")).json() == [told]
    assert (await client.ask("DELETE", "/api/limits/raised", json=which)).status == 200
    assert (await client.ask("DELETE", "/api/limits", json=which)).status == 200
    assert await (await client.get("/api/limits")).json() == []
    assert (await client.ask("DELETE", "/api/limits", json=which)).status == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "problem"),
    [
        ("PUT", "/api/limits", {"scope": "team:a", "usd": 1}, "needs per"),
        ("PUT", "/api/limits", {"scope": "team:a", "furlongs": 1, "per": "day"}, "furlongs"),
        ("PUT", "/api/limits", {"scope": "key:ghost", "usd": 1, "per": "day"}, "no such key"),
        ("PATCH", "/api/teams/research", {"modles": ["a"]}, "modles"),
        ("POST", "/api/teams", {}, "name"),
    ],
)
async def test_what_is_no_team_or_limit_says_why(client, method, path, body, problem):
    response = await client.ask(method, path, json=body)
    assert response.status in (400, 404)
    assert problem in (await error_of(response))["message"]
