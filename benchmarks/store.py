"""The embedded store alone: what group commit makes of one disk, and whether a long queue slows it.

Goal (issue: numbers): submit with its queuePosition, and claim, with 100,000 waiting: p95 within 1.2x of 1,000.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.house import measure_disk
from benchmarks.table import Number, below, percentile, told
from managers.clock import SystemClock, new_id
from managers.workflows.model import NewWorkflow, Priority, rank
from managers.workflows.sqlite_store import SqliteStore

AGING_SECONDS = 600
GRAPH = b"{%s}" % b",".join(
    b'"%d":{"class_type":"KSampler","inputs":{"seed":%d,"steps":20,"cfg":7.5,"model":["4",0]}}' % (n, n * 977)
    for n in range(10)
)
CLIENTS = 64


def new_workflow(clock: SystemClock) -> NewWorkflow:
    now = clock.now_ms()
    return NewWorkflow(
        id=new_id(),
        graph=GRAPH,
        priority=Priority.NORMAL,
        gpu="local",
        rank=rank(Priority.NORMAL, now, AGING_SECONDS),
        created_at=now,
        max_attempts=3,
        timeout_seconds=3600,
    )


async def with_clients(clients: int, calls: int, call: Callable[[], Awaitable[object]]) -> tuple[float, list[float]]:
    """Calls a second by so many clients, each waiting for its answer, and the seconds each call took."""
    left = iter(range(calls))
    seconds: list[float] = []

    async def client() -> None:
        for _ in left:
            started = time.perf_counter()
            await call()
            seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return calls / (time.perf_counter() - started), seconds


async def fill(store: SqliteStore, waiting: int, clock: SystemClock) -> None:
    missing = waiting - store.counts().length
    if missing > 0:
        await with_clients(512, missing, lambda: store.submit(new_workflow(clock)))


async def measure(folder: Path) -> list[Number]:
    clock = SystemClock()
    store = SqliteStore(folder / "store", clock=clock, ids=new_id, aging_seconds=AGING_SECONDS)
    await store.open(lambda _: None)

    async def submit() -> None:
        await store.submit(new_workflow(clock), max_waiting=10**6)

    async def claim() -> None:
        prompt_id = new_id()
        claimed = await store.claim(backend="a", pools=("local",), prompt_id=prompt_id, now=clock.now_ms())
        if claimed is None:
            raise RuntimeError("nothing to claim")
        await store.cancel(claimed.workflow.id, clock.now_ms())
        await store.close_attempt(prompt_id, clock.now_ms())

    async def claim_only() -> float:
        prompt_id = new_id()
        started = time.perf_counter()
        await store.claim(backend="a", pools=("local",), prompt_id=prompt_id, now=clock.now_ms())
        seconds = time.perf_counter() - started
        await store.withdraw(prompt_id, clock.now_ms())
        return seconds

    bare = measure_disk(folder).commits_per_second
    await with_clients(CLIENTS, 3000, submit)
    commits = store.commits
    rate, seconds = await with_clients(CLIENTS, 20_000, submit)
    numbers = [
        told("the store alone: bare fsynced inserts", f"{bare:,.0f} /s"),
        told(
            f"the store alone: submits, {CLIENTS} clients",
            f"{rate:,.0f} /s, {rate / bare:.2f} x bare, {20_000 / (store.commits - commits):.0f} a commit,"
            f" p99 {percentile(seconds, 99) * 1e3:.1f} ms",
        ),
        told("the store alone: claim, cancel, close in turn", f"{(await with_clients(1, 500, claim))[0]:,.0f} /s"),
    ]
    await store.close()

    # In turns, so that a slow minute of the machine hits both.
    short, long = (
        SqliteStore(folder / name, clock=clock, ids=new_id, aging_seconds=AGING_SECONDS) for name in ("short", "long")
    )
    results: dict[str, dict[str, list[float]]] = {}
    for name, one, waiting in (("short", short, 1_000), ("long", long, 100_000)):
        await one.open(lambda _: None)
        await fill(one, waiting, clock)
        results[name] = {"submit, 1 client": [], f"submit, {CLIENTS} clients": [], "claim": []}
    for _ in range(40):
        for name, one, waiting in (("short", short, 1_000), ("long", long, 100_000)):
            store = one
            into = results[name]
            into["submit, 1 client"] += (await with_clients(1, 25, submit))[1]
            into[f"submit, {CLIENTS} clients"] += (await with_clients(CLIENTS, 256, submit))[1]
            into["claim"] += [await claim_only() for _ in range(25)]
            while one.counts().length > waiting:
                await claim()
    for what in results["short"]:
        few, many = (results[name][what] for name in ("short", "long"))
        ratio = percentile(many, 95) / percentile(few, 95)
        numbers.append(below(f"{what}: p95 with 100,000 waiting ÷ with 1,000", ratio, 1.2, "x", digits=2))
        times = [f"{percentile(one, 50) * 1e3:.2f} / {percentile(one, 95) * 1e3:.2f}" for one in (few, many)]
        numbers.append(told("the same, p50 / p95", f"{times[0]} ms; {times[1]} ms"))
    for one in (short, long):
        await one.close()
    started = time.perf_counter()
    await long.open(lambda _: None)
    numbers.append(told("opening the store with 100,000 waiting", f"{time.perf_counter() - started:.2f} s"))
    await long.close()
    return numbers


def run() -> list[Number]:
    """On the disk of the working folder."""
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:
        return asyncio.run(measure(Path(folder).resolve()))
