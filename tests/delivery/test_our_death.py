"""The service is killed between a delivery and its record: what was on its way comes again, under the same id."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.delivery.kit import Post, calls, lab, settled
from tests.delivery.receiver import Answer, Call, Receiver, receiving
from tests.queue_kit import Child, Comfy, child, comfy, picture


@pytest.fixture
def comfyui(tmp_path: Path) -> Iterator[Comfy]:
    with comfy(tmp_path / "comfyui") as process:
        yield process


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


async def test_killed_between_delivery_and_record(tmp_path: Path, comfyui: Comfy, receiver: Receiver) -> None:
    environ = lab(tmp_path, comfyui)
    (tmp_path / "data").mkdir()
    victims: list[Child] = []

    def answer(call: Call) -> Answer:
        if victims and call.type == "workflow:started":
            victims.pop().kill()  # it has the call, and never hears the answer
        return Answer()

    async with child(environ) as service:
        made = await Post(service).webhook(receiver.url)
        await service.run(picture())
        await calls(receiver, lambda calls: len(calls) == 3)
        receiver.answer = answer
        victims.append(service)
        second = await service.submit(picture())
        await calls(receiver, lambda calls: len(calls) == 5)
        service.process.wait(10)
    async with child(environ) as service:
        await service.ended(second)
        await calls(receiver, lambda calls: len(calls) >= 7)
        log = await Post(service).until(lambda log: len(log) == 6 and settled(log))
        assert {one["state"] for one in log} == {"delivered"}
        heard = list(receiver.calls)
    ids = Counter(call.id for call in heard)
    assert set(ids) == {one["id"] for one in log}, "at least once at the receiver, once in the record"
    (started,) = {call.id for call in heard if call.type == "workflow:started" and call.workflow_id == second}
    assert ids[started] >= 2
    kinds = list(dict.fromkeys(call.type for call in heard if call.workflow_id == second))
    assert kinds == ["workflow:queued", "workflow:started", "workflow:completed"]
    for call in heard:
        call.verify(made["secret"])


async def test_stopped_while_a_receiver_hangs(tmp_path: Path, comfyui: Comfy, receiver: Receiver) -> None:
    environ = lab(tmp_path, comfyui)
    (tmp_path / "data").mkdir()
    receiver.answer = lambda _: Answer(hold=receiver.hold)
    async with child(environ) as service:
        await Post(service).webhook(receiver.url, "workflow:completed")
        await service.run(picture())
        (first,) = await calls(receiver, lambda calls: len(calls) == 1)
        began = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(service.process.wait, 20) == 0
        assert time.monotonic() - began < 10, "less than a try may take"
    receiver.hold.set()
    async with child(environ) as service:
        (done,) = await Post(service).until(settled)
        assert (done["state"], done["id"]) == ("delivered", first.id)
        assert {call.id for call in receiver.calls} == {first.id}
