"""The tool sees what grows, and a short run of it finds nothing (`make soak` is the long one)."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.evidence import own_faults
from tests.soak.run import soak
from tests.soak.samples import Sample, Tolerance, growth, look, table

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def samples(fds: Callable[[int], int] = lambda _: 30, rss: Callable[[int], int] = lambda _: 60_000) -> list[Sample]:
    return [Sample(seconds=n, rss=rss(n), fds=fds(n), threads=5) for n in range(40)]


def test_flat_is_flat() -> None:
    assert growth(samples(), Tolerance()) == []


def test_warming_up_and_a_peak_are_no_growth() -> None:
    assert growth(samples(fds=lambda n: min(10 + n, 30)), Tolerance()) == []
    assert growth(samples(fds=lambda n: 90 if n == 35 else 30), Tolerance()) == []


def test_a_leak_is_growth() -> None:
    (told,) = growth(samples(fds=lambda n: 30 + n), Tolerance())
    assert told == "fds grew from 54.5 to 64.5, by more than 3"
    (told,) = growth(samples(rss=lambda n: 60_000 + 500 * n), Tolerance())
    assert told.startswith("rss grew")
    assert growth(samples(rss=lambda n: 60_000 + 500 * n), Tolerance(), memory=False) == []


def test_too_few_samples_are_no_proof() -> None:
    with pytest.raises(ValueError, match="7 samples"):
        growth(samples()[:7], Tolerance())


def test_a_look_at_a_process_sees_what_it_opens() -> None:
    before = look(os.getpid(), 0)
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    reading, writing = os.pipe()
    thread.start()
    after = look(os.getpid(), 1)
    done.set()
    thread.join()
    os.close(reading)
    os.close(writing)
    assert (after.fds - before.fds, after.threads - before.threads) == (2, 1)
    assert after.rss > 10_000
    assert len(table([before, after])) == 3


@pytest.mark.slow
async def test_a_short_run_leaves_nothing_open(tmp_path: Path) -> None:
    """Memory says nothing in so short a time; what is left open does."""
    found = await soak(tmp_path, seconds=16, rounds_a_second=6, every=0.4, say=lambda _: None)
    assert growth(found.samples, Tolerance(), memory=False) == []
    assert found.wrong == {}
    assert own_faults(tmp_path / "service.log") == []
    assert found.status == 0
    for what in ("POST workflow", "GET workflow", "DELETE workflow", "stream", "events"):
        assert found.done[what] > 5, what
    assert max(sample.clients for sample in found.samples) <= 5
