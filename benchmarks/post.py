"""How many workflows a second are taken in, each on disk before its 202, and what that does to readers.

Goals (issue: numbers): with key, limit and metrics on and 64 connections ≥ 2,000/s on a machine where a bare loop of
fsynced SQLite inserts makes 3,000/s, p99 ≤ 120 ms; at half that rate, reads beside it p99 ≤ 20 ms. The clients are a
process of their own; the queue is paused, so that nothing is dispatched.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from benchmarks.house import KEY, Connection, fastify, measure_disk, service, simulator, until_connected
from benchmarks.table import Number, above, below, percentile, told

CONNECTIONS, READERS = 64, 4
WARM_SECONDS, SECONDS, ROUNDS = 1.0, 4.0, 3
READS_PER_SECOND = 100
BARE_GOAL, GOAL = 3_000, 2_000
PATH = "/v1/comfyui/workflow"

GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 0,
            "steps": 20,
            "cfg": 7.5,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
            "model": ["4", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "none.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a house by the sea, evening", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "benchmark"}},
}
"""Text to image, as the web page of ComfyUI shows it first; only the seed changes."""


class Load(msgspec.Struct, frozen=True):
    """What the clients' process is to do. `rate` None: as fast as the replies come. Times in seconds."""

    url: str
    checkpoint: str
    seconds: float
    rate: float | None = None


class Taken(msgspec.Struct, frozen=True):
    """What it found: replies a second, and the milliseconds of each request."""

    rate: float
    posts_ms: list[float]
    reads_ms: list[float]


# ---- the clients' process


async def _clients(load: Load) -> Taken:
    graph = {**GRAPH, "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": load.checkpoint}}}
    before, _, after = json.dumps({"workflow": graph}).partition('"seed": 0')
    head, tail = (before + '"seed": ').encode(), after.encode()
    seeds = itertools.count(random.SystemRandom().randrange(2**40))
    posts: list[tuple[float, float]] = []
    reads: list[float] = []
    last = ""
    began = time.perf_counter()
    ends = began + WARM_SECONDS + load.seconds
    turns = itertools.count()

    async def submitter() -> None:
        nonlocal last
        connection = await Connection.to(load.url, KEY)
        while time.perf_counter() < ends:
            start = time.perf_counter()
            if load.rate is not None:
                due = began + next(turns) / load.rate
                await asyncio.sleep(max(0.0, due - start))
                start = due  # a late one counts from when it should have gone out
            reply = await connection.post(PATH, b"%b%d%b" % (head, next(seeds), tail))
            posts.append((start, time.perf_counter() - start))
            assert reply.status == 202, reply.body
            last = msgspec.json.decode(reply.body)["workflowId"] if not last or len(posts) % 100 == 0 else last
        connection.close()

    async def reader(number: int) -> None:
        connection = await Connection.to(load.url, KEY)
        for turn in itertools.count():
            due = began + WARM_SECONDS + (turn + number / READERS) * READERS / READS_PER_SECOND
            if due > ends:
                break
            await asyncio.sleep(due - time.perf_counter())
            reply = await connection.get(f"{PATH}/{last}")
            reads.append((time.perf_counter() - due) * 1e3)
            assert reply.status == 200, reply.body
        connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(submitter())
        if load.rate is not None:
            for number in range(READERS):
                group.create_task(reader(number))
    kept = [taken for start, taken in posts if start >= began + WARM_SECONDS]
    return Taken(len(kept) / (time.perf_counter() - began - WARM_SECONDS), [1e3 * taken for taken in kept], reads)


def put_under(load: Load) -> Taken:
    """Run the clients as a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.post"],
        input=msgspec.json.encode(load),
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    return msgspec.json.decode(done.stdout, type=Taken)


# ---- the measurement


async def _pause(url: str) -> None:
    await until_connected(url)
    control = await Connection.to(url, KEY)
    reply = await control.post("/v1/comfyui/queue/pause", b"{}")
    assert reply.status == 200, reply.body
    control.close()


async def _checkpoint(comfyui: str) -> str:
    """One that is there, so that no finding is written."""
    connection = await Connection.to(comfyui)
    found: Any = (await connection.get("/object_info/CheckpointLoaderSimple")).json()
    connection.close()
    return str(found["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0][0])


def run(fastify_packages: Path | None = None) -> list[Number]:
    """Against a service whose backend is an idle simulator; beside it Fastify, where its packages are."""
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as parent, ExitStack() as stack:
        folder = Path(parent).resolve()
        comfyui = stack.enter_context(simulator(folder / "comfy"))
        checkpoint = uvloop.run(_checkpoint(comfyui))
        house = stack.enter_context(service(folder / "data", comfyui, COMFYUI_MAX_QUEUE="1000000"))
        uvloop.run(_pause(house.url))
        other = None
        if fastify_packages is not None:
            other = stack.enter_context(fastify(folder, fastify_packages))
        ours, theirs, bare = [], [], []
        for _ in range(ROUNDS):
            bare.append(measure_disk(folder).commits_per_second)
            ours.append(put_under(Load(house.url, checkpoint, SECONDS)))
            if other is not None:
                theirs.append(put_under(Load(other.url, checkpoint, SECONDS)))
        best = max(ours, key=lambda one: one.rate)
        half = put_under(Load(house.url, checkpoint, SECONDS, rate=best.rate / 2))
    disk = percentile(bare, 50)
    goal = GOAL * min(1.0, disk / BARE_GOAL)
    numbers = [
        told("bare fsynced inserts of one row", f"{disk:,.0f} /s"),
        above(f"POST of a durable workflow, {CONNECTIONS} connections, best round", best.rate, goal, "/s", digits=0),
        told("the same, all rounds; ÷ bare inserts", f"{_rates(ours)} /s; {best.rate / disk:.2f} x"),
        below("the same, p99", percentile(best.posts_ms, 99), 120, "ms"),
        below("GET of a workflow at half that rate, p99", percentile(half.reads_ms, 99), 20, "ms"),
        told(
            "the same, p50; the posts beside it p50 / p99",
            f"{percentile(half.reads_ms, 50):.1f} ms; {percentile(half.posts_ms, 50):.1f} / "
            f"{percentile(half.posts_ms, 99):.1f} ms",
        ),
    ]
    if theirs:
        node = max(theirs, key=lambda one: one.rate)
        numbers += [
            told(
                "Fastify + better-sqlite3, all rounds; p99",
                f"{_rates(theirs)} /s; {percentile(node.posts_ms, 99):.0f} ms",
            ),
            above("POST of a durable workflow ÷ Fastify's rate", best.rate / node.rate, 2.0, "x"),
        ]
    return numbers


def _rates(rounds: Sequence[Taken]) -> str:
    return " ".join(f"{one.rate:,.0f}" for one in rounds)


def main() -> None:
    load = msgspec.json.decode(sys.stdin.buffer.read(), type=Load)
    sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(_clients(load))))


if __name__ == "__main__":
    main()
