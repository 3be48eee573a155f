"""Links and the API over TLS: who gets in by certificate, who does not, what travels, and certificates renewed."""

import asyncio
import dataclasses
import json
import signal
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from helixd.emulation.hollow import write_hollow_checkpoint
from helixd.errors import PeerLost
from helixd.exits import Exit
from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.tls import KeyPair, PeerTls
from helixd.wire.endpoint import Endpoint
from helixd.wire.errors import AuthRejected
from helixd.wire.link import Frame
from helixd.wire.options import MIB, WireOptions
from tests.certificates import Authority, needs_openssl
from tests.daemons import Daemon, Daemons, completion, daemons
from tests.functional.test_emulation import NODES, cluster_file
from tests.functional.wire_world import DEADLINE_S, Side

pytestmark = [
    needs_openssl,
    pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy:pytest.PytestDeprecationWarning"),
]


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    """The daemon's."""
    return uvloop.EventLoopPolicy()


Contexts = Callable[[str], PeerTls]


@pytest.fixture(scope="module")
def of(ca: Authority) -> Contexts:
    """Contexts with a certificate for a name."""
    return lambda names: PeerTls.load(ca.cert, ca.sign(f"DNS:{names}"))


def endpoint(side: Side, tls: PeerTls | None, secret: bytes | None = None) -> Endpoint:
    return Endpoint(side.identity, WireOptions(), secret, side.accept, side.on_link, side.on_lost, tls)


# -- links -----------------------------------------------------------------------------------------------------------


async def test_small_and_large_frames_travel_both_ways(of: Contexts) -> None:
    near, far = Side("near"), Side("far")
    payload = memoryview(bytes(range(256)) * (3 * MIB // 256))
    async with endpoint(near, of("near")) as ours, endpoint(far, of("far")) as theirs:
        link = await ours.dial(*await theirs.listen("127.0.0.1", 0), DEADLINE_S)
        for way, side in ((link, far), (theirs.links[near.name], near)):
            for number in range(3):
                await way.send(Frame(number, ["x"], payload if number else None))
            frames = await side.received(3)
            assert [frame.kind for frame in frames if frame.payload is None] == [0]
            assert all(frame.payload == payload for frame in frames if frame.payload is not None)


async def test_a_name_is_taken_only_from_who_has_its_certificate(of: Contexts) -> None:
    """The secret is right in every case: a member of the cluster cannot pass for another one."""
    secret = b"s" * 32
    far, near = Side("far"), Side("near")
    async with endpoint(far, of("far"), secret) as theirs, endpoint(near, of("other"), secret) as ours:
        address = await theirs.listen("127.0.0.1", 0)
        with pytest.raises(AuthRejected, match="near shows a certificate of other"):
            await ours.dial(*address, DEADLINE_S)
        with pytest.raises(AuthRejected, match="near shows a certificate of other"):
            await theirs.dial(*await ours.listen("127.0.0.1", 0), DEADLINE_S)
    assert (far.up, near.up) == ([], [])


async def test_with_a_secret_too_both_are_asked_for(of: Contexts) -> None:
    far, near = Side("far"), Side("near")
    async with endpoint(far, of("far"), b"s" * 32) as theirs, endpoint(near, of("near"), b"w" * 32) as ours:
        with pytest.raises(AuthRejected):
            await ours.dial(*await theirs.listen("127.0.0.1", 0), DEADLINE_S)


@pytest.mark.parametrize("stranger", ["other authority", "plain text", "certificate for none", "old TLS"])
async def test_strangers_and_plain_text_do_not_get_in(stranger: str, of: Contexts, tmp_path: Path) -> None:
    far, near, friend = Side("far"), Side("near"), Side("friend")
    tls: PeerTls | None = of("near")
    if stranger == "plain text":
        tls = None
    elif stranger == "other authority":
        other = Authority.make(tmp_path, "other")
        tls = PeerTls.load(other.cert, other.sign("DNS:near"))
    elif tls is not None:
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        if stranger == "old TLS":
            client = tls.client
            client.minimum_version, client.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
        tls = dataclasses.replace(tls, client=client)
    async with endpoint(far, of("far")) as theirs, endpoint(near, tls) as ours:
        address = await theirs.listen("127.0.0.1", 0)
        with pytest.raises(PeerLost):
            await ours.dial(*address, DEADLINE_S)
        assert far.up == []
        async with endpoint(friend, of("friend")) as third:
            await third.dial(*address, DEADLINE_S)
        await far.until(lambda side: len(side.up) == 1)


async def test_who_does_not_finish_the_handshake_is_cut_off(of: Contexts) -> None:
    far = Side("far")
    quick = WireOptions(auth_timeout_s=0.2)
    async with Endpoint(far.identity, quick, None, far.accept, far.on_link, far.on_lost, of("far")) as theirs:
        async with asyncio.timeout(DEADLINE_S):
            reader, writer = await asyncio.open_connection(*await theirs.listen("127.0.0.1", 0))
            writer.write(b"\x16\x03\x01")
            assert await reader.read() == b""
            writer.close()


# -- daemons ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Daemons]:
    with daemons(tmp_path) as made:
        yield made


def tls_keys(section: str, pair: KeyPair, ca: Authority | None = None) -> list[str]:
    words = {"cert": pair.cert, "key": pair.key, **({"ca": ca.cert} if ca else {})}
    return [word for name, path in words.items() for word in ("--set", f"{section}.tls.{name}={path}")]


def wait_for_text(daemon: Daemon, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in daemon.text:
        assert time.monotonic() < deadline, f"waited for {text!r} in\n{daemon.text}"
        time.sleep(0.05)


def served_certificate(api: str, ca: Authority) -> bytes:
    """What the API shows to a client that trusts `ca`."""
    host, port = api.split(":")
    context = ssl.create_default_context(cafile=ca.cert)
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname=host) as s,
    ):
        return s.getpeercert(binary_form=True) or b""


def test_a_cluster_that_others_reach_needs_certificates_and_no_secret(
    made: Daemons, ca: Authority, tmp_path: Path
) -> None:
    file = cluster_file(tmp_path / "cluster.json")
    spec = parse_cluster(json.loads(file.read_text()))
    hollow = write_hollow_checkpoint(tmp_path / "m", spec)
    shown = ca.sign("IP:127.0.0.1", "api")
    coordinator = made.coordinator(
        tmp_path / "m", "--set", "node.id=boss", "--set", "planner.wait_for_nodes=2", *tls_keys("api", shown),
        *tls_keys("cluster", ca.sign("DNS:boss"), ca),
    )  # fmt: skip

    def worker(name: str, pair: KeyPair | None, node: str = "") -> Daemon:
        node = node or name
        return made.start(
            name, "--role", "worker", "--coordinator", made.peers, "--device", f"emulated:{NODES[node]}",
            "--cluster-file", str(file), "--memory", str(hollow.memory_bytes(spec.nodes[0].profile)),
            "--peer-listen", "0.0.0.0:0", "--set", f"node.id={node}",
            *(tls_keys("cluster", pair, ca) if pair else ("--set", "cluster.insecure_open=true")),
        )  # fmt: skip

    made.scheme, made.context = "https", ssl.create_default_context(cafile=ca.cert)
    for name in ("slow1", "slow2"):
        worker(name, ca.sign(f"DNS:{name}"))
    nameless = worker("fast", ca.sign("DNS:somebody"))
    assert nameless.wait_exit() == Exit.CONFIG
    assert "cluster.tls.cert speaks for somebody, but this daemon is fast" in nameless.text
    del made.all["fast"]
    plain = worker("plain", None, "fast")
    made.wait_ready()
    assert completion(made, b"hello", 10).read().done
    wait_for_text(plain, "join_failed")
    assert {node["id"] for node in made.get("/cluster")["nodes"]} == {"slow1", "slow2"}
    assert "cluster_open" in plain.text
    assert not any("cluster_" in made.all[name].text for name in ("coordinator", "slow1", "slow2"))

    # A renewed certificate is shown from a SIGHUP on, and links go on; one that is no good changes nothing.
    before = served_certificate(made.api, ca)
    ca.sign("IP:127.0.0.1", "api")
    coordinator.signal(signal.SIGHUP)
    wait_for_text(coordinator, " reloaded ")
    assert served_certificate(made.api, ca) != before
    before = served_certificate(made.api, ca)
    shown.cert.write_text("no certificate")
    coordinator.signal(signal.SIGHUP)
    wait_for_text(coordinator, " reload_refused ")
    assert served_certificate(made.api, ca) == before
    assert completion(made, b"hello", 10).read().done


def test_plain_text_on_the_encrypted_port_gets_nothing(made: Daemons, ca: Authority) -> None:
    made.coordinator("demo", *tls_keys("api", ca.sign("IP:127.0.0.1", "api2")))
    wait_for_text(made.all["coordinator"], f"api=https://{made.api}")
    with pytest.raises(OSError, match=r"."):
        urllib.request.urlopen(f"http://{made.api}/healthz", timeout=10)
    assert made.all["coordinator"].process.poll() is None
