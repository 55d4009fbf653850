"""What the service costs a workflow: throughput and latency beside the same ComfyUI driven directly.

Goals (issue: numbers): 200 trivial workflows by 4 submitters at ≥ 0.90 of ComfyUI's own rate, results in hand; added
latency of one p50 ≤ 2 ms + 3 fsyncs as measured on that disk, p90 ≤ twice that. Both ways use the same client, and
take turns. Directly means: POST /prompt, `executing null` on the WebSocket, GET /history/{id}.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import uvloop
from websockets.asyncio.client import ClientConnection, connect

from benchmarks.house import KEY, Connection, measure_disk, service, simulator, until_connected
from benchmarks.table import Number, above, below, percentile, told

SUBMITTERS = 4
WORKFLOWS, ROUNDS = 200, 6
PAIRS = 150
STUCK_SECONDS = 20

_numbers = itertools.count()
_first = random.SystemRandom().randrange(2**24)
_folder = f"benchmark/{uuid.uuid4()}"


def graph() -> dict[str, object]:
    """Never the same, so that nothing is cached; and few files in a folder, which SaveImage lists each time."""
    number = next(_numbers)
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": (_first + number) % 2**24},
        },
        "2": {
            "class_type": "SaveImage",
            "inputs": {"images": ["1", 0], "filename_prefix": f"{_folder}/{number // 100}/image"},
        },
    }


class _Frame(msgspec.Struct):
    """What both need to know of a frame."""

    type: str
    data: msgspec.Raw = msgspec.Raw(b"null")
    workflow_id: str | None = msgspec.field(default=None, name="workflowId")
    outputs: list[dict[str, object]] = []


class _Executing(msgspec.Struct):
    node: str | None = None
    prompt_id: str | None = None


class _Side:
    """One way to a result. `ended` has a future for each workflow; it is filled when its outputs are in hand."""

    def __init__(self, submitters: list[Connection]) -> None:
        self.submitters = submitters
        self.ended: dict[str, asyncio.Future[None]] = {}

    def expect(self) -> str:
        """A new id, waited for."""
        name = str(uuid.uuid4())
        self.ended[name] = asyncio.get_running_loop().create_future()
        return name

    async def submit(self, connection: Connection) -> str:
        """Hand one in; its id."""
        raise NotImplementedError

    async def listen(self, stream: ClientConnection) -> None:
        """Fill `ended` from the WebSocket."""
        raise NotImplementedError

    async def one(self) -> float:
        """Seconds from handing in to the outputs in hand."""
        began = time.perf_counter()
        name = await self.submit(self.submitters[0])
        await asyncio.wait_for(self.ended[name], STUCK_SECONDS)
        taken = time.perf_counter() - began
        del self.ended[name]
        return taken

    async def many(self) -> float:
        """Workflows a second: every submitter hands in its share, one after another."""

        async def submitter(connection: Connection) -> None:
            for _ in range(WORKFLOWS // SUBMITTERS):
                await self.submit(connection)

        began = time.perf_counter()
        await asyncio.gather(*map(submitter, self.submitters))
        await asyncio.wait_for(asyncio.gather(*self.ended.values()), STUCK_SECONDS)
        self.ended.clear()
        return WORKFLOWS / (time.perf_counter() - began)


class _Direct(_Side):
    def __init__(self, submitters: list[Connection], reader: Connection, client_id: str) -> None:
        super().__init__(submitters)
        self.reader = reader
        self._client_id = client_id

    async def submit(self, connection: Connection) -> str:
        name = self.expect()
        body = {"prompt": graph(), "prompt_id": name, "client_id": self._client_id}
        reply = await connection.post("/prompt", json.dumps(body).encode())
        assert reply.status == 200, reply.body
        return name

    async def listen(self, stream: ClientConnection) -> None:
        decode = msgspec.json.Decoder(_Frame).decode
        decode_executing = msgspec.json.Decoder(_Executing).decode
        async for raw in stream:
            if isinstance(raw, bytes):
                continue
            frame = decode(raw)
            if frame.type == "executing":
                executing = decode_executing(frame.data)
                if executing.node is None and executing.prompt_id in self.ended:
                    entry = (await self.reader.get(f"/history/{executing.prompt_id}")).json()[executing.prompt_id]
                    assert entry["status"]["status_str"] == "success", entry["status"]
                    assert entry["outputs"]["2"]["images"]
                    self.ended[executing.prompt_id].set_result(None)


class _Service(_Side):
    async def submit(self, connection: Connection) -> str:
        name = self.expect()
        reply = await connection.post("/v1/comfyui/workflow", json.dumps({"workflow": graph(), "id": name}).encode())
        assert reply.status == 202, reply.body
        return name

    async def listen(self, stream: ClientConnection) -> None:
        decode = msgspec.json.Decoder(_Frame).decode
        async for raw in stream:
            frame = decode(raw)
            if frame.type == "workflow:completed":
                assert frame.outputs
                self.ended[frame.workflow_id or ""].set_result(None)
            assert frame.type not in ("workflow:error", "workflow:cancelled"), raw


@asynccontextmanager
async def _sides(comfyui: str, house: str) -> AsyncIterator[tuple[_Direct, _Service]]:
    client_id = str(uuid.uuid4())
    async with AsyncExitStack() as stack:
        there, here = [], []
        for _ in range(SUBMITTERS):
            there.append(await Connection.to(comfyui))
            here.append(await Connection.to(house, KEY))
        direct = _Direct(there, await Connection.to(comfyui), client_id)
        through = _Service(here)
        for connection in (*there, *here, direct.reader):
            stack.callback(connection.close)
        listeners: list[asyncio.Task[None]] = []
        for side, url in (
            (direct, f"{comfyui.replace('http', 'ws', 1)}/ws?clientId={client_id}"),
            (through, f"{house.replace('http', 'ws', 1)}/v1/comfyui/stream"),
        ):
            stream = await stack.enter_async_context(
                connect(url, additional_headers={"X-API-Key": KEY}, compression=None, proxy=None, max_size=2**24)
            )
            listeners.append(asyncio.create_task(side.listen(stream)))
        try:
            yield direct, through
        finally:
            for listener in listeners:
                listener.cancel()
                if listener.done() and not listener.cancelled():
                    listener.result()


async def _measure(name: str, comfyui: str, folder: Path, outputs: Path | None) -> list[Number]:
    environ = {} if outputs is None else {"COMFYUI_OUTPUTS": str(outputs)}
    disk = measure_disk(folder)
    with service(folder / "data", comfyui, **environ) as house:
        await until_connected(house.url)
        async with _sides(comfyui, house.url) as (direct, through):
            for side in (direct, through):
                for _ in range(10):
                    await side.one()
            alone: list[float] = []
            added: list[float] = []
            for _ in range(PAIRS):
                without, within = await direct.one(), await through.one()
                alone.append(without * 1e3)
                added.append((within - without) * 1e3)
            rates: dict[_Side, list[float]] = {direct: [], through: []}
            for number in range(ROUNDS):
                for side in (direct, through) if number % 2 else (through, direct):
                    rates[side].append(await side.many())
    again = measure_disk(folder)
    fsync = (disk.p50_ms + again.p50_ms) / 2
    goal = 2 + 3 * fsync
    ratio = percentile(rates[through], 50) / percentile(rates[direct], 50)
    ratios = " ".join(f"{b / a:.2f}" for a, b in zip(rates[direct], rates[through], strict=True))
    return [
        above(f"{name}: {WORKFLOWS} workflows through the service ÷ directly (median)", ratio, 0.90, "x"),
        told(
            f"{name}: workflows a second, directly / through the service; ratios of the rounds",
            f"{percentile(rates[direct], 50):.0f} / {percentile(rates[through], 50):.0f}; {ratios}",
        ),
        below(f"{name}: added latency of one workflow, p50", percentile(added, 50), goal, "ms", digits=2),
        below(f"{name}: added latency of one workflow, p90", percentile(added, 90), 2 * goal, "ms", digits=2),
        told(
            f"{name}: directly p50 / p90; one fsynced commit",
            f"{percentile(alone, 50):.2f} / {percentile(alone, 90):.2f} ms; {fsync:.2f} ms",
        ),
    ]


def run(comfyui: str | None = None, outputs: Path | None = None) -> list[Number]:
    """Against the simulator, and against a real ComfyUI where one is named (`outputs`: its folder, if it is here)."""
    numbers = []
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as parent:
        folder = Path(parent).resolve()
        (folder / "simulated").mkdir()
        (folder / "comfy" / "output").mkdir(parents=True)
        with simulator(folder / "comfy") as url:
            numbers += uvloop.run(_measure("simulator", url, folder / "simulated", folder / "comfy" / "output"))
        if comfyui is not None:
            (folder / "real").mkdir()
            numbers += uvloop.run(_measure("ComfyUI", comfyui, folder / "real", outputs))
    return numbers
