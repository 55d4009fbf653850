"""What the service is made of, started and stopped in one visible order.

The only place where a manager meets another. Must never hold a rule of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from msgspec import Struct
from prometheus_client import CollectorRegistry

from management_api import __version__
from management_api.eventbridge import make_eventbridge
from management_api.inputs import make_inputs
from management_api.programs import LOOPBACK, managed_config, tasks_config, uncharged
from management_api.security import Authenticator
from management_api.settings import Settings
from management_api.uploads import make_uploads
from managers.clock import Clock, new_id
from managers.comfyui.backend import BackendConfig
from managers.comfyui.restart import RestartConfig
from managers.comfyui.watchdog import WatchConfig
from managers.delivery.endpoints import Webhooks
from managers.delivery.eventbridge import EventBridge
from managers.delivery.office import Deliveries
from managers.delivery.sqlite_deliveries import SqliteDeliveries
from managers.delivery.webhooks import Sender, as_stored
from managers.errors import StoreUnavailable
from managers.events.hub import Hub
from managers.events.tickets import Tickets
from managers.events.types import Cost
from managers.files import MODEL_TYPES, Files, FilesConfig, OutputOwner
from managers.gpu import GpuConfig, GpuManager
from managers.guard import Guard
from managers.processes.comfyui import ManagedComfyUI
from managers.processes.manager import ProcessManager
from managers.system import DiskWatch, SystemMonitor
from managers.templates.registry import Templates
from managers.templates.sqlite_templates import SqliteTemplates
from managers.workflows.dispatcher import Dispatcher, DispatcherConfig
from managers.workflows.inputs import InputDoor
from managers.workflows.manager import QueueConfig, WorkflowManager
from managers.workflows.outputs import OutputDoor
from managers.workflows.retention import Retention, RetentionConfig
from managers.workflows.sqlite_store import SqliteStore
from managers.workflows.store import WorkflowStore
from metrics.house import HouseMetrics
from routes.managed import Managed
from routes.service import ReadyChecks, ReadyState, ServiceInfo
from routes.stream import Streams

log = structlog.get_logger(__name__)

_RESTART_SECONDS = 1.0


class Base(Struct, frozen=True):
    """What exists before anything is started."""

    settings: Settings
    clock: Clock
    registry: CollectorRegistry
    authenticator: Authenticator


class Services(Struct, frozen=True):
    """What routes ask for by name (`NamedDependency`): each field is one dependency."""

    service: ServiceInfo
    ready_state: ReadyState
    registry: CollectorRegistry
    workflows: WorkflowManager
    hub: Hub
    streams: Streams
    files: Files
    output_door: OutputDoor
    inputs: InputDoor
    gpus: GpuManager
    tasks: ProcessManager
    system: SystemMonitor
    managed: Managed
    deliveries: Deliveries
    webhooks: Webhooks
    templates: Templates

    async def close_doors(self) -> None:
        """The first step of stopping, before the server closes its sockets: no new work, streams end with 1001."""
        self.workflows.drain()
        self.tasks.drain()
        self.managed.drain()
        self.deliveries.stop()
        await self.hub.close()


@asynccontextmanager
async def start_services(base: Base) -> AsyncIterator[Services]:
    """Start the managers, each on those before it; stop them in reverse when the service ends."""
    settings, clock = base.settings, base.clock
    tasks = ProcessManager(tasks_config(settings), clock=clock, new_id=new_id)
    program = managed_config(settings)
    store = SqliteStore(settings.api.data_dir, clock=clock, ids=new_id, aging_seconds=settings.comfyui.priority_aging)
    hub = Hub(store)
    uploads = make_uploads(settings, store=store, clock=clock)

    def cost_of(workflow_id: str) -> Cost | None:  # asked when all have met
        return gpus.cost_of(workflow_id)

    workflows = WorkflowManager(
        QueueConfig(
            max_waiting=settings.comfyui.max_queue,
            aging_seconds=settings.comfyui.priority_aging,
            timeout_seconds=settings.comfyui.timeout,
        ),
        store=store,
        events=hub,
        clock=clock,
        new_id=new_id,
        cost_of=cost_of,
        links=None if uploads is None else uploads.links,
    )
    async with AsyncExitStack() as stack:  # closed in the reverse order
        await store.open(workflows.committed)
        stack.push_async_callback(store.close)
        await workflows.forecast.open()
        backends = backend_configs(settings)
        inputs = make_inputs(settings, lambda: workflows.catalogs)
        dispatchers = [
            Dispatcher(
                DispatcherConfig(
                    backend=backend,
                    prefetch=settings.comfyui.prefetch,
                    free_when_idle_seconds=settings.comfyui.free_when_idle_seconds,
                    gone_seconds=settings.comfyui.gone_seconds,
                    restart=restart_config(settings, backend),
                ),
                store=store,
                events=hub,
                live=workflows.live,
                forecast=workflows.forecast,
                describe=workflows.describe,
                clock=clock,
                new_id=new_id,
                client_id=await store.client_id(backend.name),
                cost_of=cost_of,
                before_complete=uploads.before_complete
                if uploads is not None and settings.s3.before_complete
                else None,
                inputs=inputs,
            )
            for backend in backends
        ]
        drained = await store.drained()
        for dispatcher in dispatchers:
            if dispatcher.name in drained:
                dispatcher.drain()
        workflows.attach(dispatchers)
        gpus = GpuManager(
            gpu_config(settings), backends=[dispatcher.backend for dispatcher in dispatchers], hub=hub, clock=clock
        )
        comfyui = (
            None
            if program is None
            else ManagedComfyUI(program, clock=clock, on_restart=lambda name: uncharged(dispatchers, name))
        )
        tickets = Tickets(clock)
        base.authenticator.register_ticket_checker(tickets.redeem)
        files = Files(
            FilesConfig(
                outputs=settings.comfyui.outputs,
                models={kind: getattr(settings.comfyui.models, kind) for kind in MODEL_TYPES},
            ),
            Owners(store, next((backend.name for backend in backends if backend.outputs), None)),
        )
        outgoing = SqliteDeliveries(store)
        deliveries = Deliveries(store=outgoing, log=store, clock=clock, new_id=new_id)
        sender = Sender(
            Guard(allow_private=settings.delivery.webhook_allow_private),
            clock=clock,
            agent=f"comfyui-management-api/{__version__}",
        )
        webhooks = Webhooks(
            store=outgoing,
            deliveries=deliveries,
            sender=sender,
            clock=clock,
            new_id=new_id,
            dress=as_stored if uploads is None else uploads.links.dressed,
        )
        templates = Templates(
            SqliteTemplates(store),
            workflows,
            clock,
            folders=template_folders(settings),
            default=settings.api.generate_template,
        )
        await templates.open()
        services = Services(
            service=ServiceInfo(
                version=__version__, started=clock.monotonic(), clock=clock, metrics_auth=settings.api.metrics_auth
            ),
            ready_state=Readiness(workflows, tasks, store.check),
            registry=base.registry,
            workflows=workflows,
            hub=hub,
            streams=Streams(
                hub=hub,
                log=workflows.log,
                source=workflows,
                tickets=tickets,
                clock=clock,
                origins=settings.api.cors_allowed_origins,
            ),
            files=files,
            output_door=OutputDoor(
                store,
                [dispatcher.backend for dispatcher in dispatchers],
                links=None if uploads is None else uploads.links,
            ),
            inputs=InputDoor(inputs.config, [dispatcher.backend for dispatcher in dispatchers], new_id=new_id),
            gpus=gpus,
            tasks=tasks,
            system=SystemMonitor(settings.api.data_dir),
            managed=Managed(comfyui),
            deliveries=deliveries,
            webhooks=webhooks,
            templates=templates,
        )
        disks = DiskWatch({"data": settings.api.data_dir, "outputs": settings.comfyui.outputs})
        metrics = HouseMetrics(
            base.registry,
            workflows=workflows,
            hub=hub,
            gpus=gpus,
            clock=clock,
            tasks=tasks,
            disks=disks,
            deliveries=deliveries,
        )
        stack.callback(metrics.close)
        stack.callback(files.close)
        stack.push_async_callback(tasks.aclose)
        if comfyui is not None:
            stack.push_async_callback(comfyui.aclose)
        stack.push_async_callback(inputs.aclose)
        for dispatcher in dispatchers:
            stack.push_async_callback(dispatcher.aclose)
        await tasks.open()
        stop_hearing = hub.listen(deliveries.hear)
        await webhooks.open()
        if uploads is not None:
            await deliveries.add(uploads.destination(services.output_door))
        eventbridge = make_eventbridge(
            settings,
            records=store,
            hub=hub,
            clock=clock,
            client_ids={dispatcher.name: dispatcher.backend.client_id for dispatcher in dispatchers},
            dress=None if uploads is None else uploads.links.dressed,
        )
        if eventbridge is not None:
            stack.push_async_callback(eventbridge.aclose)
            await deliveries.add(eventbridge)
        retention = Retention(RetentionConfig(days=settings.api.retention), store, clock, heard=deliveries.heard)
        log_retention = Retention(RetentionConfig(days=settings.delivery.log_days), outgoing, clock)
        work = [
            asyncio.create_task(_keep(gpus), name="gpus"),  # first: no start of a workflow may pass unheard
            *(
                asyncio.create_task(_keep(dispatcher), name=f"dispatcher {dispatcher.name}")
                for dispatcher in dispatchers
            ),
            asyncio.create_task(retention.run(), name="retention"),
            asyncio.create_task(log_retention.run(), name="retention of the delivery log"),
            asyncio.create_task(_keep(disks), name="disks"),
            *([asyncio.create_task(_keep(comfyui), name="comfyui")] if comfyui else ()),
            *([asyncio.create_task(_keep(eventbridge), name="eventbridge")] if eventbridge else ()),
        ]
        stack.push_async_callback(_end, work)
        stack.push_async_callback(webhooks.aclose)
        stack.push_async_callback(deliveries.aclose)  # while the store can still record what arrives
        stack.callback(stop_hearing)
        stack.push_async_callback(services.close_doors)
        yield services


async def _end(work: Sequence[asyncio.Task[None]]) -> None:
    for task in work:
        task.cancel()
    await asyncio.gather(*work, return_exceptions=True)


def backend_configs(settings: Settings) -> list[BackendConfig]:
    """The configured backends. One on this machine shares our outputs folder; with several of them none does."""
    local = [backend for backend in settings.comfyui.backends if urlsplit(backend.url).hostname in LOOPBACK]
    shared = settings.comfyui.outputs if len(local) == 1 and settings.comfyui.outputs.is_dir() else None
    watch = WatchConfig(
        interrupt=settings.comfyui.interrupt_seconds,
        stall=settings.comfyui.stall_seconds,
        stall_interrupt=settings.comfyui.stall_interrupt,
    )
    return [
        BackendConfig(name=backend.name, url=backend.url, outputs=shared if backend in local else None, watch=watch)
        for backend in settings.comfyui.backends
    ]


def template_folders(settings: Settings) -> list[Path]:
    """Where templates lie as files; of two with one name that of the later folder counts."""
    return [settings.api.data_dir / "templates", *([settings.api.templates] if settings.api.templates else ())]


def restart_config(settings: Settings, backend: BackendConfig) -> RestartConfig:
    """How a stalled backend is restarted. The command is told which one, without what is secret in its address."""
    parts = urlsplit(backend.url)
    url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    told = {"COMFYUI_BACKEND": backend.name, "COMFYUI_URL": url}
    environ = settings.comfyui.restart_environ | told
    return RestartConfig(argv=settings.comfyui.restart_command.argv, environ=environ)


def gpu_config(settings: Settings) -> GpuConfig:
    """How the cards are sampled, and whose they are."""
    places = settings.gpu.backends
    return GpuConfig(
        sample_seconds=settings.gpu.sample_seconds,
        running_seconds=settings.gpu.running_sample_seconds,
        here=None if places is None else {place.name: place.cards for place in places},
    )


async def _keep(work: Dispatcher | GpuManager | ManagedComfyUI | DiskWatch | EventBridge) -> None:
    """Run it for ever. A fault of ours must not stop the queue: what was open is reconciled by the next run."""
    while True:
        try:
            await work.run()
        except Exception:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            log.exception("failed, starting it again", work=work.name)
            await asyncio.sleep(_RESTART_SECONDS)


class Readiness:
    """What `/ready` tells."""

    def __init__(
        self, workflows: WorkflowManager, tasks: ProcessManager, check: Callable[[], Awaitable[None]]
    ) -> None:
        self._workflows = workflows
        self._tasks = tasks
        self._check = check

    def active_tasks(self) -> int:
        """Those that run; workflows are not tasks."""
        return self._tasks.active_count

    async def ready(self) -> ReadyChecks:
        """The store is asked, ComfyUI is only remembered."""
        store: str = "ok"
        try:
            await self._check()
        except StoreUnavailable:
            store = "failing"
        up = any(dispatcher.backend.up for dispatcher in self._workflows.dispatchers)
        return ReadyChecks(
            store="ok" if store == "ok" else "failing",
            comfyui="ok" if up else "unreachable",
            draining=self._workflows.draining,
        )


class Owners:
    """Who wrote which file of our outputs folder, from the record of runs on the `backend` that shares it."""

    def __init__(self, store: WorkflowStore, backend: str | None) -> None:
        self._store = store
        self._backend = backend

    async def workflows_of(self, paths: Sequence[str]) -> Mapping[str, OutputOwner]:
        """The last run that reported each path."""
        return await self._store.owners(self._backend, paths)

    async def paths_of(self, workflow_id: str) -> Sequence[str]:
        """What a workflow wrote."""
        return await self._store.output_paths(workflow_id)
