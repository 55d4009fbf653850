"""The embedded store alone: what group commit makes of one disk, and whether a long queue slows it.

Run with `python -m benchmarks.store [folder]`; the folder decides which disk is measured. Prints a table of ratios.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median, quantiles

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


def bare_inserts_per_second(folder: Path, inserts: int = 1500) -> float:
    """One row, one fsync, again: what the disk and SQLite allow a program without group commit."""
    connection = sqlite3.connect(folder / "bare.sqlite3", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE t (id TEXT PRIMARY KEY, graph BLOB)")
    started = time.perf_counter()
    for _ in range(inserts):
        connection.execute("INSERT INTO t VALUES (?, ?)", (new_id(), GRAPH))
    elapsed = time.perf_counter() - started
    connection.close()
    return inserts / elapsed


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


async def measure(folder: Path) -> None:
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

    bare = bare_inserts_per_second(folder)
    await with_clients(CLIENTS, 3000, submit)
    commits = store.commits
    rate, seconds = await with_clients(CLIENTS, 20_000, submit)
    print(f"bare fsynced inserts            {bare:9.0f} /s")
    print(
        f"submits, {CLIENTS} clients            {rate:9.0f} /s   {rate / bare:5.2f} x bare"
        f"   {20_000 / (store.commits - commits):.0f} a commit   p99 {quantiles(seconds, n=100)[98] * 1e3:.1f} ms"
    )
    print(f"claim, cancel, close in turn    {(await with_clients(1, 500, claim))[0]:9.0f} /s")
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
    print(f"\n{'p50 / p95 in ms':28} {'1,000 waiting':>16} {'100,000 waiting':>16} {'p95 ratio':>10}")
    for what in results["short"]:
        a, b = (results[name][what] for name in ("short", "long"))
        p95 = [quantiles(values, n=20)[18] * 1e3 for values in (a, b)]
        p50 = [median(values) * 1e3 for values in (a, b)]
        cells = [f"{p50[i]:.2f} / {p95[i]:.2f}" for i in range(2)]
        print(f"{what:28} {cells[0]:>16} {cells[1]:>16} {p95[1] / p95[0]:10.2f}")
    for one in (short, long):
        await one.close()
    started = time.perf_counter()
    await long.open(lambda _: None)
    print(f"\nopen with 100,000 waiting       {time.perf_counter() - started:9.2f} s")
    await long.close()


def main() -> None:
    parent = Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd()
    with tempfile.TemporaryDirectory(dir=parent, prefix=".bench-") as folder:
        asyncio.run(measure(Path(folder)))


if __name__ == "__main__":
    main()
