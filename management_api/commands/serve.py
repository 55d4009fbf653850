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
from typing import TYPE_CHECKING

import structlog
import uvicorn
import uvloop

from management_api import __version__
from management_api.commands.listener import CannotStart, bind, cannot_listen, url_of
from management_api.commands.terminal import complain
from management_api.keys import KeysError
from management_api.logging import configure
from management_api.settings import Settings, SettingsError, load
from managers.errors import ManagerError

if TYPE_CHECKING:
    from management_api.app import Application

_LAST_SECONDS = 1.0
"""Of the time for stopping, what is kept for the managers after the last request."""
_CLOSING_SECONDS = 4.0
"""Of the time for stopping, what is kept for streams, requests and managers after the last workflow; at most half."""

log = structlog.get_logger(__name__)


def run(*, drain: bool = False) -> int:
    """Serve with the settings of the environment and `.env`; `drain` is the option. Gives the exit status."""
    option = {"MANAGEMENT_API_DRAIN": "true"} if drain else {}
    try:
        settings = load({**os.environ, **option}, Path(".env"))
    except SettingsError as error:
        return complain(str(error))
    from management_api.app import create_app

    # The store's thread wants the interpreter lock for every statement; 5 ms, the default, is ten commits long.
    sys.setswitchinterval(0.0005)
    logs = configure(settings.log.level, settings.log.format, secrets=settings.secrets)
    status = 0
    try:
        with bind(settings.api.host, settings.api.port) as listener:
            app = create_app(settings, logs=logs)
            uvloop.run(serve(app, listener, asyncio.Event()))
    except* (CannotStart, KeysError, ManagerError) as group:  # the framework starts the managers in a task group
        status = complain(reason(group))
    return status


def reason(error: BaseException) -> str:
    """The words of what is at the bottom of a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)


async def serve(
    app: Application, listener: socket.socket, stop: asyncio.Event, ready: Callable[[], object] = lambda: None
) -> None:
    """Start the managers, listen, call `ready`; stop when `stop` is set or a signal comes.

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
        ready: Callable[[], object],
    ) -> None:
        self._seconds = app.base.settings.api.shutdown_seconds
        self._drain = app.base.settings.api.drain
        super().__init__(
            uvicorn.Config(
                app,
                http="management_api.guarded_http:GuardedHttpProtocol",
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
            )
        )
        self._app, self._listener, self._stop, self._ready = app, listener, stop, ready
        self._stop_at: float | None = None  # by the loop's clock
        self._last_resort: asyncio.TimerHandle | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        host, port = self._listener.getsockname()[:2]
        try:
            await super().startup(sockets)
        except OSError as error:
            raise CannotStart(cannot_listen(host, port, error)) from None
        if not self._stop.is_set():
            _announce(self._app.base.settings, url_of(self._listener))
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Every 0.1 s: whether to end."""
        if await super().on_tick(counter):
            return True
        if not self._stop.is_set():
            return False
        if self._drain and self._stop_at is None:
            self._stop_at = self._begin_to_stop()
            for services in self._app.running:
                services.workflows.drain(leaving=False)
            log.info("draining", busy_backends=self._busy(), seconds=self._seconds)
        return not self._drain or self._drained()

    def _drained(self) -> bool:
        """Whether no workflow runs any more, or there is no time to wait for it. Until then all doors are open."""
        busy = self._busy()
        if busy and self._left() > min(_CLOSING_SECONDS, self._seconds / 2):
            return False
        if busy:
            log.warning("the time for draining is over", busy_backends=busy)
        return True

    def _busy(self) -> int:
        """In how many ComfyUIs something of ours still is."""
        return sum(one.busy for services in self._app.running for one in services.workflows.dispatchers)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """First the doors: new work is refused, streams end with 1001. Then the sockets."""
        if self._stop_at is None:
            self._stop_at = self._begin_to_stop()
        log.info("stopping")
        for services in self._app.running:
            await services.close_doors()
        self.config.timeout_graceful_shutdown = max(0.0, self._left() - _LAST_SECONDS)  # type: ignore[assignment]  # any number will do
        await super().shutdown(sockets)

    def stopped(self) -> None:
        """The managers have stopped too."""
        if self._last_resort is not None:
            self._last_resort.cancel()
        log.info("stopped")

    def _begin_to_stop(self) -> float:
        """The time for stopping begins; when it will be over."""
        loop = asyncio.get_running_loop()
        self._last_resort = loop.call_later(max(self._seconds, _LAST_SECONDS), _end)
        return loop.time() + self._seconds

    def _left(self) -> float:
        """Of the time for stopping, in seconds."""
        return 0.0 if self._stop_at is None else self._stop_at - asyncio.get_running_loop().time()

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


def _end() -> None:
    log.warning("the time for stopping is over")
    sys.stdout.flush()
    os._exit(0)
