"""A ComfyUI process for tests: the simulator with its faults, what it says when asked directly, and graphs for it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.simulator_process import end, start_simulator

WORKFLOWS = Path(__file__).parent / "data" / "workflows"
PATIENCE = 20
"""Seconds that nothing waited for in these tests should need."""
PLAIN: dict[str, Any] = {"verify": False, "trust_env": False}
"""For httpx: building a TLS context takes 50 ms."""

Graph = dict[str, Any]

_colors = itertools.count(uuid.uuid4().int % 8_000_000)


def workflow(name: str) -> Graph:
    """One of the recorded workflows."""
    found: Graph = json.loads((WORKFLOWS / f"{name}.json").read_text())
    return found


def picture(**inputs: Any) -> Graph:
    """The smallest workflow that writes a file, different each time so that no cache answers for it."""
    empty = {"width": 64, "height": 64, "batch_size": 1, "color": next(_colors)} | inputs
    return {
        "1": {"class_type": "EmptyImage", "inputs": empty},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "kit"}},
    }


def sleeper(steps: int = 600, seconds: float = 0.05, **inputs: Any) -> Graph:
    """One that executes until it is stopped (or for `steps` x `seconds`), and polls the interrupt flag."""
    sleep = {"image": ["1", 0], "steps": steps, "seconds_per_step": seconds, "seed": next(_colors)}
    sleep |= {"preview": False, "fail": "none", "fail_at_step": 0} | inputs
    return picture() | {
        "2": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "kit"}},
        "3": {"class_type": "SleepSteps", "inputs": sleep},
    }


class Comfy:
    """A simulator process, its folder, and what it says when asked directly."""

    def __init__(self, directory: Path, *args: str) -> None:
        self.directory = directory
        self.outputs = directory / "output"
        self._args = args
        self.url, self.process = start_simulator(directory, *args)
        self._probes = 0

    def kill(self) -> None:
        """The process is gone at once, as after kill -9."""
        end(self.process)

    def restart(self) -> None:
        """The same again on the same port: queue, history and cache are forgotten."""
        end(self.process)
        self._probes = 0
        port = self.url.rpartition(":")[2]
        self.url, self.process = start_simulator(self.directory, *self._args, "--port", port)

    def freeze(self) -> None:
        """It answers nothing from now on, while its connections stay open."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def get(self, path: str) -> Any:
        async with httpx.AsyncClient(base_url=self.url, timeout=5, **PLAIN) as client:
            return (await client.get(path)).raise_for_status().json()

    async def post(self, path: str, body: Any) -> Any:
        async with httpx.AsyncClient(base_url=self.url, timeout=5, **PLAIN) as client:
            reply = (await client.post(path, json=body)).raise_for_status()
            return reply.json() if reply.content else None

    async def faults(self, **plan: Any) -> None:
        """What is to go wrong from now on; nothing without arguments."""
        await self.post("/_faults", plan)

    async def queue(self) -> tuple[list[str], list[str]]:
        """The prompt ids that run and that wait."""
        found = await self.get("/queue")
        return [item[1] for item in found["queue_running"]], [item[1] for item in found["queue_pending"]]

    async def until_queue(self, right: Callable[[list[str], list[str]], bool]) -> tuple[list[str], list[str]]:
        """Ask for the queue until (running, pending) is right: ComfyUI tells nobody of changes in it."""
        running: list[str] = []
        pending: list[str] = []
        for _ in range(PATIENCE * 50):
            running, pending = await self.queue()
            if right(running, pending):
                return running, pending
            await asyncio.sleep(0.02)
        raise AssertionError(f"the queue of ComfyUI stayed at running {running}, pending {pending}")

    async def history(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.get("/history")
        return found

    async def post_prompt(self, graph: Graph, *, client_id: str = "somebody else") -> str:
        """A prompt of somebody who does not use the service."""
        prompt_id = str(uuid.uuid4())
        self._probes += 1
        await self.post("/prompt", {"prompt": graph, "client_id": client_id, "prompt_id": prompt_id})
        return prompt_id

    async def posts(self) -> int:
        """How many prompts the service has posted since the process started: ComfyUI numbers them."""
        probe = await self.post("/prompt", {"prompt": picture(), "client_id": "somebody else"})
        self._probes += 1
        number: int = probe["number"]
        return number - (self._probes - 1)


@contextlib.contextmanager
def comfy(directory: Path, *args: str) -> Iterator[Comfy]:
    """A simulator that takes faults."""
    process = Comfy(directory, "--faults", *args)
    try:
        yield process
    finally:
        process.kill()
