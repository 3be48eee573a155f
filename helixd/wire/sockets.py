"""TCP options of peer sockets."""

import socket

from helixd.wire.options import WireOptions

_KEEPALIVE_IDLE_S = 5
_KEEPALIVE_INTERVAL_S = 2
_KEEPALIVE_PROBES = 3


def tune_socket(sock: socket.socket | None, options: WireOptions, bulk: bool) -> None:
    """Set keepalive, user timeout and the optional TCP settings; what this kernel does not know is left alone.

    Raises OSError for a congestion control that the operator named and the kernel refuses.
    """
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wanted = {
        "TCP_KEEPIDLE": _KEEPALIVE_IDLE_S,
        "TCP_KEEPINTVL": _KEEPALIVE_INTERVAL_S,
        "TCP_KEEPCNT": _KEEPALIVE_PROBES,
        "TCP_USER_TIMEOUT": int(options.tcp_user_timeout_s * 1000),
    }
    if bulk and options.notsent_lowat_bytes is not None:
        wanted["TCP_NOTSENT_LOWAT"] = options.notsent_lowat_bytes
    for name, value in wanted.items():
        number = getattr(socket, name, None)
        if number is not None:
            sock.setsockopt(socket.IPPROTO_TCP, number, value)
    if options.congestion_control is not None and hasattr(socket, "TCP_CONGESTION"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, options.congestion_control.encode())
