"""`managers.files` on real files."""

# ruff: noqa: ASYNC240 -- a test may wait for its own disk

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path

import pytest
from msgspec import Struct

from managers.errors import Conflict, Gone, InvalidRequest, NotFound, Unavailable
from managers.files import MODEL_TYPES, Files, FilesConfig, OutputEntry, OutputOwner, media_of, read
from managers.files.index import OutputsIndex
from managers.files.outputs import CHUNK


class Owner(Struct, frozen=True):
    workflow_id: str
    node_id: str | None = None


class Record:
    """Who reported what, in memory: the port `OutputOwners`, with the reports in the order they came."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, Owner]] = []

    def report(self, workflow_id: str, *paths: str, node_id: str | None = None) -> None:
        self.reports += [(path, Owner(workflow_id, node_id)) for path in paths]

    async def workflows_of(self, paths: Sequence[str]) -> Mapping[str, OutputOwner]:
        return {path: owner for path, owner in self.reports if path in set(paths)}

    async def paths_of(self, workflow_id: str) -> Sequence[str]:
        return [path for path, owner in self.reports if owner.workflow_id == workflow_id]


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


@pytest.fixture
def record() -> Record:
    return Record()


@pytest.fixture
def files(outputs: Path, tmp_path: Path, record: Record) -> Iterator[Files]:
    models = {kind: tmp_path / "models" / kind for kind in MODEL_TYPES}
    manager = Files(FilesConfig(outputs=outputs, models=models), record)
    yield manager
    manager.close()


def put(root: Path, path: str, content: bytes = b"x", at: float | None = None) -> Path:
    """Write a file below root; `at` sets its time, in seconds."""
    place = root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    if at is not None:
        os.utime(place, (at, at))
    return place


async def names(files: Files) -> list[str]:
    return [entry.path for entry in (await files.list_outputs(limit=1000)).outputs]


async def all_pages(files: Files, limit: int, **asked: str) -> list[str]:
    found: list[str] = []
    cursor = None
    while True:
        page = await files.list_outputs(limit=limit, cursor=cursor, **asked)
        assert len(page.outputs) <= limit
        assert page.outputs or cursor is None  # no empty page at the end
        found += [entry.path for entry in page.outputs]
        if (cursor := page.next_cursor) is None:
            return found


# ---- models


async def test_models_of_all_types_come_in_the_order_of_the_contract(files: Files, tmp_path: Path) -> None:
    for kind in reversed(MODEL_TYPES):
        put(tmp_path / "models" / kind, f"{kind}.safetensors", b"four", at=1_700_000_000.25)
    found = await files.list_models()
    assert [model.type for model in found] == ["checkpoints", "loras", "vae", "controlnet", "upscale"]
    assert found[1].name == "loras.safetensors"
    assert (found[1].size, found[1].modified_at, found[1].hash) == (4, 1_700_000_000_250, None)
    assert [model.name for model in await files.list_models("vae")] == ["vae.safetensors"]


async def test_model_names_are_relative_paths_and_other_files_are_no_models(files: Files, tmp_path: Path) -> None:
    root = tmp_path / "models" / "checkpoints"
    for path in (
        "b.ckpt",
        "sdxl/turbo/a.SAFETENSORS",
        "put_checkpoints_here",
        "readme.md",
        ".hidden.ckpt",
        ".x/a.ckpt",
    ):
        put(root, path)
    (root / "folder.safetensors").mkdir()
    assert [model.name for model in await files.list_models()] == ["b.ckpt", "sdxl/turbo/a.SAFETENSORS"]


async def test_a_missing_models_folder_is_empty(files: Files) -> None:
    assert await files.list_models() == []


async def test_a_model_is_hashed_by_its_sidecar_only(files: Files, tmp_path: Path) -> None:
    root = tmp_path / "models" / "loras"
    digest = hashlib.sha256(b"weights").hexdigest()
    put(root, "a.pt", b"weights")
    put(root, "a.pt.sha256", f"{digest.upper()}  a.pt\n".encode())
    put(root, "b.pt", b"weights")
    put(root, "c.pt", b"weights")
    put(root, "c.pt.sha256", b"no hash at all")
    assert [model.hash for model in await files.list_models("loras")] == [digest, None, None]


async def test_links_of_the_operator_are_followed_but_not_out_by_dots(files: Files, tmp_path: Path) -> None:
    root = tmp_path / "models" / "checkpoints"
    put(root, "own.ckpt")
    disk = tmp_path / "disk"
    put(disk, "blobs/blob.ckpt")
    put(disk, "snapshot/one.ckpt").unlink()
    (disk / "snapshot/one.ckpt").symlink_to("../blobs/blob.ckpt")  # relative, but over there
    (root / "disk").symlink_to(disk / "snapshot")
    (root / "file.ckpt").symlink_to(disk / "blobs/blob.ckpt")
    (root / "same.ckpt").symlink_to("own.ckpt")
    (root / "out").symlink_to("../../disk")
    (root / "out.ckpt").symlink_to("../../disk/blobs/blob.ckpt")
    (root / "twice.ckpt").symlink_to("out.ckpt")
    found = [model.name for model in await files.list_models()]
    assert found == ["disk/one.ckpt", "file.ckpt", "own.ckpt", "same.ckpt"]


async def test_links_in_a_circle_are_cut(files: Files, tmp_path: Path) -> None:
    root = tmp_path / "models" / "checkpoints"
    put(root, "deep/a.ckpt")
    (root / "deep/up").symlink_to(root)
    (root / "deep/here").symlink_to(".")
    (root / "self.ckpt").symlink_to("self.ckpt")
    (root / "gone.ckpt").symlink_to(tmp_path / "nothing.ckpt")
    assert [model.name for model in await files.list_models()] == ["deep/a.ckpt"]


# ---- the listing of outputs


async def test_outputs_come_newest_first_with_what_is_known_of_them(
    files: Files, outputs: Path, record: Record
) -> None:
    put(outputs, "old.png", at=1000)
    put(outputs, "jobs/7/new_00001_.PNG", b"12345", at=2000.5)
    put(outputs, "same_b.png", at=1500)
    put(outputs, "same_a.png", at=1500)
    record.report("w-1", "jobs/7/new_00001_.PNG", node_id="9")
    page = await files.list_outputs()
    assert [entry.path for entry in page.outputs] == ["jobs/7/new_00001_.PNG", "same_b.png", "same_a.png", "old.png"]
    assert page.next_cursor is None
    assert page.outputs[0] == OutputEntry(
        path="jobs/7/new_00001_.PNG",
        filename="new_00001_.PNG",
        subfolder="jobs/7",
        workflow_id="w-1",
        node_id="9",
        type="png",
        size=5,
        created_at=2_000_500,
    )
    assert (page.outputs[3].workflow_id, page.outputs[3].node_id) == ("unknown", None)


async def test_what_is_no_output_is_not_listed(files: Files, outputs: Path, tmp_path: Path) -> None:
    put(outputs, "a.png")
    for path in (".DS_Store", "_output_images_will_be_put_here", ".cache/b.png", "back\\slash.png", "new\nline.png"):
        put(outputs, path)
    Path(os.fsdecode(os.fsencode(outputs) + b"/\xff.png")).touch()
    put(tmp_path, "elsewhere/c.png")
    (outputs / "link.png").symlink_to("a.png")
    (outputs / "folder").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(outputs / "pipe.png")
    assert await names(files) == ["a.png"]


async def test_a_missing_folder_is_empty_and_may_come_and_go(files: Files, outputs: Path) -> None:
    outputs.rmdir()
    assert await names(files) == []
    outputs.mkdir()
    put(outputs, "sub/a.png")
    assert await names(files) == ["sub/a.png"]
    outputs.rename(outputs.with_name("moved"))
    assert await names(files) == []


async def test_every_change_is_seen_at_once(files: Files, outputs: Path) -> None:
    put(outputs, "a.png", at=1000)
    assert await names(files) == ["a.png"]
    put(outputs, "b.png", at=1001)
    put(outputs, "deep/er/c.png", at=1002)
    assert await names(files) == ["deep/er/c.png", "b.png", "a.png"]
    (outputs / "b.png").unlink()
    put(outputs, "deep/er/d.png", at=999)
    assert await names(files) == ["deep/er/c.png", "a.png", "deep/er/d.png"]
    (outputs / "deep").rename(outputs / "moved")
    assert await names(files) == ["moved/er/c.png", "a.png", "moved/er/d.png"]
    (outputs / "moved/er/c.png").unlink()
    (outputs / "moved/er/d.png").unlink()
    (outputs / "moved/er").rmdir()
    assert await names(files) == ["a.png"]


def test_a_change_within_the_tick_of_another_is_seen(outputs: Path) -> None:
    """On a coarse clock a second change leaves the folder's times as the first did: set so by hand."""
    put(outputs, "a.png", at=1000)
    soon = time.time() + 3600  # as fresh as can be
    os.utime(outputs, (soon, soon))
    index = OutputsIndex(outputs)
    assert len(index.page(10).files) == 1
    put(outputs, "b.png", at=1001)
    os.utime(outputs, (soon, soon))
    facts = outputs.stat()
    index._folders[""].stamp = (facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns)
    assert [file.path for file in index.page(10).files] == ["b.png", "a.png"]


async def test_a_file_and_a_folder_may_take_each_others_name(
    files: Files, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("managers.files.index._TICK_NS", -(10**15))  # as if every change were long ago
    put(outputs, "a", at=1000)
    put(outputs, "b/in.png", at=1001)
    assert await names(files) == ["b/in.png", "a"]
    (outputs / "a").unlink()
    (outputs / "b/in.png").unlink()
    (outputs / "b").rmdir()
    put(outputs, "a/in.png", at=1002)
    put(outputs, "b", at=1003)
    await names(files)  # a name that changed its kind may show one listing later
    assert await names(files) == ["b", "a/in.png"]


async def test_a_file_rewritten_in_place_moves_up_with_its_new_size(files: Files, outputs: Path) -> None:
    put(outputs, "a.png", b"1", at=1000)
    put(outputs, "b.png", b"1", at=2000)
    assert await names(files) == ["b.png", "a.png"]
    with (outputs / "a.png").open("r+b") as stream:
        stream.write(b"123")
    os.utime(outputs / "a.png", (3000, 3000))
    page = await files.list_outputs(limit=1)
    assert (page.outputs[0].path, page.outputs[0].size, page.outputs[0].created_at) == ("a.png", 3, 3_000_000)


def test_a_tree_that_is_gone_leaves_nothing_behind(outputs: Path) -> None:
    put(outputs, "deep/er/est/c.png")
    index = OutputsIndex(outputs)
    index.page(10)
    (outputs / "deep").rename(outputs.parent / "away")
    index.page(10, only=())  # looks at no file
    assert (len(index), set(index._folders)) == (0, {""})


def test_files_beyond_the_page_are_looked_at_again_in_turn(outputs: Path) -> None:
    for n in range(1000):
        put(outputs, f"{n:04d}.png", at=1000 + n)
    index = OutputsIndex(outputs)
    assert index.page(1).files[0].path == "0999.png"
    os.utime(outputs / "0000.png", (5000, 5000))  # the oldest, far from the page
    assert any(index.page(1).files[0].path == "0000.png" for _ in range(6))


def test_a_huge_folder_rests_but_reported_files_are_never_late(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("managers.files.index._HUGE", 2)
    monkeypatch.setattr("managers.files.index._REST", 10**9)
    for n in range(3):
        put(outputs, f"{n}.png", at=1_000 + n)
    index = OutputsIndex(outputs)
    assert len(index.page(10).files) == 3
    put(outputs, "late.png", at=2_000)
    assert [file.path for file in index.page(10).files] == ["2.png", "1.png", "0.png"]
    assert [file.path for file in index.page(10, only={"late.png"}).files] == ["late.png"]
    assert index.page(10).files[0].path == "late.png"


def test_an_unchanged_folder_is_not_read_again(outputs: Path) -> None:
    """Where nothing can have changed, a listing looks at the folder, not into it."""
    put(outputs, "a.png", at=1000)
    os.utime(outputs, (1000, 1000))
    index = OutputsIndex(outputs)
    deadline = time.monotonic() + 5
    while not index._folders or not index._folders[""].settled:
        index.page(10)
        assert time.monotonic() < deadline
    index._folders[""].entries["a.png"] = None  # what a second reading would not set right either
    index._folders[""].entries["ghost.png"] = None  # but this one it would drop
    index.page(10)
    assert "ghost.png" in index._folders[""].entries
    put(outputs, "b.png")
    index.page(10)
    assert "ghost.png" not in index._folders[""].entries


async def test_pages_hold_every_file_once(files: Files, outputs: Path) -> None:
    for n in range(25):
        put(outputs, f"{n % 3}/{n:02d}.png", at=1000 + n // 2)
    listed = await names(files)
    assert len(listed) == 25
    for limit in (1, 7, 24, 25, 26):
        assert await all_pages(files, limit) == listed


async def test_the_cursor_is_stable_under_inserts_and_deletes(files: Files, outputs: Path) -> None:
    for n in range(10):
        put(outputs, f"{n}.png", at=1000 + n)
    first = await files.list_outputs(limit=4)
    assert [entry.path for entry in first.outputs] == ["9.png", "8.png", "7.png", "6.png"]
    put(outputs, "new.png", at=5000)
    (outputs / "8.png").unlink()
    (outputs / "6.png").unlink()  # the very one the cursor stands on
    (outputs / "5.png").unlink()
    second = await files.list_outputs(limit=4, cursor=first.next_cursor)
    assert [entry.path for entry in second.outputs] == ["4.png", "3.png", "2.png", "1.png"]
    third = await files.list_outputs(limit=4, cursor=second.next_cursor)
    assert ([entry.path for entry in third.outputs], third.next_cursor) == (["0.png"], None)


async def test_the_filter_works_before_the_limit(files: Files, outputs: Path, record: Record) -> None:
    for n in range(50):
        put(outputs, f"{n:02d}.png", at=1000 + n)
    record.report("w-1", "03.png", "00.png", "01.png", "gone.png")
    page = await files.list_outputs(workflow_id="w-1", limit=2)
    assert [entry.path for entry in page.outputs] == ["03.png", "01.png"]
    assert await all_pages(files, 2, workflow_id="w-1") == ["03.png", "01.png", "00.png"]
    assert (await files.list_outputs(workflow_id="nobody")).outputs == ()


async def test_a_name_written_again_belongs_to_the_later_run(files: Files, outputs: Path, record: Record) -> None:
    put(outputs, "img_00001_.png")
    record.report("w-1", "img_00001_.png")
    record.report("w-2", "img_00001_.png")
    assert (await files.list_outputs()).outputs[0].workflow_id == "w-2"
    assert (await files.list_outputs(workflow_id="w-1")).outputs == ()
    assert len((await files.list_outputs(workflow_id="w-2")).outputs) == 1


@pytest.mark.parametrize("limit", [0, -1, 1001])
async def test_a_limit_outside_is_refused(files: Files, limit: int) -> None:
    with pytest.raises(InvalidRequest):
        await files.list_outputs(limit=limit)


@pytest.mark.parametrize("cursor", ["", "x", "!!!", "bnVsbA", "W10", "eyJhIjoxfQ", "é", "W1siYSIsMV0"])
async def test_a_cursor_that_is_none_is_refused(files: Files, outputs: Path, cursor: str) -> None:
    put(outputs, "a.png")
    with pytest.raises(InvalidRequest):
        await files.list_outputs(cursor=cursor)


async def test_a_root_that_cannot_be_read_is_told(
    files: Files, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: str) -> list[str]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "listdir", broken)
    with pytest.raises(Unavailable):
        await files.list_outputs()


async def test_concurrent_listings_agree(files: Files, outputs: Path) -> None:
    """Listings from many tasks, while a real thread writes and deletes."""
    stop = threading.Event()

    def churn() -> None:
        n = 0
        while not stop.is_set():
            put(outputs, f"{n % 7}/{n}.png")
            if n >= 20:
                (outputs / f"{(n - 20) % 7}/{n - 20}.png").unlink()
            n += 1

    writer = threading.Thread(target=churn)
    writer.start()
    try:
        for _ in range(10):
            found = await asyncio.gather(*(names(files) for _ in range(8)))
            assert all(len(listed) == len(set(listed)) for listed in found)
    finally:
        stop.set()
        writer.join()
    on_disk = sorted(place.relative_to(outputs).as_posix() for place in outputs.rglob("*.png"))
    assert sorted(await names(files)) == on_disk


# ---- one output


async def test_an_output_is_described(files: Files, outputs: Path) -> None:
    put(outputs, "sub/ä b.png", b"12345", at=1_700_000_000)
    file = await files.open_output("sub/ä b.png")
    assert (file.name, file.size, file.modified_at) == ("ä b.png", 5, 1_700_000_000)
    assert file.etag == f'"{1_700_000_000 * 10**9:x}-5"'
    assert (file.media.type, file.media.inline) == ("image/png", True)


TRAVERSALS = [
    "",
    ".",
    "..",
    "../secret.png",
    "sub/../../secret.png",
    "sub/../a.png",
    "./a.png",
    "sub//a.png",
    "/a.png",
    "//a.png",
    "a.png/",
    "a.png/.",
    "sub",
    "a.png\0",
    "\0",
    "..\\secret.png",
    "sub\\..\\..\\secret.png",
    "sub/.hidden.png",
    "missing.png",
    "a.png/below",
    "x" * 5000,
    "x/" * 3000 + "x",
    "\udcff.png",
    "leaves.png",
    "leaves/secret.png",
    "circle.png",
    "pipe.png",
]


@pytest.fixture
def trapped(outputs: Path, tmp_path: Path) -> Path:
    """An outputs folder with an `a.png`, and traps around it."""
    put(outputs, "a.png")
    put(outputs, "sub/a.png")
    put(outputs, "sub/.hidden.png")
    put(tmp_path, "secret.png", b"secret")
    (outputs / "leaves.png").symlink_to(tmp_path / "secret.png")
    (outputs / "leaves").symlink_to("..")
    (outputs / "circle.png").symlink_to("circle.png")
    os.mkfifo(outputs / "pipe.png")
    return outputs


@pytest.mark.parametrize("path", TRAVERSALS)
async def test_nothing_outside_can_be_opened_or_deleted(
    files: Files, trapped: Path, tmp_path: Path, path: str
) -> None:
    with pytest.raises(NotFound):
        await files.open_output(path)
    with pytest.raises(NotFound):
        await files.delete_output(path)
    assert (tmp_path / "secret.png").read_bytes() == b"secret"
    assert (trapped / "leaves.png").is_symlink()


async def test_an_absolute_path_is_not_found_even_if_it_points_inside(files: Files, trapped: Path) -> None:
    with pytest.raises(NotFound):
        await files.open_output(str(trapped / "a.png"))


async def test_a_link_that_stays_inside_is_opened_and_deleting_it_spares_its_target(
    files: Files, outputs: Path
) -> None:
    put(outputs, "real.png", b"12")
    (outputs / "link.png").symlink_to("real.png")
    assert (await files.open_output("link.png")).size == 2
    await files.delete_output("link.png")
    assert not (outputs / "link.png").is_symlink()
    assert (outputs / "real.png").exists()


async def test_a_root_that_is_a_link_is_followed(tmp_path: Path, outputs: Path, record: Record) -> None:
    put(outputs, "a.png", b"12")
    (tmp_path / "link").symlink_to(outputs)
    files = Files(FilesConfig(outputs=tmp_path / "link", models={}), record)
    assert (await files.open_output("a.png")).size == 2
    assert await names(files) == ["a.png"]
    files.close()


async def test_delete_removes_the_file_and_the_listing_knows(files: Files, outputs: Path) -> None:
    put(outputs, "a.png")
    put(outputs, "b.png")
    assert len(await names(files)) == 2
    await files.delete_output("a.png")
    assert await names(files) == ["b.png"]
    with pytest.raises(NotFound):
        await files.delete_output("a.png")


async def test_a_folder_that_forbids_deleting_is_a_conflict(
    files: Files, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(outputs, "a.png")

    def forbidden(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", forbidden)  # tests may run as root, whom no mode stops
    with pytest.raises(Conflict):
        await files.delete_output("a.png")


async def content(files: Files, path: str, start: int = 0, length: int | None = None) -> list[bytes]:
    file = await files.open_output(path)
    async with aclosing(read(file, start, file.size - start if length is None else length)) as chunks:
        return [chunk async for chunk in chunks]


async def test_bytes_come_in_bounded_chunks(files: Files, outputs: Path) -> None:
    data = os.urandom(3 * CHUNK + 17)
    put(outputs, "a.bin", data)
    chunks = await content(files, "a.bin")
    assert b"".join(chunks) == data
    assert max(map(len, chunks)) == CHUNK
    assert b"".join(await content(files, "a.bin", CHUNK - 1, 3)) == data[CHUNK - 1 : CHUNK + 2]


async def test_a_file_that_changed_since_it_was_described_is_gone(files: Files, outputs: Path) -> None:
    put(outputs, "a.png", b"one", at=1000)
    file = await files.open_output("a.png")
    put(outputs, "a.png", b"two", at=1001)
    with pytest.raises(Gone):
        await anext(read(file, 0, 3))
    (outputs / "a.png").unlink()
    with pytest.raises(NotFound):
        await anext(read(file, 0, 3))
    os.mkfifo(outputs / "a.png")  # must not wait for a writer
    with pytest.raises(Gone):
        await anext(read(file, 0, 3))


async def test_a_file_put_in_place_as_a_link_is_not_followed(files: Files, outputs: Path, tmp_path: Path) -> None:
    put(outputs, "a.png", b"one", at=1000)
    file = await files.open_output("a.png")
    (outputs / "a.png").rename(tmp_path / "same.png")  # same bytes, same time: only the link is in the way
    (outputs / "a.png").symlink_to(tmp_path / "same.png")
    with pytest.raises(Gone):
        await anext(read(file, 0, 3))


async def test_a_file_cut_short_while_it_is_read_is_told(files: Files, outputs: Path) -> None:
    place = put(outputs, "a.bin", bytes(3 * CHUNK))
    file = await files.open_output("a.bin")
    async with aclosing(read(file, 0, file.size)) as chunks:
        await anext(chunks)
        os.truncate(place, CHUNK)
        with pytest.raises(Gone):
            await anext(chunks)


@pytest.mark.parametrize(
    "name", ["a.html", "a.htm", "a.svg", "a.js", "a.mjs", "a.xml", "a.xhtml", "a.pdf", "a", "png"]
)
def test_what_could_run_in_a_browser_is_never_inline(name: str) -> None:
    assert (media_of(name).type, media_of(name).inline) == ("application/octet-stream", False)
    assert media_of(name.upper()) == media_of(name)


def test_pictures_and_films_are_inline() -> None:
    assert media_of("a.PNG").type == "image/png"
    assert all(media_of(f"a.{kind}").inline for kind in ("png", "jpg", "webp", "gif", "mp4", "webm", "flac"))
