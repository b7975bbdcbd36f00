"""What the operator says about endpoints that are not listed but found."""

import re
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from backends.local_path import LocalPath
from backends.member import Role
from local_engine.config import Section

_HOST: Final = re.compile(r"(?=.{1,253}\.?$)(?:_?[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?\.?)+")
_NAMESERVER: Final = re.compile(r"(?:[0-9.]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")


def _host(value: str) -> str:
    if not _HOST.fullmatch(value):
        raise ValueError("must be a host name")
    return value


def _nameserver(value: str) -> str:
    if not _NAMESERVER.fullmatch(value):
        raise ValueError(
            "must be an address, with a port if that is not 53: 10.0.0.2, 127.0.0.1:5353, [::1]:53"
        )
    return value


class DnsSource(Section):
    """A name and what it stands for."""

    name: Annotated[str, AfterValidator(_host)]
    """The name; with `srv` in full: `_http._tcp.engines.models.svc.cluster.local`."""
    records: Literal["address", "srv"] = "address"
    """`address`: each of its IP addresses (A, AAAA) is an engine. `srv`: each service record is one, with its port and weight."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """Where the engines listen; needed with `address`."""
    nameserver: Annotated[str, AfterValidator(_nameserver)] | None = None
    """Who is asked; null: for `address` the system's resolver, for `srv` the first of /etc/resolv.conf."""

    @model_validator(mode="after")
    def _has_port(self) -> "DnsSource":
        if (self.records == "address") == (self.port is None):
            raise ValueError("port: is needed with address, and is the records' own with srv")
        return self


class FileSource(Section):
    """A list that somebody else keeps."""

    path: LocalPath
    """One URL a line, or YAML or JSON: a list of URLs or of `{url, name, role, weight, ranks}`. Looked at every `every_s`;
    what is broken is not used."""


class KubernetesSource(Section):
    """Services of a cluster, followed through their EndpointSlices. The account needs `list` and `watch` for `endpointslices`
    of `discovery.k8s.io`."""

    selector: str = Field(min_length=1)
    """Which slices, by their labels, which are those of their services: `app=vllm`, `kubernetes.io/service-name in (a, b)`. Of
    these labels `headgate.dev/role`, `headgate.dev/weight` and `headgate.dev/ranks` are understood."""
    namespace: str | None = Field(default=None, pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """Null: the pod's own."""
    port: str | int | None = None
    """The name or number of a slice's port; null: its first."""
    api: str | None = Field(default=None, pattern=r"^https?://[^\s/]+$")
    """The API server; null: as the pod's environment says."""
    account: LocalPath | None = None
    """Folder with `token`, `ca.crt` and `namespace`; null: where Kubernetes mounts them."""


class DiscoveryConfig(Section):
    """Endpoints that come and go. Those that stay keep their sessions and connections; one that leaves finishes what it has."""

    dns: DnsSource | None = None
    """By name."""
    file: FileSource | None = None
    """In a file."""
    kubernetes: KubernetesSource | None = None
    """From Kubernetes."""
    scheme: Literal["http", "https"] = "http"
    """Of what is found by name or in Kubernetes."""
    path: str = Field(default="/v1", pattern=r"^(/[!-~]+)?$")
    """Where its API begins."""
    role: Role = "both"
    """Of what says nothing of it."""
    every_s: float = Field(default=5.0, ge=0.05)
    """How often a name or file is looked at; how soon Kubernetes is asked again when it breaks off."""

    @model_validator(mode="after")
    def _has_a_source(self) -> "DiscoveryConfig":
        if sum(source is not None for source in (self.dns, self.file, self.kubernetes)) != 1:
            raise ValueError("needs one of dns, file and kubernetes")
        return self
