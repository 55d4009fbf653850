"""`management-api serve`: the service on its port, from the first line of the log to a clean end.

Must never end with a traceback for what an operator can mend: that is one line, and exit status 1.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import structlog
import uvicorn
import uvloop

from management_api import __version__
from management_api.app import Application, create_app
from management_api.commands.terminal import complain
from management_api.logging import configure
from management_api.settings import Settings, SettingsError, load
from managers.errors import ManagerError

_LAST_SECONDS = 1.0
"""Of the time for stopping, what is kept for the managers after the last request."""

log = structlog.get_logger(__name__)


class CannotStart(Exception):
    """The service cannot start; the message is one line for the operator."""


def run() -> int:
    """Serve with the settings of the environment and `.env`. Gives the exit status."""
    try:
        settings = load(os.environ, Path(".env"))
    except SettingsError as error:
        return complain(str(error))
    logs = configure(settings.log.level, settings.log.format, secrets=(settings.api.key,))
    status = 0
    try:
        with bind(settings.api.host, settings.api.port) as listener:
            app = create_app(settings, logs=logs)
            uvloop.run(serve(app, listener, asyncio.Event(), lambda url: _announce(settings, url)))
    except* (CannotStart, ManagerError) as group:  # the framework starts the managers in a task group
        status = complain(reason(group))
    return status


def reason(error: BaseException) -> str:
    """The words of what is at the bottom of a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)


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
        raise CannotStart(_cannot_listen(host, port, error)) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine finds it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(app: Application, listener: socket.socket, stop: asyncio.Event, ready: Callable[[str], None]) -> None:
    """Start the managers, listen, call `ready` with the URL; stop when `stop` is set or a signal comes.

    Raises `CannotStart`, and what the managers raise when they cannot start.
    """
    loop = asyncio.get_running_loop()
    with _signals(lambda: loop.call_soon_threadsafe(stop.set)):
        server = Server(app, listener, stop, ready)
        async with app.litestar.lifespan():
            await server.serve(sockets=[listener])
        server.stopped()


class Server(uvicorn.Server):
    """uvicorn that says when it is ready, and closes our doors before its sockets (STACK §2.11)."""

    def __init__(
        self,
        app: Application,
        listener: socket.socket,
        stop: asyncio.Event,
        ready: Callable[[str], None],
    ) -> None:
        self._seconds = app.base.settings.api.shutdown_seconds
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]  # the same protocol, typed twice
                http="httptools",
                loop="none",
                lifespan="off",
                ws="management_api.fast_websocket:FastWebSocketProtocol",
                ws_per_message_deflate=False,
                ws_max_size=2**20,
                ws_ping_interval=20,
                ws_ping_timeout=20,
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=65,
                timeout_graceful_shutdown=max(0.0, self._seconds - _LAST_SECONDS),  # type: ignore[arg-type]  # any number will do
            )
        )
        self._app, self._listener, self._stop, self._ready = app, listener, stop, ready
        self._deadline: asyncio.TimerHandle | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        host, port = self._listener.getsockname()[:2]
        try:
            await super().startup(sockets)
        except OSError as error:
            raise CannotStart(_cannot_listen(host, port, error)) from None
        if not self._stop.is_set():
            self._ready(url_of(self._listener))

    async def on_tick(self, counter: int) -> bool:
        """Every 0.1 s: whether to end."""
        return await super().on_tick(counter) or self._stop.is_set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """First the doors: new work is refused, streams end with 1001. Then the sockets."""
        log.info("stopping")
        self._deadline = asyncio.get_running_loop().call_later(max(self._seconds, _LAST_SECONDS), _end)
        for services in self._app.running:
            await services.close_doors()
        await super().shutdown(sockets)

    def stopped(self) -> None:
        """The managers have stopped too."""
        if self._deadline is not None:
            self._deadline.cancel()
        log.info("stopped")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours."""
        yield


@contextmanager
def _signals(first: Callable[[], object]) -> Iterator[None]:
    """The first SIGTERM or SIGINT calls `first`, a second one ends the process at once: what counts is on disk."""
    asked = False

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(128 + number)
        asked = True
        first()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(settings: Settings, url: str) -> None:
    shown = {row.name: row.value for row in settings.rows}  # without passwords
    log.info(
        "ready",
        url=url,
        version=__version__,
        data=str(settings.api.data_dir),
        backends=shown["COMFYUI_BACKENDS"],
        docs=f"{url}/docs",
    )


def _cannot_listen(host: str, port: int, error: OSError) -> str:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"Cannot listen on {address}: {error.strerror or error}. Choose another with MANAGEMENT_API_PORT"


def _end() -> None:
    log.warning("the time for stopping is over")
    sys.stdout.flush()
    os._exit(0)
