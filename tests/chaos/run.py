"""It happens: the processes live and die by the plan, the clients do their work, and all is written down."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec

from tests.chaos.clients import PATH, Clients, Listener, http
from tests.chaos.evidence import Event, Evidence, ask_all, own_faults, read_store
from tests.chaos.plan import LONGEST_WAIT, Kill, Plan
from tests.chaos.processes import SERVICE, ComfyUI, Life, Program, service
from tests.comfy_kit import PLAIN

_LOOK = 0.002
_LONG_LOOK = 0.25
_WORKFLOW_SECONDS = 2.0
_CALM_SECONDS = 60.0
"""After the last kill, beside `_WORKFLOW_SECONDS` for each workflow."""


class Chaos:
    """One run in an empty folder. `say` gets a line now and then."""

    def __init__(self, plan: Plan, folder: Path, say: Callable[[str], None]) -> None:
        self.plan = plan
        self.folder = folder
        self._say = say
        self._lives: list[Life] = []
        self._faults: list[str] = []
        self._killed = 0
        self._ended = 0
        self._submitting = 0
        self._began = time.monotonic()

    async def run(self) -> Evidence:
        """From the first start to the last word. Ends every process it has started."""
        for backend in self.plan.backends:
            (self.folder / backend / "output").mkdir(parents=True)
        self._comfyuis = [ComfyUI(backend, self.folder, self._lives) for backend in self.plan.backends]
        self._url, self._service = service(self._comfyuis, self.folder, self._lives)
        self._programs: dict[str, Program] = {one.name: one for one in (*self._comfyuis, self._service)}
        try:
            return await self._run()
        finally:
            for program in self._programs.values():
                if program.life.until is None:
                    program.kill()

    async def _run(self) -> Evidence:
        clients = Clients(self._url, iter(self.plan.jobs), lambda: self.plan.due(self._killed), self._note_submitting)
        listener = Listener(self._url)
        async with asyncio.TaskGroup() as tasks:
            beside = [tasks.create_task(listener.run()), tasks.create_task(self._progress(clients))]
            working = tasks.create_task(clients.run())
            await self._kill_all()
            seconds = _CALM_SECONDS + _WORKFLOW_SECONDS * len(self.plan.jobs)
            try:
                async with asyncio.timeout(seconds):
                    await working
                    await self._until_all_ended()
            except TimeoutError:
                self._faults.append(f"{seconds:.0f} s after the last kill there was still work to do")
                working.cancel()
            evidence = await self._collect(clients, listener)
            for task in beside:
                task.cancel()
        return evidence

    # ---- the kills

    async def _kill_all(self) -> None:
        for kill in self.plan.kills:
            await self._moment(kill)
            for victim in kill.victims:
                program = self._programs[victim]
                await asyncio.to_thread(program.kill)
                program.start()
            self._killed = kill.number

    async def _moment(self, kill: Kill) -> None:
        if kill.moment == "seconds":
            await asyncio.sleep(kill.count)
            return
        count = self._counter(kill.moment)
        until = time.monotonic() + LONGEST_WAIT
        wanted = count() + kill.count
        while count() < wanted and time.monotonic() < until:  # noqa: ASYNC110 - a file of another process
            await asyncio.sleep(_LOOK)
        await asyncio.sleep(kill.later)

    def _counter(self, moment: str) -> Callable[[], int]:
        if moment == "submitting":
            return lambda: self._submitting
        tails = [_Tail(comfyui.ledger, f'"event":"{moment}"'.encode()) for comfyui in self._comfyuis]
        return lambda: sum(tail.count() for tail in tails)

    def _note_submitting(self) -> None:
        self._submitting += 1

    # ---- the end

    async def _until_all_ended(self) -> None:
        async with http(self._url) as client:
            while True:
                try:
                    left = [
                        (await client.get(PATH, params={"status": status, "limit": 1000})).raise_for_status().json()
                        for status in ("queued", "running")
                    ]
                except httpx.HTTPError:
                    await asyncio.sleep(_LONG_LOOK)
                    continue
                waiting = sum(len(page["workflows"]) for page in left)
                self._ended = len(self.plan.jobs) - waiting
                if not waiting:
                    return
                await asyncio.sleep(_LONG_LOOK)

    async def _collect(self, clients: Clients, listener: Listener) -> Evidence:
        async with http(self._url) as client:
            found = await ask_all(client, self.plan, clients.told)
        last = max((event.seq for _, events, _ in found.values() for event in events if _told(event)), default=0)
        await self._until(lambda: bool(listener.heard) and listener.heard[-1]["seq"] >= last, "the stream is behind")
        for comfyui in self._comfyuis:
            await self._until_idle(comfyui)
        if (status := await asyncio.to_thread(self._service.stop)) != 0:
            self._faults.append(f"SIGTERM ended the service with status {status}")
        for comfyui in self._comfyuis:
            comfyui.kill()
        faults = [*self._faults, *clients.faults, *listener.gaps, *own_faults(self._service.log)]
        evidence = Evidence(
            plan=self.plan,
            lives=tuple(self._lives),
            ledgers={comfyui.name: tuple(comfyui.lines()) for comfyui in self._comfyuis},
            told=clients.told,
            views={marker: view for marker, (view, _, _) in found.items()},
            events={marker: events for marker, (_, events, _) in found.items()},
            files={marker: files for marker, (_, _, files) in found.items()},
            heard=tuple(map(Event.of, listener.heard)),
            store=read_store(self.folder / "data"),
            faults=tuple(faults),
        )
        (self.folder / "evidence.json").write_bytes(msgspec.json.encode(evidence))
        return evidence

    async def _until_idle(self, comfyui: ComfyUI) -> None:
        """A cancelled prompt may take a moment to go; a ghost does not go."""
        left: list[str] = []
        async with httpx.AsyncClient(base_url=comfyui.url, timeout=5, **PLAIN) as client:
            for _ in range(40):
                queue = (await client.get("/queue")).raise_for_status().json()
                left = [item[1] for item in (*queue["queue_running"], *queue["queue_pending"])]
                if not left:
                    return
                await asyncio.sleep(_LONG_LOOK)
        self._faults.append(f"{comfyui.name} is left with {left}")

    async def _until(self, right: Callable[[], bool], complaint: str) -> None:
        for _ in range(40):
            if right():
                return
            await asyncio.sleep(_LONG_LOOK)
        self._faults.append(complaint)

    # ---- what is seen of it

    async def _progress(self, clients: Clients) -> None:
        while True:
            await asyncio.sleep(3)
            done = Counter(life.name for life in self._lives if life.until is not None)
            self._say(
                f"{time.monotonic() - self._began:4.0f} s  kills {self._killed}/{len(self.plan.kills)} "
                f"(service {done[SERVICE]}, ComfyUI {done.total() - done[SERVICE]})  "
                f"accepted {len(clients.told)}/{len(self.plan.jobs)}"
                + (f"  ended {self._ended}" if self._ended else "")
            )


class _Tail:
    """Counts lines of a growing file that hold this."""

    def __init__(self, path: Path, part: bytes) -> None:
        self._path, self._part = path, part
        self._offset = path.stat().st_size if path.exists() else 0
        self._count = 0

    def count(self) -> int:
        """How many since it was made."""
        if self._path.exists() and self._path.stat().st_size > self._offset:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._offset += len(whole)
            self._count += whole.count(self._part)
        return self._count


def _told(event: Event) -> bool:
    return event.type.startswith("workflow:")
