"""The simulator behaves like the recorded ComfyUI; with COMFYUI_CONFORMANCE_URL set, the server there is tested.

A replay is compared by order and shape. What the clock decides is left out: how many progress events come before an
interrupt, which of two nodes that could run is first, counters in file names, times and sizes.
"""

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.conformance import recording
from tests.conformance.compare import differences
from tests.conformance.player import Player
from tests.conformance.servers import OwnServer, Server

REAL = os.environ.get("COMFYUI_CONFORMANCE_URL")

NOT_SIMULATED = {
    "run_audio_outputs": "no audio nodes",
    "run_video_outputs": "no video nodes",
    "run_preview_3d": "no 3D nodes",
    "run_latent_output": "no SaveLatent",
    "run_animated_outputs": "no animated formats",
}
OWN_TEST = {"ws_slow_consumer": "a peer that never reads is no recorded frame: see test_a_slow_reader_blocks_all"}
ENDS_THE_SERVER = {
    "crash_hard_exit",
    "poison_dead_worker",
    "poison_equal_heap_keys",
    "stop_sigint_mid_run",
    "stop_sigterm_mid_run",
}
NEEDS_ITS_DISK = {"cached_output_file_deleted"}
LOOSELY = {"interrupt_just_after_submit": "whether the interrupt finds the prompt running is a race"}
UNREAD = {
    # request ids whose bodies are not compared, and why
    "ws_history_race": {11},  # the race itself: {} or the entry
    "endpoints_info": {16, 17, 18, 20, 21},  # internal routes; other prompts in the history
}
NOT_OFFERED = {"endpoints_info": {16, 17, 18}}
"""Request ids of routes for the web page that the simulator does not have."""
SLOW = {
    "interrupt_deaf_last_node", "interrupt_deaf_node", "interrupt_just_after_submit", "poison_dead_worker",
    "poison_equal_heap_keys", "prompt_own_id", "prompt_same_id_same_number", "stop_sigint_mid_run", "upload_limit",
    "ws_reconnect_after_end", "ws_reconnect_mid_run",
}  # fmt: skip
CASES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [], id=name) for name in recording.names()]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if REAL:
        yield Server(REAL)
        return
    server = OwnServer(tmp_path_factory.mktemp("simulator"))
    yield server
    server.close()


@pytest.fixture
def server(case: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    if case in OWN_TEST:
        pytest.skip(OWN_TEST[case])
    if REAL is None and case in NOT_SIMULATED:
        pytest.skip(f"not simulated: {NOT_SIMULATED[case]}")
    if REAL and case in NEEDS_ITS_DISK:
        pytest.skip("would have to remove a file of a server that is not ours")
    if case not in ENDS_THE_SERVER:
        yield request.getfixturevalue("shared")
        return
    if REAL:
        pytest.skip("would end a server that is not ours")
    own = OwnServer(tmp_path)
    yield own
    own.close()


@pytest.mark.parametrize("case", CASES)
async def test_replay(case: str, server: Server) -> None:
    events = recording.load(case)
    if REAL is None:
        left_out = NOT_OFFERED.get(case, set())
        events = [event for event in events if event.id not in left_out]
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        played = await Player(events, server, client).play()
    found = differences(events, played, loosely=case in LOOSELY, unread=UNREAD.get(case, set()))
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.skipif(bool(REAL), reason="leaves a real server with a flooded client for a while")
async def test_a_slow_reader_blocks_all(shared: Server) -> None:
    """`ws_slow_consumer`: one client that does not read its socket stops the events of all; execution goes on."""
    graph = json.loads((recording.FOLDER.parent / "workflows" / "preview_flood.json").read_bytes())
    graph["2"]["inputs"] |= {"seed": 11}
    url = shared.url.replace("http", "ws", 1) + "/ws?clientId="
    async with (
        httpx.AsyncClient(base_url=shared.url, timeout=60) as client,
        connect(url + "reads", max_size=None, compression=None) as reads,
        connect(url + "stuck", max_size=None, max_queue=1, compression=None) as stuck,
    ):
        previews = asyncio.ensure_future(_count_previews(reads))
        answer = await client.post("/prompt", json={"prompt": graph})
        while not (await client.get(f"/history/{answer.json()['prompt_id']}")).json():  # noqa: ASYNC110 - polled
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        assert not previews.done(), "all previews came although one client reads nothing"
        stuck.transport.abort()
        assert await asyncio.wait_for(previews, 20) == 40


async def _count_previews(socket: ClientConnection) -> int:
    seen = 0
    async for message in socket:
        seen += isinstance(message, bytes)
        if seen == 40:
            break
    return seen
