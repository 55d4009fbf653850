"""What the store of templates promises, on a real file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from managers.clock import SystemClock, new_id
from managers.templates.model import Source
from managers.templates.sqlite_templates import SqliteTemplates
from managers.templates.store import Found
from managers.workflows.sqlite_store import SqliteStore
from tests.templates.kit import boxed

OLD = boxed()["demo"]
NEW = replace(OLD, description="Another one.")


@pytest.fixture
async def templates(tmp_path: Path) -> AsyncIterator[SqliteTemplates]:
    store = SqliteStore(tmp_path, clock=SystemClock(), ids=new_id, aging_seconds=600)
    await store.open(lambda _: None)
    yield SqliteTemplates(store)
    await store.close()


async def test_a_newer_box_replaces_only_what_nobody_has_touched(templates: SqliteTemplates) -> None:
    for name in ("mine", "theirs", "gone"):
        await templates.settle([Found(name, OLD)], Source.BOX, 1)
    await templates.save("mine", OLD, saved_by="admin", now=2)
    assert await templates.delete("gone")
    saved = await templates.settle([Found(name, NEW) for name in ("mine", "theirs", "gone")], Source.BOX, 3)
    assert [(one.name, one.number) for one in saved] == [("theirs", 2)]
    heads = await templates.heads()
    assert heads["mine"].newest.source is Source.API
    assert heads["theirs"].newest.definition.description == "Another one."


async def test_a_file_that_has_changed_is_a_new_version_whoever_saved_before(templates: SqliteTemplates) -> None:
    assert len(await templates.settle([Found("wall", OLD)], Source.FILE, 1)) == 1
    await templates.save("wall", NEW, saved_by="admin", now=2)
    assert len(await templates.settle([Found("wall", OLD)], Source.FILE, 3)) == 0
    assert [one.number for one in await templates.settle([Found("wall", NEW)], Source.FILE, 4)] == [3]


async def test_the_same_in_another_order_of_keys_is_the_same(templates: SqliteTemplates) -> None:
    await templates.settle([Found("wall", OLD)], Source.FILE, 1)
    other = replace(OLD, inputs=dict(reversed(OLD.inputs.items())))
    assert len(await templates.settle([Found("wall", other)], Source.FILE, 2)) == 0


async def test_an_alias_names_only_a_version_that_is_there(templates: SqliteTemplates) -> None:
    await templates.save("wall", OLD, saved_by="admin", now=1)
    assert await templates.set_alias("wall", "prod", 1)
    assert not await templates.set_alias("wall", "prod", 2)
    assert not await templates.set_alias("door", "prod", 1)
    assert (await templates.heads())["wall"].aliases == {"prod": 1}
