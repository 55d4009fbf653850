from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import Raw
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from managers.clock import new_id
from managers.events.session import StreamConfig
from managers.events.types import (
    BackendConnected,
    ComfyUIMessage,
    NodeCounts,
    NodeProgressed,
    Preview,
    QueueStatus,
    WorkflowProgress,
)
from routes.sse import SseEvent
from routes.stream import origin_allowed
from tests.stream_house import KEY, House, answer, next_frame, open_house, settled, small_socket, until

HEADERS = {"X-API-Key": KEY}
PAGE = 16


@pytest.fixture(params=["fast", "plain"])
def fast(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "fast")


@pytest.fixture
async def house(tmp_path: Path, fast: bool) -> AsyncIterator[House]:
    config = StreamConfig(page=PAGE, max_waiting=32, max_live=32)
    async with open_house(tmp_path, fast=fast, config=config) as house:
        yield house


def progress(workflow_id: str, percent: int) -> WorkflowProgress:
    return WorkflowProgress(
        timestamp=1,
        workflow_id=workflow_id,
        progress=percent,
        current_node=None,
        current_node_id=None,
        current_node_type=None,
        step=None,
        steps=None,
        message=None,
        nodes=NodeCounts(),
    )


def types(frames: list[Any]) -> list[str]:
    return [frame["type"] for frame in frames]


def seqs(frames: list[Any]) -> list[int]:
    return [frame["seq"] for frame in frames if "workflowId" in frame and "seq" in frame]


# ---- who hears what


async def test_a_new_socket_hears_the_workflow_channel_of_all(house: House) -> None:
    async with house.connect() as socket:
        assert await settled(socket) == []
        first, second = await house.submit(), await house.submit()
        house.hub.publish(progress(first, 50))
        house.hub.publish(NodeProgressed(timestamp=1, workflow_id=first, node_id="3", display_node_id="3"))
        house.hub.publish(QueueStatus(timestamp=1, length=2, running=0, paused=False))
        frames = await settled(socket)
        assert types(frames) == ["workflow:queued", "workflow:queued", "workflow:progress"]
        assert [frame["workflowId"] for frame in frames] == [first, second, first]
        assert seqs(frames) == [1, 2]
        assert "seq" not in frames[2]
        assert frames[0]["queuePosition"] == 0
        assert frames[0]["priority"] == "normal"
        assert frames[2]["progress"] == 50


async def test_subscribe_narrows_and_unsubscribing_the_last_leaves_silence(house: House) -> None:
    mine, other = await house.submit(), await house.submit()
    async with house.connect() as socket:
        reply = await answer(socket, type="subscribe", workflowId=mine)
        assert reply["type"] == "subscribed"
        assert reply["workflowIds"] == [mine]
        assert reply["channels"] == ["workflow"]
        assert reply["seq"] == 2
        assert [entry["workflowId"] for entry in reply["snapshot"]] == [mine]
        assert reply["snapshot"][0]["status"] == "queued"
        house.hub.publish(progress(mine, 1))
        house.hub.publish(progress(other, 2))
        await house.store.cancel(other, 1)
        await house.store.cancel(mine, 1)
        frames = await settled(socket)
        assert types(frames) == ["workflow:progress", "workflow:cancelled"]
        assert {frame["workflowId"] for frame in frames} == {mine}
        left = await answer(socket, type="unsubscribe", workflowId=[mine])
        assert (left["type"], left["workflowIds"], left["channels"]) == ("unsubscribed", [], ["workflow"])
        house.hub.publish(progress(mine, 3))
        house.hub.publish(progress(other, 4))
        await house.submit()
        assert await settled(socket) == []


async def test_channels_alone_replace_the_channels(house: House) -> None:
    workflow_id = await house.submit()
    async with house.connect() as socket:
        reply = await answer(socket, type="subscribe", channels=["node", "queue", "backend"])
        assert reply["workflowIds"] is None
        assert reply["channels"] == ["backend", "node", "queue"]
        assert reply["snapshot"] == []  # nothing runs
        house.hub.publish(progress(workflow_id, 1))
        house.hub.publish(NodeProgressed(timestamp=1, workflow_id=workflow_id, node_id="3", display_node_id="2"))
        house.hub.publish(QueueStatus(timestamp=1, length=1, running=0, paused=False))
        await house.store.append(BackendConnected(timestamp=1, backend="local"))
        frames = await settled(socket)
        assert types(frames) == ["node:progress", "queue:status", "backend:connected"]
        assert frames[0]["displayNodeId"] == "2"
        assert frames[2]["seq"] == 2


async def test_ids_we_do_not_know_yet_are_accepted(house: House) -> None:
    async with house.connect() as socket:
        reply = await answer(socket, type="subscribe", workflowId=new_id())
        assert reply["type"] == "subscribed"
        assert reply["snapshot"] == []


async def test_comfyuis_own_events_come_as_they_came(house: House) -> None:
    workflow_id = new_id()
    async with house.connect() as socket:
        await answer(socket, type="subscribe", channels=["comfyui"])
        data = '{"node": "3", "väl": [1, 2.50]}'
        house.hub.publish(
            ComfyUIMessage(
                type="comfyui:executing",
                timestamp=7,
                backend="local",
                data=Raw(data.encode()),
                workflow_id=workflow_id,
            )
        )
        async with asyncio.timeout(5):
            text = await socket.recv()
        assert isinstance(text, str)
        assert data in text
        frame = json.loads(text)
        del frame["data"]
        assert frame == {"type": "comfyui:executing", "timestamp": 7, "backend": "local", "workflowId": workflow_id}


async def test_previews_come_in_binary_or_in_json(house: House) -> None:
    picture = bytes(range(256)) * 300  # more than 64 KiB
    shown = Preview(
        timestamp=1,
        workflow_id=new_id(),
        prompt_id=new_id(),
        node_id="3",
        display_node_id="3",
        mime="image/png",
        image=picture,
    )
    async with house.connect() as one, house.connect() as two:
        await answer(one, type="subscribe", channels=["preview"])
        await answer(two, type="subscribe", channels=["preview"], previewFormat="json")
        house.hub.publish(shown)
        async with asyncio.timeout(5):
            binary = await one.recv()
        assert isinstance(binary, bytes)
        kind, size = struct.unpack_from(">II", binary)
        assert kind == 4
        assert json.loads(binary[8 : 8 + size])["image_type"] == "image/png"
        assert binary[8 + size :] == picture
        frame = await next_frame(two)
        assert frame["type"] == "preview"
        assert frame["workflowId"] == shown.workflow_id


# ---- seq, snapshots, replay


async def test_a_snapshot_and_the_events_after_it_leave_nothing_out_and_tell_nothing_twice(house: House) -> None:
    """Many subscribe while many submit: every event is in the snapshot or comes after it, once, in order."""
    known = [await house.submit() for _ in range(3)]

    subscribed = asyncio.Semaphore(0)

    async def listen() -> None:
        async with house.connect() as socket:
            ask = {"type": "subscribe", "workflowId": known, "channels": ["workflow", "backend"]}
            reply = (await until_reply(socket, ask))[-1]
            subscribed.release()
            statuses = {entry["workflowId"]: entry["status"] for entry in reply["snapshot"]}
            assert set(statuses) == set(known)
            frames = await until(socket, "backend:connected")
            told = seqs(frames)
            assert told == sorted(set(told))
            assert all(seq > reply["seq"] for seq in told)
            ended = {frame["workflowId"] for frame in frames if frame["type"] == "workflow:cancelled"}
            assert ended == {one for one, status in statuses.items() if status == "queued"}

    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        for _ in range(8):
            tasks.create_task(listen())
        for workflow_id in known:
            for _ in range(10):
                await house.submit()
                await house.images(workflow_id)
            await house.store.cancel(workflow_id, 1)
        for _ in range(8):
            await subscribed.acquire()
        await house.store.append(BackendConnected(timestamp=1, backend="local"))


async def test_what_a_socket_heard_before_goes_on_across_a_subscribe(house: House) -> None:
    """A socket that hears one workflow adds others again and again, while events of the first keep coming."""
    first = await house.submit()
    others = [await house.submit() for _ in range(20)]
    done = asyncio.Event()

    async def work() -> None:
        while not done.is_set():
            await house.images(first)

    async with house.connect() as socket, asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        frames = await until_reply(socket, {"type": "subscribe", "workflowId": first})
        working = tasks.create_task(work())
        for other in others:
            frames += await until_reply(socket, {"type": "subscribe", "workflowId": other})
        done.set()
        await working
        frames += await settled(socket)
    at = next(number for number, frame in enumerate(frames) if frame["type"] == "subscribed")
    told = [frame["seq"] for frame in frames[at:] if frame["type"] in {"subscribed", "images:generated"}]
    assert told == sorted(told)
    events = seqs(frames[at:])
    assert events == list(range(22, house.store.last_seq + 1))


async def until_reply(socket: ClientConnection, frame: dict[str, Any]) -> list[Any]:
    await socket.send(json.dumps(frame))
    return await until(socket, "subscribed")


async def test_since_in_a_frame_replays_what_was_missed(house: House) -> None:
    mine = await house.submit()
    for _ in range(PAGE + 3):
        await house.submit()
    await house.store.cancel(mine, 1)
    last = house.store.last_seq
    async with house.connect() as socket:
        await socket.send(json.dumps({"type": "subscribe", "workflowId": mine, "since": 0}))
        frames = await until(socket, "subscribed")
        assert types(frames) == ["workflow:queued", "workflow:cancelled", "subscribed"]
        assert [frame["seq"] for frame in frames] == [1, last, last]
        again = await answer(socket, type="subscribe", since=last)
        assert again["type"] == "subscribed"
        beyond = await answer(socket, type="subscribe", since=last + 1000)
        assert beyond["seq"] == last
        await house.images(mine)
        assert seqs(await settled(socket)) == [last + 1]


async def test_since_in_the_address_replays_also_after_a_restart(tmp_path: Path, fast: bool) -> None:
    config = StreamConfig(page=PAGE)
    async with open_house(tmp_path, fast=fast, config=config) as house:
        ids = [await house.submit() for _ in range(3 * PAGE)]
    async with open_house(tmp_path, fast=fast, config=config) as house, house.connect("?since=2") as socket:
        frames = await settled(socket)
        assert [frame["workflowId"] for frame in frames] == ids[2:]
        assert seqs(frames) == list(range(3, len(ids) + 1))
        await house.submit()
        assert seqs(await settled(socket)) == [len(ids) + 1]


async def test_a_replay_of_many_pages_joins_what_happens_meanwhile(house: House) -> None:
    for _ in range(5 * PAGE):
        await house.submit()
    async with house.connect("?since=0") as socket, asyncio.timeout(20):
        for number in range(3 * PAGE):
            workflow_id = await house.submit()
            house.hub.publish(progress(workflow_id, number))
        last = house.store.last_seq
        frames: list[Any] = []
        while not frames or frames[-1].get("seq", 0) < last:
            frames.append(await next_frame(socket))
        frames += await settled(socket)
        assert seqs(frames) == list(range(1, last + 1))
        heard: set[str] = set()
        for frame in frames:  # nobody hears of progress before he hears that there is a workflow
            if frame["type"] == "workflow:progress":
                assert frame["workflowId"] in heard
            heard.add(frame["workflowId"])


async def test_a_gap_too_old_is_told_first(house: House) -> None:
    for _ in range(4):
        await house.store.cancel(await house.submit(), 1)
    while await house.store.prune(2**60):
        pass
    first, last = await house.store.first_seq(), house.store.last_seq
    assert first > 3
    async with house.connect("?since=1") as socket:
        frames = await settled(socket)
        assert frames[0] == {"type": "gap", "from": 2, "to": first - 1}
        assert seqs(frames[1:]) == list(range(first, last + 1))
        await socket.send('{"type":"subscribe","since":2}')
        frames = await until(socket, "subscribed")
        assert frames[0] == {"type": "gap", "from": 3, "to": first - 1}
        assert frames[-1]["seq"] == last


# ---- client frames


async def test_ping_is_answered(house: House) -> None:
    async with house.connect() as socket:
        before = int(time.time() * 1000)
        pong = await answer(socket, type="ping")
        assert pong.keys() == {"type", "timestamp"}
        assert before <= pong["timestamp"] <= int(time.time() * 1000)


async def test_bad_frames_are_answered_and_the_twentieth_ends_it(house: House) -> None:
    bad: list[tuple[str | bytes, str]] = [
        ("nonsense", "invalid_json"),
        (b"\x00\x01", "binary_frame"),
        ('{"type":"subscribe","workflowId":"no-uuid"}', "invalid_id"),
        ('{"type":"ping","x":"' + "x" * 70_000 + '"}', "frame_too_large"),
        ('{"type":"dance"}', "invalid_frame"),
    ]
    async with house.connect() as socket:
        for data, code in bad * 3 + bad[:4]:
            await socket.send(data)
            frame = await next_frame(socket)
            assert frame.keys() == {"type", "code", "message"}
            assert (frame["type"], frame["code"]) == ("error", code)
        assert (await answer(socket, type="ping"))["type"] == "pong"
        await socket.send("one too many")
        assert (await next_frame(socket))["type"] == "error"
        with pytest.raises(ConnectionClosed):
            await next_frame(socket)
        assert socket.close_code == 1008


async def test_a_heartbeat_names_the_last_stored_event(tmp_path: Path, fast: bool) -> None:
    async with (
        open_house(tmp_path, fast=fast, config=StreamConfig(heartbeat_seconds=0.05)) as house,
        house.connect() as socket,
    ):
        first, second = await next_frame(socket), await next_frame(socket)
        assert first.keys() == {"type", "timestamp", "seq"}
        assert (first["type"], first["seq"]) == ("heartbeat", 0)
        assert second["timestamp"] - first["timestamp"] >= 40
        await house.submit()
        assert types(frames := await until(socket, "workflow:queued"))[-1] == "workflow:queued"
        assert frames[-1]["seq"] == 1
        assert (await next_frame(socket))["seq"] == 1


# ---- the way in


@contextmanager
def refused(status: int) -> Iterator[list[dict[str, Any]]]:
    """Expect an HTTP answer with a problem instead of an upgrade."""
    problem: list[dict[str, Any]] = []
    with pytest.raises(InvalidStatus) as caught:
        yield problem
    response = caught.value.response
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.body is not None
    problem.append(json.loads(response.body))
    assert problem[0]["status"] == problem[0]["statusCode"] == status
    assert problem[0]["instance"] == "/v1/comfyui/stream"


@pytest.mark.parametrize(
    "options",
    [
        {"additional_headers": {}},
        {"additional_headers": {"X-API-Key": "wrong"}},
        {"additional_headers": {}, "subprotocols": [Subprotocol("bearer"), Subprotocol("wrong")]},
    ],
)
async def test_without_a_key_there_is_no_upgrade(house: House, options: dict[str, Any]) -> None:
    with refused(401):
        async with house.connect(**options):
            pass


@pytest.mark.parametrize("query", [f"?key={KEY}", "?ticket=", "?ticket=made-up"])
async def test_neither_a_key_in_the_address_nor_a_false_ticket_opens(house: House, query: str) -> None:
    with refused(401):
        async with house.connect(query, additional_headers={}):
            pass


@pytest.mark.parametrize("scheme", ["bearer", "Bearer"])
async def test_the_sub_protocol_pair_is_a_key_and_only_the_scheme_is_echoed(house: House, scheme: str) -> None:
    async with house.connect(additional_headers={}, subprotocols=[Subprotocol(scheme), Subprotocol(KEY)]) as socket:
        assert socket.subprotocol == scheme
        assert await settled(socket) == []


async def test_other_sub_protocols_are_not_chosen(house: House) -> None:
    async with house.connect(subprotocols=[Subprotocol("chat"), Subprotocol("mqtt")]) as socket:
        assert socket.subprotocol is None


async def test_a_ticket_opens_once(house: House) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{house.port}", headers=HEADERS) as client:
        reply = await client.post("/v1/comfyui/stream/ticket")
        assert (await client.post("/v1/comfyui/stream/ticket", headers={"X-API-Key": "no"})).status_code == 401
    assert reply.status_code == 200
    assert reply.headers["cache-control"] == "no-store"
    ticket = reply.json()
    assert ticket.keys() == {"ticket", "expiresAt"}
    assert 55_000 < ticket["expiresAt"] - time.time() * 1000 <= 60_000
    async with house.connect(f"?ticket={ticket['ticket']}", additional_headers={}) as socket:
        assert await settled(socket) == []
    with refused(401):
        async with house.connect(f"?ticket={ticket['ticket']}", additional_headers={}):
            pass


@pytest.mark.parametrize("since", ["", "x", "-1", "1.5", "١", "9" * 19, "1&since=2"])
async def test_a_since_that_is_no_number_is_refused(house: House, since: str) -> None:
    with refused(400) as problem:
        async with house.connect(f"?since={since}"):
            pass
    assert "since" in problem[0]["detail"]


async def test_foreign_pages_may_not_connect(tmp_path: Path, fast: bool) -> None:
    config, friend = StreamConfig(), "https://friend.example"
    async with open_house(tmp_path, fast=fast, config=config, origins=(friend,)) as house:
        for origin in (friend, f"http://127.0.0.1:{house.port}"):
            async with house.connect(origin=origin) as socket:
                assert await settled(socket) == []
        for origin in ("https://evil.example", f"http://localhost:{house.port}", "null"):
            with refused(403):
                async with house.connect(origin=origin):
                    pass


@pytest.mark.parametrize(
    ("origins", "host", "allowed", "verdict"),
    [
        ([], "h:1", [], True),
        (["http://h:1"], "h:1", [], True),
        (["HTTP://H:1"], "h:1", [], True),
        (["https://h"], "h:443", [], True),
        (["http://h:80"], "h", [], True),
        (["https://h"], "h:80", [], False),
        (["http://h:1"], "h:2", [], False),
        (["http://h.evil"], "h", [], False),
        (["null"], "h", ["http://x"], False),
        (["http://[bad"], "h", [], False),
        (["ftp://h"], "h", [], False),
        (["http://x"], "h", ["HTTP://X/"], True),
        (["http://x"], "h", ["*"], True),
        (["http://x", "http://evil"], "h", ["http://x"], False),
    ],
)
def test_the_origin_rule(origins: list[str], host: str, allowed: list[str], verdict: bool) -> None:
    assert origin_allowed(origins, host, allowed) is verdict


# ---- slow peers


TEXT = "x" * 4000


async def test_a_reader_that_stops_loses_no_event_and_nobody_else_notices(house: House) -> None:
    """It is emptied and filled again from the log; of what is live it gets the latest."""
    workflow_id = await house.submit()
    async with house.connect(sock=small_socket(house.port), max_queue=1) as slow, house.connect() as other:
        await answer(slow, type="subscribe", channels=["workflow", "node"])
        await settled(other)
        for number in range(200):
            house.hub.publish(progress(workflow_id, number))
            await house.images(workflow_id, TEXT)
            if number % 20 == 19:
                assert seqs(await settled(other))[-1] == house.store.last_seq
        assert house.hub.clients == 2
        house.hub.publish(progress(workflow_id, 999))
        last = house.store.last_seq
        assert last == 201
        frames: list[Any] = []
        while not frames or frames[-1].get("progress") != 999:
            frames.append(await next_frame(slow))
        assert seqs(frames) == list(range(2, last + 1))
        told = [frame["progress"] for frame in frames if frame["type"] == "workflow:progress"]
        assert told == sorted(told)
        assert len(told) < 200
        assert house.hub.dropped > 0
        await house.images(workflow_id)
        assert seqs(await settled(slow)) == [last + 1]


async def test_what_was_live_about_an_ended_workflow_is_not_told_after_its_end(house: House) -> None:
    workflow_id, other = await house.submit(), await house.submit()
    async with house.connect(sock=small_socket(house.port), max_queue=1) as slow:
        await settled(slow)
        for _ in range(150):
            await house.images(other, TEXT)
        house.hub.publish(progress(workflow_id, 99))
        house.hub.publish(progress(other, 50))
        await house.store.cancel(workflow_id, 1)
        frames = await until(slow, "workflow:progress")
        assert frames[-1]["workflowId"] == other
        assert frames[-2]["type"] == "workflow:cancelled"


async def test_a_socket_that_takes_no_lifecycle_is_closed(tmp_path: Path, fast: bool) -> None:
    config = StreamConfig(stall_seconds=0.4, close_seconds=0.2, page=PAGE, max_waiting=32)
    async with open_house(tmp_path, fast=fast, config=config) as house:
        workflow_id = await house.submit()
        async with house.connect(sock=small_socket(house.port), max_queue=1) as slow, house.connect() as other:
            await settled(slow)
            await settled(other)
            for _ in range(100):
                await house.images(workflow_id, TEXT)
            frames: list[Any] = []
            while not seqs(frames) or seqs(frames)[-1] < house.store.last_seq:
                frames.append(await next_frame(other))
            await house.one_ends()
            assert house.hub.clients == 1
            if fast:  # plain ASGI cannot put a close behind a full buffer
                with pytest.raises(ConnectionClosed):
                    await until(slow, "no such type")
                assert slow.close_code == 1013
            assert await settled(other) == []


async def send_without_end(socket: ClientConnection) -> None:
    for _ in range(20_000):
        async with asyncio.timeout(0.5):
            await socket.send('{"type":"ping","pad":"' + "x" * 2000 + '"}')


async def test_a_flood_of_pings_without_reading_is_not_kept_in_memory(house: House) -> None:
    """The server stops to read before it queues answers without end."""
    async with house.connect(sock=small_socket(house.port), max_queue=1) as rude:
        await settled(rude)
        with pytest.raises(TimeoutError):  # the client cannot get rid of its frames any more
            await send_without_end(rude)
        assert (await next_frame(rude))["type"] == "pong"
        rude.transport.abort()


async def test_a_slow_reader_is_not_taken_for_one_that_stopped(tmp_path: Path, fast: bool) -> None:
    config = StreamConfig(stall_seconds=2.0)
    async with open_house(tmp_path, fast=fast, config=config) as house:
        workflow_id = await house.submit()
        async with house.connect(sock=small_socket(house.port, 65536), max_queue=1) as slow:
            await settled(slow)
            for _ in range(250):
                await house.images(workflow_id, TEXT)
            for seq in range(2, 252):
                await asyncio.sleep(0.012)  # the pace of this reader
                assert (await next_frame(slow))["seq"] == seq


async def test_a_heartbeat_never_overtakes_an_event(tmp_path: Path, fast: bool) -> None:
    """Its seq is a good `since`: everything up to it has been told."""
    config = StreamConfig(heartbeat_seconds=0.01, page=PAGE, max_waiting=32)
    async with open_house(tmp_path, fast=fast, config=config) as house:
        workflow_id = await house.submit()
        async with house.connect(sock=small_socket(house.port), max_queue=1) as slow:
            await settled(slow)
            for _ in range(150):
                await house.images(workflow_id, TEXT)
            await asyncio.sleep(0.05)  # a few heartbeats while nobody reads
            told = 1
            while told < house.store.last_seq:
                frame = await next_frame(slow)
                assert frame["seq"] <= told if frame["type"] == "heartbeat" else frame["seq"] == told + 1
                told = max(told, frame["seq"])


async def test_a_peer_that_vanishes_while_it_is_waited_for_is_forgotten(house: House) -> None:
    workflow_id = await house.submit()
    async with house.connect(sock=small_socket(house.port), max_queue=1) as slow:
        await settled(slow)
        for _ in range(60):
            await house.images(workflow_id, TEXT)
        await slow.send('{"type":"ping"}')
        slow.transport.abort()
        await house.one_ends()
        assert house.hub.clients == 0


async def test_a_peer_that_vanishes_is_forgotten(house: House) -> None:
    async with house.connect() as socket:
        await settled(socket)
        assert house.hub.clients == 1
        socket.transport.abort()
        await house.one_ends()
        assert house.hub.clients == 0


# ---- the end


async def test_the_service_says_goodbye(house: House) -> None:
    async with house.connect() as one, house.connect() as two:
        await settled(one)
        await settled(two)
        await house.submit()
        async with asyncio.timeout(2):
            await house.hub.close()
        assert house.hub.clients == 0
        for socket in (one, two):
            assert types([await next_frame(socket)]) == ["workflow:queued"]
            with pytest.raises(ConnectionClosed):
                await next_frame(socket)
            assert socket.close_code == 1001


async def test_uvicorns_own_close_comes_too_late_to_be_heard(house: House) -> None:
    """It would say 1012 to every socket that has not been closed."""
    async with house.connect() as one, house.connect() as two:
        for socket in (one, two):
            await settled(socket)
        house.hub.publish(progress(new_id(), 1))
        await house.hub.close()
        await house.server.shutdown()
        for socket in (one, two):
            assert types([await next_frame(socket)]) == ["workflow:progress"]
            with pytest.raises(ConnectionClosed):
                await next_frame(socket)
            assert socket.close_code == 1001


async def test_nobody_comes_in_while_it_ends(house: House) -> None:
    await house.hub.close()
    with refused(503):
        async with house.connect():
            pass


# ---- server-sent events


async def test_server_sent_events_with_heartbeats_and_ids(house: House) -> None:
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{house.port}", headers=HEADERS) as client,
        client.stream("GET", "/v1/ticker") as reply,
        asyncio.timeout(5),
    ):
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-store"
        lines = reply.aiter_lines()
        assert await anext(lines) == ": stream"
        house.ticks.put_nowait(SseEvent(data=b'{"a":1}', id=7))
        house.ticks.put_nowait(SseEvent(data=b"two\nlines", event="task-complete"))
        heard = [line async for line in _until_heartbeat(lines)]
        assert heard == ["", "id: 7", 'data: {"a":1}', "", "event: task-complete", "data: two", "data: lines", ""]
        house.ticks.put_nowait(None)
        assert [line for line in [line async for line in lines] if line not in {"", ": heartbeat"}] == []
        await house.ticker_closed.wait()


async def _until_heartbeat(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    async for line in lines:
        if line == ": heartbeat":
            return
        yield line


async def test_a_reader_that_goes_ends_the_iterator(house: House) -> None:
    raw = socket.create_connection(("127.0.0.1", house.port))
    raw.sendall(f"GET /v1/ticker HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\n\r\n".encode())
    async with asyncio.timeout(5):
        await house.ticking.wait()
        raw.close()
        await house.ticker_closed.wait()
