"""What the recordings cannot show of the simulator: its pictures, its pretended sampler, embedding, faults."""

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from management_api.simulator.server import SimulatorOptions, serve
from tests.simulator_process import simulator

Graph = dict[str, Any]


def txt2img(seed: int, steps: int = 3) -> Graph:
    sampling = {
        "seed": seed,
        "steps": steps,
        "cfg": 7.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    links = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "simulated.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "waves", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 64, "batch_size": 2}},
        "5": {"class_type": "KSampler", "inputs": sampling | links},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "art"}},
    }


def one_colour(colour: int) -> Graph:
    size = {"width": 8, "height": 8, "batch_size": 1}
    return {
        "1": {"class_type": "EmptyImage", "inputs": size | {"color": colour}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }


async def submit(client: httpx.AsyncClient, graph: Graph, **more: object) -> str:
    answer = await client.post("/prompt", json={"prompt": graph, **more})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["prompt_id"])


async def ended(client: httpx.AsyncClient, prompt_id: str) -> dict[str, Any]:
    """The history entry of a prompt that another client runs."""
    async with asyncio.timeout(10):
        while not (history := (await client.get(f"/history/{prompt_id}")).json()):  # noqa: ASYNC110 - polled
            await asyncio.sleep(0.01)
    return dict(history[prompt_id])


async def saved(client: httpx.AsyncClient, entry: dict[str, Any]) -> list[Image.Image]:
    files = [item for output in entry["outputs"].values() for item in output["images"]]
    answers = [await client.get("/view", params=file) for file in files]
    return [Image.open(io.BytesIO(answer.content)) for answer in answers]


@pytest.fixture(scope="module")
def with_faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with simulator(tmp_path_factory.mktemp("faulty"), "--faults") as (url, _):
        yield url


@pytest.fixture
async def faulty(with_faults: str) -> str:
    """A simulator with no fault in force yet."""
    async with httpx.AsyncClient() as client:
        assert (await client.post(f"{with_faults}/_faults", json={})).status_code == 200
    return with_faults


async def test_the_sampler_paints_from_its_seed_and_says_how_far_it_is(tmp_path: Path) -> None:
    with simulator(tmp_path, "--preview", "--step-seconds", "0.001") as (url, _):
        async with (
            httpx.AsyncClient(base_url=url) as client,
            connect(url.replace("http", "ws") + "/ws?clientId=a") as ws,
        ):
            prompts = [await submit(client, txt2img(seed), client_id="a") for seed in (1, 2, 1)]
            pictures = [await saved(client, await ended(client, prompt)) for prompt in prompts]
            heard: list[str | bytes] = []
            while not (heard and f'"node":null,"prompt_id":"{prompts[2]}"' in str(heard[-1])):
                heard.append(await asyncio.wait_for(ws.recv(), 5))
    assert [image.size for image in pictures[0]] == [(128, 64)] * 2
    first, second, again = ([image.convert("RGB").tobytes() for image in images] for images in pictures)
    assert first == again
    assert first != second
    assert first[0] != first[1], "the pictures of a batch differ"
    assert json.loads(pictures[0][0].text["prompt"])["5"]["inputs"]["seed"] == 1  # type: ignore[attr-defined]
    texts = [json.loads(frame) for frame in heard if isinstance(frame, str)]
    values = [m["data"]["value"] for m in texts if m["type"] == "progress" and m["data"]["prompt_id"] == prompts[0]]
    assert values == [1, 2, 3]
    assert sum(isinstance(frame, bytes) for frame in heard) == 9


async def test_colours_come_out_as_asked(tmp_path: Path) -> None:
    graph = one_colour(0x102030)
    graph["3"] = {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}}
    graph["2"]["inputs"]["images"] = ["3", 0]
    with simulator(tmp_path) as (url, _):
        async with httpx.AsyncClient(base_url=url) as client:
            (image,) = await saved(client, await ended(client, await submit(client, graph)))
    assert image.getpixel((3, 3)) == (0xEF, 0xDF, 0xCF)


async def test_embedded_in_a_loop_and_cancelled_with_a_socket_open(tmp_path: Path) -> None:
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    running = asyncio.ensure_future(serve(SimulatorOptions(directory=tmp_path, port=0), listening.set_result))
    url = await asyncio.wait_for(listening, 5)
    async with httpx.AsyncClient(base_url=url) as client, connect(url.replace("http", "ws") + "/ws") as socket:
        assert await ended(client, await submit(client, one_colour(1)))
        running.cancel()
        await asyncio.wait_for(socket.wait_closed(), 5)
        with pytest.raises(httpx.TransportError):
            await client.get("/prompt")
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 5)


async def test_without_the_switch_there_are_no_faults(tmp_path: Path) -> None:
    with simulator(tmp_path) as (url, _):
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.post("/_faults", json={})).status_code == 404


@pytest.mark.parametrize(("fault", "accepted"), [("refuse_prompt", False), ("lose_prompt_response", True)])
async def test_a_submission_whose_answer_never_comes(faulty: str, fault: str, accepted: bool) -> None:
    chosen = "11111111-1111-4111-8111-111111111111"
    async with httpx.AsyncClient(base_url=faulty) as client:
        await client.post("/_faults", json={fault: 1})
        with pytest.raises(httpx.RemoteProtocolError):
            await submit(client, one_colour(2), prompt_id=chosen)
        await ended(client, await submit(client, one_colour(3)))
        assert bool((await client.get(f"/history/{chosen}")).json()) is accepted


async def test_slow_answers(faulty: str) -> None:
    async with httpx.AsyncClient(base_url=faulty, timeout=0.2) as client:
        await client.post("/_faults", json={"http_delay": 30})
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/queue")
        await client.post("/_faults", json={"hang_prompt": 30})
        with pytest.raises(httpx.ReadTimeout):
            await submit(client, one_colour(4), prompt_id="hangs")
        assert await ended(client, "hangs")


async def test_sockets_can_be_deaf_and_can_break(faulty: str) -> None:
    async with httpx.AsyncClient(base_url=faulty) as client, connect(faulty.replace("http", "ws") + "/ws") as socket:
        await socket.recv()
        await client.post("/_faults", json={"deaf": True})
        await ended(client, await submit(client, one_colour(5)))
        await client.post("/_faults", json={"drop_sockets": True})
        with pytest.raises(ConnectionClosed) as closed:
            await asyncio.wait_for(socket.recv(), 5)  # not a status frame: it heard nothing
        assert closed.value.rcvd is None, "no close frame"


async def test_a_killed_worker_leaves_its_prompt_running(tmp_path: Path) -> None:
    with simulator(tmp_path, "--faults") as (url, _):
        async with httpx.AsyncClient(base_url=url) as client:
            await client.post("/_faults", json={"kill_worker": True})
            first, second = [await submit(client, one_colour(6)), await submit(client, one_colour(7))]
            queue = (await client.get("/queue")).json()
    assert [item[1] for item in queue["queue_running"]] == [first]
    assert [item[1] for item in queue["queue_pending"]] == [second]


async def test_dying_and_forgetting(tmp_path: Path) -> None:
    with simulator(tmp_path, "--faults") as (url, process):
        async with httpx.AsyncClient(base_url=url) as client:
            done = await submit(client, one_colour(8))
            await ended(client, done)
            await client.post("/_faults", json={"clear_history": True})
            assert (await client.get(f"/history/{done}")).json() == {}
            await client.post("/_faults", json={"die_after_accept": True})
            with pytest.raises(httpx.TransportError):
                await submit(client, one_colour(9))
        assert process.wait(timeout=5) == 137
