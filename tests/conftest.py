"""Fixtures most tests need: settings, a running app with a client, a real server. ComfyUI is away."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import httpx
import pytest
from litestar.types import ControllerRouterHandler

from management_api.app import ROUTES, create_app
from management_api.logging import SILENT, Logs
from management_api.settings import Settings, load
from tests.serving import KEY, Log, Server, Service, SettingsMaker, StartServer, StartService, lifespan, serve


@pytest.fixture(autouse=True)
def log() -> Log:
    """What the service logs during this test goes here."""
    return Log()


@pytest.fixture
def make_settings(tmp_path: Path) -> SettingsMaker:
    """`make_settings(NAME=value, …)`: settings of a service with its own folder and no ComfyUI."""

    def make(**environ: str) -> Settings:
        base = {
            "MANAGEMENT_API_KEY": KEY,
            "MANAGEMENT_API_DATA_DIR": str(tmp_path / "data"),
            "MANAGEMENT_API_RATE_LIMIT": "100000/minute",
            "COMFY_PATH": str(tmp_path / "comfyui"),
            "COMFYUI_URL": "http://127.0.0.1:9",
            "GPU_SAMPLE_SECONDS": "0",  # a card of the machine that tests is none of theirs
        }
        return load({**base, **environ}, None)

    return make


@pytest.fixture
async def start_service(make_settings: SettingsMaker) -> AsyncIterator[StartService]:
    """`await start_service(NAME=value, …, routes=[…], logs=…)`: the app on this loop, without a socket."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            *,
            routes: Sequence[ControllerRouterHandler] = (),
            logs: Logs = SILENT,
            peer: str = "127.0.0.1",
            headers: Mapping[str, str] | None = None,
            **environ: str,
        ) -> Service:
            app = create_app(make_settings(**environ), routes=[*ROUTES, *routes], logs=logs)
            await stack.enter_async_context(lifespan(app))
            transport = httpx.ASGITransport(app, client=(peer, 50000))
            client = httpx.AsyncClient(
                transport=transport,
                base_url="http://service",
                headers={"X-API-Key": KEY} if headers is None else headers,
            )
            return Service(app, await stack.enter_async_context(client))

        yield start


@pytest.fixture
async def service(start_service: StartService) -> Service:
    """The app with ordinary settings."""
    return await start_service()


@pytest.fixture
async def start_server(make_settings: SettingsMaker) -> AsyncIterator[StartServer]:
    """`await start_server(NAME=value, …)`: the app behind a real uvicorn on a free port of 127.0.0.1."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            *, routes: Sequence[ControllerRouterHandler] = (), logs: Logs = SILENT, **environ: str
        ) -> Server:
            app = create_app(make_settings(**environ), routes=[*ROUTES, *routes], logs=logs)
            port = await stack.enter_async_context(serve(app))
            client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers={"X-API-Key": KEY})
            return Server(app, await stack.enter_async_context(client), port)

        yield start


@pytest.fixture
async def server(start_server: StartServer) -> Server:
    """The service behind a real uvicorn."""
    return await start_server()
