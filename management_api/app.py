"""Puts the house together: settings in, an ASGI app out. What is started in it is in `services.py`.

Must never hold a rule itself.
"""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from litestar import Litestar
from litestar.di import Provide
from litestar.types import ControllerRouterHandler

from management_api import __version__
from management_api.cors import Cors
from management_api.errors import exception_handlers, log_socket_failure
from management_api.keys import KeyRing
from management_api.limits import ClientAddress, RateLimiter
from management_api.logging import SILENT, Logs
from management_api.open_streams import OpenStreams
from management_api.openapi import STATIC, openapi_config, static_router
from management_api.outer import Outer
from management_api.route_names import RouteNames
from management_api.security import Authenticator, ScopeGate
from management_api.services import Base, Services, start_services
from management_api.settings import Settings
from management_api.template_operations import GENERIC, mark, operations
from managers.clock import Clock, SystemClock
from metrics.http import HttpMetrics
from metrics.registry import new_registry
from routes.backends import backend_routes
from routes.bodies import JsonRequest
from routes.dashboard import dashboard_routes
from routes.definitions import definition_routes
from routes.deliveries import delivery_routes
from routes.files import files_routes
from routes.generate import generate_routes
from routes.inputs import input_routes
from routes.managed import managed_routes
from routes.options import options_route
from routes.replay import replay_routes
from routes.service import service_routes
from routes.status import status_routes
from routes.stream import stream_routes
from routes.tasks import task_routes
from routes.templates import template_routes
from routes.usage import usage_routes
from routes.webhooks import webhook_routes
from routes.workflows import workflow_routes

ROUTES: list[ControllerRouterHandler] = [
    *service_routes,
    *workflow_routes,
    *replay_routes,
    *backend_routes,
    *stream_routes,
    *definition_routes,
    *files_routes,
    *input_routes,
    *status_routes,
    *usage_routes,
    *task_routes,
    *managed_routes,
    *delivery_routes,
    *webhook_routes,
    *template_routes,
    *generate_routes,
    *dashboard_routes(STATIC / "dashboard"),
]
"""Every door of the service."""


class Application(Outer):
    """The ASGI app for the server, with what tests and the command line want to reach."""

    litestar: Litestar
    base: Base
    running: list[Services]
    """The services while the lifespan lasts, else empty."""


def create_app(
    settings: Settings,
    services: Services | None = None,
    *,
    routes: Sequence[ControllerRouterHandler] | None = None,
    logs: Logs = SILENT,
    clock: Clock | None = None,
) -> Application:
    """The app. With `services` nothing is started: they are used as they are. `routes` default to `ROUTES`.

    Raises `KeysError` when the keys file cannot be used.
    """
    api = settings.api
    clock = clock or SystemClock()
    keys = None if api.keys_file is None else KeyRing(api.keys_file, clock)
    base = Base(
        settings=settings,
        clock=clock,
        registry=new_registry(),
        authenticator=Authenticator(api.key, keys, metrics_auth=api.metrics_auth),
    )
    running: list[Services] = []
    handlers = ROUTES if routes is None else routes

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if services is None:
                running.append(await stack.enter_async_context(start_services(base)))
            else:
                running.append(services)
            stack.callback(running.clear)
            _settle()
            stack.callback(gc.unfreeze)
            yield

    litestar = Litestar(
        route_handlers=[options_route(handlers), *handlers, static_router()],
        dependencies={name: _provide(running, name) for name in Services.__struct_fields__},
        middleware=[ScopeGate()],
        exception_handlers=exception_handlers(),
        after_exception=[log_socket_failure],
        lifespan=[lifespan],
        openapi_config=openapi_config(__version__),
        request_class=JsonRequest,
        request_max_body_size=api.max_body,
        logging_config=None,
        debug=False,
    )
    litestar.state["living"] = LivingTemplates(running)
    application = Application(
        litestar,
        authenticator=base.authenticator,
        limiter=RateLimiter(api.rate_limit, api.rate_limit_allow),
        addresses=ClientAddress(api.trusted_proxies),
        streams=OpenStreams(api.max_sockets, api.rate_limit_allow),
        cors=Cors(api.cors_allowed_origins),
        names=RouteNames(litestar.routes),
        metrics=HttpMetrics(base.registry),
        access_log=logs.access,
    )
    application.litestar, application.base, application.running = litestar, base, running
    return application


class LivingTemplates:
    """The operations of templates, while there are services (`openapi.Living`)."""

    def __init__(self, running: Sequence[Services]) -> None:
        self._running = running

    def mark(self) -> Hashable:
        """See `template_operations.mark`."""
        return mark(self._running[0].templates) if self._running else None

    def paths(self, finished: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `template_operations.operations`."""
        generic = finished["paths"].get(GENERIC)
        return operations(self._running[0].templates, generic["post"]) if generic and self._running else {}


def _settle() -> None:
    """The end of start-up: what lives now lives long, so the collector need not look at it again (STACK §2)."""
    gc.collect()
    gc.freeze()


def _provide(running: list[Services], name: str) -> Provide:
    def provide() -> Any:
        return getattr(running[0], name)

    return Provide(provide, sync_to_thread=False)
