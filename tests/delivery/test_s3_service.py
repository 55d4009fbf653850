"""Uploads as clients of the service see them: a real S3 server, a real ComfyUI process, links, events, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import program
from tests.comfy_kit import PATIENCE, PLAIN
from tests.delivery.s3_kit import BUCKET, KEY_ID, SECRET, S3Server, fetch, needs_rclone, s3_server
from tests.faults.proxy import proxied
from tests.queue_kit import PATH, ROOT, Comfy, House, Queue, Site, child, comfy, environment, picture, sleeper

pytestmark = [needs_rclone, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    with comfy(tmp_path_factory.mktemp("comfyui")) as found:
        yield found


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, simulator: Comfy, environ: dict[str, str]) -> AsyncIterator[House]:
    async with Site(tmp_path, simulator, **environ).fresh() as house:
        await house.connected()
        yield house


async def uploaded(queue: Queue, workflow_id: str, count: int = 1) -> dict[str, Any]:
    """The workflow when so many of its outputs are on record."""
    async with queue.stream("workflow", since=0) as stream:
        for _ in range(count):
            await stream.until("upload:completed", workflowId=workflow_id, after=len(stream.frames))
    return await queue.get(workflow_id)


async def test_outputs_carry_links_wherever_they_are_told(server: S3Server, simulator: Comfy, tmp_path: Path) -> None:
    async with serving(tmp_path, simulator, server.environ(S3_URL_TTL="3600")) as house, house.stream() as stream:
        await stream.until("subscribed")
        workflow_id = await house.submit(picture())
        told = await stream.until("upload:completed", workflowId=workflow_id)
        original = (simulator.outputs / told["output"]["filename"]).read_bytes()
        assert (await fetch(told["url"])).content == original
        assert told["output"]["url"] == told["url"]
        assert 3500_000 < told["urlExpiresAt"] - told["timestamp"] <= 3601_000

        (output,) = (await house.get(workflow_id))["outputs"]
        assert (await fetch(output["url"])).content == original
        assert output["key"] == f"generated/comfyui/jobs/{workflow_id}/{output['filename']}"
        assert output["urlExpiresAt"] == told["urlExpiresAt"], "the same link for a while: clients may cache by it"
        assert output["localUrl"] == f"{PATH}/{workflow_id}/outputs/0"
        assert (await house.client.get(output["localUrl"])).content == original

        (listed,) = (await house.list())["workflows"]
        assert listed["outputs"] == [output]
        completed = next(one for one in await house.events(workflow_id) if one["type"] == "workflow:completed")
        assert completed["outputs"] == [output]
        async with house.stream("workflow", since=0) as again:
            replayed = await again.until("upload:completed", workflowId=workflow_id)
        assert replayed["url"] == output["url"]


async def test_the_old_name_is_for_those_who_ask(server: S3Server, simulator: Comfy, tmp_path: Path) -> None:
    async with serving(tmp_path, simulator, server.environ()) as house, house.stream() as new, house.stream() as old:
        await new.until("subscribed")
        await old.until("subscribed")
        await old.send('{"type":"subscribe","names":"old"}')
        await old.until("subscribed", after=len(old.frames))
        workflow_id = await house.submit(picture())
        told = await new.until("upload:completed", workflowId=workflow_id)
        assert await old.until("upload_complete", workflowId=workflow_id) == told | {"type": "upload_complete"}
        await old.send('{"type":"subscribe","since":0}')
        await old.until("upload_complete", workflowId=workflow_id, after=len(old.frames))
        assert not [one for one in old.frames if one["type"] == "upload:completed"]


@pytest.mark.parametrize(
    ("environ", "base"),
    [
        ({"S3_PUBLIC_BASE_URL": "https://pictures.example.com/b/"}, "https://pictures.example.com/b/generated/"),
        ({"CLOUDFRONT_DOMAIN": "d111.cloudfront.net"}, "https://d111.cloudfront.net/generated/"),
        ({"S3_PUBLIC_ENDPOINT_URL": "https://s3.example.com"}, f"https://s3.example.com/{BUCKET}/generated/"),
    ],
)
async def test_links_name_what_others_reach(
    server: S3Server, simulator: Comfy, tmp_path: Path, environ: dict[str, str], base: str
) -> None:
    async with serving(tmp_path, simulator, server.environ(**environ)) as house:
        view = await uploaded(house, await house.submit(picture()))
    (output,) = view["outputs"]
    assert output["url"].startswith(f"{base}comfyui/jobs/{view['workflowId']}/{output['filename']}")
    assert ("urlExpiresAt" in output) == ("X-Amz-Signature" in output["url"]) == ("S3_PUBLIC_ENDPOINT_URL" in environ)


async def test_complete_waits_for_uploads_and_the_card_does_not(
    server: S3Server, simulator: Comfy, tmp_path: Path
) -> None:
    async with proxied(server.url) as proxy:
        environ = server.environ(S3_ENDPOINT_URL=proxy.url, UPLOAD_BEFORE_COMPLETE="true")
        async with serving(tmp_path, simulator, environ) as house, house.stream() as stream:
            await stream.until("subscribed")
            hold = proxy.hold("PUT", "")
            first = await house.submit(picture())
            held = await hold.caught()
            second = await house.submit(sleeper(steps=2000))
            await stream.until("workflow:started", workflowId=second)
            assert (await house.get(first))["status"] == "running"
            assert (await house.client.get("/v1/status")).json()["comfyui"]["backends"][0][
                "currentWorkflow"
            ] == second
            hold.release()
            held.answer()
            completed = await stream.until("workflow:completed", workflowId=first)
            kinds = [one["type"] for one in stream.of(first)]
            assert kinds.index("upload:completed") < kinds.index("workflow:completed")
            assert (await fetch(completed["outputs"][0]["url"])).status_code == 200
            await house.cancel(second)
            await until_delivered(house)
        assert [one["type"] for one in stream.of(first)].count("upload:completed") == 1


async def test_complete_waits_not_for_a_bucket_that_is_down(simulator: Comfy, tmp_path: Path) -> None:
    with s3_server(tmp_path / "s3") as own:
        own.stop()
        async with serving(tmp_path, simulator, own.environ(UPLOAD_BEFORE_COMPLETE="true")) as house:
            view = await house.run(picture())
            assert view["status"] == "completed"
            assert view["outputs"][0]["url"] == f"{PATH}/{view['workflowId']}/outputs/0"


async def until_delivered(house: Queue, count: int = 1) -> list[dict[str, Any]]:
    """The deliveries when so many have ended well. Asks again and again: no event tells of it."""
    for _ in range(PATIENCE * 50):
        found: list[dict[str, Any]] = (await house.client.get("/v1/deliveries")).json()["deliveries"]
        if [one["state"] for one in found].count("delivered") >= count:
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"not delivered: {found}")


async def test_without_local_copies_the_local_address_leads_to_the_bucket(
    server: S3Server, simulator: Comfy, tmp_path: Path
) -> None:
    async with serving(tmp_path, simulator, server.environ(UPLOAD_DELETE_LOCAL="true")) as house:
        workflow_id = await house.submit(picture())
        await uploaded(house, workflow_id)
        await until_delivered(house)
        (output,) = (await house.get(workflow_id))["outputs"]
        assert not (simulator.outputs / output["filename"]).exists()
        reply = await house.client.get(output["localUrl"], follow_redirects=False)
        assert reply.status_code == 307
        assert (await fetch(reply.headers["location"])).content[:4] == b"\x89PNG"


async def test_outputs_of_a_backend_elsewhere_come_through_view(
    server: S3Server, simulator: Comfy, tmp_path: Path
) -> None:
    async with proxied(simulator.url) as proxy:
        environ = server.environ(COMFYUI_BACKENDS=f"far={proxy.url}", COMFY_PATH=str(tmp_path / "nothing here"))
        environ |= {"DOWNLOAD_RETRY_DELAY_MS": "1", "COMFYUI_OUTPUTS": str(tmp_path / "nothing")}
        async with Site(tmp_path, None, **environ).fresh() as house:
            await house.connected("far")
            hold = proxy.hold("GET", "/view", times=1)
            workflow_id = await house.submit(picture())
            (await hold.caught()).drop()  # the first try breaks
            view = await uploaded(house, workflow_id)
    (output,) = view["outputs"]
    assert server.read(output["key"]) == (simulator.outputs / output["filename"]).read_bytes()


async def test_a_bucket_that_is_down_stops_nobody(simulator: Comfy, tmp_path: Path) -> None:
    with s3_server(tmp_path / "s3") as own:
        own.stop()
        async with serving(tmp_path, simulator, own.environ()) as house:
            views = [await house.run(picture()) for _ in range(3)]
            assert {view["status"] for view in views} == {"completed"}
            assert all(view["outputs"][0]["url"].startswith(PATH) for view in views)
            found: list[dict[str, Any]] = []
            for _ in range(PATIENCE * 50):  # no event tells of a try
                found = (await house.client.get("/v1/deliveries?state=pending")).json()["deliveries"]
                if len(found) == 3 and all(one["attempts"] for one in found):
                    break
                await asyncio.sleep(0.02)
            own.start()
            for one in found:
                assert one["lastError"] == "the store cannot be reached"
                assert (await house.client.post(f"/v1/deliveries/{one['id']}/retry")).is_success
            await until_delivered(house, 3)
            for view in views:
                (output,) = (await house.get(view["workflowId"]))["outputs"]
                assert (await fetch(output["url"])).status_code == 200


@pytest.mark.parametrize("secret", [SECRET, "wrong-secret-3kd92"])
async def test_no_secret_and_no_link_is_in_the_log(
    server: S3Server, simulator: Comfy, tmp_path: Path, secret: str
) -> None:
    environ = server.environ(AWS_SECRET_ACCESS_KEY=secret, LOG_FORMAT="json", LOG_LEVEL="debug")
    environ |= {"COMFYUI_URL": simulator.url, "COMFY_PATH": str(simulator.directory)}
    with program.served(tmp_path, **environ) as (url, process):
        headers = {"X-API-Key": program.KEY}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=PATIENCE, **PLAIN) as client:
            queue = Queue(client, url)
            workflow_id = await queue.submit(picture())
            for _ in range(PATIENCE * 50):
                tried = (await client.get("/v1/deliveries")).json()["deliveries"]
                if tried and tried[0]["attempts"]:
                    break
                await asyncio.sleep(0.02)
            assert tried[0]["state"] == ("delivered" if secret == SECRET else "pending")
            assert ("X-Amz-Signature" in (await queue.get(workflow_id))["outputs"][0]["url"]) == (secret == SECRET)
            assert not [one for one in (secret, KEY_ID, "X-Amz-") if one in json.dumps(tried)]
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    said = "\n".join(process.seen)
    assert workflow_id in said
    assert not [one for one in (secret, KEY_ID, "X-Amz-") if one in said]


async def test_killed_between_upload_and_record_it_is_recorded_once(
    server: S3Server, simulator: Comfy, tmp_path: Path
) -> None:
    async with proxied(server.url) as proxy:
        environ = environment(tmp_path, simulator, **server.environ(S3_ENDPOINT_URL=proxy.url))
        await asyncio.to_thread(Path(environ["MANAGEMENT_API_DATA_DIR"]).mkdir)
        hold = proxy.hold("PUT", "")
        async with child(environ) as service:
            await service.connected()
            workflow_id = await service.submit(picture())
            held = await hold.caught()
            await held.ask()  # it is in the bucket, and nobody here knows
            service.kill()
        key = held.path.removeprefix(f"/{BUCKET}/")
        before = server.read(key)
        proxy.mend()
        async with child(environ) as service:
            view = await uploaded(service, workflow_id)
            await until_delivered(service)
            events = [one for one in await service.events(workflow_id) if one["type"] == "upload:completed"]
        assert len(events) == 1
        assert view["outputs"][0]["key"] == key
        assert server.read(key) == before
        folder = key.rpartition("/")[0]
        assert server.keys(folder) == [key, f"{folder}/metadata.json"]
        assert json.loads(server.read(f"{folder}/metadata.json"))["workflowId"] == workflow_id


async def test_an_upload_fails_for_good_when_the_file_is_gone(
    server: S3Server, simulator: Comfy, tmp_path: Path
) -> None:
    async with proxied(server.url) as proxy:
        environ = server.environ(S3_ENDPOINT_URL=proxy.url, UPLOAD_CONCURRENCY="1")
        async with serving(tmp_path, simulator, environ) as house, house.stream() as stream:
            hold = proxy.hold("PUT", "")
            await house.submit(picture())
            await hold.caught()  # now whatever comes has to wait
            late = await house.run(picture())
            (simulator.outputs / late["outputs"][0]["filename"]).unlink()
            proxy.mend()
            failed = await stream.until("upload:failed", workflowId=late["workflowId"])
            assert failed["error"]
            assert failed["url"] == late["outputs"][0]["url"]
            for _ in range(PATIENCE * 50):
                dead = (await house.client.get("/v1/deliveries?state=dead")).json()["deliveries"]
                if dead:
                    break
                await asyncio.sleep(0.02)
            assert [one["workflowId"] for one in dead] == [late["workflowId"]]
            assert dead[0]["lastError"].startswith("1 of 1 outputs are gone")


async def test_without_a_bucket_nothing_of_it_is_there(simulator: Comfy, tmp_path: Path) -> None:
    async with serving(tmp_path, simulator, {}) as house:
        view = await house.run(picture())
        (output,) = view["outputs"]
        assert {"key", "sha256", "localUrl", "urlExpiresAt"} & output.keys() == set()
        assert (await house.client.get("/v1/deliveries")).json()["deliveries"] == []


def test_without_a_bucket_nothing_is_imported_for_it() -> None:
    program = "import sys, management_api.services; sys.exit('obstore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False, cwd=ROOT).returncode == 0
