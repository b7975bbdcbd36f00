"""Hosts that are reached without the outbound proxy: names with their subdomains, addresses, networks, or `*` for all.

What cannot match any host is refused: a wrong line would send requests the other way without a word.
"""

import ipaddress
import re

_NAME = re.compile(r"(\*|\*?\.?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?)")


def host_pattern(pattern: str) -> str:
    """The pattern as it is; an empty one, of a variable that is not set, matches nothing. ValueError when it is none."""
    if not pattern or _NAME.fullmatch(pattern):
        return pattern
    try:
        ipaddress.ip_network(pattern, strict=False)
    except ValueError:
        raise ValueError(
            f'"{pattern}" is no host name, address or network such as 10.0.0.0/8; scheme and port are left out'
        ) from None
    return pattern


def is_listed(host: str, patterns: tuple[str, ...]) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        names = (pattern.lstrip("*").lstrip(".").lower() for pattern in patterns)
        return "*" in patterns or any(host == name or host.endswith(f".{name}") for name in names if name)
    return "*" in patterns or any(_contains(pattern, address) for pattern in patterns)


def _contains(pattern: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    try:
        return address in ipaddress.ip_network(pattern, strict=False)
    except ValueError:
        return False
