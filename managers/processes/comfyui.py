"""ComfyUI as a program of ours: started, watched, started again when it dies, restarted when somebody asks.

Like a task it has a supervisor and outlives the service, so that a restart of the service costs no running workflow:
it is found again. Must never end a ComfyUI that somebody else started, nor judge one by what it computes: that is for
who talks to it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from enum import StrEnum
from pathlib import Path

import msgspec
import structlog
from msgspec import Struct

from managers.clock import Clock
from managers.comfyui.client import ComfyUIClient
from managers.errors import BackendUnavailable, Conflict, ManagerError
from managers.processes import logs
from managers.processes.following import Gap, read_on
from managers.processes.logs import Line
from managers.processes.supervised import Supervised
from managers.processes.supervisor import PLAN, Plan

log = structlog.get_logger(__name__)

ENVIRON = (
    *("USER", "LOGNAME", "TZ", "TMPDIR", "LC_*", "XDG_*", "PYTHON*", "LD_LIBRARY_PATH", "OMP_*", "MKL_*"),
    *("CUDA_*", "NVIDIA_*", "CUBLAS_*", "NCCL_*", "TORCH*", "PYTORCH_*", "TRITON_*", "XFORMERS_*"),
    *("HIP_*", "HSA_*", "ROCM_*", "ROCR_*", "MIOPEN_*", "ONEAPI_*", "ZE_*", "SYCL_*"),
    *("HF_*", "HUGGINGFACE_*", "COMFYUI_MODEL_PATH", "SSL_CERT_*", "REQUESTS_CA_BUNDLE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
)
"""What ComfyUI gets of the environment beside PATH, HOME and LANG: what chooses cards, caches and the network."""

_ASK_SECONDS = 0.5
_ANSWER_SECONDS = 5
_PATIENCE_SECONDS = 120
_FOREIGN_SECONDS = 5
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 1.0, 60.0
_STABLE_SECONDS = 60.0
_LOG_BYTES = 64 * 2**20
_GRACE_SECONDS = 10.0


class CannotManage(ManagerError):
    """ComfyUI cannot be started as configured; the message is one line for the operator."""


class ManagedConfig(Struct, frozen=True, kw_only=True):
    """`name` and `url` are those of the backend. `argv` is run in `directory`, with this `environ` and no more.

    `folder` gets its log. `first_wait_seconds` is the pause after a first death; it doubles with each.
    """

    name: str
    url: str
    folder: Path
    directory: Path
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    stop_with_service: bool = False
    first_wait_seconds: float = _FIRST_WAIT_SECONDS
    grace_seconds: float = _GRACE_SECONDS


class ManagedState(StrEnum):
    """What is known of the process. FOREIGN: something answers at the address that we did not start."""

    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"
    WAITING = "waiting"
    FOREIGN = "foreign"


class ManagedView(Struct, frozen=True, kw_only=True, rename="camel"):
    """The process as clients see it. `deaths` are ends that nobody had asked for, since the service started."""

    name: str
    state: ManagedState
    deaths: int
    log_file: str


def _nobody(_name: str) -> None:
    """Hears it."""


class ManagedComfyUI:
    """One ComfyUI. `run` it as a task; `aclose` when that has ended."""

    def __init__(self, config: ManagedConfig, *, clock: Clock, on_restart: Callable[[str], None] = _nobody) -> None:
        """`on_restart` hears the name of the backend just before its process is ended on purpose."""
        self.name = config.name
        self.state = ManagedState.STARTING
        self.deaths = 0
        self._config = config
        self._clock = clock
        self._on_restart = on_restart
        self._client = ComfyUIClient(config.url)
        self._program: Supervised | None = None
        self._next = asyncio.Event()
        self._asked = asyncio.Event()
        self._leaving = False

    async def run(self) -> None:
        """Until cancelled: keep it running."""
        wait = self._config.first_wait_seconds
        if self._program is not None:  # we failed, and begin again
            self._program.close()
        self._program = await self._found()
        while True:
            if self._program is None and not await self._started():
                wait = await self._pause(wait)
                continue
            self._asked.clear()
            lived = await self._watch()
            if self._asked.is_set():
                wait = self._config.first_wait_seconds
                continue
            if lived >= _STABLE_SECONDS:
                wait = self._config.first_wait_seconds
            self.state = ManagedState.WAITING
            wait = await self._pause(wait)

    async def restart(self) -> ManagedView:
        """End it and start it again; at once when it waits to be started. Gives what it is doing then.

        Raises `Conflict` when it is somebody else's.
        """
        if self.state is ManagedState.FOREIGN:
            message = f"The ComfyUI of {self.name} was not started by this service: restart it where it was started"
            raise Conflict(message, self.state)
        log.info("ComfyUI is restarted", backend=self.name)
        self._asked.set()
        program = self._program
        if program is not None and not program.ended.is_set():
            self.state = ManagedState.RESTARTING
            self._on_restart(self.name)
            await program.stop()
        return self.view()

    def view(self) -> ManagedView:
        """As it is now."""
        return ManagedView(
            name=self.name, state=self.state, deaths=self.deaths, log_file=str(self._config.folder / "output.log")
        )

    async def follow(self, after: int | None = None) -> AsyncGenerator[list[Line] | Gap, None]:
        """Each whole line of its log once, from this offset on, over all restarts; None: from the last lines on."""
        folder = self._config.folder
        at = await asyncio.to_thread(logs.tail_offset, folder) if after is None else after
        while not self._leaving:
            program, following = self._program, self._next
            async with aclosing(read_on(folder, at, program, lambda: self._leaving)) as lines:
                async for told in lines:
                    at = told.end if isinstance(told, Gap) else told[-1].end
                    yield told
            if not self._leaving:
                await following.wait()

    def drain(self) -> None:
        """Send away who follows its log."""
        self._leaving = True
        self._turn()
        if self._program is not None:
            self._program.nudge()

    async def aclose(self) -> None:
        """Let go of it: it runs on, unless it is to stop with the service."""
        self.drain()
        program = self._program
        if program is not None:
            if self._config.stop_with_service and not program.ended.is_set():
                await program.stop()
                try:
                    async with asyncio.timeout(self._config.grace_seconds + 1):
                        await program.ended.wait()
                except TimeoutError:
                    log.error("ComfyUI does not end", backend=self.name)
            program.close()
        await self._client.aclose()

    # ---- inside

    async def _found(self) -> Supervised | None:
        """The one of the service before this one, if it runs."""
        try:
            program = await Supervised.find(self._config.folder)
        except OSError:
            return None
        if program.ended.is_set():
            program.close()
            return None
        plan = msgspec.json.decode(await asyncio.to_thread((self._config.folder / PLAN).read_bytes), type=Plan)
        if tuple(plan["argv"]) != self._config.argv:
            log.warning("ComfyUI runs with other arguments than configured: restart it", backend=self.name)
        log.info("ComfyUI runs already, started by this service before", backend=self.name)
        self._take(program)
        return program

    async def _started(self) -> bool:
        if await self._answers():
            if self.state is not ManagedState.FOREIGN:
                log.warning("a ComfyUI that this service did not start answers there", backend=self.name)
            self.state = ManagedState.FOREIGN
            return False
        self.state = ManagedState.STARTING
        plan = Plan(
            argv=list(self._config.argv),
            directory=str(self._config.directory),
            log_bytes=_LOG_BYTES,
            timeout_seconds=0,
            grace_seconds=self._config.grace_seconds,
        )
        try:
            await asyncio.to_thread(self._config.folder.mkdir, mode=0o700, parents=True, exist_ok=True)
            program = await Supervised.start(self._config.folder, plan, self._config.environ)
        except OSError as error:
            log.error("ComfyUI cannot be started", backend=self.name, reason=str(error))
            self.state = ManagedState.WAITING
            return False
        log.info("ComfyUI is started", backend=self.name)
        self._take(program)
        return True

    def _take(self, program: Supervised) -> None:
        self._program = program
        self._turn()

    def _turn(self) -> None:
        """Those who follow the log go on with the next program."""
        self._next.set()
        self._next = asyncio.Event()

    async def _watch(self) -> float:
        """Until it has ended; seconds it answered."""
        program = self._program
        assert program is not None  # noqa: S101 -- only called with one
        ended = asyncio.create_task(program.ended.wait())
        try:
            since = await self._until_it_answers(ended)
            await ended
        finally:
            ended.cancel()
        outcome = await program.outcome()
        await program.gone.wait()  # its port is free, and its memory
        await program.collect()
        self._program = None
        if self._asked.is_set():
            return 0
        self.deaths += 1
        log.error(
            "ComfyUI has died",
            backend=self.name,
            exit_code=None if outcome is None else outcome.exit_code,
            signal=None if outcome is None else outcome.signal,
            error=None if outcome is None else outcome.error,
        )
        return 0 if since is None else self._clock.monotonic() - since

    async def _until_it_answers(self, ended: asyncio.Task[bool]) -> float | None:
        began = self._clock.monotonic()
        told = False
        while not ended.done():
            if await self._answers():
                if self.state is ManagedState.STARTING:
                    self.state = ManagedState.RUNNING
                    log.info("ComfyUI answers", backend=self.name, seconds=round(self._clock.monotonic() - began, 1))
                return self._clock.monotonic()
            if not told and self._clock.monotonic() - began > _PATIENCE_SECONDS:
                told = True
                log.warning("ComfyUI was started and does not answer yet", backend=self.name)
            await asyncio.wait({ended}, timeout=_ASK_SECONDS)
        return None

    async def _answers(self) -> bool:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self._client.system_stats()
        except (BackendUnavailable, TimeoutError):
            return False
        return True

    async def _pause(self, seconds: float) -> float:
        """Wait so long, or until a restart is asked for; how long to wait the next time."""
        if self.state is ManagedState.FOREIGN:
            await asyncio.sleep(_FOREIGN_SECONDS)
            return self._config.first_wait_seconds
        try:
            async with asyncio.timeout(seconds):
                await self._asked.wait()
        except TimeoutError:
            return min(seconds * 2, _LONGEST_WAIT_SECONDS)
        return self._config.first_wait_seconds


def interpreter(path: Path, chosen: Path | None) -> str:
    """The Python that ComfyUI is to run with: the one that was chosen, that of its own environment, or ours."""
    own = [path / folder / "bin" / "python" for folder in (".venv", "venv")]
    return str(chosen or next((python for python in own if python.exists()), sys.executable))
