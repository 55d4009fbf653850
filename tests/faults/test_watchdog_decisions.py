"""What follows from what was heard and seen, at the borders that a real ComfyUI meets rarely."""

from __future__ import annotations

import msgspec

from managers.comfyui.protocol import Queue, QueueItem
from managers.comfyui.watchdog import Stall, StallReason, WatchConfig, Watchdog

STALL = Stall(StallReason.NOTHING_RUNS, "", 0)


def queue(*pending: str, running: str | None = None) -> Queue:
    def items(*prompts: str) -> list[QueueItem]:
        return [QueueItem(0, prompt, msgspec.Raw(b"{}")) for prompt in prompts]

    return Queue(items(running) if running else [], items(*pending))


def watchdog(*, interrupt: float = 60, stall: float = 600) -> Watchdog:
    return Watchdog(WatchConfig(interrupt=interrupt, stall=stall))


def test_two_looks_make_a_proof() -> None:
    dog = watchdog()
    dog.looked(queue("a"), 100)
    assert not dog.idle_worker(104.9)
    dog.looked(queue("a", "b"), 105)
    assert dog.idle_worker(105)


def test_a_look_that_shows_something_running_is_none() -> None:
    dog = watchdog()
    dog.looked(queue("a"), 100)
    dog.looked(queue("a", running="x"), 103)
    dog.looked(queue("a"), 105)
    assert not dog.idle_worker(105)


def test_a_queue_that_has_moved_is_none() -> None:
    dog = watchdog()
    dog.looked(queue("a", "b"), 100)
    dog.looked(queue("b"), 105)
    assert not dog.idle_worker(105)
    dog.looked(queue("b"), 110)
    assert dog.idle_worker(110)


def test_a_word_between_the_looks_is_none() -> None:
    dog = watchdog()
    dog.looked(queue("a"), 100)
    dog.heard("a", 101)
    dog.looked(queue("a"), 105)
    assert not dog.idle_worker(105)


def test_a_new_connection_is_none() -> None:
    dog = watchdog()
    dog.looked(queue("a"), 100)
    dog.broke(charged=True)
    dog.looked(queue("a"), 105)
    assert not dog.idle_worker(105)


def test_an_impatient_operator_is_believed() -> None:
    assert (WatchConfig(interrupt=0.5).doubt, WatchConfig().doubt) == (0.5, 5)


def test_unmoved_needs_the_time_since_the_interrupt_and_since_the_last_word() -> None:
    dog = watchdog(interrupt=60)
    dog.runs("a", 0)
    assert not dog.unmoved(None, 1000)
    assert not dog.unmoved(950, 1000)
    dog.heard("a", 990)
    assert not dog.unmoved(900, 1000)
    assert dog.unmoved(900, 1050)


def test_silence_is_that_of_the_prompt_that_executes() -> None:
    dog = watchdog(stall=600)
    assert dog.silence(1000) == 0
    dog.runs("a", 100)
    dog.heard("b", 600)
    dog.runs("a", 650)
    assert (dog.silence(700), dog.silent(699), dog.silent(700)) == (600, False, True)
    dog.left("a")
    assert not dog.silent(2000)
    never = watchdog(stall=0)
    never.runs("a", 0)
    assert not never.silent(10**6)


def test_only_what_executes_is_charged() -> None:
    dog = watchdog()
    dog.runs("a", 0)
    dog.broke(charged=True)
    assert (dog.died_of("a"), dog.died_of("ahead")) == (True, False)
    dog.runs("a", 5)  # it is still there: the connection broke, not ComfyUI
    assert not dog.died_of("a")
    dog.broke(charged=False)
    assert not dog.died_of("a")


def test_what_had_ended_is_not_charged() -> None:
    dog = watchdog()
    dog.runs("a", 0)
    dog.left("a")
    dog.broke(charged=True)
    assert not dog.died_of("a")


def test_what_executes_is_charged_with_the_death_of_its_worker_and_not_with_the_repair() -> None:
    dog = watchdog()
    dog.runs("a", 0)
    assert dog.distrust(STALL, charged=True)
    assert dog.died_of("a")
    assert not dog.distrust(STALL, charged=True)
    dog.runs("b", 10)
    dog.broke(charged=True)
    assert not dog.died_of("b")
    assert dog.stalls[StallReason.NOTHING_RUNS] == 1


def test_a_drained_one_charges_nobody() -> None:
    dog = watchdog()
    dog.runs("a", 0)
    dog.distrust(STALL, charged=False)
    assert not dog.died_of("a")


def test_what_nobody_asks_for_is_forgotten() -> None:
    dog = watchdog()
    dog.runs("a", 0)
    dog.broke(charged=True)
    dog.forget("a")
    assert not dog.died_of("a")
