"""The templates there are: saved, looked up, filled. What is known about all of them is in memory.

Must never change a version that is saved, nor refuse a value on the strength of a list that may be out of date.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog
from msgspec import Struct

from managers.clock import Clock
from managers.comfyui.graph import REFUSED, parse_graph, shown
from managers.comfyui.nearest import Nearest
from managers.comfyui.object_info import Catalog
from managers.errors import InvalidRequest, InvalidWorkflow, NotFound
from managers.events.types import Finding
from managers.templates.check import check
from managers.templates.files import BOX, Broken, read_folder
from managers.templates.fill import Filled, RandomBelow, fill
from managers.templates.model import (
    MAX_ALIASES,
    Definition,
    Head,
    Input,
    Source,
    Version,
    is_alias,
    is_name,
    split_reference,
)
from managers.templates.parameter import Parameter
from managers.templates.propose import propose
from managers.templates.resolve import missing, of_definition
from managers.templates.store import Found, Statistics, TemplateStore
from managers.workflows.model import ANY_BACKEND, Workflow

log = structlog.get_logger(__name__)

_KEPT = 256
_DOUBTFUL = frozenset({"value_not_in_list", "input_file_missing", "required", "missing_node_type"})
"""What a list may say that is out of date."""


class Takes(Struct, frozen=True):
    """What a version takes on backends that have given these answers. `missing`: classes that none of them has."""

    catalogs: Sequence[Catalog]
    parameters: Mapping[str, Parameter]
    missing: tuple[str, ...]


class Backends(Protocol):
    """What is asked about the ComfyUIs (`WorkflowManager`)."""

    @property
    def catalogs(self) -> Catalogs:
        """What each of them can run."""
        ...

    def eligible(self, gpu: str) -> tuple[str, ...]:
        """Their names. Raises `InvalidRequest`."""
        ...


class Catalogs(Protocol):
    """See `managers.comfyui.catalogs`."""

    def remembered(self, names: Collection[str]) -> list[Catalog]:
        """From memory."""
        ...

    async def current(self, names: Collection[str]) -> list[Catalog]:
        """Waits a moment for a first answer."""
        ...

    async def afresh(self, names: Collection[str], class_types: Collection[str]) -> list[Catalog]:
        """After asking again."""
        ...


class Templates:
    """The registry."""

    def __init__(
        self,
        store: TemplateStore,
        backends: Backends,
        clock: Clock,
        *,
        folders: Sequence[Path] = (),
        default: str = "txt2img",
        random_below: RandomBelow = secrets.randbelow,
    ) -> None:
        self.default = default
        """The one that is meant where none is named."""
        self.revision = 0
        """Another number after each change."""
        self.broken: tuple[Broken, ...] = ()
        """Files that could not be read at the start."""
        self._store = store
        self._backends = backends
        self._clock = clock
        self._folders = folders
        self._random_below = random_below
        self._heads: dict[str, Head] = {}
        self._versions: dict[tuple[str, int], Version] = {}
        self._resolved: dict[tuple[str, int], Takes] = {}
        self._answers: Sequence[Catalog] = ()
        self._answer_count = 0
        self._changing = asyncio.Lock()

    async def open(self) -> None:
        """Read the files and the box, and what is stored."""
        now = self._clock.now_ms()
        boxed = await asyncio.to_thread(lambda: [one for one in read_folder(BOX) if isinstance(one, Found)])
        await self._store.settle(boxed, Source.BOX, now)
        found = await asyncio.to_thread(lambda: [one for folder in self._folders for one in read_folder(folder)])
        self.broken = tuple(one for one in found if isinstance(one, Broken))
        for one in self.broken:
            log.warning("this file is no template", file=str(one.path), reason=one.reason)
        last = {one.name: one for one in found if isinstance(one, Found)}  # of two folders the later one counts
        await self._store.settle(list(last.values()), Source.FILE, now)
        await self._refresh()

    # ---- look

    @property
    def answers(self) -> int:
        """Another number after each change of what the backends say."""
        now = self.remembered()
        if not _same(self._answers, now):
            self._answers = now
            self._answer_count += 1
        return self._answer_count

    def heads(self) -> Iterable[tuple[str, Head]]:
        """All of them, by name, from memory."""
        return sorted(self._heads.items())

    def head(self, name: str) -> Head:
        """Raises `NotFound`, which names the nearest."""
        found = self._heads.get(name)
        if found is None:
            names = sorted(self._heads)
            close = Nearest().among(name, names)
            perhaps = f" (perhaps {', '.join(close)})" if close else ""
            raise NotFound(f"There is no template {shown(name)}{perhaps}; known: {', '.join(names) or 'none'}")
        return found

    async def find(self, reference: str) -> Version:
        """`name`, `name@prod` or `name@3`. Raises `NotFound`."""
        name, wanted = split_reference(reference)
        head = self.head(name)
        if wanted is None:
            return head.newest
        if wanted.isascii() and wanted.isdecimal() and len(wanted) < 10:
            return await self.version(name, int(wanted))
        if wanted not in head.aliases:
            known = ", ".join(f"{alias} ({number})" for alias, number in head.aliases.items()) or "none"
            raise NotFound(f"The template {name} has no alias {shown(wanted)}; it has {known}")
        return await self.version(name, head.aliases[wanted])

    async def version(self, name: str, number: int) -> Version:
        """Raises `NotFound`."""
        head = self.head(name)
        if number == head.newest.number:
            return head.newest
        key = (name, number)
        found = self._versions.get(key)
        if found is None:
            found = await self._store.version(name, number)
            if found is None:
                raise NotFound(
                    f"The template {name} has no version {number}; the newest of {head.count} is {head.newest.number}"
                )
            if len(self._versions) >= _KEPT:
                self._versions.clear()
            self._versions[key] = found
        return found

    async def outputs_of(self, workflow: Workflow) -> tuple[str, ...]:
        """The nodes whose outputs are the result of a workflow; none: all of them."""
        if workflow.template is None or workflow.template_version is None:
            return ()
        try:
            version = await self.version(workflow.template, workflow.template_version)
        except NotFound:  # deleted since
            return ()
        return version.definition.outputs

    async def versions(self, name: str) -> Sequence[Version]:
        """All that are kept, the newest first. Raises `NotFound`."""
        self.head(name)
        return await self._store.versions(name)

    async def statistics(self, name: str) -> Mapping[int, Statistics]:
        """By version."""
        return await self._store.statistics(name)

    async def takes(self, version: Version) -> Takes:
        """What its parameters are here and now. Waits a moment for a ComfyUI that has just come."""
        return self.takes_on(version, await self._backends.catalogs.current(self._backends.eligible(ANY_BACKEND)))

    def takes_now(self, version: Version) -> Takes:
        """The same from memory, as far as it is known."""
        return self.takes_on(version, self.remembered())

    def remembered(self) -> list[Catalog]:
        """What the backends said last, while they are there."""
        return self._backends.catalogs.remembered(self._backends.eligible(ANY_BACKEND))

    def takes_on(self, version: Version, catalogs: Sequence[Catalog]) -> Takes:
        """The same on these backends; worked out once for each of their answers."""
        key = (version.name, version.number)
        cached = self._resolved.get(key)
        if cached is None or not _same(cached.catalogs, catalogs):
            if len(self._resolved) >= _KEPT:
                self._resolved.clear()
            cached = self._resolved[key] = _takes(version, catalogs)
        return cached

    # ---- change

    async def save(self, name: str, definition: Definition, *, saved_by: str) -> Version:
        """A new version. Raises `InvalidRequest` for what is no graph or no name, `InvalidWorkflow` for what is wrong
        with the inputs.
        """
        if not is_name(name):
            message = f"{shown(name)} is no name for a template: lower-case letters, digits and hyphens"
            raise InvalidRequest(message, [Finding(code="invalid_path", message=message, input="name")])
        graph = _decoded(definition)
        catalogs = await self._backends.catalogs.current(self._backends.eligible(ANY_BACKEND))
        _refuse(check(definition, graph, catalogs))
        async with self._changing:
            version = await self._store.save(name, definition, saved_by=saved_by, now=self._clock.now_ms())
            await self._refresh()
        return version

    async def set_alias(self, name: str, alias: str, number: int) -> Head:
        """Let the alias name this version. Raises `NotFound`, `InvalidRequest`."""
        head = self.head(name)
        if not is_alias(alias) or (alias not in head.aliases and len(head.aliases) >= MAX_ALIASES):
            message = f"{shown(alias)} is no alias: a letter, then letters, digits, hyphens; {MAX_ALIASES} at most"
            raise InvalidRequest(message, [Finding(code="invalid_path", message=message, input="alias")])
        await self.version(name, number)
        async with self._changing:
            await self._store.set_alias(name, alias, number)
            await self._refresh()
        return self.head(name)

    async def delete(self, name: str) -> None:
        """All its versions and aliases; what was made from it stays. Raises `NotFound`."""
        self.head(name)
        async with self._changing:
            await self._store.delete(name)
            await self._refresh()

    # ---- use

    async def propose(self, definition: Definition) -> dict[str, Input]:
        """Inputs for a graph, in the shape that is saved. Raises `InvalidRequest`, `InvalidWorkflow`."""
        graph = _decoded(definition)
        catalogs = await self._backends.catalogs.current(self._backends.eligible(ANY_BACKEND))
        _refuse(check(definition, graph, catalogs))
        return propose(parse_graph(graph), catalogs)

    async def fill(self, version: Version, given: Mapping[str, Any], gpu: str) -> Filled:
        """The graph with these values. Raises `InvalidWorkflow` with all that is wrong, `InvalidRequest`."""
        names = self._backends.eligible(gpu)
        takes = self.takes_on(version, await self._backends.catalogs.current(names))
        found = self._filled(version, takes, given)
        if isinstance(found, list) and (doubtful := {one.class_type for one in found if one.code in _DOUBTFUL}):
            # A model that came a minute ago must not be refused.
            classes = [name for name in doubtful if name is not None]
            takes = _takes(version, await self._backends.catalogs.afresh(names, classes))
            found = self._filled(version, takes, given)
        if isinstance(found, Filled):
            return found
        raise InvalidWorkflow(f"{version.reference}: {'; '.join(one.message for one in found[:5])}", found)

    def _filled(self, version: Version, takes: Takes, given: Mapping[str, Any]) -> Filled | list[Finding]:
        if takes.missing:
            return [_no_class(name) for name in takes.missing]
        return fill(version, takes.parameters, given, self._random_below)

    async def _refresh(self) -> None:
        self._heads = dict(await self._store.heads())
        self._versions.clear()
        self._resolved.clear()
        self.revision += 1


def _takes(version: Version, catalogs: Sequence[Catalog]) -> Takes:
    graph = parse_graph(version.nodes())
    return Takes(catalogs, of_definition(version.definition, graph, catalogs), missing(graph, catalogs))


def _no_class(name: str) -> Finding:
    message = f"No ComfyUI here has the node class {shown(name)} that it needs"
    return Finding(code="missing_node_type", message=message, class_type=name)


def _same(one: Sequence[Catalog], other: Sequence[Catalog]) -> bool:
    """Whether it is the same answers of the same backends."""
    return len(one) == len(other) and all(
        a.name == b.name and a.object_info is b.object_info for a, b in zip(one, other, strict=True)
    )


def _decoded(definition: Definition) -> Any:
    try:
        return msgspec.json.decode(definition.graph)
    except (msgspec.DecodeError, RecursionError) as error:
        message = f"graph is not valid JSON: {error}"
        raise InvalidRequest(message, [Finding(code="invalid_value", message=message, pointer="/graph")]) from error


def _refuse(findings: Sequence[Finding]) -> None:
    if not findings:
        return
    kind = InvalidRequest if any(finding.code in REFUSED for finding in findings) else InvalidWorkflow
    raise kind("; ".join(finding.message for finding in findings[:5]), findings)
