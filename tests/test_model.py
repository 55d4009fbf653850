"""The order of the queue and the moves between states, for every input."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from managers.events.types import Finding
from managers.workflows.model import FINAL, MOVES, Priority, Status, merged, rank

times = st.integers(min_value=0, max_value=10**13)
agings = st.integers(min_value=0, max_value=10**6)
priorities = st.sampled_from(Priority)
classes = list(Priority)


@given(priorities, times, times, agings)
def test_within_a_class_the_older_goes_first(priority: Priority, a: int, b: int, aging: int) -> None:
    assert (rank(priority, a, aging) < rank(priority, b, aging)) == (a < b)


@given(times, agings)
def test_at_the_same_moment_the_higher_class_goes_first(at: int, aging: int) -> None:
    assert rank(Priority.HIGH, at, aging) < rank(Priority.NORMAL, at, aging) < rank(Priority.LOW, at, aging)


@given(priorities, priorities, times, times)
def test_without_aging_a_class_always_goes_before_the_next(first: Priority, second: Priority, a: int, b: int) -> None:
    if classes.index(first) < classes.index(second):
        assert rank(first, a, 0) < rank(second, b, 0)


@given(priorities, priorities, times, st.integers(min_value=1, max_value=10**6))
def test_with_aging_nobody_starves(first: Priority, second: Priority, at: int, aging: int) -> None:
    steps = classes.index(second) - classes.index(first)
    later = at + steps * aging * 1000
    assert rank(first, later, aging) == rank(second, at, aging)
    assert rank(first, later + 1, aging) > rank(second, at, aging)


def test_every_status_has_its_moves_and_the_final_ones_have_none() -> None:
    assert set(MOVES) == set(Status)
    assert {status for status, moves in MOVES.items() if not moves} == FINAL


def test_only_what_runs_can_complete_and_only_what_ran_waits_again() -> None:
    assert [status for status in Status if Status.COMPLETED in MOVES[status]] == [Status.RUNNING]
    assert [status for status in Status if Status.QUEUED in MOVES[status]] == [Status.RUNNING]


def test_comfyuis_word_replaces_ours_about_the_same_place() -> None:
    ours = Finding(code="value_not_in_list", message="ours", pointer="/workflow/1/inputs/a", severity="warning")
    other = Finding(code="value_not_in_list", message="other", pointer="/workflow/2/inputs/a", severity="warning")
    blocked = Finding(code="execution_blocked", message="x", severity="warning")
    said = Finding(code="value_not_in_list", message="ComfyUI's", pointer="/workflow/1/inputs/a")
    assert merged((ours, other), (said,)) == (other, said)
    assert merged((blocked,), (blocked,)) == (blocked, blocked)
