"""The monitor's own doors: `/health`, `/ready` and `/metrics` on MANAGEMENT_API_PORT, as the service has them.

Must never take anything in, and never keep the monitor from its work: where the port is taken, it goes without.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import structlog
import uvicorn
from litestar import Litestar
from litestar.di import Provide
from prometheus_client import CollectorRegistry

from management_api import __version__
from management_api.commands.listener import CannotStart, bind, url_of
from management_api.settings import Settings
from managers.clock import Clock
from managers.delivery.monitor import Watcher
from managers.delivery.office import Deliveries
from managers.errors import StoreUnavailable
from managers.events.hub import Hub
from metrics.deliveries import DeliveryMetrics
from metrics.registry import new_registry
from metrics.workflows import WorkflowMetrics
from routes.service import ReadyChecks, ServiceInfo, health, healthz, metrics, ready, readyz

log = structlog.get_logger(__name__)


class _Ready:
    """What `/ready` tells."""

    def __init__(self, watchers: Sequence[Watcher], check: Callable[[], Awaitable[None]]) -> None:
        self._watchers = watchers
        self._check = check

    def active_tasks(self) -> int:
        """There are none here."""
        return 0

    async def ready(self) -> ReadyChecks:
        """The store is asked, ComfyUI is only remembered."""
        up = any(watcher.up for watcher in self._watchers)
        try:
            await self._check()
        except StoreUnavailable:
            return ReadyChecks(store="failing", comfyui="ok" if up else "unreachable", draining=False)
        return ReadyChecks(store="ok", comfyui="ok" if up else "unreachable", draining=False)


class _Server(uvicorn.Server):
    """Signals are for the monitor."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """They are not taken."""
        yield


@asynccontextmanager
async def doors(
    settings: Settings,
    *,
    watchers: Sequence[Watcher],
    deliveries: Deliveries,
    hub: Hub,
    check: Callable[[], Awaitable[None]],
    clock: Clock,
) -> AsyncIterator[str | None]:
    """Open them; gives the URL, or None where there are none."""
    try:
        listener = bind(settings.api.host, settings.api.port)
    except CannotStart as error:
        log.warning("there is no /health and no /metrics", reason=str(error))
        yield None
        return
    registry = new_registry()
    counted = WorkflowMetrics([watcher.name for watcher in watchers])
    stop_listening = hub.listen(counted.hear)
    registry.register(counted)
    registry.register(DeliveryMetrics(deliveries))
    info = ServiceInfo(version=__version__, started=clock.monotonic(), clock=clock)
    config = uvicorn.Config(
        _app(info, _Ready(watchers, check), registry, metrics_open=not settings.api.metrics_auth),
        loop="none",
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="doors")
    try:
        yield url_of(listener)
    finally:
        server.should_exit = True
        await asyncio.gather(task, return_exceptions=True)
        listener.close()
        stop_listening()


def _app(info: ServiceInfo, state: _Ready, registry: CollectorRegistry, *, metrics_open: bool) -> Litestar:
    def given(value: Any) -> Provide:
        return Provide(lambda: value, sync_to_thread=False)

    return Litestar(
        route_handlers=[health, healthz, ready, readyz, *([metrics] if metrics_open else ())],
        dependencies={"service": given(info), "ready_state": given(state), "registry": given(registry)},
        openapi_config=None,
        logging_config=None,
        debug=False,
    )
