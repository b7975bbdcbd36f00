"""Endpoints by name: each address is one, or each service record."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Final, Protocol

from backends.discovery.config import DiscoveryConfig, DnsSource
from backends.discovery.dns_query import Address, Service, query, server_address, system_server
from backends.discovery.found import DiscoveryError, Found

# An empty answer may be a hiccup of the name server: so many in a row are believed.
_EMPTY_ROUNDS: Final = 3


class Resolver(Protocol):
    """Who is asked. DiscoveryError if there is no answer; a name that does not exist has no records."""

    async def addresses(self, name: str) -> list[str]: ...
    async def services(self, name: str) -> list[Service]: ...


class SystemResolver:
    """The system's own for addresses, with its search list and hosts file; its first name server for services."""

    async def addresses(self, name: str) -> list[str]:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            if error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
                return []
            raise DiscoveryError(f"the name could not be looked up ({error.strerror})") from error
        return [str(address[0]) for *_, address in found]

    async def services(self, name: str) -> list[Service]:
        return [each for each in await query(name, "SRV", system_server()) if isinstance(each, Service)]


class ServerResolver:
    """One name server, for everything."""

    def __init__(self, server: Address) -> None:
        self._server = server

    async def addresses(self, name: str) -> list[str]:
        of_both = await asyncio.gather(
            query(name, "A", self._server), query(name, "AAAA", self._server), return_exceptions=True
        )
        answers = [answer for answer in of_both if not isinstance(answer, BaseException)]
        if not answers:
            raise DiscoveryError(str(of_both[0]))
        return [each for answer in answers for each in answer if isinstance(each, str)]

    async def services(self, name: str) -> list[Service]:
        return [each for each in await query(name, "SRV", self._server) if isinstance(each, Service)]


class DnsFinder:
    """Looks again and again."""

    def __init__(
        self, settings: DiscoveryConfig, source: DnsSource, resolver: Resolver | None = None
    ) -> None:
        self._settings = settings
        self._source = source
        self._is_own = source.nameserver is not None
        self._resolver = resolver or (
            SystemResolver()
            if source.nameserver is None
            else ServerResolver(server_address(source.nameserver))
        )

    async def follow(self) -> AsyncIterator[tuple[Found, ...]]:
        """All that there are, each time it was looked."""
        empty = _EMPTY_ROUNDS  # the first answer is believed
        while True:
            found = await self.look()
            empty = 0 if found else empty + 1
            if found or empty >= _EMPTY_ROUNDS:
                yield found
            await asyncio.sleep(self._settings.every_s)

    async def look(self) -> tuple[Found, ...]:
        source = self._source
        if source.records == "address":
            assert source.port is not None
            addresses = await self._resolver.addresses(source.name)
            return tuple(
                self._found(address, address, source.port, 1.0) for address in sorted(set(addresses))
            )
        services = await self._resolver.services(source.name)
        first = min((service.priority for service in services), default=0)
        found = []
        for service in services:
            if service.priority == first:
                hosts = await self._hosts(service.host)
                found += [
                    self._found(service.host, host, service.port, float(service.weight or 1))
                    for host in hosts
                ]
        return tuple(found)

    async def _hosts(self, host: str) -> list[str]:
        """Looked up when it is connected to, as any host; but where only our server knows it, now."""
        if not self._is_own:
            return [host]
        return sorted(await self._resolver.addresses(host))[:1]

    def _found(self, known_as: str, host: str, port: int, weight: float) -> Found:
        settings = self._settings
        shown = f"[{host}]" if ":" in host else host
        url = f"{settings.scheme}://{shown}:{port}{settings.path}"
        return Found(f"{known_as}:{port}", url, settings.role, weight)
