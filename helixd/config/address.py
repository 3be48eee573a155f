"""A `host:port` as users write it, and whether only this machine can reach it. Resolves no names."""

import ipaddress
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address. `port` 0 means "any free port" where one listens."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it. A name other than localhost counts as reachable from outside."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @classmethod
    def of(cls, text: str) -> Self:
        """Read `host:port`, with IPv6 hosts in brackets. Raises ValueError saying what is wrong."""
        host, colon, port = text.rpartition(":")
        if not colon:
            raise ValueError(f"{text!r} has no port; write HOST:PORT")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(f"{text!r} is ambiguous; write an IPv6 address in brackets, as in [::1]:7070")
        if not host or any(character.isspace() for character in host):
            raise ValueError(f"{text!r} has no host; write HOST:PORT, with 0.0.0.0 to listen on every interface")
        if ":" not in host and not _resolvable(host):
            raise ValueError(f"{text!r}: no host has such a name; each part of it has 1 to 63 characters")
        if not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ValueError(f"{text!r}: the port must be a number from 0 to 65535")
        return cls(host, int(port))


def _resolvable(host: str) -> bool:
    """Whether a resolver would take it: it encodes names so before it asks anybody."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True
