"""Certificates from files: which fit together, whom they speak for, and what is said of those that do not."""

from pathlib import Path

import pytest

from helixd.errors import ConfigError
from helixd.tls import KeyPair, PeerTls, api_context, certified_names
from tests.certificates import Authority, needs_openssl, openssl

pytestmark = needs_openssl


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def pair(ca: Authority) -> KeyPair:
    return ca.sign("DNS:a,DNS:b,IP:127.0.0.1", "ab")


def test_a_certificate_speaks_for_its_dns_names(ca: Authority, pair: KeyPair) -> None:
    assert PeerTls.load(ca.cert, pair).names == {"a", "b"}
    assert PeerTls.load(ca.cert, ca.sign("", "nobody")).names == frozenset()


@pytest.mark.parametrize("certificate", [None, {}, {"subject": ((("commonName", "a"),),)}])
def test_no_certificate_and_a_common_name_speak_for_nobody(certificate: dict[str, object] | None) -> None:
    assert certified_names(certificate) == frozenset()


def test_what_does_not_fit_together_is_named(ca: Authority, pair: KeyPair, tmp_path: Path) -> None:
    other = Authority.make(tmp_path, "other")
    stranger = other.sign("DNS:a")
    with pytest.raises(ConfigError, match=r"ab.pem is not good for .*other.pem"):
        PeerTls.load(other.cert, pair)
    with pytest.raises(ConfigError, match="are no certificate and its key: KEY_VALUES_MISMATCH"):
        PeerTls.load(ca.cert, KeyPair(pair.cert, stranger.key))
    with pytest.raises(ConfigError, match="holds no certificates of an authority"):
        PeerTls.load(pair.key, pair)
    with pytest.raises(ConfigError, match="No such file"):
        PeerTls.load(tmp_path / "none", pair)
    for load in (api_context, lambda pair: PeerTls.load(ca.cert, pair)):
        with pytest.raises(ConfigError, match="are no certificate and its key"):
            load(KeyPair(pair.key, pair.key))


def test_a_certificate_must_serve_both_ends_of_a_link(ca: Authority) -> None:
    for use in ("serverAuth", "clientAuth"):
        with pytest.raises(ConfigError, match="is not good for"):
            PeerTls.load(ca.cert, ca.sign("DNS:a", use, f"extendedKeyUsage={use}\n"))
    PeerTls.load(ca.cert, ca.sign("DNS:a", "both", "extendedKeyUsage=serverAuth,clientAuth\n"))


def test_a_key_with_a_passphrase_is_refused_instead_of_asked_for(ca: Authority, pair: KeyPair, tmp_path: Path) -> None:
    locked = tmp_path / "locked.key"
    openssl("pkey", "-in", pair.key, "-aes256", "-passout", "pass:sesame", "-out", locked)
    with pytest.raises(ConfigError, match="has a passphrase"):
        PeerTls.load(ca.cert, KeyPair(pair.cert, locked))


def test_contexts_in_use_take_new_files_or_none(ca: Authority, pair: KeyPair, tmp_path: Path) -> None:
    tls = PeerTls.load(ca.cert, pair)
    assert tls.take(tls.renewed(ca.cert, ca.sign("DNS:b,DNS:a", "renewed")))
    with pytest.raises(ConfigError, match="does not speak for b"):
        tls.renewed(ca.cert, ca.sign("DNS:a"))
    # A second authority beside the first is trusted at once; the first, once gone from the file, not before a restart.
    other = Authority.make(tmp_path, "other")
    theirs = other.sign("DNS:a,DNS:b")
    with pytest.raises(ConfigError, match="is not good for"):
        tls.renewed(ca.cert, theirs)
    both = tmp_path / "both.pem"
    both.write_text(ca.cert.read_text() + other.cert.read_text())
    assert tls.take(tls.renewed(both, theirs))
    assert not tls.take(tls.renewed(other.cert, theirs))
