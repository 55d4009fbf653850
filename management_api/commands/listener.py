"""The socket the service listens on: taken before anything else is started, so that a taken port is told at once."""

from __future__ import annotations

import socket


class CannotStart(Exception):
    """The service cannot start; the message is one line for the operator."""


def bind(host: str, port: int) -> socket.socket:
    """Take the address, without listening yet: who connects before the service is ready is refused.

    Raises `CannotStart`.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise CannotStart(f"MANAGEMENT_API_HOST={host!r} is no address of this machine: {error}") from None
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise CannotStart(cannot_listen(host, port, error)) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine finds it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def cannot_listen(host: str, port: int, error: OSError) -> str:
    """What to tell the operator."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"Cannot listen on {address}: {error.strerror or error}"
