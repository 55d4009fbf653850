"""How long it will take: what is learnt, what is left of a run, when what waits is done, and how that is told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from management_api.app import create_app
from management_api.settings import load
from managers.comfyui.graph import parse_graph
from managers.comfyui.tracker import GraphNode, describe
from managers.events.types import (
    NodeCounts,
    NodeExecuted,
    NodeExecuting,
    NodeProgressed,
    WorkflowCancelled,
    WorkflowCompleted,
    WorkflowProgress,
)
from managers.workflows import durations as rooms
from managers.workflows.course import Course, NodeState, NodeTime
from managers.workflows.durations import MAX_KINDS, RATIO, Durations, Estimate, Histogram
from managers.workflows.eta import Worker, expected, schedule, shape_of
from managers.workflows.sqlite_store import SqliteStore
from managers.workflows.waiting import Entry
from tests.queue_kit import Comfy, Graph, House, Site, View, comfy, environment, house, picture, sleeper
from tests.scraping import sample
from tests.store_kit import AGING_SECONDS, Kit
from tests.test_metrics_events import metrics_after, started

Seconds = st.floats(0.0, 5000.0)


def node(
    class_type: str = "A", steps: int | None = None, sources: tuple[str, ...] = (), weight: float = 1
) -> GraphNode:
    return GraphNode(class_type, class_type, weight, steps, sources)


def learnt(*seconds: float, steps: int | None = None, class_type: str = "A", backend: str = "left") -> Durations:
    known = Durations()
    for one in seconds:
        known.learn(node(class_type, steps), backend, one)
    return known


def takes(known: Durations, steps: int | None = None, backend: str = "left") -> float:
    found = known.known("A", steps, backend)
    assert found is not None
    return found.whole().seconds


def near(found: float, wanted: float, ratio: float = RATIO) -> bool:
    return wanted / ratio <= found <= wanted * ratio


# ---- what is learnt


@given(st.lists(st.floats(0.002, 5000), min_size=1, max_size=40))
def test_a_quantile_lies_within_a_bucket_of_what_was_seen(seen: list[float]) -> None:
    histogram = Histogram()
    for one in seen:
        histogram.add(one)
    marks = [histogram.quantile(share) for share in (0.0, 0.1, 0.5, 0.9, 1.0)]
    assert marks == sorted(marks)
    assert min(seen) / RATIO <= marks[0]
    assert marks[-1] <= max(seen) * RATIO


@given(st.lists(Seconds, max_size=30), Seconds, st.floats(0, 1))
def test_what_is_over_by_then_does_not_count(seen: list[float], past: float, share: float) -> None:
    histogram = Histogram()
    for one in seen:
        histogram.add(one)
    assert histogram.quantile(share, past) >= past


def test_medians_and_marks_of_a_spread() -> None:
    rng = random.Random(4)
    assert near(takes(learnt(*(rng.lognormvariate(1, 0.4) for _ in range(400)))), 2.72)
    cold_and_warm = Histogram()
    for number in range(40):
        cold_and_warm.add(30.0 if number % 5 == 0 else 2.0)
    assert near(cold_and_warm.whole.seconds, 2.0)
    assert near(cold_and_warm.whole.p90, 30.0)
    # After three seconds it must be a cold one.
    assert near(cold_and_warm.quantile(0.5, 3.0), 30.0)


def test_it_follows_a_new_card() -> None:
    assert near(takes(learnt(*[10.0] * 100, *[2.0] * 25)), 2.0)
    assert near(takes(learnt(*[10.0] * 100, *[2.0] * 3)), 10.0)


def test_the_cached_are_no_durations_but_count_for_what_waits() -> None:
    known = learnt(8.0)
    for _ in range(30):
        known.learn(node(), "left", None)
    found = known.known("A", None, "left")
    assert found is not None
    assert near(found.whole().seconds, 8.0)
    assert found.expected() == Estimate(0.0, 0.0)
    for _ in range(30):
        known.learn(node(), "left", 8.0)
    assert near(found.expected().seconds, 8.0)


def test_more_steps_take_longer_and_other_backends_stand_in() -> None:
    known = learnt(10.0, steps=20)
    assert near(takes(known, steps=20), 10.0)
    assert near(takes(known, steps=24), 12.0)
    assert near(takes(known, steps=100), 50.0)
    assert near(takes(known, steps=100, backend="right"), 50.0)
    known.learn(node(steps=80), "left", 100.0)  # slower than in proportion
    assert near(takes(known, steps=90), 112.0)
    known.learn(node(steps=20), "right", 1.0)
    assert near(takes(known, steps=90, backend="right"), 4.5)
    assert known.known("B", 20, "left") is None


def test_the_steps_are_those_of_the_node_or_of_its_sigmas() -> None:
    graph = parse_graph(
        {
            "1": {"class_type": "BasicScheduler", "inputs": {"steps": 12}},
            "2": {"class_type": "SamplerCustomAdvanced", "inputs": {"sigmas": ["1", 0]}},
            "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0]}},
            "4": {"class_type": "KSampler", "inputs": {"steps": 7, "latent": ["3", 0]}},
            "5": {"class_type": "KSampler", "inputs": {"steps": ["1", 0]}},
            "6": {"class_type": "KSampler", "inputs": {"steps": 10**400}},
        }
    )
    found = describe(graph, lambda _: None)
    assert [one.steps for one in found.values()] == [12, 12, None, 7, None, None]
    assert [one.sources for one in found.values()] == [(), ("1",), ("2",), ("3",), ("1",), ()]


def test_kinds_are_bounded_and_the_oldest_go() -> None:
    known = Durations()
    for number in range(MAX_KINDS + 2):
        known.learn(node(f"C{number}"), "left", 1.0)
        known.learn(node("C0"), "left", 1.0)
    assert [kind.class_type for kind in known.shrink()] == ["C1", "C2"]
    assert known.known("C1", None, "left") is None
    assert known.known("C0", None, "left") is not None


# ---- what is left of a run


def began(node_id: str, at: int, value: float | None = None) -> NodeExecuting:
    return NodeExecuting(timestamp=at, node_id=node_id, display_node_id=node_id, node_progress=value)


def stepped(node_id: str, at: int, value: float, most: float) -> NodeProgressed:
    return NodeProgressed(
        timestamp=at, node_id=node_id, display_node_id=node_id, node_progress=value, node_max_progress=most
    )


def done(node_id: str, at: int, *, cached: bool = False) -> NodeExecuted:
    state: Any = "cached" if cached else "finished"
    return NodeExecuted(timestamp=at, node_id=node_id, display_node_id=node_id, node_state=state)


def left(course: Course, now: int) -> Estimate:
    found = course.left(now)
    assert found is not None
    return found


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, GraphNode], Durations, list[tuple[int, float]]]:
    """A graph, what is known of its classes, and how long each of its nodes takes in how many steps."""
    size = draw(st.integers(1, 7))
    nodes = {}
    known = Durations()
    for number in range(size):
        sources = draw(st.sets(st.sampled_from(range(number)))) if number else set()
        nodes[str(number)] = node(f"C{number % 3}", 8, tuple(map(str, sorted(sources))))
        for seconds in draw(st.lists(Seconds, min_size=1, max_size=4)):
            known.learn(nodes[str(number)], "left", seconds)
    return nodes, known, [(draw(st.integers(0, 5)), draw(Seconds)) for _ in nodes]


@given(runs())
def test_it_is_never_negative_and_shrinks_as_nodes_finish(
    run: tuple[dict[str, GraphNode], Durations, list[tuple[int, float]]],
) -> None:
    nodes, known, lengths = run
    course = Course(nodes, "left", known)
    now, before = 0, left(course, 0)
    for node_id, (steps, seconds) in zip(nodes, lengths, strict=True):
        course.hear(began(node_id, now))
        assert left(course, now).seconds <= before.seconds * 1.0001 + 1e-6
        for step in range(1, steps + 1):
            now += int(seconds / steps * 1000)
            course.hear(stepped(node_id, now, step, steps))
            found = left(course, now)
            assert 0 <= found.seconds <= found.p90
            assert left(course, now + 1000).seconds >= 0
        before = left(course, now)
        course.hear(done(node_id, now))
        after = left(course, now)
        assert after.seconds <= before.seconds * 1.0001 + 1e-6
        assert 0 <= after.seconds <= after.p90
        before = after
    assert left(course, now).seconds == pytest.approx(0, abs=1e-6)


CHAIN = {"1": node("Load"), "2": node("Sample", 10, ("1",)), "3": node("Save", None, ("2",))}


def chain() -> Durations:
    known = learnt(4.0, class_type="Load")
    known.learn(CHAIN["2"], "left", 20.0)
    known.learn(CHAIN["3"], "left", 1.0)
    return known


def test_what_was_never_seen_has_no_number() -> None:
    course = Course(CHAIN, "left", learnt(4.0, class_type="Load"))
    assert course.left(0) is None
    course.hear(done("1", 10, cached=True))
    course.hear(began("2", 10))
    assert course.left(10) is None
    course.hear(done("2", 20))
    course.hear(done("3", 30))
    assert left(course, 30) == Estimate()
    # But what takes no time to speak of need not be known.
    small = {"1": node("Load"), "2": node("Reroute", None, ("1",), weight=0.1)}
    assert near(left(Course(small, "left", learnt(4.0, class_type="Load")), 0).seconds, 4.0)


def test_the_cached_and_what_only_they_need_are_left_out() -> None:
    course = Course(CHAIN, "left", chain())
    assert near(left(course, 0).seconds, 25.0)
    course.hear(done("2", 10, cached=True))
    assert near(left(course, 10).seconds, 1.0)  # the first need not run any more


def test_its_own_pace_counts_as_soon_as_there_is_one() -> None:
    course = Course(CHAIN, "left", chain())
    course.hear(began("1", 0))
    course.hear(done("1", 4000))
    course.hear(began("2", 4000))
    course.hear(stepped("2", 4001, 0, 10))
    course.hear(stepped("2", 9000, 1, 10))  # the first step has the loading in it
    assert near(left(course, 9000).seconds, 16.0, 1.3)
    course.hear(stepped("2", 13000, 2, 10))
    course.hear(stepped("2", 17000, 3, 10))  # 4 s a step, where 2 were known
    found = left(course, 17000)
    assert near(found.seconds, 7 * 4.0 + 1.0, 1.02)
    assert found.p90 > found.seconds
    assert left(course, 18500).seconds == pytest.approx(found.seconds - 1.5)


def test_a_class_without_a_past_is_told_by_its_pace() -> None:
    course = Course({"1": node("New", 10)}, "left", Durations())
    course.hear(began("1", 0))
    course.hear(stepped("1", 1000, 1, 10))
    assert course.left(1000) is None
    course.hear(stepped("1", 2000, 2, 10))
    course.hear(stepped("1", 3000, 3, 10))
    assert left(course, 3000) == Estimate(7.0)


def test_a_node_of_several_parts_is_not_told_by_the_pace_of_one() -> None:
    known = learnt(100.0)
    course = Course({"1": node()}, "left", known)
    course.hear(began("1", 0))
    for step in range(1, 5):
        course.hear(stepped("1", step * 1000, step, 5))
    assert near(left(course, 4000).seconds, 96.0)  # by its pace it would be done in a second
    course.hear(stepped("1", 5000, 5, 5))
    for step in range(1, 5):
        course.hear(stepped("1", 70_000 + step * 1000, step, 5))
    assert near(left(course, 74_000).seconds, 26.0, 2)


def test_a_run_that_we_came_late_to() -> None:
    course = Course(CHAIN, "left", chain(), late=True)
    assert near(left(course, 49_000).seconds, 25.0)
    course.hear(began("2", 50_000))
    assert near(left(course, 50_000).seconds, 21.0)  # what it takes from is done
    course.hear(done("2", 51_000))
    course.hear(began("3", 51_000))
    course.hear(done("3", 52_500))
    course.end(52_600, completed=True)
    # Nobody saw when it began, so there is nothing to learn from it.
    assert [(one.class_type, seconds) for one, seconds in course.learnt()] == [("Save", 1.5)]
    assert course.times(60_000) == [
        NodeTime("2", "done"),
        NodeTime("3", "done", 51_000, 1.5),
    ]


def test_a_beginning_that_was_missed_teaches_nothing() -> None:
    course = Course(CHAIN, "left", chain())
    course.hear(began("2", 5000, value=7))
    course.hear(done("2", 6000))
    assert list(course.learnt()) == []


def test_an_old_server_does_not_say_that_its_last_node_is_done() -> None:
    ways: list[tuple[bool, NodeState]] = [(True, "done"), (False, "stopped")]
    for completed, state in ways:
        course = Course(CHAIN, "left", chain())
        course.hear(began("3", 1000))
        course.end(3000, completed=completed)
        assert course.times(9000) == [NodeTime("3", state, 1000, 2.0)]
        assert len(list(course.learnt())) == (1 if completed else 0)
        assert course.left(9000) == Estimate()


# ---- what waits


def entry(number: int, gpu: str = "local", unfit: tuple[str, ...] = ()) -> Entry:
    return Entry(number, number, f"w{number}", gpu, 1, 0, None, unfit)


def seconds_of(found: Any) -> list[float | None]:
    return [None if one is None else one.seconds for one in found.ends.values()]


def test_each_goes_to_the_backend_that_is_free_first() -> None:
    workers = [Worker("left", ("local", "left"), Estimate(5, 4)), Worker("right", ("local", "right"), Estimate())]
    line = [entry(1), entry(2), entry(3, "left"), entry(4, unfit=("right",)), entry(5)]
    found = schedule(line, workers, lambda _, name: Estimate(10 if name == "left" else 3, 1), whole=True)
    # right: 3, 6 · left: 5 + 10, + 10 · and right again
    assert seconds_of(found) == [3, 6, 15, 25, 9]
    ends = list(found.ends.values())
    assert ends[3] is not None
    assert ends[3].spread == 4 + 1 + 1


def test_one_that_is_unknown_hides_what_comes_after_it() -> None:
    line = [entry(number) for number in range(1, 5)]
    one = [Worker("left", ("local",), Estimate())]
    found = schedule(line, one, lambda name, _: None if name == "w2" else Estimate(3), whole=True)
    assert seconds_of(found) == [3, None, None, None]
    assert found.start("local", 9) is None
    away = schedule(line, [Worker("left", ("local",), None)], lambda *_: Estimate(3), whole=True)
    assert seconds_of(away) == [None] * 4
    assert seconds_of(schedule(line, [], lambda *_: Estimate(3), whole=True)) == [None] * 4


def test_what_is_further_back_goes_on_at_that_pace() -> None:
    workers = [Worker(name, ("local",), Estimate(1)) for name in ("left", "right")]
    found = schedule([entry(number) for number in range(100)], workers, lambda *_: Estimate(10, 1), whole=False)
    start = found.start("local", 1000)
    assert start is not None
    assert start.seconds == pytest.approx(1 + 500 * 10, rel=0.02)
    assert found.start("right", 1000) is None


@given(st.lists(st.tuples(Seconds, st.sampled_from(["local", "left", "right"])), max_size=30))
def test_nobody_ends_before_it_could_and_no_time_is_lost(line: list[tuple[float, str]]) -> None:
    workers = [Worker(name, ("local", name), Estimate()) for name in ("left", "right")]
    lengths = {f"w{number}": seconds for number, (seconds, _) in enumerate(line)}
    entries = [entry(number, gpu) for number, (_, gpu) in enumerate(line)]
    found = schedule(entries, workers, lambda name, _: Estimate(lengths[name]), whole=True)
    for workflow_id, end in found.ends.items():
        assert end is not None
        assert lengths[workflow_id] <= end.seconds <= sum(lengths.values()) * 1.0001


def test_the_shape_of_a_graph_is_all_that_its_time_depends_on() -> None:
    shape = shape_of(CHAIN)
    found = expected(shape, "left", chain())
    assert found is not None
    assert near(found.seconds, 25.0)
    assert expected(shape, "left", learnt(1.0, class_type="Load")) is None
    twice = expected(shape_of({"1": node(), "2": node()}), "left", learnt(3.0))
    assert twice is not None
    assert near(twice.seconds, 6.0)


# ---- what is kept


async def test_what_was_learnt_is_kept(tmp_path: Path) -> None:
    kit = Kit(lambda clock, ids, aging: SqliteStore(tmp_path, clock=clock, ids=ids, aging_seconds=aging))
    await kit.open()
    workflow, prompt_id = await kit.running()
    assert await kit.store.node_times(workflow.id) == ()
    known = learnt(*[3.0] * 5, steps=20)
    kinds = [known.learn(node(steps=20), "left", None), known.learn(node("B"), "left", 9.0)]
    times = [NodeTime("1", "done", 1000, 3.0), NodeTime("x" * 5000, "cached")]  # long enough to be packed
    await kit.store.keep_times(prompt_id, times, known.rows(kinds, 7), [])
    await kit.reopen(AGING_SECONDS)
    assert list(await kit.store.node_times(workflow.id)) == times
    again = Durations(await kit.store.durations())
    assert takes(again, 20) == takes(known, 20)
    for book in (known, again):
        found = book.known("A", 20, "left")
        assert found is not None
        assert found.histogram.cached == 1
    await kit.store.keep_times(prompt_id, times, [], kinds[:1])
    assert [row.kind for row in await kit.store.durations()] == kinds[1:]
    assert await kit.store.graphs([workflow.id, "none"]) == {workflow.id: (await kit.store.graph(workflow.id))[0]}
    await kit.store.close()


async def test_the_first_in_line_are_those_of_all_pools(tmp_path: Path) -> None:
    kit = Kit(lambda clock, ids, aging: SqliteStore(tmp_path, clock=clock, ids=ids, aging_seconds=aging))
    await kit.open()
    waiting = [await kit.submit(gpu=gpu) for gpu in ("local", "left", "local", "right", "left")]
    assert [one.id for one in kit.store.first_in_line(4)] == [one.id for one in waiting[:4]]
    await kit.claim()
    assert len(kit.store.first_in_line(9)) == 5  # one with an open attempt waits still
    await kit.store.close()


# ---- how well it holds


def progress(eta: float | None, current: str | None = None) -> WorkflowProgress:
    return WorkflowProgress(
        timestamp=0,
        workflow_id="1",
        progress=0,
        current_node=None,
        current_node_id=current,
        current_node_type=None,
        step=None,
        steps=None,
        message=None,
        nodes=NodeCounts(),
        eta_p90_seconds=eta,
    )


def completed(duration: float) -> WorkflowCompleted:
    return WorkflowCompleted(timestamp=0, workflow_id="1", duration=duration, outputs=(), outputs_reused=False)


@pytest.mark.parametrize(
    ("events", "within", "beyond"),
    [
        ([progress(9), completed(8)], 1, 0),
        ([progress(9), completed(9.04)], 1, 0),
        ([progress(9), completed(9.1)], 0, 1),
        ([progress(9), progress(4), completed(5)], 0, 1),  # when it knew what is in the cache
        ([progress(9), progress(30, "3"), completed(20)], 0, 1),  # later ones don't count
        ([progress(None), progress(3, "3"), completed(2)], 0, 0),
        ([completed(2)], 0, 0),
        ([progress(9), WorkflowCancelled(timestamp=0, workflow_id="1"), completed(8)], 0, 0),
        ([progress(9), completed(8), completed(8)], 1, 0),
    ],
)
def test_calibration(events: list[Any], within: int, beyond: int) -> None:
    found = metrics_after(started("1", 0, 1), *events)
    name = "comfyui_eta_total"
    assert found[sample(name, result="within_p90")] == within
    assert found[sample(name, result="beyond_p90")] == beyond


# ---- the whole service


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    with comfy(tmp_path_factory.mktemp("comfyui")) as process:
        yield process


@pytest.fixture(scope="module")
def site(simulator: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"), simulator)


@pytest.fixture
async def queue(site: Site, simulator: Comfy) -> AsyncIterator[House]:
    async with site.fresh() as service:
        await service.connected()
        yield service
        for one in (await service.list())["workflows"]:
            if one["status"] in ("queued", "running"):
                await service.cancel(one["workflowId"])
        await simulator.until_queue(lambda running, pending: not running and not pending)


STEPS, PACE = 10, 0.08
LONG = STEPS * PACE


def timed() -> Graph:
    return sleeper(steps=STEPS, seconds=PACE)


async def ran_once(queue: House) -> View:
    view = await queue.run(timed())
    assert view["status"] == "completed"
    await stored(queue, view["workflowId"])
    return view


async def stored(queue: House, workflow_id: str) -> None:
    """What it has taught is written a moment after its end, and no event tells of it."""
    for _ in range(400):
        if await queue.app.running[0].workflows.store.node_times(workflow_id):
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the times of its nodes were never stored")


def shown(view: View) -> tuple[float | None, float | None]:
    return view["etaSeconds"], view["etaP90Seconds"]


async def test_the_second_run_is_told(queue: House) -> None:
    async with queue.stream("workflow") as stream:
        first = await queue.submit(timed())
        begun = await stream.until("workflow:progress", workflowId=first)
        assert shown(begun) == (None, None)
        paced = await stream.until("workflow:progress", workflowId=first, step=4)
        assert shown(paced) == (None, None)  # what comes after it is not known
        await queue.ended(first)
        await stored(queue, first)

        second = await queue.submit(timed())
        begun = await stream.until("workflow:progress", workflowId=second)
        half = await stream.until("workflow:progress", workflowId=second, step=STEPS // 2)
        view = await queue.get(second)
        ended = await queue.ended(second)
        await stream.settled()
    seconds = (ended["completionTime"] - ended["startTime"]) / 1000
    assert begun["etaSeconds"] == pytest.approx(seconds, rel=0.3)
    assert begun["etaSeconds"] <= begun["etaP90Seconds"]
    assert half["etaSeconds"] == pytest.approx((ended["completionTime"] - half["timestamp"]) / 1000, abs=0.2)
    assert 0 <= view["etaSeconds"] <= half["etaSeconds"] + 0.1
    assert shown(ended) == (None, None)
    told = [frame["etaSeconds"] for frame in stream.of(second, "workflow:progress")]
    assert None not in told
    assert told[-1] == 0


async def test_what_waits_is_told_and_all_of_it_survives_a_restart(simulator: Comfy, tmp_path: Path) -> None:
    settings = load(environment(tmp_path, simulator), None)
    async with house(create_app(settings)) as queue:
        await queue.connected()
        await ran_once(queue)
        await queue.switch("pause")
        waiting = [await queue.submit(timed()) for _ in range(3)]
        assert [shown(await queue.get(one)) for one in waiting] == [(None, None)] * 3  # until when, nobody knows
        unknown = await queue.submit({"1": {"class_type": "ProbeText", "inputs": {"text": "new"}}})
    async with house(create_app(settings)) as queue:
        await queue.connected()
        running = await queue.submit(timed(), priority="high")
        await queue.switch("resume")
        await queue.started(running)
        listed = {view["workflowId"]: shown(view) for view in (await queue.list())["workflows"]}
        for place, one in enumerate(waiting):
            eta, p90 = listed[one]
            assert eta is not None
            assert p90 is not None
            assert eta == pytest.approx((place + 1.5) * LONG, abs=0.75 * LONG)
            assert p90 >= eta
        assert listed[unknown] == (None, None)
        assert listed[waiting[0]][0] < listed[waiting[1]][0] < listed[waiting[2]][0]  # type: ignore[operator]
        single = shown(await queue.get(waiting[1]))
        assert single[0] == pytest.approx(listed[waiting[1]][0], abs=0.6)
        # The one that runs is told from its first moment on, by what the process before has learnt.
        async with queue.stream("workflow") as stream:
            frame = await stream.until("workflow:progress", workflowId=waiting[0])
            assert frame["etaSeconds"] == pytest.approx(LONG, rel=0.3)
            for one in (*waiting, unknown):
                await queue.cancel(one)


async def test_two_backends_share_the_line(simulator: Comfy, tmp_path: Path) -> None:
    with comfy(tmp_path / "second") as second:
        backends = f"left={simulator.url},right={second.url}"
        async with house(create_app(load(environment(tmp_path, COMFYUI_BACKENDS=backends), None))) as queue:
            await queue.connected("left", "right")
            await ran_once(queue)
            long = [await queue.submit(sleeper(steps=100, seconds=PACE)) for _ in range(2)]
            await queue.started(*long)
            waiting = [await queue.submit(timed()) for _ in range(4)]
            etas = [(await queue.get(one))["etaSeconds"] for one in waiting]
            # 8 s are left on each of them, then two rounds of 0.8 s.
            assert etas[0] == pytest.approx(8 + LONG, abs=2.5)
            assert etas[1] == pytest.approx(etas[0], abs=1.2)
            assert etas[3] - etas[0] == pytest.approx(LONG, abs=0.8)
            for one in (*long, *waiting):
                await queue.cancel(one)


async def test_the_nodes_and_their_times(queue: House) -> None:
    running = await queue.submit(timed())
    async with queue.stream("workflow") as stream:
        await stream.until("workflow:progress", workflowId=running, step=3)
        view = await queue.get(running, include="nodes,workflow")
    assert {one["nodeId"]: one["state"] for one in view["nodeTimes"]} == {"1": "done", "3": "running", "2": "pending"}
    assert [one["nodeId"] for one in view["nodeTimes"]] == ["1", "3", "2"]
    sampling = view["nodeTimes"][1]
    assert sampling["nodeType"] == "SleepSteps"
    assert sampling["nodeName"] == "Sleep Steps"
    assert sampling["startTime"] >= view["startTime"]
    assert 2 * PACE < sampling["seconds"] < LONG
    assert view["nodeTimes"][2] | {"nodeName": ""} == {
        "nodeId": "2",
        "nodeName": "",
        "nodeType": "SaveImage",
        "state": "pending",
        "startTime": None,
        "seconds": None,
    }
    assert view["workflow"]["3"]["class_type"] == "SleepSteps"
    assert "nodeTimes" not in await queue.get(running, include="workflow")
    await queue.ended(running)
    await stored(queue, running)
    ended = (await queue.get(running, include="nodes"))["nodeTimes"]
    assert [(one["nodeId"], one["state"]) for one in ended] == [("1", "done"), ("3", "done"), ("2", "done")]
    assert ended[1]["startTime"] == sampling["startTime"]
    assert ended[1]["seconds"] == pytest.approx(LONG, rel=0.4)


async def test_the_nodes_of_what_was_cached_stopped_and_never_ran(queue: House) -> None:
    graph = picture()
    await queue.run(graph)
    again = await queue.run(graph)
    await stored(queue, again["workflowId"])
    times = (await queue.get(again["workflowId"], include="nodes"))["nodeTimes"]
    assert [(one["state"], one["startTime"], one["seconds"]) for one in times] == [("cached", None, None)] * 2

    failed = await queue.run(sleeper(steps=4, fail="value_error", fail_at_step=2))
    assert failed["status"] == "failed"
    await stored(queue, failed["workflowId"])
    times = (await queue.get(failed["workflowId"], include="nodes"))["nodeTimes"]
    assert {one["nodeId"]: one["state"] for one in times} == {"1": "done", "3": "stopped", "2": "pending"}

    await queue.switch("pause")
    waiting = await queue.submit(timed())
    times = (await queue.get(waiting, include="nodes"))["nodeTimes"]
    assert {one["state"] for one in times} == {"pending"}


async def test_the_calibration_is_scraped(queue: House) -> None:
    for _ in range(2):
        await ran_once(queue)
    text = (await queue.client.get("/metrics")).text
    found = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("comfyui_eta")}
    judged = [found[f'comfyui_eta_total{{result="{result}"}}'] for result in ("within_p90", "beyond_p90")]
    assert sum(judged) == 1  # for the first there was no estimate


def test_the_parts_that_bound_it_are_small() -> None:
    """A histogram has a bucket for each fifth up to a month, and no more."""
    histogram = Histogram()
    rng = random.Random(1)
    for _ in range(5000):
        histogram.add(rng.uniform(0.0, 30 * 86400.0))
    assert len(histogram.counts) < 60
    assert rooms.KEPT < 1
