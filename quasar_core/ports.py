"""Open the socket of a server, or find its address taken, before anything is loaded."""

import socket

from quasar_core.errors import UsageError, reason


def listen_at(host: str, port: int) -> socket.socket:
    """A socket that listens, whose clients wait until somebody accepts; UsageError where the address is not to be had.

    It listens at once: two that are bound alone may share an address, and the later one would find out after loading.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By the protocol's name asyncio knows that small writes are not to wait for one another (TCP_NODELAY).
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise UsageError(f"{host}:{port} cannot be listened on: {reason(error)}.") from error
    return listening


def require_free(host: str, port: int) -> None:
    """UsageError where another program listens on an address already."""
    listen_at(host, port).close()
