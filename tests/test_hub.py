from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from managers.callers import NOBODY
from managers.clock import SystemClock
from managers.errors import Unavailable
from managers.events import packets
from managers.events.hub import Hub
from managers.events.log import StoredFrame
from managers.events.outbox import Outbox
from managers.events.packets import Packet
from managers.events.subscriptions import BadFrame, Ping, Subscribe, Subscription, Unsubscribe, parse
from managers.events.tickets import Tickets
from managers.events.types import (
    ComfyUIMessage,
    LiveEvent,
    NodeCounts,
    NodeExecuted,
    NodeExecuting,
    NodeProgressed,
    Preview,
    QueueStatus,
    StoredEvent,
    WorkflowCancelled,
    WorkflowProgress,
)

A = "3f0c6f1e-4d3b-4d55-9f6a-0d6f2a3c9b11"
B = "8a1b2c3d-0000-4000-8000-00000000000b"


class QuietLog:
    """A log with a past and no future."""

    last_seq = 7

    async def first_seq(self) -> int:
        return 1

    async def events_after(self, seq: int, limit: int) -> list[StoredFrame]:
        return []

    async def events_of(self, workflow_id: str, after: int = 0) -> list[StoredFrame]:
        return []


class Ear:
    """A subscriber that takes everything."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.heard: list[Packet] = []
        self.came = asyncio.Event()
        self.closed: tuple[int, str] | None = None
        hub.subscribe(self)

    def offer(self, packet: Packet) -> None:
        self.heard.append(packet)
        self.came.set()

    def close(self, code: int, reason: str) -> None:
        self.closed = code, reason
        self.hub.unsubscribe(self)


def progress(percent: int, workflow_id: str = A) -> WorkflowProgress:
    return WorkflowProgress(
        timestamp=1,
        workflow_id=workflow_id,
        progress=percent,
        current_node="K-Sampler",
        current_node_id="3",
        current_node_type="KSampler",
        step=percent,
        steps=100,
        message=None,
        nodes=NodeCounts(),
    )


def cancelled(seq: int, workflow_id: str = A) -> tuple[StoredEvent, StoredFrame]:
    event = WorkflowCancelled(timestamp=1, workflow_id=workflow_id, seq=seq)
    return event, StoredFrame(seq, "workflow:cancelled", workflow_id, msgspec.json.encode(event))


def comfyui(name: str, data: str = "{}", workflow_id: str = A) -> ComfyUIMessage:
    return ComfyUIMessage(
        type=f"comfyui:{name}", timestamp=1, backend="local", data=Raw(data.encode()), workflow_id=workflow_id
    )


def preview(image: bytes = b"\xff\xd8jpeg") -> Preview:
    return Preview(
        timestamp=5,
        workflow_id=A,
        prompt_id=B,
        node_id="2.0.1",
        display_node_id="2",
        mime="image/jpeg",
        image=image,
    )


def texts(ear: Ear) -> list[dict[str, object]]:
    return [json.loads(packet.payload) for packet in ear.heard]


# ---- the hub


async def test_everybody_gets_the_same_bytes() -> None:
    hub = Hub(QuietLog())
    first, second = Ear(hub), Ear(hub)
    hub.publish(progress(40))
    assert first.heard[0].frame is second.heard[0].frame
    assert texts(first)[0]["type"] == "workflow:progress"
    assert texts(first)[0]["progress"] == 40
    assert hub.clients == 2


async def test_stored_events_go_out_with_the_bytes_of_the_disk() -> None:
    hub = Hub(QuietLog())
    assert hub.seq == 7
    ear = Ear(hub)
    pairs = [cancelled(8), cancelled(9, B)]
    hub.publish_stored(pairs)
    assert [packet.payload for packet in ear.heard] == [frame.data for _, frame in pairs]
    assert [packet.seq for packet in ear.heard] == [8, 9]
    assert hub.seq == 9


async def test_listeners_in_the_house_hear_everything_until_they_stop() -> None:
    hub = Hub(QuietLog())
    heard: list[LiveEvent | StoredEvent] = []
    stop = hub.listen(heard.append)
    state = comfyui("progress_state")
    hub.publish(state)
    hub.publish(state)
    pair = cancelled(8)
    hub.publish_stored([pair])
    assert heard == [state, state, pair[0]]
    stop()
    hub.publish(state)
    assert len(heard) == 3


async def test_who_unsubscribes_hears_no_more() -> None:
    hub = Hub(QuietLog())
    ear = Ear(hub)
    hub.unsubscribe(ear)
    hub.unsubscribe(ear)
    hub.publish(progress(1))
    assert not ear.heard
    assert hub.clients == 0


async def test_close_says_goodbye_and_waits_until_all_have_gone() -> None:
    hub = Hub(QuietLog())
    ear = Ear(hub)
    await hub.close()
    assert ear.closed == (1001, "The service is going away")
    assert hub.closing
    assert hub.clients == 0


async def test_progress_state_is_throttled_and_its_last_one_arrives() -> None:
    hub = Hub(QuietLog())
    ear = Ear(hub)
    began = asyncio.get_running_loop().time()
    for step in range(50):
        hub.publish(comfyui("progress_state", f'{{"step":{step}}}'))
    assert [event["data"] for event in texts(ear)] == [{"step": 0}]
    ear.came.clear()
    async with asyncio.timeout(2):
        await ear.came.wait()
    assert asyncio.get_running_loop().time() - began >= 0.24
    assert [event["data"] for event in texts(ear)] == [{"step": 0}, {"step": 49}]
    await hub.close()


async def test_the_last_progress_state_goes_before_the_end_of_its_run() -> None:
    hub = Hub(QuietLog())
    ear = Ear(hub)
    for step in range(3):
        hub.publish(comfyui("progress_state", f'{{"step":{step}}}'))
    hub.publish(comfyui("progress_state", '{"other":1}', B))
    hub.publish(comfyui("executing", '{"node":"3"}'))
    hub.publish(comfyui("execution_success"))
    told = [(event["type"], event["data"]) for event in texts(ear)]
    assert told == [
        ("comfyui:progress_state", {"step": 0}),
        ("comfyui:progress_state", {"other": 1}),
        ("comfyui:executing", {"node": "3"}),
        ("comfyui:progress_state", {"step": 2}),
        ("comfyui:execution_success", {}),
    ]
    await hub.close()


# ---- packets


def test_the_binary_preview_is_comfyuis_format_4() -> None:
    packet = packets.live(preview(b"\xff\xd8\x00picture"))
    event, size = struct.unpack_from(">II", packet.payload)
    assert packet.binary
    assert event == 4
    assert json.loads(packet.payload[8 : 8 + size]) == {
        "node_id": "2.0.1",
        "prompt_id": B,
        "display_node_id": "2",
        "parent_node_id": None,
        "real_node_id": "2.0.1",
        "image_type": "image/jpeg",
        "workflow_id": A,
    }
    assert packet.payload[8 + size :] == b"\xff\xd8\x00picture"


def test_the_json_preview_is_made_once() -> None:
    packet = packets.live(preview(b"\x00\x01\x02"))
    text = packet.as_json()
    assert text is packet.as_json()
    assert not text.binary
    assert text.key == packet.key
    assert json.loads(text.text) == {
        "type": "preview",
        "workflowId": A,
        "timestamp": 5,
        "promptId": B,
        "nodeId": "2.0.1",
        "displayNodeId": "2",
        "mime": "image/jpeg",
        "image": "AAEC",
    }


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 70000])
@pytest.mark.parametrize("binary", [False, True])
def test_frames_are_what_another_library_understands(size: int, binary: bool) -> None:
    if binary:
        packet = packets.live(preview(b"x" * size))
    else:
        packet = packets.stored(StoredFrame(1, "workflow:queued", A, b"x" * size))
    reader = StreamReader()
    reader.feed_data(packet.frame)
    parsing = Frame.parse(reader.read_exact, mask=False)
    with pytest.raises(StopIteration) as done:
        next(parsing)
    frame = done.value.value
    assert frame.opcode is (Opcode.BINARY if binary else Opcode.TEXT)
    assert frame.fin
    assert bytes(frame.data) == packet.payload
    assert len(reader.buffer) == 0


def node(kind: type[NodeExecuting | NodeProgressed | NodeExecuted], node_id: str, workflow_id: str = A) -> Packet:
    return packets.live(kind(timestamp=1, workflow_id=workflow_id, node_id=node_id, display_node_id=node_id))


def test_what_takes_the_place_of_what() -> None:
    keys = [
        packets.live(progress(1)).key,
        packets.live(progress(1, B)).key,
        node(NodeProgressed, "3").key,
        node(NodeProgressed, "4").key,
        node(NodeProgressed, "3", B).key,
        packets.live(preview()).key,
        packets.live(QueueStatus(timestamp=1, length=1, running=0, paused=False)).key,
        packets.live(comfyui("progress_state")).key,
        packets.live(comfyui("progress")).key,
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert node(NodeExecuted, "3").key == node(NodeExecuting, "3").key == keys[2]
    assert packets.live(comfyui("executed")).key is None
    assert packets.stored(cancelled(1)[1]).key is None


# ---- the outbox


def drained(outbox: Outbox) -> Iterator[Packet]:
    while outbox:
        yield outbox.pop()


class Drops:
    count = 0

    def __call__(self) -> None:
        self.count += 1


def test_the_latest_of_a_key_goes_to_the_end() -> None:
    drops = Drops()
    outbox = Outbox(10, drops)
    old, verdict, new = packets.live(progress(1)), packets.stored(cancelled(8)[1]), packets.live(progress(2))
    for packet in (old, verdict, new):
        outbox.put(packet)
    assert outbox.must == 1
    assert list(drained(outbox)) == [verdict, new]
    assert outbox.must == 0
    assert drops.count == 1


def test_the_oldest_that_may_be_dropped_makes_room() -> None:
    drops = Drops()
    outbox = Outbox(2, drops)
    verdict = packets.stored(cancelled(8)[1])
    events = [packets.live(comfyui("executed", str(number))) for number in range(4)]
    for packet in (events[0], verdict, *events[1:]):
        outbox.put(packet)
    assert list(drained(outbox)) == [verdict, *events[2:]]
    assert drops.count == 2


def test_giving_up_keeps_answers_and_names_the_first_event() -> None:
    drops = Drops()
    outbox = Outbox(10, drops)
    answer = packets.reply(Ping())
    for packet in (answer, packets.live(progress(1)), *(packets.stored(cancelled(seq)[1]) for seq in (8, 9))):
        outbox.put(packet)
    assert outbox.give_up() == 8
    assert outbox.must == 1
    assert list(drained(outbox)) == [answer]
    assert drops.count == 1


_PUBLISHED = st.lists(st.sampled_from(["a", "b", "c", "must", "pop", "free"]), max_size=60)


@given(_PUBLISHED, st.integers(1, 5))
def test_what_comes_out_is_in_order_and_complete_where_it_must_be(steps: list[str], limit: int) -> None:
    drops = Drops()
    outbox = Outbox(limit, drops)
    published: list[Packet] = []
    out: list[Packet] = []
    for step in steps:
        if step == "pop":
            if outbox:
                out.append(outbox.pop())
            continue
        packet = Packet(None, payload=b"", key=step if step in "abc" else None, must=step == "must")
        published.append(packet)
        outbox.put(packet)
        assert len(outbox) - outbox.must <= limit
    out += drained(outbox)
    places = [published.index(packet) for packet in out]
    assert places == sorted(places)
    assert [packet for packet in published if packet.must] == [packet for packet in out if packet.must]
    assert len(out) + drops.count == len(published)
    if published:
        assert out[-1] is published[-1]


# ---- subscriptions


def test_a_new_socket_hears_the_workflow_channel_of_all() -> None:
    new = Subscription()
    assert new.wants("workflow", A)
    assert not new.wants("node", A)
    assert not new.wants("queue", None)


def test_the_first_ids_narrow_and_further_ones_add() -> None:
    one = Subscription().add(Subscribe(workflow_id=A))
    assert one.wants("workflow", A)
    assert not one.wants("workflow", B)
    both = one.add(Subscribe(workflow_id=[B]))
    assert both.wants("workflow", A)
    assert both.wants("workflow", B)


def test_channels_alone_replace_the_channels_only() -> None:
    changed = Subscription().add(Subscribe(workflow_id=A)).add(Subscribe(channels=["node", "queue"]))
    assert changed.ids == frozenset({A})
    assert not changed.wants("workflow", A)
    assert changed.wants("node", A)
    assert not changed.wants("node", B)
    assert changed.wants("queue", None)


def test_unsubscribing_the_last_id_leaves_a_socket_that_hears_nothing() -> None:
    deaf = (
        Subscription()
        .add(Subscribe(workflow_id=A, channels=["workflow", "queue"]))
        .remove(Unsubscribe(workflow_id=A))
    )
    assert not deaf.wants("workflow", A)
    assert not deaf.wants("workflow", B)
    assert not deaf.wants("queue", None)
    assert deaf.add(Subscribe(workflow_id=B)).wants("workflow", B)


def test_unsubscribing_from_channels_from_nothing_and_from_all() -> None:
    new = Subscription()
    assert new.remove(Unsubscribe(workflow_id=A)).wants("workflow", A)
    assert not new.remove(Unsubscribe(channels=["workflow"])).wants("workflow", A)
    assert not new.remove(Unsubscribe()).wants("workflow", A)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b'{"type":"ping"}', "binary_frame"),
        ("", "invalid_json"),
        ("{", "invalid_json"),
        ('{"type":"ping"} {}', "invalid_json"),
        ('{"type":"subscribe","since":NaN}', "invalid_json"),
        ('{"x":' + "[" * 10_000 + "]" * 10_000 + ',"type":"ping"}', "invalid_json"),
        ('"ping"', "invalid_frame"),
        ("[]", "invalid_frame"),
        ("{}", "invalid_frame"),
        ('{"type":"publish"}', "invalid_frame"),
        ('{"type":7}', "invalid_frame"),
        ('{"type":"subscribe","channels":"workflow"}', "invalid_frame"),
        ('{"type":"subscribe","channels":["everything"]}', "invalid_frame"),
        ('{"type":"subscribe","since":-1}', "invalid_frame"),
        ('{"type":"subscribe","since":1.5}', "invalid_frame"),
        ('{"type":"subscribe","since":9223372036854775808}', "invalid_frame"),
        ('{"type":"subscribe","since":"3"}', "invalid_frame"),
        ('{"type":"subscribe","workflowId":{}}', "invalid_frame"),
        ('{"type":"subscribe","previewFormat":"gif"}', "invalid_frame"),
        ('{"type":"subscribe","workflowId":"7"}', "invalid_id"),
        ('{"type":"subscribe","workflowId":["../../etc"]}', "invalid_id"),
        (f'{{"type":"unsubscribe","workflowId":["{A}","{A}\\n"]}}', "invalid_id"),
        (f'{{"type":"subscribe","workflowId":"{A.replace("-", "")}"}}', "invalid_id"),
        ('{"type":"ping","pad":"' + "x" * 65536 + '"}', "frame_too_large"),
        ('{"type":"ping","pad":"' + "€" * 22000 + '"}', "frame_too_large"),
    ],
)
def test_bad_frames(data: str | bytes, code: str) -> None:
    with pytest.raises(BadFrame) as refused:
        parse(data, 65536)
    assert refused.value.code == code
    assert 0 < len(str(refused.value)) <= 300


@pytest.mark.parametrize(
    ("data", "frame"),
    [
        ('{"type":"ping","extra":[1]}', Ping()),
        ('{"type":"subscribe"}', Subscribe()),
        ('{"type":"subscribe","workflowId":null,"channels":null,"since":null}', Subscribe()),
        (f'{{"type":"subscribe","workflowId":"{A}","since":0}}', Subscribe(workflow_id=A, since=0)),
        ('{"type":"subscribe","previewFormat":"json"}', Subscribe(preview_format="json")),
        (f'{{"type":"unsubscribe","workflowId":["{B}"]}}', Unsubscribe(workflow_id=[B])),
    ],
)
def test_good_frames(data: str, frame: object) -> None:
    assert parse(data, 65536) == frame


def test_ids_are_taken_in_either_case() -> None:
    assert parse(f'{{"type":"subscribe","workflowId":"{A.upper()}"}}', 65536).ids == {A}  # type: ignore[union-attr]


def test_a_socket_names_a_bounded_number_of_workflows() -> None:
    names = [f"00000000-0000-4000-8000-{number:012x}" for number in range(1001)]
    many = Subscription().add(Subscribe(workflow_id=names[:1000]))
    with pytest.raises(BadFrame):
        many.add(Subscribe(workflow_id=names[1000]))


# ---- tickets


class Hand(SystemClock):
    """A clock that is moved by hand."""

    at = 100.0

    def monotonic(self) -> float:
        return self.at

    def now_ms(self) -> int:
        return 1_700_000_000_000 + int(self.at * 1000)


def test_a_ticket_is_good_once() -> None:
    tickets = Tickets(Hand())
    ticket = tickets.issue(NOBODY)
    assert ticket.expires_at == 1_700_000_000_000 + 160_000
    assert len(ticket.ticket) == 43  # 256 bits in base64
    assert not tickets.redeem(ticket.ticket[:-1])
    assert tickets.redeem(ticket.ticket) is NOBODY
    assert not tickets.redeem(ticket.ticket)


def test_a_ticket_ends_after_a_minute() -> None:
    clock = Hand()
    tickets = Tickets(clock)
    early, late = tickets.issue(NOBODY), tickets.issue(NOBODY)
    clock.at += 59.9
    assert tickets.redeem(early.ticket)
    clock.at += 0.2
    assert not tickets.redeem(late.ticket)
    assert not tickets.redeem("\ud800")


def test_open_tickets_are_bounded() -> None:
    clock = Hand()
    tickets = Tickets(clock, limit=2)
    tickets.issue(NOBODY)
    tickets.issue(NOBODY)
    with pytest.raises(Unavailable):
        tickets.issue(NOBODY)
    clock.at += 60
    tickets.issue(NOBODY)
