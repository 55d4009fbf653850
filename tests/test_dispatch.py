"""Who runs when: the order, one at a time, the prompt posted ahead, and what takes it back (CONTRACT 4, DESIGN 2)."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from management_api.app import create_app
from management_api.settings import load
from tests.faults.kit import locked
from tests.faults.proxy import proxied
from tests.faults.watch_kit import dispatcher, taken_back
from tests.queue_kit import (
    Comfy,
    Graph,
    House,
    Queue,
    Site,
    View,
    comfy,
    environment,
    house,
    picture,
    sleeper,
    workflow,
)


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    with comfy(tmp_path_factory.mktemp("comfyui")) as process:
        yield process


@pytest.fixture(scope="module")
def site(simulator: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"), simulator)


@pytest.fixture
async def queue(site: Site, simulator: Comfy) -> AsyncIterator[House]:
    """A fresh service, connected. What is left in ComfyUI at the end is cancelled."""
    async with site.fresh() as service:
        await service.connected()
        yield service
        await empty(service, simulator)


async def empty(queue: Queue, *simulators: Comfy) -> None:
    for left in (await queue.list())["workflows"]:
        if left["status"] in ("queued", "running"):
            await queue.cancel(left["workflowId"])
    for simulator in simulators:
        await simulator.until_queue(lambda running, pending: not running and not pending)


async def ran(simulator: Comfy) -> list[str]:
    """The prompts that ComfyUI has executed, in that order."""
    return list(await simulator.history())


async def views(queue: Queue, *ids: str) -> list[View]:
    return [await queue.ended(one) for one in ids]


def spans(found: list[View]) -> list[tuple[int, int]]:
    """When each ran, in order. Fails where two overlap."""
    taken = sorted((view["startTime"], view["completionTime"]) for view in found)
    for (_, end), (start, _) in itertools.pairwise(taken):
        assert end <= start
    return taken


async def test_priority_first_then_arrival_and_one_at_a_time(queue: Queue) -> None:
    await queue.switch("pause")
    submitted = [(priority, await queue.submit(picture(), priority=priority)) for priority in
                 ("low", "normal", "high", "normal", "low", "high")]  # fmt: skip
    await queue.switch("resume")
    found = await views(queue, *(one for _, one in submitted))
    assert {view["status"] for view in found} == {"completed"}
    spans(found)
    order = {"high": 0, "normal": 1, "low": 2}
    expected = [one for _, one in sorted(submitted, key=lambda pair: order[pair[0]])]
    # ComfyUI's times are milliseconds, and these runs are short: the order is that of the service's own events.
    starts = {view["workflowId"]: (await queue.events(view["workflowId"]))[1]["seq"] for view in found}
    assert sorted(starts, key=starts.__getitem__) == expected


async def test_order_in_comfyui_is_the_order_of_the_queue(queue: Queue, simulator: Comfy) -> None:
    await queue.switch("pause")
    rng = random.Random(7)
    priorities = [rng.choice(["high", "normal", "low"]) for _ in range(20)]
    ids = [await queue.submit(picture(), priority=priority) for priority in priorities]
    positions = {one: (await queue.get(one))["queuePosition"] for one in ids}
    await queue.switch("resume")
    found = await views(queue, *ids)
    prompts = {view["promptId"]: view["workflowId"] for view in found}
    executed = [prompts[prompt] for prompt in await ran(simulator) if prompt in prompts]
    assert executed == sorted(ids, key=positions.__getitem__)
    spans(found)


async def test_the_next_is_posted_ahead_and_no_more(queue: Queue, simulator: Comfy) -> None:
    blocker = await queue.submit(sleeper())
    waiting = [await queue.submit(picture()) for _ in range(3)]
    await queue.started(blocker)
    running, pending = await simulator.until_queue(lambda running, pending: bool(pending))
    assert running == [(await queue.get(blocker))["promptId"]]
    ahead = await queue.get(waiting[0])
    assert pending == [ahead["promptId"]]
    # It waits still, as the next, with an attempt in hand.
    assert (ahead["status"], ahead["queuePosition"], ahead["attempt"]) == ("queued", 0, 1)
    assert await queue.attempts(waiting[0]) == [(1, "posted")]
    assert [(await queue.get(one))["queuePosition"] for one in waiting] == [0, 1, 2]
    await queue.cancel(blocker)
    found = await views(queue, *waiting)
    assert [view["status"] for view in found] == ["completed"] * 3
    spans(found)


async def test_more_urgent_work_takes_the_place_of_what_was_posted_ahead(queue: Queue, simulator: Comfy) -> None:
    blocker = await queue.submit(sleeper())
    normal = await queue.submit(picture())
    _, (first,) = await simulator.until_queue(lambda running, pending: bool(pending))
    high = await queue.submit(picture(), priority="high")
    await simulator.until_queue(lambda running, pending: len(pending) == 1 and pending != [first])
    assert [(await queue.get(one))["queuePosition"] for one in (high, normal)] == [0, 1]
    taken_back = await queue.get(normal)
    assert (taken_back["attempt"], taken_back["promptId"], taken_back["backend"]) == (0, None, None)
    assert await queue.attempts(normal) == [(1, "withdrawn")]
    await queue.cancel(blocker)
    found = await views(queue, high, normal)
    assert [view["status"] for view in found] == ["completed"] * 2
    assert found[0]["completionTime"] <= found[1]["startTime"]
    assert found[1]["attempt"] == 1  # withdrawn costs none
    assert await queue.attempts(normal) == [(1, "withdrawn"), (1, "ended")]
    assert await queue.kinds(normal) == ["queued", "started", "completed"]
    assert first not in await ran(simulator)


async def test_a_new_priority_takes_back_what_was_posted_ahead(queue: Queue, simulator: Comfy) -> None:
    blocker = await queue.submit(sleeper())
    first = await queue.submit(picture())
    second = await queue.submit(picture())
    _, (ahead,) = await simulator.until_queue(lambda running, pending: bool(pending))
    assert ahead == (await queue.get(first))["promptId"]
    assert (await queue.set_priority(first, "low")).status_code == 200
    await simulator.until_queue(lambda running, pending: len(pending) == 1 and pending != [ahead])
    assert await queue.attempts(first) == [(1, "withdrawn")]
    # And back before it: the one that took its place has to give way again.
    assert (await queue.set_priority(first, "high")).status_code == 200
    await simulator.until_queue(lambda running, pending: len(pending) == 1 and pending != [ahead])
    await queue.cancel(blocker)
    found = await views(queue, first, second)
    assert [view["status"] for view in found] == ["completed"] * 2
    assert found[0]["completionTime"] <= found[1]["startTime"]


async def test_cancel_what_was_posted_ahead(queue: Queue, simulator: Comfy) -> None:
    blocker = await queue.submit(sleeper())
    ahead, follower = await queue.submit(picture()), await queue.submit(picture())
    _, (prompt,) = await simulator.until_queue(lambda running, pending: bool(pending))
    assert await queue.cancel(ahead) == "cancelled"
    _, (after,) = await simulator.until_queue(lambda running, pending: bool(pending) and prompt not in pending)
    assert after == (await queue.get(follower))["promptId"]
    await queue.cancel(blocker)
    assert (await queue.ended(follower))["status"] == "completed"
    assert (await queue.get(ahead))["status"] == "cancelled"
    assert await queue.kinds(ahead) == ["queued", "cancelled"]
    assert prompt not in await ran(simulator)


async def test_the_next_starts_when_the_cancelled_one_is_really_gone(queue: Queue, simulator: Comfy) -> None:
    deaf = workflow("deaf_sleep")
    deaf["2"]["inputs"]["seconds"] = 0.8
    running = await queue.submit(deaf)
    await queue.started(running)
    await queue.cancel(running)  # the node does not look at the flag before it has slept
    found = await queue.run(picture())
    assert found["status"] == "completed"
    history = await simulator.history()
    messages = dict(history[(await queue.get(running))["promptId"]]["status"]["messages"])
    assert messages["execution_interrupted"]["timestamp"] <= found["startTime"]
    assert messages["execution_interrupted"]["timestamp"] - messages["execution_start"]["timestamp"] >= 700


async def test_nothing_is_posted_ahead_of_a_cancelled_one(queue: Queue, simulator: Comfy) -> None:
    deaf = workflow("deaf_sleep")
    deaf["2"]["inputs"]["seconds"] = 0.8
    running = await queue.submit(deaf)
    await queue.started(running)
    await queue.cancel(running)
    follower = await queue.submit(picture())
    posted = (await simulator.queue())[1]
    assert (posted, (await queue.get(follower))["attempt"]) == ([], 0)
    assert (await queue.ended(follower))["status"] == "completed"


async def test_cancelled_while_it_is_handed_out(queue: Queue, simulator: Comfy) -> None:
    """Whenever the cancel comes, nothing of it is left to run."""
    ids: list[str] = []
    for pause in [*[0] * 6, *(number / 2000 for number in range(12))]:
        graph = sleeper()
        if len(ids) < 6:  # a large one takes its time between the claim and the post
            graph["1"]["_meta"] = {"title": "x", "fill": random.Random(len(ids)).randbytes(2**21).hex()}
        ids.append(await queue.submit(graph))
        await asyncio.sleep(pause)  # not for an event: to meet every moment between claim, post and start
        assert await queue.cancel(ids[-1]) == "cancelled"
    assert (await queue.run(picture()))["status"] == "completed"
    await simulator.until_queue(lambda running, pending: not running and not pending)
    for one in ids:
        assert (await queue.get(one))["status"] == "cancelled"
        assert {state for _, state in await queue.attempts(one)} <= {"ended", "withdrawn"}


async def test_without_prefetch_one_prompt_at_most(simulator: Comfy, tmp_path: Path) -> None:
    app = create_app(load(environment(tmp_path, simulator, COMFYUI_PREFETCH="false"), None))
    async with house(app) as queue:
        await queue.connected()
        blocker = await queue.submit(sleeper())
        follower = await queue.submit(picture())
        await queue.started(blocker)
        somebody = await simulator.post_prompt(picture())
        _, pending = await simulator.queue()
        assert pending == [somebody]
        assert (await queue.get(follower))["attempt"] == 0
        await queue.cancel(blocker)
        assert (await queue.ended(follower))["status"] == "completed"


async def test_no_prefetch_where_an_interrupt_hits_everybody(tmp_path: Path) -> None:
    """Older servers take no prompt_id in an interrupt (PROTOCOL 2): a neighbour would be hit."""
    with comfy(tmp_path / "comfyui", "--comfyui-version", "0.3.50") as old:
        async with house(create_app(load(environment(tmp_path, old), None))) as queue:
            await queue.connected()
            blocker = await queue.submit(sleeper())
            follower = await queue.submit(picture())
            await queue.started(blocker)
            await old.post_prompt(picture())
            assert len((await old.queue())[1]) == 1
            assert (await queue.get(follower))["attempt"] == 0
            await queue.cancel(blocker)
            assert (await queue.ended(follower))["status"] == "completed"


async def test_several_backends_each_one_at_a_time(simulator: Comfy, tmp_path: Path) -> None:
    with comfy(tmp_path / "second") as second:
        backends = f"left={simulator.url},right={second.url}"
        app = create_app(load(environment(tmp_path, COMFYUI_BACKENDS=backends), None))
        async with house(app) as queue:
            await queue.connected("left", "right")
            # Two sleepers run side by side, whoever takes which; those for one backend by name wait for it.
            both = [await queue.submit(sleeper()) for _ in range(2)]
            await queue.started(*both)
            assert {(await queue.get(one))["backend"] for one in both} == {"left", "right"}
            right = [await queue.submit(picture(), gpu="right") for _ in range(3)]
            either = await queue.submit(picture(), gpu="local")
            # Places are counted within a pool.
            assert [(await queue.get(one))["queuePosition"] for one in right] == [0, 1, 2]
            reply = await queue.post(picture(), gpu="middle")
            assert reply.status_code == 400
            assert reply.json()["errors"][0]["allowed"] == ["local", "left", "right"]
            for one in both:
                await queue.cancel(one)
            found = await views(queue, *right, either)
            assert [view["status"] for view in found] == ["completed"] * 4
            assert [view["backend"] for view in found[:3]] == ["right"] * 3
            assert [view["gpu"] for view in found] == ["right"] * 3 + ["local"]
            spans(found[:3])
            for view in found:
                picture_reply = await queue.client.get(view["outputs"][0]["url"])
                assert picture_reply.headers["content-type"] == "image/png"
            await empty(queue, simulator, second)


async def test_an_idle_backend_takes_what_only_waits_at_another(simulator: Comfy, tmp_path: Path) -> None:
    with comfy(tmp_path / "second") as second:
        backends = f"left={simulator.url},right={second.url}"
        app = create_app(load(environment(tmp_path, COMFYUI_BACKENDS=backends), None))
        async with house(app) as queue:
            await queue.connected("left", "right")
            blocked = {name: await queue.submit(sleeper(), gpu=name) for name in ("left", "right")}
            await queue.started(*blocked.values())
            shared = await queue.submit(sleeper())
            ahead_at = await queue.posted(shared)
            # The other one becomes free first: it runs there, and that costs no attempt.
            free = {"left": "right", "right": "left"}[ahead_at]
            await queue.cancel(blocked[free])
            await queue.started(shared)
            view = await queue.get(shared)
            assert (view["backend"], view["attempt"]) == (free, 1)
            assert await queue.attempts(shared) == [(1, "withdrawn"), (1, "running")]
            await empty(queue, simulator, second)


async def test_nothing_waits_behind_another_while_a_backend_is_idle(simulator: Comfy, tmp_path: Path) -> None:
    with comfy(tmp_path / "second") as second:
        backends = f"left={simulator.url},right={second.url}"
        app = create_app(load(environment(tmp_path, COMFYUI_BACKENDS=backends), None))
        async with house(app) as queue:
            await queue.connected("left", "right")
            for _ in range(8):  # who looks first is chance
                both = [await queue.submit(sleeper()) for _ in range(2)]
                await queue.started(*both)
                assert {(await queue.get(one))["backend"] for one in both} == {"left", "right"}
                await empty(queue, simulator, second)


def inverted() -> Graph:
    return picture() | {
        "2": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "kit"}},
        "3": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
    }


async def test_a_backend_that_lacks_a_class_does_not_get_what_another_can_run(tmp_path: Path) -> None:
    with comfy(tmp_path / "able") as able, comfy(tmp_path / "unfit", "--without", "ImageInvert") as unfit:
        app = create_app(load(environment(tmp_path, COMFYUI_BACKENDS=f"unfit={unfit.url},able={able.url}"), None))
        async with house(app) as queue:
            await queue.connected("unfit", "able")
            busy = await queue.submit(sleeper(), gpu="able")
            await queue.started(busy)
            inverts = [await queue.submit(inverted()) for _ in range(4)]
            # The idle one takes what stands behind them, and none of them, not even after a restart.
            plain = await queue.ended(await queue.submit(picture()))
            assert (plain["status"], plain["backend"]) == ("completed", "unfit")
        async with house(app) as queue:
            await queue.connected("unfit", "able")
            await queue.ended(await queue.submit(picture()))
            await queue.cancel(busy)
            found = await views(queue, *inverts)
            assert [(one["status"], one["backend"], one["attempt"]) for one in found] == [
                ("completed", "able", 1)
            ] * 4
            assert [one["errors"] for one in found] == [[]] * 4
            # Asked for by name it is that ComfyUI's own answer that counts.
            assert (await queue.run(inverted(), gpu="unfit"))["errorType"] == "validation"


async def test_many_over_two_backends_each_exactly_once(simulator: Comfy, tmp_path: Path) -> None:
    with comfy(tmp_path / "second") as second:
        backends = f"left={simulator.url},right={second.url}"
        app = create_app(load(environment(tmp_path, COMFYUI_BACKENDS=backends), None))
        before = set(await ran(simulator))
        async with house(app) as queue:
            await queue.connected("left", "right")
            ids = await asyncio.gather(*(queue.submit(picture()) for _ in range(40)))
            found = [await queue.ended(one) for one in ids]
        assert {view["status"] for view in found} == {"completed"}
        executed = {"left": set(await ran(simulator)) - before, "right": set(await ran(second))}
        for name, prompts in executed.items():
            assert prompts == {view["promptId"] for view in found if view["backend"] == name}
            assert prompts
        assert await second.posts() == len(executed["right"])


async def test_a_backend_that_is_away_holds_nobody_up(simulator: Comfy, tmp_path: Path) -> None:
    backends = f"here={simulator.url},away=http://127.0.0.1:9"
    async with house(create_app(load(environment(tmp_path, COMFYUI_BACKENDS=backends), None))) as queue:
        stuck = await queue.submit(picture(), gpu="away")
        assert (await queue.run(picture()))["backend"] == "here"
        assert (await queue.get(stuck))["status"] == "queued"


async def test_other_peoples_prompts_are_left_alone(queue: Queue, simulator: Comfy) -> None:
    theirs = [await simulator.post_prompt(sleeper(steps=10)), await simulator.post_prompt(picture())]
    ours = await queue.submit(sleeper())
    await simulator.until_queue(lambda running, pending: len(pending) == 2)
    # Behind theirs it waits; pending is not running, so no time limit counts.
    view = await queue.get(ours)
    assert (view["status"], view["startTime"]) == ("queued", None)
    await queue.started(ours)
    theirs.append(await simulator.post_prompt(picture()))
    await queue.cancel(ours)
    await simulator.until_queue(lambda running, pending: not running and not pending)
    history = await simulator.history()
    assert [history[one]["status"]["status_str"] for one in theirs] == ["success"] * 3


async def test_pause_leaves_what_runs(queue: Queue, simulator: Comfy) -> None:
    running = await queue.submit(sleeper(steps=8))
    await queue.started(running)
    await queue.switch("pause")
    waiting = await queue.submit(picture())
    assert (await queue.ended(running))["status"] == "completed"
    assert (await queue.get(waiting))["status"] == "queued"
    assert await simulator.queue() == ([], [])


async def test_pause_lasts_over_a_restart(simulator: Comfy, tmp_path: Path) -> None:
    settings = load(environment(tmp_path, simulator), None)
    async with house(create_app(settings)) as queue:
        assert (await queue.switch("pause"))["paused"] is True
        waiting = await queue.submit(picture(), priority="low", metadata={"kept": True})
    async with house(create_app(settings)) as queue:
        await queue.connected()
        view = await queue.get(waiting)
        assert (view["status"], view["queuePosition"], view["metadata"]) == ("queued", 0, {"kept": True})
        assert await simulator.queue() == ([], [])
        assert await queue.switch("resume") == {"length": 1, "running": 0, "paused": False}
        assert (await queue.ended(waiting))["status"] == "completed"


async def test_the_queue_channel_counts(queue: Queue) -> None:
    async with queue.stream("queue") as stream:
        await queue.switch("pause")
        await stream.until("queue:status", paused=True)
        waiting = await queue.submit(picture())
        await stream.until("queue:status", length=1, running=0, paused=True)
        await queue.switch("resume")
        await queue.ended(waiting)
        await stream.until("queue:status", length=0, running=0, paused=False, after=2)


# ---- a backend that its operator takes out


async def test_drain_takes_back_what_only_waits(queue: House, simulator: Comfy) -> None:
    running = await queue.submit(sleeper(steps=12))
    ahead = await queue.submit(picture())
    await queue.started(running)
    _, (prompt,) = await simulator.until_queue(lambda running, pending: bool(pending))
    dispatcher(queue).drain()
    await simulator.until_queue(lambda running, pending: not pending)
    await taken_back(queue, ahead)
    assert (await queue.ended(running))["status"] == "completed"  # what executes runs to its end
    assert not (await simulator.queue())[1]
    view = await queue.get(ahead)
    assert (view["status"], view["attempt"], dispatcher(queue).draining) == ("queued", 0, True)
    later = await queue.submit(picture())
    dispatcher(queue).resume()
    assert [(await queue.ended(one))["attempt"] for one in (ahead, later)] == [1, 1]
    assert prompt not in await ran(simulator)


async def test_drain_asks_again_when_comfyui_did_not_hear(simulator: Comfy, tmp_path: Path) -> None:
    async with proxied(simulator.url) as proxy:
        settings = load(environment(tmp_path, simulator, COMFYUI_URL=proxy.url), None)
        async with house(create_app(settings)) as queue:
            await queue.connected()
            running = await queue.submit(sleeper())
            await queue.started(running)
            ahead = await queue.submit(picture())
            await simulator.until_queue(lambda running, pending: bool(pending))
            deletion = proxy.hold("POST", "/queue", times=1)
            dispatcher(queue).drain()
            (await deletion.caught()).drop()
            async with asyncio.timeout(10):  # soon, and not when it is looked after
                await simulator.until_queue(lambda running, pending: not pending)
            await taken_back(queue, ahead)
            assert await queue.attempts(ahead) == [(1, "withdrawn")]
            await queue.cancel(running)


async def test_drained_while_it_is_handed_out(simulator: Comfy, tmp_path: Path) -> None:
    """The claim is on its way to the disk when the drain comes: nothing is posted."""
    async with house(create_app(load(environment(tmp_path, simulator, COMFYUI_PREFETCH="false"), None))) as queue:
        await queue.connected()
        posts = await simulator.posts()
        running = await queue.submit(sleeper(steps=4))
        await queue.started(running)
        follower = await queue.submit(picture())
        with locked(tmp_path / "data"):
            for _ in range(800):  # no event tells of it
                if dispatcher(queue)._claiming:
                    break
                await asyncio.sleep(0.005)
            dispatcher(queue).drain()
        assert (await queue.ended(running))["status"] == "completed"
        for _ in range(1000):
            if await queue.attempts(follower):
                break
            await asyncio.sleep(0.005)
        await taken_back(queue, follower)
        assert await queue.attempts(follower) == [(1, "withdrawn")]
        assert await simulator.posts() == posts + 1
        dispatcher(queue).resume()
        assert (await queue.ended(follower))["attempt"] == 1


async def test_drained_work_goes_to_another(simulator: Comfy, tmp_path: Path) -> None:
    with comfy(tmp_path / "second") as second:
        backends = f"left={simulator.url},right={second.url}"
        async with house(create_app(load(environment(tmp_path, COMFYUI_BACKENDS=backends), None))) as queue:
            await queue.connected("left", "right")
            dispatcher(queue, "left").drain()
            found = [await queue.run(picture()) for _ in range(4)]
            assert {view["backend"] for view in found} == {"right"}


async def test_a_drained_backend_stays_so_over_a_restart(simulator: Comfy, tmp_path: Path) -> None:
    settings = load(environment(tmp_path, simulator), None)
    async with house(create_app(settings)) as queue:
        await queue.app.running[0].workflows.store.set_drained("local", True)
    async with house(create_app(settings)) as queue:
        await queue.connected()
        waiting = await queue.submit(picture())
        assert dispatcher(queue).draining
        assert (await queue.get(waiting))["attempt"] == 0
        # The service that stops is another thing: it drains nobody.
        dispatcher(queue).resume()
        assert (await queue.ended(waiting))["status"] == "completed"
        queue.app.running[0].workflows.drain()
        assert not dispatcher(queue).draining


# ---- failures and what follows


async def test_out_of_memory_after_a_lost_attempt_has_its_one_more_try_too(queue: House, simulator: Comfy) -> None:
    await simulator.faults(refuse_prompt=1)
    view = await queue.run(workflow("fail_oom_torch"), maxAttempts=9)
    assert (view["status"], view["errorType"], view["attempt"]) == ("failed", "oom", 3)
    errors = [event for event in await queue.events(view["workflowId"]) if event["type"] == "workflow:error"]
    assert [(event["errorType"], event["willRetry"]) for event in errors] == [
        ("lost", True),
        ("oom", True),
        ("oom", False),
    ]


async def test_max_attempts_counts_every_kind(queue: House, simulator: Comfy) -> None:
    await simulator.faults(refuse_prompt=1)
    view = await queue.run(workflow("fail_oom_torch"), maxAttempts=2)
    assert (view["status"], view["errorType"], view["attempt"]) == ("failed", "oom", 2)
    await simulator.faults(refuse_prompt=2)
    view = await queue.run(picture(), maxAttempts=2)
    assert (view["status"], view["errorType"], view["attempt"]) == ("failed", "lost", 2)
