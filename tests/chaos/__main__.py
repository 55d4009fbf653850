"""`python -m tests.chaos --kills 200 --seed 1`: kill and look. Exit status 1 when a promise was broken."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from tests.chaos.evidence import Evidence
from tests.chaos.judge import Report, judge
from tests.chaos.plan import make
from tests.chaos.run import Chaos

_SHOWN = 40


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="how often somebody is killed (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed makes the same plan (default %(default)s)")
    parser.add_argument("--workflows", type=int, default=300, help="how many are handed in (default %(default)s)")
    parser.add_argument("--backends", type=int, default=1, help="how many ComfyUIs (default %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the folder of a run without faults too")
    parser.add_argument("--judge", type=Path, metavar="FOLDER", help="judge a run that was kept once more")
    given = parser.parse_args()
    if given.judge is not None:
        report = judge(msgspec.json.decode((given.judge / "evidence.json").read_bytes(), type=Evidence))
        show(report)
        return int(bool(report.faults))
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    plan = make(seed=given.seed, kills=given.kills, workflows=given.workflows, backends=given.backends)
    began = time.monotonic()
    print(
        f"seed {given.seed}: {given.kills} kills while {given.workflows} workflows run; folder {folder}", flush=True
    )
    report = judge(asyncio.run(Chaos(plan, folder, lambda line: print(line, flush=True)).run()))
    report.counts["seconds"] = round(time.monotonic() - began)
    show(report)
    if report.faults:
        again = f"--kills {given.kills} --workflows {given.workflows} --backends {given.backends}"
        print(f"seed {given.seed} ({again}); what everybody says about it is in {folder}")
        return 1
    if given.keep:
        print(f"kept in {folder}")
    else:
        shutil.rmtree(folder)
    return 0


def show(report: Report) -> None:
    """The table, then what is wrong."""
    width = max(map(len, report.counts))
    for name, count in report.counts.items():
        print(f"  {name:<{width}}  {count:>6}")
    for fault in report.faults[:_SHOWN]:
        print(f"  wrong: {fault}")
    if len(report.faults) > _SHOWN:
        print(f"  … and {len(report.faults) - _SHOWN} more")
    print("every promise was kept" if not report.faults else f"{len(report.faults)} faults")


if __name__ == "__main__":
    sys.exit(main())
