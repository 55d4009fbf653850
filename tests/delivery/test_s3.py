"""Outputs go to a bucket of a real S3 server that checks signatures, and the record tells of each once."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from managers.delivery.port import Again, Delivered, Refused
from managers.delivery.s3_bucket import MULTIPART
from managers.delivery.sqlite_uploads import SqliteUploads
from managers.delivery.uploads import Upload
from managers.events.types import UploadCompleted, UploadFailed
from tests.delivery.s3_kit import (
    BUCKET,
    GRAPH,
    Bench,
    S3Server,
    bench,
    fetch,
    needs_rclone,
    s3_server,
    sha256,
)
from tests.faults.proxy import proxied

pytestmark = [needs_rclone, pytest.mark.slow]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
async def here(shared: S3Server, tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(tmp_path, shared.environ()) as found:
        yield found


def folder_of(workflow_id: str | None) -> str:
    return f"generated/comfyui/jobs/{workflow_id}"


async def test_outputs_are_there_byte_for_byte_and_metadata_last(here: Bench, shared: S3Server) -> None:
    files = {"a_00001_.png": os.urandom(200_000), "clip.mp4": os.urandom(70_000), "page.html": b"<script>"}
    delivery = await here.completed(files, "a caption")
    workflow_id = delivery.event.workflow_id
    assert await here.deliver(delivery) == Delivered()

    folder = folder_of(workflow_id)
    for name, data in files.items():
        assert shared.read(f"{folder}/{name}") == data
    described = json.loads(shared.read(f"{folder}/metadata.json"))
    assert described["workflow"] == GRAPH
    assert described["parameters"]["2"] == {
        "classType": "SaveImage",
        "title": "Keep it",
        "inputs": {"filename_prefix": "kit"},
    }
    assert described["completionTime"] == described["startTime"] + 1
    assert described["metadata"] == {"customer": "7"}
    assert "partner-secret" not in json.dumps(described)
    told = {one.get("name"): one for one in described["outputs"]}
    assert {name: told[name]["sha256"] for name in files} == {name: sha256(data) for name, data in files.items()}
    assert [one["text"] for one in described["outputs"] if one["kind"] == "text"] == ["a caption"]

    events = await here.events(workflow_id)
    assert [(one["type"], one["n"], one["output"]["sha256"]) for one in sorted(events, key=lambda one: one["n"])] == [
        ("upload:completed", n, sha256(data)) for n, data in enumerate(files.values())
    ]
    assert all("url" not in one["output"] and one["url"] is None for one in events), "no link is on the disk"


async def test_a_link_opens_without_a_key_and_says_what_it_is(here: Bench) -> None:
    delivery = await here.completed({"a.png": b"picture", "b.svg": b"<svg/>"})
    await here.deliver(delivery)
    workflow = await here.store.get(delivery.event.workflow_id or "")
    (linked,) = await here.uploads.links.linked([workflow])
    first, second = linked.outputs
    assert first.url is not None
    assert second.url is not None
    reply = await fetch(first.url)
    assert (reply.status_code, reply.content, reply.headers["content-type"]) == (200, b"picture", "image/png")
    assert reply.headers["x-amz-meta-sha256"] == first.sha256 == sha256(b"picture")
    assert (await fetch(second.url)).headers["content-type"] == "application/octet-stream"
    forged = first.url[:-1] + ("0" if first.url[-1] != "0" else "1")
    assert (await fetch(forged)).status_code == 403
    assert workflow.outputs[0].url is None, "the record has no link"


async def test_more_than_16_mebibytes_go_up_in_parts(shared: S3Server, tmp_path: Path) -> None:
    async with proxied(shared.url) as proxy, bench(tmp_path, shared.environ(S3_ENDPOINT_URL=proxy.url)) as here:
        data = {"at.png": os.urandom(MULTIPART), "over.png": os.urandom(MULTIPART + 1)}
        delivery = await here.completed(data)
        hold = proxy.hold("PUT", "")
        delivering = asyncio.create_task(here.deliver(delivery))
        paths = []
        while not delivering.done():
            catching = asyncio.create_task(hold.caught())
            await asyncio.wait([catching, delivering], return_when=asyncio.FIRST_COMPLETED)
            if catching.done():
                caught = catching.result()
                paths.append((caught.path.rpartition("/")[2], len(caught.body)))
                caught.answer()
            else:
                catching.cancel()
        assert await delivering == Delivered()
        folder = folder_of(delivery.event.workflow_id)
        assert all(shared.read(f"{folder}/{name}") == content for name, content in data.items())
        assert [size for path, size in paths if path == "at.png"] == [MULTIPART]
        parts = [size for path, size in paths if path.startswith("over.png?")]
        assert (len(parts), sum(parts)) == (4, MULTIPART + 1)


async def test_many_mebibytes_go_not_through_memory(here: Bench, shared: S3Server) -> None:
    size = 128 * 2**20
    path = here.folder.root / "long.mp4"
    delivery = await here.completed({"long.mp4": b""})
    with path.open("wb") as file:
        block = os.urandom(2**20)
        for _ in range(size // 2**20):
            file.write(block)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert await here.deliver(delivery) == Delivered()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < size / 2, f"{grown / 2**20:.0f} MiB for {size / 2**20:.0f}"
    key = f"{folder_of(delivery.event.workflow_id)}/long.mp4"
    assert shared.read(key) == path.read_bytes()
    (event,) = await here.events(delivery.event.workflow_id)
    assert (event["output"]["size"], event["output"]["sha256"]) == (size, sha256(path.read_bytes()))
    (linked,) = await here.uploads.links.linked([await here.store.get(delivery.event.workflow_id or "")])
    assert (await fetch(str(linked.outputs[0].url))).headers["x-amz-meta-sha256"] == event["output"]["sha256"]


async def test_what_is_on_record_is_not_uploaded_again(here: Bench, shared: S3Server, tmp_path: Path) -> None:
    delivery = await here.completed({"a.png": b"1", "b.png": b"2"})
    (here.folder.root / "b.png").rename(here.folder.root / "later.png")
    outcome = await here.deliver(delivery)
    assert isinstance(outcome, Refused)
    assert outcome.reason.startswith("1 of 2 outputs are gone")
    assert sorted((one["type"], one["n"]) for one in await here.events(delivery.event.workflow_id)) == [
        ("upload:completed", 0),
        ("upload:failed", 1),
    ]
    assert json.loads(shared.read(f"{folder_of(delivery.event.workflow_id)}/metadata.json"))["outputs"][1]["error"]

    await here.deliver(delivery)  # replayed while it is still gone: nothing is told twice
    assert len(await here.events(delivery.event.workflow_id)) == 2
    (here.folder.root / "later.png").rename(here.folder.root / "b.png")
    here.folder.opened.clear()
    assert await here.deliver(delivery) == Delivered()
    assert here.folder.opened == ["b.png"], "the first is on record"
    assert [one["type"] for one in await here.events(delivery.event.workflow_id)].count("upload:completed") == 2


async def test_a_server_that_is_down_is_waited_for(tmp_path: Path) -> None:
    with s3_server(tmp_path / "s3") as server:
        async with bench(tmp_path, server.environ()) as here:
            delivery = await here.completed({"a.png": b"1"})
            server.stop()
            outcome = await here.deliver(delivery)
            assert outcome == Again("the store cannot be reached")
            assert await here.events(delivery.event.workflow_id) == []
            server.start()
            assert await here.deliver(delivery) == Delivered()
            assert server.read(f"{folder_of(delivery.event.workflow_id)}/a.png") == b"1"


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        (
            {"AWS_SECRET_ACCESS_KEY": "wrong-secret-3kd"},
            "the store refuses our credentials: 403 SignatureDoesNotMatch",
        ),
        ({"S3_BUCKET": "nobody-made-it"}, "the store answers 404 NoSuchBucket"),
    ],
)
async def test_what_an_operator_may_mend_is_tried_again(
    shared: S3Server, tmp_path: Path, environ: dict[str, str], reason: str
) -> None:
    async with bench(tmp_path, shared.environ(**environ)) as here:
        delivery = await here.completed({"a.png": b"1"})
        assert await here.deliver(delivery) == Again(reason)
    async with bench(tmp_path, shared.environ()) as here:  # mended, and restarted
        assert await here.deliver(delivery) == Delivered()
        assert len(await here.events(delivery.event.workflow_id)) == 1


async def test_half_an_upload_is_none(shared: S3Server, tmp_path: Path) -> None:
    async with proxied(shared.url) as proxy, bench(tmp_path, shared.environ(S3_ENDPOINT_URL=proxy.url)) as here:
        delivery = await here.completed({"big.png": os.urandom(MULTIPART + 5 * 2**20)})
        key = f"{folder_of(delivery.event.workflow_id)}/big.png"
        hold = proxy.hold("PUT", "")
        trying = asyncio.create_task(here.deliver(delivery))
        first = await hold.caught()
        assert f"/{BUCKET}/{key}?" in first.path, first.path
        await first.ask()  # one part has arrived
        first.drop()
        while not trying.done():  # and whatever is tried now breaks
            catching = asyncio.create_task(hold.caught())
            await asyncio.wait([catching, trying], return_when=asyncio.FIRST_COMPLETED)
            if catching.done():
                catching.result().drop()
            else:
                catching.cancel()
        assert isinstance(await trying, Again)
        assert shared.keys(folder_of(delivery.event.workflow_id)) == []
        assert await here.events(delivery.event.workflow_id) == []
        proxy.mend()
        assert await here.deliver(delivery) == Delivered()
        assert shared.read(key) == (here.folder.root / "big.png").read_bytes()


async def test_cut_off_between_upload_and_record_it_ends_in_one_record(shared: S3Server, tmp_path: Path) -> None:
    async with proxied(shared.url) as proxy:
        environ = shared.environ(S3_ENDPOINT_URL=proxy.url)
        async with bench(tmp_path, environ) as here:
            delivery = await here.completed({"a.png": b"1"})
            hold = proxy.hold("PUT", "", times=1)
            trying = asyncio.create_task(here.deliver(delivery))
            await (await hold.caught()).ask()
            trying.cancel()
            with pytest.raises(asyncio.CancelledError):
                await trying
            assert shared.read(f"{folder_of(delivery.event.workflow_id)}/a.png") == b"1"
            assert await here.events(delivery.event.workflow_id) == []
        async with bench(tmp_path, environ) as here:
            assert await here.deliver(delivery) == Delivered()
            assert await here.deliver(delivery) == Delivered()
            assert [one["type"] for one in await here.events(delivery.event.workflow_id)] == ["upload:completed"]


async def test_a_store_that_cannot_be_written_is_tried_again(here: Bench) -> None:
    delivery = await here.completed({"a.png": b"1"})
    await here.store.close()
    assert await here.deliver(delivery) == Again("The store is closed")


async def test_a_backend_that_is_away_is_waited_for(here: Bench, shared: S3Server) -> None:
    delivery = await here.completed({"a.png": b"1", "b.png": b"2"})
    here.folder.away = {"b.png"}
    assert await here.deliver(delivery) == Again("ComfyUI is away")
    assert not [key for key in shared.keys(folder_of(delivery.event.workflow_id)) if "metadata" in key]
    here.folder.away = set()
    assert await here.deliver(delivery) == Delivered()
    assert [one["n"] for one in await here.events(delivery.event.workflow_id)] == [0, 1]


async def test_the_record_takes_an_upload_once(here: Bench) -> None:
    delivery = await here.completed({"a.png": b"1"})
    workflow_id = delivery.event.workflow_id or ""
    books = SqliteUploads(here.store)
    upload = Upload(workflow_id=workflow_id, n=0, bucket="b", key="k", sha256="0", size=1, uploaded_at=5)
    output = (await here.store.get(workflow_id)).outputs[0]
    done = UploadCompleted(timestamp=5, workflow_id=workflow_id, n=0, output=output)
    failed = UploadFailed(timestamp=5, workflow_id=workflow_id, n=0, output=output, error="gone")
    assert [await books.failed(failed, bucket="b") for _ in range(2)] == [True, False]
    assert await books.of([workflow_id]) == {}
    assert [await books.completed(upload, done) for _ in range(2)] == [True, False]
    assert await books.failed(failed, bucket="b") is False, "it is there"
    assert await books.of([workflow_id]) == {workflow_id: {0: upload}}
    assert [one["type"] for one in await here.events(workflow_id)] == ["upload:failed", "upload:completed"]


async def test_local_copies_go_after_the_record(shared: S3Server, tmp_path: Path) -> None:
    async with bench(tmp_path, shared.environ(UPLOAD_DELETE_LOCAL="true")) as here:
        delivery = await here.completed({"a.png": b"1", "b.png": b"2"})
        assert await here.deliver(delivery) == Delivered()
        assert list(here.folder.root.iterdir()) == []
        assert await here.deliver(delivery) == Delivered()  # a replay finds the records
