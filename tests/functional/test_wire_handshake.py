"""Who is let in at a peer port, who is not, and what each side is told."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import aiohttp
import pytest
from aiohttp import web

from helixd.errors import PeerLost
from helixd.wire.errors import AuthRejected, CloseCode, PeerRefused, VersionMismatch
from helixd.wire.handshake import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    DialerHandshake,
    HandshakeFailed,
    Hello,
    Purpose,
    new_hello,
)
from helixd.wire.link import Frame
from helixd.wire.options import KIB, WireOptions
from tests.functional.wire_stranger import (
    TOKEN,
    Address,
    Script,
    goodbye,
    identity,
    impostor,
    listen_honestly,
    socket_to,
    stranger,
)
from tests.functional.wire_world import DEADLINE_S, SECRET, Side

QUICK = WireOptions(auth_timeout_s=0.3, close_timeout_s=0.2, max_pending=3)


@asynccontextmanager
async def listening(options: WireOptions | None = None) -> AsyncIterator[tuple[Side, Address]]:
    """A daemon that listens; when the test is over, honest peers still get in."""
    far, friend = Side("far"), Side("friend")
    async with far.websockets(options) as net:
        address = await net.listen("127.0.0.1", 0)
        yield far, address
        far.refusal = None
        async with friend.websockets() as theirs:
            link = await theirs.dial(*address, DEADLINE_S)
            await link.send(Frame(77, None))
            await far.until(lambda side: any(frame.kind == 77 for frame in side.frames))


# -- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(b"w" * 32, SECRET), (None, SECRET), (SECRET, None), (SECRET + b"!", SECRET), (SECRET[:-1], SECRET)],
    ids=["wrong", "none against one", "one against none", "longer", "shorter"],
)
async def test_secrets_that_differ_open_nothing(ours: bytes | None, theirs: bytes | None) -> None:
    near, far = Side("near"), Side("far")
    async with near.websockets(secret=ours) as mine, far.websockets(secret=theirs) as other:
        address = await other.listen("127.0.0.1", 0)
        with pytest.raises(AuthRejected, match="secret"):
            await mine.dial(*address, DEADLINE_S)
    assert near.up == far.up == []


@pytest.mark.parametrize("secret", [SECRET, None])
async def test_the_same_secret_or_none_on_both_sides_opens(secret: bytes | None) -> None:
    near, far = Side("near", 7), Side("far", 8)
    async with near.websockets(secret=secret) as mine, far.websockets(secret=secret) as other:
        link = await mine.dial(*await other.listen("127.0.0.1", 0), DEADLINE_S)
        assert (link.peer, link.incarnation) == ("far", 8)
        assert (far.up[0].peer, far.up[0].incarnation) == ("near", 7)
        assert link.remote_host == "127.0.0.1"


async def test_a_replayed_proof_is_worth_nothing() -> None:
    """Somebody who heard a whole successful handshake says it again."""
    said: list[bytes] = []

    async with listening() as (_, address):
        async with socket_to(address) as ws:
            hello = new_hello(identity("near"), Purpose.CONTROL, TOKEN)
            send = ws.send_bytes

            async def listen_in(data: bytes) -> None:
                said.append(data)
                await send(data)

            ws.send_bytes = listen_in  # type: ignore[method-assign, assignment]
            shake = DialerHandshake(ws, hello, SECRET, "far")
            await shake.greet()
            await shake.prove()
        assert len(said) == 2
        async with socket_to(address) as ws:
            await ws.send_bytes(said[0])
            await ws.receive()
            await ws.send_bytes(said[1])
            assert await goodbye(ws) == (CloseCode.AUTH_REJECTED, "wrong cluster secret")


async def reflect(ws: web.WebSocketResponse) -> None:
    async for message in ws:
        await ws.send_bytes(message.data)


async def reflect_under_another_name(ws: web.WebSocketResponse) -> None:
    theirs = Hello.decode((await ws.receive()).data)
    await ws.send_bytes(dataclasses.replace(theirs, identity=identity("far")).encode())
    await reflect(ws)


async def guess(ws: web.WebSocketResponse) -> None:
    theirs = Hello.decode((await ws.receive()).data)
    await ws.send_bytes(new_hello(identity("far"), theirs.purpose, theirs.token).encode())
    await ws.receive()
    await ws.send_bytes(b"HLXD" + bytes(32))
    await ws.receive()


async def be_old(ws: web.WebSocketResponse) -> None:
    theirs = Hello.decode((await ws.receive()).data)
    old = Hello(identity("far"), theirs.purpose, theirs.token, bytes(32), 0, 0)
    await ws.send_bytes(old.encode())
    await ws.receive()


async def answer_somebody_else(ws: web.WebSocketResponse) -> None:
    await ws.receive()
    await ws.send_bytes(new_hello(identity("far"), Purpose.CONTROL, b"x" * 16).encode())
    await ws.receive()


async def swap_the_purpose(ws: web.WebSocketResponse) -> None:
    await ws.receive()
    await ws.send_bytes(new_hello(identity("far"), Purpose.BULK, TOKEN).encode())
    await ws.receive()


async def babble(ws: web.WebSocketResponse) -> None:
    await ws.send_bytes(b"\xc1" * 200)
    await ws.receive()


async def chat(ws: web.WebSocketResponse) -> None:
    await ws.send_str("hello")
    await ws.receive()


async def flood(ws: web.WebSocketResponse) -> None:
    await ws.send_bytes(bytes(MAX_MESSAGE_BYTES + 1))
    await ws.receive()


async def hang_up(ws: web.WebSocketResponse) -> None:
    await ws.receive()
    await ws.close(code=CloseCode.REFUSED, message=b"house full")


async def vanish(ws: web.WebSocketResponse) -> None:
    await ws.receive()


async def silence(_: web.WebSocketResponse) -> None:
    await asyncio.Event().wait()


async def restart_between_sockets(ws: web.WebSocketResponse) -> None:
    await listen_honestly(ws, identity("far"))
    await asyncio.Event().wait()


async def never_grant(ws: web.WebSocketResponse) -> None:
    await listen_honestly(ws, _FAR)
    await asyncio.Event().wait()


async def grant_nonsense(ws: web.WebSocketResponse) -> None:
    await listen_honestly(ws, _FAR)
    await ws.receive()
    await ws.send_bytes(b"\xc1nonsense")
    await asyncio.Event().wait()


_FAR = identity("far")


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        (reflect, PeerRefused, "dialed itself"),
        (reflect_under_another_name, AuthRejected, "does not know the cluster secret"),
        (guess, AuthRejected, "does not know the cluster secret"),
        (be_old, VersionMismatch, rf"0\.\.0.*{PROTOCOL_VERSION}"),
        (answer_somebody_else, PeerLost, "answers another"),
        (swap_the_purpose, PeerLost, "answers another"),
        (babble, PeerLost, "not a helixd peer"),
        (chat, PeerLost, "only binary"),
        (flood, PeerLost, "too large"),
        (hang_up, PeerRefused, "house full"),
        (restart_between_sockets, PeerLost, "changed while"),
        (vanish, PeerLost, "closed the connection"),
        (silence, PeerLost, "no link within 0.4 s"),
        (never_grant, PeerLost, r"no link within 0.4 s|sent no setup"),
        (grant_nonsense, PeerLost, "not a frame"),
    ],
)
async def test_a_dialer_does_not_trust_who_answers(script: Script, error: type[Exception], words: str) -> None:
    near = Side("near")
    async with impostor(script) as address, near.websockets() as net:
        with pytest.raises(error, match=words) as caught:
            await net.dial(*address, 0.4)
        assert f"{address[0]}:{address[1]}" in str(caught.value) or "far" in str(caught.value)
        assert net.links == {}
    assert near.up == []


async def test_a_dialer_says_whom_it_expects() -> None:
    near = Side("near")
    async with listening() as (far, address), near.websockets() as net:
        with pytest.raises(PeerRefused, match=r"expected other, far answers"):
            await net.dial(*address, DEADLINE_S, identity("other").peer)
        assert (await net.dial(*address, DEADLINE_S, far.name)).peer == "far"


# -- before authentication -------------------------------------------------------------------------------------------


HELLO = new_hello(identity("near"), Purpose.CONTROL, TOKEN)


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        (b"", CloseCode.BAD_HELLO, "not a helixd peer"),
        (b"\xc1" * MAX_MESSAGE_BYTES, CloseCode.BAD_HELLO, "not a helixd peer"),
        (b"\xc1" * (MAX_MESSAGE_BYTES + 1), CloseCode.BAD_HELLO, "too large"),
        ("text", CloseCode.BAD_HELLO, "only binary"),
        (HELLO.encode()[:-1], CloseCode.BAD_HELLO, "malformed"),
        (HELLO.encode() + b"!", CloseCode.BAD_HELLO, "malformed"),
        (
            dataclasses.replace(HELLO, oldest_version=98, newest_version=99).encode(),
            CloseCode.VERSION_MISMATCH,
            "98..99",
        ),
        (dataclasses.replace(HELLO, oldest_version=0, newest_version=0).encode(), CloseCode.VERSION_MISMATCH, "0..0"),
        (dataclasses.replace(HELLO, identity=identity("far")).encode(), CloseCode.AUTH_REJECTED, "secret"),
        (dataclasses.replace(HELLO, purpose=Purpose.BULK).encode(), CloseCode.AUTH_REJECTED, "secret"),
    ],
    # A hello is random: processes that share the suite must agree on the tests' names.
    ids=["empty", "noise", "long", "text", "cut", "more", "newer", "older", "another", "purpose"],
)
async def test_a_listener_answers_strangers_with_a_code(message: bytes | str, code: int, words: str) -> None:
    """Those who get as far as a proof do not know the secret; what they claim to be is not looked at before."""
    async with listening() as (far, address), socket_to(address) as ws:
        if isinstance(message, str):
            await ws.send_str(message)
        else:
            await ws.send_bytes(message)
        if code == CloseCode.AUTH_REJECTED:
            await ws.receive()
            await ws.send_bytes(b"HLXD" + bytes(32))
        told = await goodbye(ws)
        assert told[0] == code
        assert words in told[1]
        assert far.up == []


async def test_a_version_range_that_overlaps_is_welcome() -> None:
    async with listening() as (_, address), socket_to(address) as ws:
        newer = dataclasses.replace(HELLO, newest_version=PROTOCOL_VERSION + 5)
        shake = DialerHandshake(ws, newer, SECRET, "far")
        await shake.greet()
        await shake.prove()


@pytest.mark.parametrize(
    ("request_line", "status"),
    [(b"GET / HTTP/1.1", b"404"), (b"GET /peer HTTP/1.1", b"426"), (b"POST /peer HTTP/1.1", b"426")],
)
async def test_a_browser_is_told_where_it_is(request_line: bytes, status: bytes) -> None:
    async with listening() as (_, address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(request_line + b"\r\nHost: x\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(DEADLINE_S):
            answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("words", [b"", b"GET /peer HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00\x01"])
async def test_who_says_nothing_useful_is_cut_off(words: bytes) -> None:
    async with listening(QUICK) as (_, address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(words)
        async with asyncio.timeout(DEADLINE_S):
            with suppress(ConnectionError):
                await reader.read()
        writer.close()


async def test_who_stops_in_the_middle_is_told_why() -> None:
    async with listening(QUICK) as (_, address), socket_to(address) as ws:
        await ws.send_bytes(HELLO.encode())
        assert await goodbye(ws) == (CloseCode.AUTH_TIMEOUT, "authentication took too long")


async def test_both_sides_of_what_a_stranger_may_send() -> None:
    limit = WireOptions().preauth_bytes
    start = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX: "
    async with listening() as (_, address):
        for size, answered in ((limit, True), (limit + 1, False)):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(start + b"x" * (size - len(start) - 4) + b"\r\n\r\n")
            async with asyncio.timeout(DEADLINE_S):
                answer = b""
                with suppress(ConnectionError):
                    answer = await reader.read()
            assert (b" 404 " in answer) is answered
            writer.close()


async def test_only_so_many_strangers_wait_at_the_door() -> None:
    options = dataclasses.replace(QUICK, auth_timeout_s=30.0)
    async with listening(options) as (_, address), AsyncExitStack() as stack:
        waiting = [await stack.enter_async_context(socket_to(address)) for _ in range(options.max_pending)]
        with pytest.raises(aiohttp.ClientError):
            await stack.enter_async_context(socket_to(address))
        await waiting[0].close()


async def test_those_who_are_in_do_not_count_as_strangers() -> None:
    async with listening(QUICK) as (far, address), AsyncExitStack() as stack:
        for number in range(QUICK.max_pending + 2):
            await stack.enter_async_context(stranger(address, f"s{number}"))
        assert len(far.up) == QUICK.max_pending + 2


# -- after authentication: names, lives, tokens ----------------------------------------------------------------------


async def test_a_refused_peer_hears_the_reason() -> None:
    near = Side("near")
    async with listening() as (far, address), near.websockets() as net:
        far.refusal = "the plan has no place for you"
        with pytest.raises(PeerRefused, match="no place for you"):
            await net.dial(*address, DEADLINE_S)
        assert far.up == []


async def test_a_name_belongs_to_its_newest_life() -> None:
    first, twin, old, new = Side("near", 5), Side("near", 5), Side("near", 4), Side("near", 6)
    async with (
        listening() as (far, address),
        first.websockets() as net,
        twin.websockets() as twins,
        old.websockets() as olds,
        new.websockets() as news,
    ):
        await net.dial(*address, DEADLINE_S)
        for ghost in (twins, olds):
            with pytest.raises(PeerRefused, match="incarnation 5") as refused:
                await ghost.dial(*address, DEADLINE_S)
            assert refused.value.code == CloseCode.DUPLICATE
        assert far.lost == []
        await news.dial(*address, DEADLINE_S)
        await first.until(lambda side: side.lost != [])
        assert [link.incarnation for link in far.up] == [5, 6]
        assert "5 -> 6" in far.lost[0][1]


async def test_a_daemon_dials_neither_itself_nor_its_namesake() -> None:
    near, namesake = Side("near"), Side("near")
    async with near.websockets() as net, namesake.websockets() as other:
        with pytest.raises(PeerRefused, match="dialed itself"):
            await net.dial(*await net.listen("127.0.0.1", 0), DEADLINE_S)
        with pytest.raises(PeerRefused, match="two daemons are named near"):
            await net.dial(*await other.listen("127.0.0.1", 0), DEADLINE_S)


@pytest.mark.parametrize("turn", range(4))
async def test_two_that_dial_each_other_get_one_link(turn: int) -> None:
    near, far = Side("near"), Side("far")
    async with near.websockets() as mine, far.websockets() as other:
        here, there = await mine.listen("127.0.0.1", 0), await other.listen("127.0.0.1", 0)

        async def later() -> object:
            await asyncio.sleep(turn * 0.001)
            return await other.dial(*here, DEADLINE_S)

        link, back = await asyncio.gather(mine.dial(*there, DEADLINE_S), later())
        await link.send(Frame(1, None))
        await far.received(1)
        assert link is mine.links[far.name]
        assert back is other.links[near.name]
        assert near.lost == far.lost == []
        assert len(near.up) == len(far.up) == 1


@pytest.mark.parametrize("who", ["nobody", "another"])
async def test_a_bulk_socket_belongs_to_a_control_socket_of_the_same_peer(who: str) -> None:
    async with listening() as (far, address), AsyncExitStack() as stack:
        if who == "another":
            control = await stack.enter_async_context(socket_to(address))
            shake = DialerHandshake(control, HELLO, SECRET, "far")
            await shake.greet()
            await shake.prove()
        ws = await stack.enter_async_context(socket_to(address))
        shake = DialerHandshake(ws, new_hello(identity("thief"), Purpose.BULK, TOKEN), SECRET, "far")
        await shake.greet()
        with pytest.raises(PeerLost, match="without its control socket"):
            await shake.prove()
        assert far.up == []


async def test_a_token_whose_bulk_socket_is_awaited_is_nobody_elses() -> None:
    async with listening() as (_, address), socket_to(address) as first, socket_to(address) as second:
        shake = DialerHandshake(first, HELLO, SECRET, "far")
        await shake.greet()
        await shake.prove()
        shake = DialerHandshake(second, new_hello(identity("second"), Purpose.CONTROL, TOKEN), SECRET, "far")
        await shake.greet()
        with pytest.raises(PeerRefused, match="used once"):
            await shake.prove()


@pytest.mark.parametrize("name", ["", "a" * 201, "a\nb", "\x00"])
def test_names_that_cannot_be_are_no_hello(name: str) -> None:
    fixed = dataclasses.replace(HELLO, identity=identity("n")).encode()[:-2]
    with pytest.raises(HandshakeFailed) as failed:
        Hello.decode(fixed + bytes((len(name),)) + name.encode())
    assert failed.value.code == CloseCode.BAD_HELLO


async def test_a_dead_port_and_a_closed_endpoint_say_so() -> None:
    near, far = Side("near"), Side("far")
    async with far.websockets() as net:
        address = await net.listen("127.0.0.1", 0)
    async with near.websockets() as mine:
        with pytest.raises(PeerLost, match=rf"far \(127.0.0.1:{address[1]}\).*cannot connect"):
            await mine.dial(*address, DEADLINE_S, far.name)
    with pytest.raises(PeerLost, match="not open"):
        await mine.dial(*address, DEADLINE_S)


def test_the_message_limit_leaves_room_for_the_longest_name() -> None:
    assert len(dataclasses.replace(HELLO, identity=identity("n" * 200)).encode()) <= MAX_MESSAGE_BYTES <= 4 * KIB


@pytest.mark.parametrize(
    ("host", "port"), [("a..b", 1), ("a" * 64, 1), ("", 1), ("127.0.0.1/x?y#", 1), ("a@b", 1), ("::1", 1), ("h", 65536)]
)
async def test_an_address_that_is_none_is_a_peer_that_is_not_there(host: str, port: int) -> None:
    """Workers dial what other workers advertise."""
    async with Side("near").websockets() as near:
        with pytest.raises(PeerLost, match="cannot connect"):
            await near.dial(host, port, DEADLINE_S)
