"""The line of what waits, against a plain list that is sorted anew for every question."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from managers.workflows.model import QueueCounts
from managers.workflows.waiting import CLASSES, Act, Change, Draft, Entry, Line

POOLS = ("local", "a", "b")
SUBMITTERS = (None, "shop", "admin")


@st.composite
def entries(draw: st.DrawFn) -> list[Entry]:
    """As the store makes them: in one class the rank follows the time of submission."""
    step = draw(st.sampled_from([0, 5, 10**6]))
    result = []
    for number in range(draw(st.integers(1, 25))):
        level = draw(st.integers(0, len(CLASSES) - 1))
        at = draw(st.integers(0, 20))
        pool, submitter = draw(st.sampled_from(POOLS)), draw(st.sampled_from(SUBMITTERS))
        result.append(Entry(at + step * level, number, f"w{number}", pool, level, at, submitter))
    return result


def state(line: Line, all_entries: Iterable[Entry]) -> object:
    waiting = [entry for entry in all_entries if line.get(entry.id) is not None]
    return (
        len(line),
        line.counts(),
        {entry.id: (line.position(entry), line.held(entry)) for entry in waiting},
        {pools: line.next(pools, "a") for pools in [("local",), ("a",), ("b", "local"), POOLS]},
        {name: line.of_submitter(name) for name in SUBMITTERS},
    )


def expected(waiting: list[Entry], held: set[Entry], running: int, paused: bool) -> object:
    def first(pools: tuple[str, ...]) -> Entry | None:
        free = [entry for entry in waiting if entry.gpu in pools and entry not in held]
        return None if paused else min(free, key=lambda entry: (entry.rank, entry.number), default=None)

    def before(entry: Entry) -> int:
        return sum(
            other.gpu == entry.gpu and (other.rank, other.number) < (entry.rank, entry.number) for other in waiting
        )

    counts = QueueCounts(
        waiting={priority: sum(entry.level == n for entry in waiting) for n, priority in enumerate(CLASSES)},
        running=running,
        oldest_created_at=min((entry.created_at for entry in waiting), default=None),
        paused=paused,
    )
    return (
        len(waiting),
        counts,
        {entry.id: (before(entry), entry in held) for entry in waiting},
        {pools: first(pools) for pools in [("local",), ("a",), ("b", "local"), POOLS]},
        {name: sum(entry.submitter == name for entry in waiting) for name in SUBMITTERS},
    )


@given(entries(), st.data())
def test_any_life_of_a_line(all_entries: list[Entry], data: st.DataObject) -> None:
    draft, follower = Draft(Line()), Line()
    waiting: list[Entry] = []
    held: set[Entry] = set()
    running, paused = 0, False
    mark, state_at_mark = 0, state(draft.line, all_entries)
    for _ in range(data.draw(st.integers(1, 30))):
        outside = [entry for entry in all_entries if entry not in waiting]
        free = [entry for entry in waiting if entry not in held]
        act = data.draw(st.sampled_from(["enter", "leave", "hold", "free", "run", "rest", "pause", "resume"]))
        if act == "enter" and outside:
            waiting.append(entry := data.draw(st.sampled_from(outside)))
            draft.do(Act.ENTER, entry)
        elif act == "leave" and waiting:
            waiting.remove(entry := data.draw(st.sampled_from(waiting)))
            held.discard(entry)
            draft.leave(entry)
        elif act == "hold" and free:
            held.add(entry := data.draw(st.sampled_from(free)))
            draft.do(Act.HOLD, entry)
        elif act == "free" and held:
            held.remove(entry := data.draw(st.sampled_from(sorted(held))))
            draft.do(Act.FREE, entry)
        elif act == "run":
            running += 1
            draft.do(Act.RUN)
        elif act == "rest" and running:
            running -= 1
            draft.do(Act.REST)
        elif act == "pause" and not paused:
            paused = True
            draft.do(Act.PAUSE)
        elif act == "resume" and paused:
            paused = False
            draft.do(Act.RESUME)
        assert state(draft.line, all_entries) == expected(waiting, held, running, paused)
        if data.draw(st.booleans()):
            mark, state_at_mark = len(draft.changes), state(draft.line, all_entries)
    for change in draft.changes:
        follower.apply(change)
    assert state(follower, all_entries) == state(draft.line, all_entries)
    draft.undo_to(mark)
    assert state(draft.line, all_entries) == state_at_mark
    draft.undo_to(0)
    assert state(draft.line, all_entries) == expected([], set(), 0, False)


@given(entries())
def test_filled_at_once_equals_filled_one_by_one(all_entries: list[Entry]) -> None:
    at_once, one_by_one = Line(), Line()
    at_once.fill(all_entries)
    for entry in all_entries:
        one_by_one.apply(Change(Act.ENTER, entry))
    assert state(at_once, all_entries) == state(one_by_one, all_entries)


def test_changes_are_handed_over_once() -> None:
    draft = Draft(Line())
    draft.do(Act.RUN)
    assert draft.take() == [Change(Act.RUN)]
    assert draft.take() == []
