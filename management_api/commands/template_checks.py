"""What `management-api doctor` says of templates: files that are none, and node classes that are gone.

It changes nothing; it reads the store as it is, whether or not the service runs.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import msgspec

from management_api.services import backend_configs, template_folders
from management_api.settings import Settings
from managers.clock import SystemClock, new_id
from managers.comfyui.backend import Backend, BackendConfig
from managers.comfyui.graph import parse_graph
from managers.comfyui.object_info import Catalog, decode_object_info
from managers.errors import BackendUnavailable
from managers.templates.files import BOX, Broken, read_folder
from managers.templates.model import Definition
from managers.templates.resolve import missing
from managers.templates.sqlite_templates import SqliteTemplates
from managers.templates.store import Found
from managers.workflows.sqlite_schema import FILE_NAME, connect_reader
from managers.workflows.sqlite_writer import Transaction

R = TypeVar("R")

_SECONDS = 60.0


async def template_checks(settings: Settings) -> AsyncIterator[tuple[bool, str, str]]:
    """Whether it is good, what was found, and what to do when it is not."""
    found = await asyncio.to_thread(
        lambda: [one for folder in template_folders(settings) for one in read_folder(folder)]
    )
    for one in found:
        if isinstance(one, Broken):
            advice = "It is left out: mend it, or take it away. PUT /v1/templates/{name} takes the same"
            yield False, f"template file {one.path}: {one.reason}", advice
    definitions = await _stored(settings.api.data_dir / FILE_NAME)
    if not definitions:
        boxed = await asyncio.to_thread(lambda: list(read_folder(BOX)))
        definitions = {one.name: one.definition for one in [*boxed, *found] if isinstance(one, Found)}
    catalogs = await asyncio.gather(*map(_catalog, backend_configs(settings)))
    whole = True
    for name, definition in definitions.items():
        gone = missing(parse_graph(msgspec.json.decode(definition.graph)), catalogs)
        if gone:
            whole = False
            advice = "Install the custom node that has it, or save a version of the template without it"
            yield False, f"template {name}: no ComfyUI has the node class {', '.join(gone)}", advice
    if whole:
        known = "" if all(catalog.object_info is not None for catalog in catalogs) else ", as far as ComfyUI answers"
        yield True, f"templates: {len(definitions)}, with all their node classes{known}", ""


class _Reader:
    """The door of a store that nobody has opened."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    async def read(self, question: Callable[[sqlite3.Connection], R]) -> R:
        """On this thread: there is nobody else here."""
        return question(self._connection)

    async def write(self, operation: Callable[[Transaction], R], *, patient: bool = False) -> R:
        """Never."""
        raise NotImplementedError


async def _stored(path: Path) -> Mapping[str, Definition]:
    try:
        with closing(connect_reader(path)) as connection:
            heads = await SqliteTemplates(_Reader(connection)).heads()
    except sqlite3.Error:  # none yet, of an older version, or damaged: another check says so
        return {}
    return {name: head.newest.definition for name, head in heads.items()}


async def _catalog(config: BackendConfig) -> Catalog:
    backend = Backend(config, new_id(), clock=SystemClock(), publish=lambda _: None, on_event=lambda _: None)
    try:
        async with asyncio.timeout(_SECONDS):
            return Catalog(config.name, decode_object_info(await backend.client.object_info()))
    except (TimeoutError, BackendUnavailable, msgspec.DecodeError):
        return Catalog(config.name)
    finally:
        await backend.client.aclose()
