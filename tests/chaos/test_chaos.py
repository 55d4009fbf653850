"""Twenty kills, as CI runs them (`make chaos N=200` is the long one)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.judge import judge
from tests.chaos.plan import make
from tests.chaos.run import Chaos


@pytest.mark.slow
async def test_twenty_kills(tmp_path: Path) -> None:
    plan = make(seed=1, kills=20, workflows=40)
    report = judge(await Chaos(plan, tmp_path, print).run())
    assert report.faults == []
    assert report.counts["workflows"] == 40
    assert report.counts["kills of service"] >= 5
    assert report.counts["kills of ComfyUI"] >= 5
    assert report.counts["executions cut off by the death of ComfyUI"] > 0
