"""EndpointSlices followed through an API server that does what the real one does: lists, watches, forgets, refuses."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from backends.discovery.config import DiscoveryConfig
from backends.discovery.found import DiscoveryError
from backends.discovery.kubernetes import KubernetesFinder

PATH = "/apis/discovery.k8s.io/v1/namespaces/models/endpointslices"


def a_slice(name, version, *pods, labels=None, ports=((("http", 8000)),)):
    return {
        "metadata": {"name": name, "namespace": "models", "resourceVersion": version, "labels": labels},
        "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": [address],
                "conditions": conditions,
                "targetRef": {"kind": "Pod", "name": pod} if pod else None,
            }
            for pod, address, conditions in pods
        ],
        "ports": [{"name": name, "port": port, "protocol": "TCP"} for name, port in ports],
    }


READY = {"ready": True, "serving": True, "terminating": False}
GOING = {"ready": False, "serving": True, "terminating": True}


class Api:
    """`listed` is what a list answers; what is put into `events` goes to the watch. None ends a watch."""

    def __init__(self):
        self.listed = [a_slice("s", "10", ("a", "10.0.0.1", READY))]
        self.version = "10"
        self.status = 200
        self.events = asyncio.Queue()
        self.requests = []

    async def handle(self, request):
        self.requests.append((request.path, dict(request.query), request.headers.get("authorization")))
        if self.status != 200:
            return web.Response(status=self.status)
        if "watch" not in request.query:
            return web.json_response({"metadata": {"resourceVersion": self.version}, "items": self.listed})
        response = web.StreamResponse()
        await response.prepare(request)
        while (event := await self.events.get()) is not None:
            await response.write(json.dumps(event).encode() + b"\n")
        return response


@pytest.fixture
async def api(tmp_path) -> AsyncIterator[tuple[Api, DiscoveryConfig]]:
    account = tmp_path / "account"
    account.mkdir()
    (account / "token").write_text("first-token\n")
    (account / "namespace").write_text("models")
    api = Api()
    server = web.Server(api.handle)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    source = {"selector": "app=vllm", "api": f"http://127.0.0.1:{port}", "account": str(account)}
    api.account = account
    yield api, DiscoveryConfig.model_validate({"kubernetes": source, "every_s": 0.05})
    await api.events.put(None)
    await runner.cleanup()


def told(found):
    return {each.key: (each.url, each.is_open) for each in found}


async def test_slices_are_listed_then_watched_from_there_with_the_pods_account(api):
    server, settings = api
    follow = KubernetesFinder(settings, settings.kubernetes).follow()
    assert told(await anext(follow)) == {"a:8000": ("http://10.0.0.1:8000/v1", True)}
    changed = a_slice("s", "11", ("a", "10.0.0.1", READY), ("b", "10.0.0.2", {"ready": None}))
    await server.events.put({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "10"}}})
    await server.events.put({"type": "MODIFIED", "object": changed})
    assert told(await anext(follow)).keys() == {"a:8000", "b:8000"}
    await server.events.put(
        {"type": "ADDED", "object": a_slice("t", "12", ("c", "10.0.0.3", READY), ports=[("http", 9000)])}
    )
    assert told(await anext(follow)).keys() == {"a:8000", "b:8000", "c:9000"}
    await server.events.put({"type": "DELETED", "object": a_slice("s", "13")})
    assert told(await anext(follow)).keys() == {"c:9000"}
    await follow.aclose()
    (listed, first), (watched, second) = [(path, query) for path, query, _ in server.requests[:2]]
    assert listed == watched == PATH
    assert first == {"labelSelector": "app=vllm"}
    assert (second["watch"], second["resourceVersion"]) == ("true", "10")
    assert {token for *_, token in server.requests} == {"Bearer first-token"}


async def test_one_that_is_going_or_not_ready_stays_known_and_closed(api):
    server, settings = api
    server.listed = [
        a_slice(
            "s", "1", ("a", "10.0.0.1", GOING), ("b", "10.0.0.2", {"ready": False}), (None, "10.0.0.3", {})
        )
    ]
    follow = KubernetesFinder(settings, settings.kubernetes).follow()
    assert told(await anext(follow)) == {
        "a:8000": ("http://10.0.0.1:8000/v1", False),
        "b:8000": ("http://10.0.0.2:8000/v1", False),
        "10.0.0.3:8000": ("http://10.0.0.3:8000/v1", True),
    }
    await follow.aclose()


async def test_a_watch_that_ends_goes_on_from_where_it_was_and_one_that_is_forgotten_begins_anew(api):
    server, settings = api
    follow = KubernetesFinder(settings, settings.kubernetes).follow()
    await anext(follow)
    await server.events.put({"type": "MODIFIED", "object": a_slice("s", "20", ("b", "10.0.0.2", READY))})
    assert told(await anext(follow)).keys() == {"b:8000"}
    await server.events.put(None)
    await server.events.put({"type": "ERROR", "object": {"kind": "Status", "code": 410}})
    server.listed, server.version = [a_slice("s", "30", ("c", "10.0.0.3", READY))], "30"
    (server.account / "token").write_text("second-token")
    assert told(await anext(follow)).keys() == {"c:8000"}
    await follow.aclose()
    versions = [query.get("resourceVersion") for _, query, _ in server.requests]
    assert versions[:4] == [None, "10", "20", None]
    assert server.requests[3][2] == "Bearer second-token"


async def test_labels_of_the_service_say_role_weight_and_ranks(api):
    server, settings = api
    labels = {"headgate.dev/role": "prefill", "headgate.dev/weight": "2.5", "headgate.dev/ranks": "4"}
    odd = {"headgate.dev/role": "cook", "headgate.dev/weight": "-1", "headgate.dev/ranks": "many"}
    server.listed = [
        a_slice("p", "1", ("a", "10.0.0.1", READY), labels=labels),
        a_slice("q", "1", ("b", "10.0.0.2", READY), labels=odd),
    ]
    follow = KubernetesFinder(settings, settings.kubernetes).follow()
    assert {each.key: (each.role, each.weight, each.ranks) for each in await anext(follow)} == {
        "a:8000": ("prefill", 2.5, 4),
        "b:8000": ("both", 1.0, 1),
    }
    await follow.aclose()


@pytest.mark.parametrize(("wanted", "found"), [(None, 8000), ("metrics", 9000), (9000, 9000), ("none", None)])
async def test_the_port_is_named_numbered_or_the_first(api, wanted, found):
    server, settings = api
    server.listed = [a_slice("s", "1", ("a", "10.0.0.1", READY), ports=[("http", 8000), ("metrics", 9000)])]
    source = settings.kubernetes.model_copy(update={"port": wanted})
    follow = KubernetesFinder(settings, source).follow()
    assert [each.key for each in await anext(follow)] == ([f"a:{found}"] if found else [])
    await follow.aclose()


@pytest.mark.parametrize(("status", "problem"), [(403, "needs list and watch"), (500, "answered 500")])
async def test_a_refusal_says_what_to_change(api, status, problem):
    server, settings = api
    server.status = status
    with pytest.raises(DiscoveryError, match=problem):
        await anext(KubernetesFinder(settings, settings.kubernetes).follow())


async def test_outside_of_a_cluster_the_server_must_be_named():
    settings = DiscoveryConfig.model_validate({"kubernetes": {"selector": "a=b"}})
    with pytest.raises(DiscoveryError, match=r"kubernetes\.api"):
        await anext(KubernetesFinder(settings, settings.kubernetes, {}).follow())
