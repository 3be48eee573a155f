"""TLS from files: the API's context, and the two of a daemon whose peers know one another by certificate.

Peers trust one private authority and nothing else, and each side shows a certificate. Who a certificate speaks for are
the DNS names in its subjectAltName, compared with peer ids letter by letter; addresses and common names say nothing.
Everything that reads files blocks. A context in use takes new certificates for the connections that begin then.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from helixd.errors import ConfigError

_ROUND_TRIPS = 8


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate (with those between it and its authority) and its private key, as PEM files."""

    cert: Path
    key: Path

    def load_into(self, context: ssl.SSLContext) -> None:
        """Raises ConfigError naming what is wrong."""
        try:
            # Without an answer at hand, OpenSSL would ask the terminal.
            context.load_cert_chain(self.cert, self.key, password=_no_passphrase)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.cert} and {self.key} are no certificate and its key: {_why(error)}") from error


@dataclass(frozen=True, slots=True)
class PeerTls:
    """The contexts of peer links, and the files they are from. `names`: the peer ids our certificate speaks for."""

    authority: Path
    pair: KeyPair
    server: ssl.SSLContext
    client: ssl.SSLContext
    names: frozenset[str]

    @classmethod
    def load(cls, authority: Path, pair: KeyPair) -> "PeerTls":
        """From files. Raises ConfigError if they do not fit together, or a peer of that authority would refuse."""
        contexts = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for context in contexts:
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.check_hostname = False
            context.verify_mode = ssl.CERT_REQUIRED
            _trust(context, authority)
            pair.load_into(context)
        server, client = contexts
        try:
            names = certified_names(_introduce(server, client))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{pair.cert} is not good for {authority}: {_why(error)}") from error
        return cls(authority, pair, server, client, names)

    def renewed(self, authority: Path, pair: KeyPair) -> "PeerTls":
        """From other files, or from what is in them now, for `take`. Raises ConfigError if they are no substitute."""
        fresh = PeerTls.load(authority, pair)
        if not self.names <= fresh.names:
            lost = ", ".join(sorted(self.names - fresh.names))
            raise ConfigError(f"{pair.cert} does not speak for {lost}, as the one in use does")
        return fresh

    def take(self, fresh: "PeerTls") -> bool:
        """Use the files of `fresh` for the connections that begin from now on; they are read again.

        Call it from the thread that makes the connections: OpenSSL does not like its contexts changed by another one.
        Returns whether that is all of it: an authority that was trusted before stays trusted until a restart.
        """
        for context in (self.server, self.client):
            _trust(context, fresh.authority)
            fresh.pair.load_into(context)
        return set(self.client.get_ca_certs(binary_form=True)) == set(fresh.client.get_ca_certs(binary_form=True))


def api_context(pair: KeyPair) -> ssl.SSLContext:
    """The API's context; clients show no certificate. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    pair.load_into(context)
    return context


def certified_names(certificate: Mapping[str, object] | None) -> frozenset[str]:
    """The DNS names in the subjectAltName of a certificate, in the form of `SSLSocket.getpeercert`."""
    names = (certificate or {}).get("subjectAltName", ())
    assert isinstance(names, tuple)
    return frozenset(value for kind, value in names if kind == "DNS")


def _trust(context: ssl.SSLContext, authority: Path) -> None:
    try:
        context.load_verify_locations(authority)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{authority} holds no certificates of an authority: {_why(error)}") from error


def _introduce(server: ssl.SSLContext, client: ssl.SSLContext) -> Mapping[str, object] | None:
    """A handshake with ourselves, in memory: our certificate as a peer sees it. Raises what would be raised there."""
    towards_client, towards_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = (
        client.wrap_bio(towards_client, towards_server, server_side=False),
        server.wrap_bio(towards_server, towards_client, server_side=True),
    )
    for _ in range(_ROUND_TRIPS):
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return sides[0].getpeercert()


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase, which nobody is there to type; use a key without one, in mode 0600")


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
