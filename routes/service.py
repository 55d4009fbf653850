"""What the service says about itself (CONTRACT 3): `/`, `/health`, `/ready`, `/metrics`.

Must never ask ComfyUI while answering: `/health` is about this process, `/ready` about what is already known.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from litestar import Request, Response, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import SkipValidation
from msgspec import Struct
from prometheus_client import CollectorRegistry

from managers.clock import Clock
from metrics.registry import exposition
from routes.problems import documented

NAME = "ComfyUI Management API"

ENDPOINTS: dict[str, dict[str, str]] = {
    "tasks": {
        "create": "POST /v1/tasks",
        "get": "GET /v1/tasks/{taskId}",
        "list": "GET /v1/tasks",
        "stop": "DELETE /v1/tasks/{taskId}",
        "logs": "GET /v1/tasks/{taskId}/logs/stream",
    },
    "comfyui": {
        "submit": "POST /v1/comfyui/workflow",
        "status": "GET /v1/comfyui/workflow/{workflowId}",
        "cancel": "DELETE /v1/comfyui/workflow/{workflowId}",
        "retry": "POST /v1/comfyui/workflow/{workflowId}/retry",
        "list": "GET /v1/comfyui/workflow",
        "models": "GET /v1/comfyui/models",
        "outputs": "GET /v1/comfyui/outputs",
        "output": "GET /v1/comfyui/output/{path}",
        "upload": "POST /v1/comfyui/inputs",
        "stream": "WS /v1/comfyui/stream",
        "backends": "GET /v1/comfyui/backends",
        "drain": "POST /v1/comfyui/backends/{name}/drain",
        "resume": "POST /v1/comfyui/backends/{name}/resume",
        "retryAll": "POST /v1/comfyui/workflow/retry",
    },
    "generate": {
        "generate": "POST /v1/generate/{template}",
        "templates": "GET /v1/templates",
        "save": "PUT /v1/templates/{name}",
        "propose": "POST /v1/templates/propose",
    },
    "monitoring": {
        "status": "GET /v1/status",
        "health": "GET /health",
        "ready": "GET /ready",
        "metrics": "GET /metrics",
        "usage": "GET /v1/usage",
    },
    "delivery": {
        "webhooks": "POST /v1/webhooks",
        "deliveries": "GET /v1/deliveries",
        "retry": "POST /v1/deliveries/{deliveryId}/retry",
    },
    "pages": {
        "dashboard": "GET /dashboard",
        "documentation": "GET /docs",
    },
}


class ServiceInfo(Struct, frozen=True):
    """Who this is, since when (`Clock.monotonic` seconds), and which paths are open."""

    version: str
    started: float
    clock: Clock
    metrics_auth: bool = False


class ReadyChecks(Struct, frozen=True):
    """The parts readiness is made of."""

    store: Literal["ok", "failing"]
    comfyui: Literal["ok", "unreachable"]
    draining: bool


class ReadyReply(Struct, frozen=True, rename="camel"):
    """The reply of GET /ready."""

    ready: bool
    active_tasks: int
    timestamp: str
    checks: ReadyChecks


class ReadyState(Protocol):
    """Whoever knows whether work can be taken. It answers from what it knows and waits for nobody."""

    def active_tasks(self) -> int:
        """How many tasks run now."""
        ...

    async def ready(self) -> ReadyChecks:
        """Not ready when the store fails or the service drains; an absent ComfyUI is only told."""
        ...


class RootReply(Struct, frozen=True):
    """The reply of GET /."""

    name: str
    version: str
    documentation: str
    authentication: str
    endpoints: dict[str, dict[str, str]]


class HealthReply(Struct, frozen=True):
    """The reply of GET /health. `uptime` in seconds."""

    status: Literal["healthy"]
    timestamp: str
    version: str
    uptime: float


def iso_timestamp(clock: Clock) -> str:
    """ISO-8601 in UTC with milliseconds and Z: what `/health`, `/ready` and `/v1/status` carry."""
    milliseconds = clock.now_ms()
    moment = datetime.fromtimestamp(milliseconds // 1000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{milliseconds % 1000:03d}Z"


_STAMP = "2026-11-22T16:03:11.482Z"


@get(
    "/",
    summary="What this service is",
    description="Name, version, where the documentation is, and the main endpoints.",
    tags=["service"],
    opt=documented(
        reply={
            "name": NAME,
            "version": "1.0.0",
            "documentation": "/docs",
            "authentication": "X-API-Key header required (except /, /health, /ready, /metrics, /docs, /dashboard)",
            "endpoints": ENDPOINTS,
        }
    ),
)
async def root(service: NamedDependency[SkipValidation[ServiceInfo]]) -> RootReply:
    """Answer GET /."""
    metrics = "" if service.metrics_auth else " /metrics,"
    open_paths = f"/, /health, /ready,{metrics} /docs, /dashboard"
    return RootReply(
        name=NAME,
        version=service.version,
        documentation="/docs",
        authentication=f"X-API-Key header required (except {open_paths})",
        endpoints=ENDPOINTS,
    )


@get(
    "/health",
    summary="Is the process alive",
    description="200 while the process lives. It never depends on ComfyUI or the store.",
    tags=["monitoring"],
    opt=documented(reply={"status": "healthy", "timestamp": _STAMP, "version": "1.0.0", "uptime": 86.411}),
)
async def health(service: NamedDependency[SkipValidation[ServiceInfo]]) -> HealthReply:
    """Answer GET /health."""
    return HealthReply(
        status="healthy",
        timestamp=iso_timestamp(service.clock),
        version=service.version,
        uptime=round(service.clock.monotonic() - service.started, 3),
    )


_READY_EXAMPLE: dict[str, Any] = {
    "ready": True,
    "activeTasks": 0,
    "timestamp": _STAMP,
    "checks": {"store": "ok", "comfyui": "ok", "draining": False},
}

_DRAINING_EXAMPLE: dict[str, Any] = {
    **_READY_EXAMPLE,
    "ready": False,
    "checks": {"store": "ok", "comfyui": "ok", "draining": True},
}


@get(
    "/ready",
    summary="Can work be taken",
    description=(
        "503 when the store fails or the service is about to stop. ComfyUI being away is told in `checks`, and is no "
        "reason for 503: work is accepted and kept."
    ),
    tags=["monitoring"],
    responses={
        503: ResponseSpec(
            data_container=ReadyReply,
            generate_examples=False,
            description="No work can be taken now.",
            examples=[Example(summary="Draining", value=_DRAINING_EXAMPLE)],
        )
    },
    opt=documented(reply=_READY_EXAMPLE),
)
async def ready(
    service: NamedDependency[SkipValidation[ServiceInfo]], ready_state: NamedDependency[SkipValidation[ReadyState]]
) -> Response[ReadyReply]:
    """Answer GET /ready."""
    checks = await ready_state.ready()
    is_ready = checks.store == "ok" and not checks.draining
    reply = ReadyReply(is_ready, ready_state.active_tasks(), iso_timestamp(service.clock), checks)
    return Response(reply, status_code=200 if is_ready else 503)


@get(
    "/metrics",
    summary="Metrics for Prometheus",
    description="Prometheus text, or OpenMetrics when the Accept header asks for it.",
    tags=["monitoring"],
    media_type="text/plain",
    opt=documented(
        reply='http_requests_total{method="GET",route="/health",status_code="200"} 12.0\n',
        also={
            "application/openmetrics-text": 'http_requests_total{method="GET",route="/health",status_code="200"} '
            "12.0\n# EOF\n"
        },
    ),
)
async def metrics(
    request: Request[Any, Any, Any], registry: NamedDependency[SkipValidation[CollectorRegistry]]
) -> Response[bytes]:
    """Answer GET /metrics."""
    text, content_type = await exposition(registry, request.headers.get("accept", ""))
    return Response(text, media_type=content_type)


# What Kubernetes' probes are often set to; documented under the first name alone.
healthz = get("/healthz", include_in_schema=False)(health.fn)
readyz = get("/readyz", include_in_schema=False)(ready.fn)

service_routes = [root, health, ready, healthz, readyz, metrics]
