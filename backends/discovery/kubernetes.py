"""Endpoints of services in Kubernetes, followed by a watch on their EndpointSlices.

Speaks the API with a pod's own account: the token is read again for each request, since it is renewed in place. Owns what
slices mean. Reference: Kubernetes API, `discovery.k8s.io/v1`.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlencode

import msgspec

from backends.adapter import USER_AGENT
from backends.discovery.config import DiscoveryConfig, KubernetesSource
from backends.discovery.found import MOST, DiscoveryError, Found
from backends.errors import UpstreamError
from backends.member import Role
from backends.origin import Origin
from backends.transport import ConnectionPool, Deadlines, Reply

ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_LABEL: Final = "headgate.dev/"
_MOST_BYTES: Final = 16 << 20
# A server ends a watch after minutes by itself; one that is silent for longer is a connection that died.
_WATCH_S: Final = 300
_LIST: Final = Deadlines(10.0, 30.0, 30.0, 60.0)
_WATCH: Final = Deadlines(10.0, _WATCH_S + 30.0, _WATCH_S + 30.0, _WATCH_S + 60.0)
_GONE: Final = 410


class _Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None


class _Conditions(msgspec.Struct):
    ready: bool | None = None
    terminating: bool | None = None


class _TargetRef(msgspec.Struct):
    name: str = ""


class _Endpoint(msgspec.Struct, rename="camel"):
    addresses: list[str]
    conditions: _Conditions = msgspec.field(default_factory=_Conditions)
    target_ref: _TargetRef | None = None


class _Port(msgspec.Struct):
    name: str | None = None
    port: int | None = None


class Slice(msgspec.Struct, rename="camel"):
    """An EndpointSlice, what matters of it."""

    metadata: _Metadata
    endpoints: list[_Endpoint] | None = None
    ports: list[_Port] | None = None


class _Slices(msgspec.Struct):
    metadata: _Metadata
    items: list[Slice]


class _Event(msgspec.Struct):
    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR"]
    object: msgspec.Raw


class _Status(msgspec.Struct):
    code: int = 0


_SLICES: Final = msgspec.json.Decoder(_Slices)
_EVENT: Final = msgspec.json.Decoder(_Event)


class KubernetesFinder:
    """Lists, then watches from there; lists again where the server has forgotten."""

    def __init__(
        self,
        settings: DiscoveryConfig,
        source: KubernetesSource,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._settings = settings
        self._source = source
        self._environ = os.environ if environ is None else environ
        self._account = source.account or ACCOUNT

    async def follow(self) -> AsyncIterator[tuple[Found, ...]]:
        """All that there are, each time a slice has changed."""
        authority = self._account / "ca.crt"
        try:
            origin, _ = Origin.parse(self._api(), ca_file=str(authority) if authority.exists() else None)
        except ValueError as error:
            raise DiscoveryError(f"the Kubernetes API cannot be reached: {error}") from error
        connections = ConnectionPool(origin)
        try:
            while True:
                slices, version = await self._list(connections)
                yield self._found(slices)
                async for _ in self._watch(connections, slices, version):
                    yield self._found(slices)
        except UpstreamError as error:
            raise DiscoveryError(f"the Kubernetes API did not answer ({error.kind})") from error
        except msgspec.DecodeError as error:
            raise DiscoveryError("the Kubernetes API's answer cannot be read") from error
        finally:
            await connections.close()

    async def _list(self, connections: ConnectionPool) -> tuple[dict[str, Slice], str]:
        reply = await self._get(connections, {}, _LIST)
        body = await reply.read(_MOST_BYTES)
        if reply.status != 200:
            raise DiscoveryError(_refusal(reply.status))
        listed = _SLICES.decode(body)
        return {each.metadata.name: each for each in listed.items[:MOST]}, listed.metadata.resource_version

    async def _watch(
        self, connections: ConnectionPool, slices: dict[str, Slice], version: str
    ) -> AsyncIterator[None]:
        """Changes `slices` and says so; ends where they must be listed again."""
        while True:
            began = version
            asked = {"watch": "true", "resourceVersion": version, "allowWatchBookmarks": "true"}
            reply = await self._get(connections, asked | {"timeoutSeconds": str(_WATCH_S)}, _WATCH)
            try:
                if reply.status == _GONE:
                    return
                if reply.status != 200:
                    raise DiscoveryError(_refusal(reply.status))
                async for line in _lines(reply):
                    event = _EVENT.decode(line)
                    if event.type == "ERROR":
                        code = msgspec.json.decode(event.object, type=_Status).code
                        if code == _GONE:
                            return
                        raise DiscoveryError(_refusal(code))
                    changed = msgspec.json.decode(event.object, type=Slice)
                    version = changed.metadata.resource_version or version
                    if event.type == "DELETED":
                        slices.pop(changed.metadata.name, None)
                    elif event.type != "BOOKMARK":
                        slices[changed.metadata.name] = changed
                    if event.type != "BOOKMARK":
                        yield
            finally:
                reply.close()
            if began == version:  # it ended without a word: not at once again
                await asyncio.sleep(min(self._settings.every_s, 1.0))

    async def _get(
        self, connections: ConnectionPool, asked: Mapping[str, str], deadlines: Deadlines
    ) -> Reply:
        namespace = self._source.namespace or self._read("namespace", "default")
        query = urlencode({"labelSelector": self._source.selector, **asked})
        lines = [
            f"GET /apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices?{query} HTTP/1.1",
            f"host: {connections.origin.authority}",
            f"user-agent: {USER_AGENT}",
            "accept: application/json",
        ]
        token = self._read("token", "")
        if token.isprintable() and token:
            lines.append(f"authorization: Bearer {token}")
        return await connections.send("\r\n".join([*lines, "", ""]).encode(), b"", deadlines)

    def _found(self, slices: Mapping[str, Slice]) -> tuple[Found, ...]:
        return tuple(
            found for each in slices.values() for found in found_in(each, self._settings, self._source)
        )

    def _api(self) -> str:
        if self._source.api is not None:
            return self._source.api
        host = self._environ.get("KUBERNETES_SERVICE_HOST", "")
        port = self._environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise DiscoveryError("this is no pod of a cluster: give `kubernetes.api`")
        return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"

    def _read(self, name: str, otherwise: str) -> str:
        try:
            return (self._account / name).read_text().strip()
        except OSError:
            return otherwise


class _Lines:
    """What a watch says, line by line, as it comes."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[bytes | UpstreamError | None] = asyncio.Queue()
        self._rest = b""

    def on_body(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MOST_BYTES:
            raise ValueError("a line without an end")
        for line in filter(None, lines):
            self.heard.put_nowait(line)

    def on_end(self, error: UpstreamError | None) -> None:
        self.heard.put_nowait(error)


async def _lines(reply: Reply) -> AsyncIterator[bytes]:
    sink = _Lines()
    reply.relay(sink)
    while True:
        line = await sink.heard.get()
        if isinstance(line, UpstreamError) and line.kind != "incomplete":
            raise line
        if not isinstance(line, bytes):
            return  # a server ends its watches, and some without good manners
        yield line


def found_in(each: Slice, settings: DiscoveryConfig, source: KubernetesSource) -> list[Found]:
    """One for each endpoint of a slice. One that is not ready, or is going, is known and gets nothing new."""
    port = _port_of(each, source.port)
    if port is None:
        return []
    labels = each.metadata.labels or {}
    role = _role_of(labels.get(_LABEL + "role"), settings.role)
    found = []
    for endpoint in each.endpoints or ():
        if not endpoint.addresses:
            continue
        host = endpoint.addresses[0]  # of one endpoint, all are equal
        shown = f"[{host}]" if ":" in host else host
        pod = endpoint.target_ref.name if endpoint.target_ref is not None else ""
        is_ready = endpoint.conditions.ready is not False and not endpoint.conditions.terminating
        found.append(
            Found(
                f"{pod or host}:{port}",
                f"{settings.scheme}://{shown}:{port}{settings.path}",
                role,
                _number(labels.get(_LABEL + "weight"), 1.0),
                max(1, min(1024, int(_number(labels.get(_LABEL + "ranks"), 1.0)))),
                is_ready,
            )
        )
    return found


def _port_of(each: Slice, wanted: str | int | None) -> int | None:
    for port in each.ports or ():
        if wanted is None or wanted in (port.name, port.port) or str(port.port) == wanted:
            return port.port
    return None


def _role_of(label: str | None, otherwise: Role) -> Role:
    match label:
        case "both" | "prefill" | "decode":
            return label
    return otherwise


def _number(label: str | None, otherwise: float) -> float:
    """A label is whatever somebody wrote."""
    try:
        number = float(label or otherwise)
    except ValueError:
        return otherwise
    return number if 0 < number < float("inf") else otherwise


def _refusal(status: int) -> str:
    if status in (401, 403):
        return f"the Kubernetes API refused ({status}): the account needs list and watch for endpointslices"
    return f"the Kubernetes API answered {status}"
