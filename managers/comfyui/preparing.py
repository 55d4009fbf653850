"""At its turn: what a graph names elsewhere is fetched, put into ComfyUI's input folder, and named in its place.

Must never touch the stored graph, post anything, or make a failure of ComfyUI one of the workflow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import structlog
from msgspec import Struct

from managers.comfyui.backend import Backend
from managers.comfyui.client import UploadRefused
from managers.comfyui.fetching import Fetcher, NotFetched
from managers.comfyui.graph import parse_graph, pointer
from managers.comfyui.inputs import (
    ClassOf,
    NotDecodable,
    Source,
    decoded,
    is_data,
    perhaps_sources,
    placed,
    sources,
)
from managers.comfyui.media import media_in
from managers.comfyui.spool import Spool
from managers.comfyui.verdicts import Job, Result, Verdict
from managers.errors import TooLarge, Unavailable
from managers.events.types import Finding

log = structlog.get_logger(__name__)

FOLDER = "jobs"
"""Below it each workflow has a folder of its own in ComfyUI's input folder."""
_AT_ONCE = 4
_MOST_TOLD = 3
_MOST_FINDINGS = 200

Classes = Callable[[str], Awaitable[ClassOf]]
"""The name of a backend -> what is known of node classes there, after waiting a little for it."""


class InputConfig(Struct, frozen=True, kw_only=True):
    """`max_bytes` of one input; `spool` is a folder of ours for what is on its way."""

    spool: Path
    max_bytes: int = 512 * 2**20


class Inputs:
    """Puts inputs in place. All attempts share it."""

    def __init__(self, config: InputConfig, *, fetcher: Fetcher, classes: Classes) -> None:
        self.config = config
        self._fetcher = fetcher
        self._classes = classes

    async def aclose(self) -> None:
        """Close what is open."""
        await self._fetcher.aclose()

    def new_spool(self) -> Spool:
        """For one input."""
        return Spool(self.config.spool, self.config.max_bytes)

    async def in_place(self, backend: Backend, job: Job) -> bytes | Verdict:
        """The graph to post; or the end of the attempt: FAILED, or WITHDRAWN where ComfyUI (or our disk) failed."""
        if not perhaps_sources(job.graph):
            return job.graph
        graph = await asyncio.to_thread(lambda: parse_graph(msgspec.json.decode(job.graph)))
        found = sources(graph, await self._classes(backend.name))
        if not found:
            return job.graph
        values = list(dict.fromkeys(source.value for source in found))
        gate = asyncio.Semaphore(_AT_ONCE)
        tasks = [
            asyncio.create_task(self._one(backend, job, value, f"{n}", gate), name=f"input {n} of {job.workflow_id}")
            for n, value in enumerate(values, 1)
        ]
        try:
            names = dict(zip(values, await asyncio.gather(*tasks), strict=True))
        except Unavailable as error:
            log.warning("inputs are not in place yet", workflow_id=job.workflow_id, reason=str(error))
            return Verdict(result=Result.WITHDRAWN, error=str(error))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        failed = [
            _finding(source, name.words) for source in found if isinstance(name := names[source.value], _CannotBeHad)
        ]
        if failed:
            return _refused(failed, backend.clock.now_ms())
        here = {source: name for source in found if isinstance(name := names[source.value], str)}
        return await asyncio.to_thread(placed, job.graph, here)

    async def _one(
        self, backend: Backend, job: Job, value: str, name: str, gate: asyncio.Semaphore
    ) -> str | _CannotBeHad:
        """The name of this input in ComfyUI. Raises `Unavailable`."""
        async with gate:
            try:
                spool = await (self._decoded(value) if is_data(value) else self._fetcher.fetch(value, self.new_spool))
            except (NotDecodable, NotFetched) as error:
                return _CannotBeHad(f"cannot be fetched: {error}")
            except TooLarge as error:
                return _CannotBeHad(f"cannot be taken: {error}")
            async with spool:
                media = media_in(spool.head)
                if media is None:
                    return _CannotBeHad("is no picture, film or sound that is known here, whatever it is called")
                try:
                    return await backend.client.upload(
                        spool,
                        filename=f"{name}{media.ending}",
                        subfolder=f"{FOLDER}/{job.workflow_id}",
                        content_type=media.type,
                    )
                except (UploadRefused, TooLarge) as error:
                    return _CannotBeHad(f"cannot be given to ComfyUI: {error}")

    async def _decoded(self, uri: str) -> Spool:
        data = await asyncio.to_thread(decoded, uri)
        spool = self.new_spool()
        await spool.write(data)
        return spool


class Preparing:
    """The inputs of one attempt on their way: can be called off."""

    def __init__(self, inputs: Inputs | None, backend: Backend) -> None:
        self._inputs = inputs
        self._backend = backend
        self._leash: asyncio.Timeout | None = None

    def call_off(self) -> None:
        """Nobody wants them any more: `graph` comes back at once."""
        if self._leash is not None:
            self._leash.reschedule(0)
            self._leash = None

    async def graph(self, job: Job) -> bytes | Verdict | None:
        """See `Inputs.in_place`. None: it was called off."""
        if self._inputs is None:
            return job.graph
        try:
            async with asyncio.timeout(None) as self._leash:
                return await self._inputs.in_place(self._backend, job)
        except TimeoutError:
            if self._leash is not None:  # a time limit of somebody inside
                raise
            return None
        finally:
            self._leash = None


class _CannotBeHad(Struct, frozen=True):
    """Why, in words that follow the name of the input."""

    words: str


def _finding(source: Source, words: str) -> Finding:
    return Finding(
        code="input_unavailable",
        message=f"{source.class_type} ({source.node_id}): {source.input} {words}",
        pointer=pointer(source.node_id, "inputs", source.input),
        node_id=source.node_id,
        class_type=source.class_type,
        input=source.input,
    )


def _refused(findings: list[Finding], now: int) -> Verdict:
    words = [finding.message for finding in findings[:_MOST_TOLD]]
    if len(findings) > _MOST_TOLD:
        words.append(f"and {len(findings) - _MOST_TOLD} more")
    return Verdict(
        result=Result.FAILED,
        end_time=now,
        error="; ".join(words),
        error_type="input",
        errors=tuple(findings[:_MOST_FINDINGS]),
        node_id=findings[0].node_id,
        node_type=findings[0].class_type,
    )
