"""What being watched costs: key, limit and metrics of a request, and a scrape of a house that has much to tell.

Goals (issue: numbers): a request pays ≤ 0.1 ms for metrics, key and limit together; a scrape with 4 GPUs and 200 node
types ≤ 10 ms p99, and meanwhile the event loop has no gap over 5 ms. In one process, without a network: the app is
called as the server calls it.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import uvloop
from prometheus_client import CollectorRegistry

from benchmarks.house import KEY
from benchmarks.table import Number, below, percentile, told
from management_api import logging
from management_api.app import Application, create_app
from management_api.cors import Cors
from management_api.limits import ClientAddress, RateLimiter
from management_api.logging import AccessLog
from management_api.open_streams import OpenStreams
from management_api.outer import Outer
from management_api.route_names import RouteNames
from management_api.settings import load
from managers.events.types import NodeExecuted, NodeExecuting
from managers.gpu.values import Gpu, Sample
from metrics.http import HttpMetrics
from tests.serving import lifespan

REQUESTS, ROUNDS = 3_000, 7
SCRAPES = 300
NODE_TYPES, GPUS = 200, 4

R = TypeVar("R")
Asgi = Callable[[Any, Any, Any], Awaitable[None]]


async def _tiny(scope: Any, _: Any, send: Any) -> None:
    """An app that does nothing: what is left is what stands before it."""
    scope["path_template"] = "/v1/nothing"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"{}", "more_body": False})


def _scope(method: str, path: str) -> dict[str, Any]:
    headers = [(b"host", b"127.0.0.1"), (b"user-agent", b"curl"), (b"accept", b"*/*"), (b"x-api-key", KEY.encode())]
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "headers": headers, "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 9090), "scheme": "http", "root_path": "",
    }  # fmt: skip


async def _receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _drop(message: Any) -> None:
    pass


async def _microseconds(app: Asgi) -> float:
    """The best of a few rounds, a request."""
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(REQUESTS):
            await app(_scope("POST", "/v1/nothing"), _receive, _drop)
        taken.append((time.perf_counter() - began) / REQUESTS * 1e6)
    return min(taken)


async def _request(app: Application, access_log: AccessLog) -> list[Number]:
    """The wrapper around nothing, in turns with nothing alone."""
    api = app.base.settings.api
    house = Outer(
        cast("Any", _tiny),
        authenticator=app.base.authenticator,
        limiter=RateLimiter(api.rate_limit, ()),
        addresses=ClientAddress(),
        streams=OpenStreams(0),
        cors=Cors(()),
        names=RouteNames(app.litestar.routes),
        metrics=HttpMetrics(CollectorRegistry()),
        access_log=access_log,
    )
    both = [(await _microseconds(_tiny), await _microseconds(house)) for _ in range(3)]
    alone, within = min(one for one, _ in both), min(two for _, two in both)
    return [
        below("key, limit, metrics, request id, common headers and access log of a request", (within - alone) / 1e3,
              0.1, "ms", digits=3),
    ]  # fmt: skip


def _much_to_tell(app: Application) -> None:
    """200 node classes that ran, four cards, every route asked."""
    services = app.running[0]
    for number in range(NODE_TYPES):
        common: dict[str, Any] = {
            "workflow_id": f"w{number % 50}", "node_id": str(number), "display_node_id": str(number),
            "parent_node_id": None, "real_node_id": str(number), "node_type": f"Benchmark.NodeClass{number}",
            "node_name": "A node", "node_state": "running", "node_progress": 0.0, "node_max_progress": 1.0,
            "node_percentage": 0,
        }  # fmt: skip
        services.hub.publish(NodeExecuting(timestamp=1_000, **common))
        services.hub.publish(NodeExecuted(timestamp=1_000 + number, **common))
    cards = tuple(
        Gpu(
            gpu_id=str(index), index=index, uuid=f"GPU-{index}", name="NVIDIA H100 80GB HBM3", utilization=97,
            memory_used=2**35, memory_total=80 * 2**30, temperature=61, power=512.0, energy=1e9,
        )
        for index in range(GPUS)
    )  # fmt: skip
    services.gpus._sampled(Sample(at=time.monotonic(), gpus=cards))  # noqa: SLF001 - in the driver's place


async def _scrape(app: Application) -> list[Number]:
    _much_to_tell(app)
    sizes: list[int] = []

    async def count(message: Any) -> None:
        if message["type"] == "http.response.body":
            sizes.append(len(message.get("body", b"")))

    async def scrapes() -> list[float]:
        taken = []
        for _ in range(SCRAPES):
            began = time.perf_counter()
            await app(_scope("GET", "/metrics"), _receive, count)
            taken.append((time.perf_counter() - began) * 1e3)
            await asyncio.sleep(0.005)
        return taken

    taken, gaps = await _beside(scrapes())
    _, alone = await _beside(asyncio.sleep(sum(taken) / 1e3))
    return [
        below(f"a scrape with {GPUS} GPUs and {NODE_TYPES} node types, p99", percentile(taken, 99), 10, "ms"),
        told("a scrape, p50; its size", f"{percentile(taken, 50):.1f} ms; {sizes[-1] / 1024:.0f} KiB"),
        below("longest gap of the event loop meanwhile", max(gaps), 5, "ms"),
        told(
            "gaps of the event loop, p99.9; longest without any scrape",
            f"{percentile(gaps, 99.9):.1f} ms; {max(alone):.1f} ms",
        ),
    ]


async def _beside(work: Awaitable[R]) -> tuple[R, list[float]]:
    """Its result, and how long (ms) the loop was away each time from somebody who wants it all the time."""
    gaps: list[float] = []
    done = asyncio.Event()

    async def tick() -> None:
        before = time.perf_counter()
        while not done.is_set():
            await asyncio.sleep(0)
            now = time.perf_counter()
            gaps.append((now - before) * 1e3)
            before = now

    ticking = asyncio.create_task(tick())
    try:
        return await work, gaps
    finally:
        done.set()
        await ticking


async def _measure(folder: Path) -> list[Number]:
    with (folder / "log").open("w") as log:
        settings = load(
            {
                "MANAGEMENT_API_KEY": KEY,
                "MANAGEMENT_API_RATE_LIMIT": "1000000000/minute",
                "MANAGEMENT_API_DATA_DIR": str(folder / "data"),
                "COMFYUI_PORT": "9",
                "GPU_SAMPLE_SECONDS": "0",
            },
            None,
        )
        logs = logging.configure("info", "json", log, secrets=(KEY,))
        app = create_app(settings, logs=logs)
        async with lifespan(app):
            numbers = await _scrape(app)
            gc.disable()
            try:
                return [*await _request(app, logs.access), *numbers]
            finally:
                gc.enable()


def run() -> list[Number]:
    """One house, asked in its own process."""
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as parent:
        return uvloop.run(_measure(Path(parent).resolve()))
