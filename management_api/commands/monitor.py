"""`management-api monitor`: tells EventBridge, and uploads, what others submit to a ComfyUI.

A small house of its own: the same store, log, hub and couriers as the service, in the folder `monitor` of the data
folder, and watchers instead of dispatchers. Must never submit or stop anything.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import structlog
import uvloop

from management_api import __version__
from management_api.commands.terminal import complain
from management_api.eventbridge import make_eventbridge
from management_api.logging import configure
from management_api.monitor_doors import doors
from management_api.services import backend_configs
from management_api.settings import Settings, SettingsError, load
from management_api.uploads import Uploads, make_uploads
from managers.clock import Clock, SystemClock, new_id
from managers.comfyui.backend import Backend, BackendConfig
from managers.delivery.eventbridge import EventBridge
from managers.delivery.monitor import Watcher
from managers.delivery.monitor_reading import RecentClient
from managers.delivery.office import Deliveries
from managers.delivery.sqlite_deliveries import SqliteDeliveries
from managers.errors import ManagerError
from managers.events.hub import Hub
from managers.events.types import QueueStatus, StoredEvent
from managers.workflows.outputs import OutputDoor
from managers.workflows.retention import DAY_MS, Retention, RetentionConfig
from managers.workflows.sqlite_store import SqliteStore

log = structlog.get_logger(__name__)

FOLDER = "monitor"
_RESTART_SECONDS = 1.0


class _Stamp(msgspec.Struct):
    timestamp: int


def run() -> int:
    """Watch with the settings of the environment and `.env`. Gives the exit status."""
    try:
        settings = load(os.environ, Path(".env"), require_key=False)
    except SettingsError as error:
        return complain(str(error))
    if settings.eventbridge.bus_name is None and settings.s3.bucket is None:
        return complain("There is nobody to tell: set EVENTBRIDGE_BUS_NAME, or S3_BUCKET")
    configure(settings.log.level, settings.log.format, secrets=(settings.api.key,))
    try:
        uvloop.run(_watch(settings))
    except ManagerError as error:
        return complain(str(error))
    return 0


async def _watch(settings: Settings) -> None:
    """Until SIGTERM or SIGINT; a second one ends the process at once: what counts is on disk."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def asked() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked)
    async with monitor(settings, SystemClock()) as (watchers, url):
        for watcher in watchers:
            log.info(
                "monitor is ready", backend=watcher.name, client_id=watcher.client_id, version=__version__, url=url
            )
        await stop.wait()
        log.info("stopping")
    log.info("stopped")


@asynccontextmanager
async def monitor(settings: Settings, clock: Clock) -> AsyncIterator[tuple[list[Watcher], str | None]]:
    """The house, running, and the URL of its doors. Raises `StoreUnavailable` and `MissingExtra`."""
    async with AsyncExitStack() as stack:
        folder = settings.api.data_dir / FOLDER
        store = SqliteStore(folder, clock=clock, ids=new_id, aging_seconds=0)
        hub = Hub(store)
        uploads = make_uploads(settings, store=store, clock=clock)
        await store.open(hub.publish_stored)
        stack.push_async_callback(store.close)
        horizon = await _horizon(store, settings.api.retention, clock)
        configs = backend_configs(settings)
        client_ids = {config.name: await store.client_id(config.name) for config in configs}
        outgoing = SqliteDeliveries(store)
        deliveries = Deliveries(store=outgoing, log=store, clock=clock, new_id=new_id)
        eventbridge = make_eventbridge(
            settings,
            records=store,
            hub=hub,
            clock=clock,
            client_ids=client_ids,
            dress=None if uploads is None else uploads.links.dressed,
        )
        stack.callback(hub.listen(deliveries.hear))
        stack.push_async_callback(deliveries.aclose)
        if eventbridge is not None:
            await deliveries.add(eventbridge)
        if uploads is not None:
            await _add_uploads(uploads, deliveries, configs, client_ids, store=store, clock=clock, stack=stack)
        # Now that all listen, what happens may be found.
        watchers = _watchers(configs, client_ids, store=store, hub=hub, clock=clock, horizon=horizon, stack=stack)
        tasks = [
            *(_keep(watcher) for watcher in watchers),
            *([] if eventbridge is None else [_keep(eventbridge)]),
            Retention(RetentionConfig(days=settings.api.retention), store, clock, heard=deliveries.heard).run(),
            Retention(RetentionConfig(days=settings.delivery.log_days), outgoing, clock).run(),
        ]
        work = [asyncio.create_task(task) for task in tasks]
        stack.push_async_callback(_end, work, deliveries, eventbridge)
        own = doors(settings, watchers=watchers, deliveries=deliveries, hub=hub, check=store.check, clock=clock)
        yield watchers, await stack.enter_async_context(own)


async def _horizon(store: SqliteStore, days: int, clock: Clock) -> int:
    """When we began to look, or so far back as anything is kept (epoch ms): what ended before is not told.

    Whatever the store has forgotten ended before that, so nothing is told twice that ComfyUI remembers for longer.
    """
    now = clock.now_ms()
    first = await store.events_after(0, 1)
    began = msgspec.json.decode(first[0].data, type=_Stamp).timestamp if first else now
    return max(began, now - days * DAY_MS) if days else began


def _watchers(
    configs: list[BackendConfig],
    client_ids: dict[str, str],
    *,
    store: SqliteStore,
    hub: Hub,
    clock: Clock,
    horizon: int,
    stack: AsyncExitStack,
) -> list[Watcher]:
    counts: dict[str, tuple[int, int]] = {}

    def counted(name: str, waiting: int, running: int) -> None:
        if counts.get(name) != (waiting, running):
            counts[name] = (waiting, running)
            waits, runs = (sum(column) for column in zip(*counts.values(), strict=True))
            hub.publish(QueueStatus(timestamp=clock.now_ms(), length=waits, running=runs, paused=False))

    watchers = []
    for config in configs:
        client = RecentClient(config.url, config.outputs)
        stack.push_async_callback(client.aclose)
        watchers.append(
            Watcher(
                name=config.name,
                client=client,
                client_id=client_ids[config.name],
                store=store,
                hub=hub,
                clock=clock,
                horizon=horizon,
                counted=counted,
            )
        )
    return watchers


async def _add_uploads(
    uploads: Uploads,
    deliveries: Deliveries,
    configs: list[BackendConfig],
    client_ids: dict[str, str],
    *,
    store: SqliteStore,
    clock: Clock,
    stack: AsyncExitStack,
) -> None:
    """The backends here only open files: none of them is ever run."""

    def ignore(_: StoredEvent) -> None:
        """They have nothing to say."""

    backends = []
    for config in configs:
        backend = Backend(config, client_ids[config.name], clock=clock, publish=lambda _: None, on_event=ignore)
        stack.push_async_callback(backend.client.aclose)
        backends.append(backend)
    await deliveries.add(uploads.destination(OutputDoor(store, backends)))


async def _end(work: list[asyncio.Task[None]], deliveries: Deliveries, eventbridge: EventBridge | None) -> None:
    await deliveries.aclose()  # while the store can still record what arrives
    for task in work:
        task.cancel()
    await asyncio.gather(*work, return_exceptions=True)
    if eventbridge is not None:
        await eventbridge.aclose()


async def _keep(work: Watcher | EventBridge) -> None:
    """Run it for ever: what was open is taken up again by the next run."""
    while True:
        try:
            await work.run()
        except Exception:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            log.exception("failed, starting it again", work=work.name)
            await asyncio.sleep(_RESTART_SECONDS)
