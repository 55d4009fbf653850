"""Serves a simulator with uvicorn, embedded in a program or as a process of its own."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Generator

import uvicorn

from management_api.simulator.app import Simulator
from management_api.simulator.options import SimulatorOptions

__all__ = ["SimulatorOptions", "serve"]


class _Server(uvicorn.Server):
    """uvicorn that says when it listens, without its signal handlers: who embeds it decides about signals."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def serve(options: SimulatorOptions, ready: Callable[[str], None]) -> None:
    """Run a simulator until cancelled; `ready` is called once with its URL when it accepts connections.

    OSError when the address is taken.
    """
    simulator = Simulator(options)
    config = uvicorn.Config(
        simulator,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="websockets-sansio",
        ws_max_size=64 * 1024 * 1024,
        ws_ping_interval=None,
        ws_per_message_deflate=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )
    with socket.create_server((options.host, options.port), backlog=512) as listener:
        url = f"http://{options.host}:{listener.getsockname()[1]}"
        server = _Server(config, lambda: ready(url))
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        working = asyncio.ensure_future(simulator.work())
        try:
            await asyncio.wait({serving, working}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            working.cancel()
            server.should_exit = server.force_exit = True
            await asyncio.gather(serving, working, return_exceptions=True)
