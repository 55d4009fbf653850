"""What runs cost, from samples at chosen times: the pure part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from managers.gpu import Cost, Gpu, GpuProcess
from managers.gpu.cost import GAP_SECONDS, Meter, Part, parts_of
from managers.gpu.costs import Costs

GIB = 2**30

seconds = st.floats(0, 50, allow_nan=False)


def metered(start: float, end: float, samples: Sequence[tuple[float, Sequence[Part]]]) -> Cost | None:
    meter = Meter(start)
    for at, parts in samples:
        meter.feed(at, parts)
    return meter.cost(end)


def one(**fields: float | int | None) -> list[Part]:
    return [Part(gpu_id="0", **fields)]  # type: ignore[arg-type]


def joules(cost: Cost | None) -> float:
    assert cost is not None
    assert cost.energy_joules is not UNSET
    return cost.energy_joules


# ---- energy


def steady(at: float) -> dict[str, float]:
    return {"power": 100.0, "energy": 5000 + 100 * at}


def counter_only(at: float) -> dict[str, float]:
    return {"energy": 5000 + 100 * at}


def power_only(at: float) -> dict[str, float]:
    return {"power": 100.0}


@given(
    start=seconds,
    length=st.floats(0.01, 60),
    steps=st.lists(st.floats(0.01, GAP_SECONDS - 1), min_size=1, max_size=20),
    lead=st.floats(0, 5),
    told=st.sampled_from([steady, power_only]),
)
def test_a_steady_draw_costs_power_times_time_whenever_it_is_sampled(
    start: float, length: float, steps: list[float], lead: float, told: Callable[[float], dict[str, float]]
) -> None:
    samples, at = [], start - lead
    for step in steps:
        if at > start + length:
            break
        samples.append((at, one(**told(at))))
        at += step
    last = samples[-1][0]
    cost = metered(start, start + length, samples)
    assert cost is not None
    if start + length - max(last, start) > GAP_SECONDS:
        assert cost.energy_joules is UNSET
    else:
        assert joules(cost) == pytest.approx(100 * length, abs=0.01)


@given(ats=st.lists(st.floats(0, 100), min_size=2, max_size=20, unique=True).map(sorted))
def test_by_the_counter_alone_the_distance_of_samples_does_not_matter(ats: list[float]) -> None:
    start, end = ats[0], ats[-1]
    cost = metered(start, end, [(at, one(**counter_only(at))) for at in ats])
    assert joules(cost) == pytest.approx(100 * (end - start), abs=0.02)


@given(
    powers=st.lists(st.floats(0, 700), min_size=2, max_size=30),
    step=st.floats(0.05, 5),
)
def test_power_is_integrated_by_trapezoids(powers: list[float], step: float) -> None:
    samples = [(n * step, one(power=power)) for n, power in enumerate(powers)]
    area = sum((a + b) / 2 * step for a, b in pairwise(powers))
    assert joules(metered(0, (len(powers) - 1) * step, samples)) == pytest.approx(area, abs=0.01)


def test_the_counter_goes_before_power() -> None:
    assert joules(metered(0, 2, [(0, one(energy=10, power=500)), (2, one(energy=60, power=500))])) == 50


def test_only_the_part_within_the_run_counts() -> None:
    around = [(0, one(power=0)), (2, one(power=200)), (3, one(power=200))]
    # From 1 s on it rises from 100 W to 200 W, and stays.
    assert joules(metered(1, 3, around)) == 150 + 200
    assert joules(metered(1, 4, around)) == 150 + 200 + 200
    by_counter = [(0, one(energy=0)), (2, one(energy=200))]
    assert joules(metered(1, 2, by_counter)) == 100
    assert joules(metered(1, 2.5, by_counter)) == 150


def test_a_run_between_two_samples_is_told_from_the_one_before() -> None:
    assert joules(metered(1, 1.005, [(0, one(power=80))])) == pytest.approx(0.4)


def test_a_first_sample_after_the_start_counts_back() -> None:
    assert joules(metered(0, 2, [(1, one(power=50))])) == 100


def test_a_counter_that_begins_anew_gives_way_to_power() -> None:
    samples = [(0, one(energy=900, power=100)), (1, one(energy=5, power=100)), (2, one(energy=105, power=100))]
    assert joules(metered(0, 2, samples)) == 200


@pytest.mark.parametrize(
    "samples",
    [
        [(0, one(energy=900)), (1, one(energy=5))],
        [(0, one(power=100)), (GAP_SECONDS + 1, one(power=100))],
        [(0, one(power=100)), (1, one()), (2, one(power=100))],
        [(0, one()), (1, one())],
        [(0, one(energy=1))],
        [(GAP_SECONDS + 1, one(power=100))],
    ],
)
def test_what_was_not_seen_is_not_told(samples: Sequence[tuple[float, Sequence[Part]]]) -> None:
    cost = metered(0, samples[-1][0] + 1, samples)
    assert cost is not None
    assert cost.energy_joules is UNSET


def test_cards_add_up_and_one_that_is_unknown_spoils_the_sum() -> None:
    both = [Part(gpu_id="0", power=100), Part(gpu_id="1", power=50)]
    cost = metered(0, 2, [(0, both), (1, both)])
    assert cost is not None
    assert (cost.gpu_seconds, cost.energy_joules) == (4, 300)
    other = [Part(gpu_id="0", power=100), Part(gpu_id="1")]
    mixed = metered(0, 2, [(0, both), (1, other), (2, both)])
    assert mixed is not None
    assert mixed.energy_joules is UNSET


def test_a_card_that_joins_counts_from_then_on() -> None:
    both = [Part(gpu_id="0", power=100), Part(gpu_id="1", power=50)]
    assert joules(metered(0, 3, [(0, one(power=100)), (1, both), (3, both)])) == 300 + 100


def test_a_card_that_is_lost_is_not_told_as_if_it_went_on() -> None:
    both = [Part(gpu_id="0", power=100), Part(gpu_id="1", power=50)]
    samples = [(0, both), *((float(at), one(power=100)) for at in range(1, 20))]
    cost = metered(0, 19, samples)
    assert cost is not None
    assert cost.energy_joules is UNSET


# ---- memory, time


def test_the_peak_is_the_most_at_one_moment_within_the_run() -> None:
    def at_once(first: int, second: int) -> list[Part]:
        return [Part(gpu_id="0", memory=first), Part(gpu_id="1", memory=second)]

    samples = [(0, at_once(90, 90)), (1, at_once(10, 20)), (2, at_once(30, 5)), (3, at_once(1, 1))]
    cost = metered(0.5, 4, samples)
    assert cost == Cost(gpu_seconds=7, vram_peak_bytes=35)


@pytest.mark.parametrize(
    "samples",
    [
        [(-1, one(memory=5))],
        [(1, one(memory=5)), (2, one())],
        [(1, one(memory=5)), (2 + GAP_SECONDS, one(memory=5))],
    ],
)
def test_a_peak_that_may_have_been_missed_is_not_told(samples: Sequence[tuple[float, Sequence[Part]]]) -> None:
    cost = metered(0, samples[-1][0] + 2, samples)
    assert cost is not None
    assert cost.vram_peak_bytes is UNSET


def test_a_peak_may_have_come_after_the_last_sample() -> None:
    samples = [(1.0, one(memory=5))]
    near, far = (metered(0, 1 + GAP_SECONDS + more, samples) for more in (0, 0.1))
    assert near is not None
    assert far is not None
    assert (near.vram_peak_bytes, far.vram_peak_bytes) == (5, UNSET)


def test_without_cards_there_is_no_cost() -> None:
    assert metered(0, 5, [(1, [])]) is None


# ---- whose cards


def card(gpu_id: str, *processes: GpuProcess, split: bool = False) -> Gpu:
    return Gpu(gpu_id=gpu_id, index=int(gpu_id[0]), memory_used=9 * GIB, power=1.0, processes=processes, split=split)


def process(backend: str | None, memory: int | None = None) -> GpuProcess:
    return GpuProcess(pid=1, memory=memory, backend=backend)


def on(gpus: Sequence[Gpu], backend: str, *cards: str, cpu_only: bool = False) -> dict[str, int | None]:
    return {part.gpu_id: part.memory for part in parts_of(gpus, backend, cards=cards, cpu_only=cpu_only)}


def test_the_cards_its_process_is_on_and_the_memory_it_has_there() -> None:
    gpus = [card("0", process(None, 3)), card("1", process("a", 4), process("a", 1), process(None, 7)), card("2")]
    assert on(gpus, "a") == {"1": 5}
    # Nobody is told to be on card 0 or 2, so b may be on both; the memory is all that is in use there.
    assert on(gpus, "b") == {"0": 9 * GIB, "2": 9 * GIB}
    assert on(gpus, "b", cpu_only=True) == {}


def test_memory_of_a_process_that_nobody_knows_is_that_of_the_card() -> None:
    assert on([card("0", process("a", 4), process("a"))], "a") == {"0": 9 * GIB}


def test_configured_cards_are_the_ones() -> None:
    gpus = [card("0", split=True), card("0.0"), card("0.1"), card("1", process("a", 4))]
    assert on(gpus, "a", "0.1", "1") == {"0.1": 9 * GIB, "1": 4}
    assert on(gpus, "a", "0.1", cpu_only=True) == {"0.1": 9 * GIB}
    assert on(gpus, "a", "7") == {}


def test_a_card_that_is_split_is_counted_by_its_instances() -> None:
    assert on([card("0", split=True), card("0.0"), card("0.1")], "a") == {"0.0": 9 * GIB, "0.1": 9 * GIB}


# ---- the books


def test_the_books_of_a_run() -> None:
    costs = Costs()
    assert costs.cost_of("w", 0) is None
    costs.begin("a", "w", 1)
    assert list(costs.backends) == ["a"]
    costs.feed("a", 1, one(power=10, memory=7))
    costs.feed("b", 1, one(power=1000))
    assert costs.cost_of("w", 3) == Cost(gpu_seconds=2, vram_peak_bytes=7, energy_joules=20)
    costs.end("w", 4)
    costs.end("w", 9)
    costs.feed("a", 5, one(power=1000))
    assert costs.cost_of("w", 99) == Cost(gpu_seconds=3, vram_peak_bytes=7, energy_joules=30)
    assert not costs.backends


def test_the_next_run_ends_the_one_before() -> None:
    costs = Costs()
    costs.begin("a", "v", 0)
    costs.feed("a", 0, one(power=10))
    costs.begin("a", "w", 2)
    assert costs.cost_of("v", 9) == Cost(gpu_seconds=2, energy_joules=20)
    assert costs.cost_of("w", 9) is None


def test_another_attempt_is_measured_anew() -> None:
    costs = Costs()
    for at in (0, 10):
        costs.begin("a", "w", at)
        costs.feed("a", at, one(power=10))
        costs.end("w", at + 1)
    assert joules(costs.cost_of("w", 99)) == 10


def test_another_attempt_that_began_unseen_has_not_the_cost_of_the_one_before() -> None:
    costs = Costs()
    costs.begin("a", "w", 0)
    costs.feed("a", 0, one(power=10))
    costs.end("w", 1)
    assert costs.cost_of("w", 1) is not None
    costs.forget("w")
    assert costs.join("a", "w", 5)
    costs.feed("a", 5, one(power=10))
    assert costs.cost_of("w", 6) is None


def test_a_run_that_began_unseen_has_no_cost() -> None:
    costs = Costs()
    assert costs.join("a", "w", 0)
    assert not costs.join("a", "w", 1)
    costs.feed("a", 0, one(power=10))
    assert list(costs.backends) == ["a"]
    assert costs.cost_of("w", 2) is None
    costs.end("w", 3)
    assert costs.cost_of("w", 3) is None
    # What comes late about a run that has ended begins nothing.
    assert not costs.join("a", "w", 4)
    assert not costs.backends


def test_the_books_forget() -> None:
    costs = Costs()
    for n in range(2000):
        costs.begin("a", f"w{n}", n)
        costs.feed("a", n, one(power=1))
    assert costs.cost_of("w0", 0) is None
    assert costs.cost_of("w1990", 0) is not None
