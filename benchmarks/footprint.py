"""What the service takes before it has anything to do: time to start, and memory.

Goals (issue: numbers): from the start of the process until /health answers ≤ 2 s; idle memory (VmRSS) ≤ 80 MB.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import uvloop

from benchmarks.house import KEY, Connection, service, simulator
from benchmarks.table import Number, below, percentile, told

STARTS = 5
REQUESTS = ("/health", "/", "/v1/comfyui/workflow", "/v1/comfyui/outputs", "/metrics")


async def _ask(url: str) -> None:
    connection = await asyncio.wait_for(Connection.to(url, KEY), 10)
    for path in REQUESTS * 2:
        reply = await connection.get(path)
        assert reply.status == 200, (path, reply.body)
    connection.close()


def run() -> list[Number]:
    """With a simulator as its backend. The first start, which may find no compiled modules, is not counted."""
    seconds, computed, idle, used = [], [], [], []
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as parent:
        folder = Path(parent).resolve()
        with simulator(folder / "comfy") as comfyui:
            for number in range(STARTS + 1):
                with service(folder / f"data-{number}", comfyui) as house:
                    seconds.append(house.ready - house.started)
                    computed.append(house.cpu_seconds())
                    idle.append(house.rss_mb())
                    uvloop.run(_ask(house.url))
                    used.append(house.rss_mb())
    return [
        below("start to ready, median", percentile(seconds[1:], 50), 2.0, "s", digits=2),
        told("CPU time of that start", f"{percentile(computed[1:], 50):.2f} s"),
        below("memory after the start", max(idle), 80, "MiB"),
        below(f"memory after {2 * len(REQUESTS)} requests", max(used), 80, "MiB"),
    ]
