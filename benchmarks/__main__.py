"""`python -m benchmarks [NAME…]`: measure, and print one table. docs/performance.md tells what each row means."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace

from benchmarks.table import Number, show

NAMES = ("dispatch", "post", "waiting", "footprint", "files", "fanout", "scrape", "uploads")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these of {', '.join(NAMES)}")
    parser.add_argument("--comfyui", metavar="URL", help="a real ComfyUI for `dispatch`, beside the simulator")
    parser.add_argument("--comfyui-outputs", metavar="DIR", type=Path, help="its output folder, if it is here")
    parser.add_argument(
        "--fastify", metavar="DIR", type=Path, help="for `post`: where `npm install fastify better-sqlite3` was run"
    )
    given = parser.parse_args()
    unknown = set(given.names) - set(NAMES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    everything: list[Number] = []
    for name in given.names or NAMES:
        everything += [replace(number, command=f"python -m benchmarks {name}") for number in _one(name, given)]
    show(everything)


def _one(name: str, given: argparse.Namespace) -> Sequence[Number]:
    from benchmarks import dispatch, fanout, files, footprint, post, scrape, store, uploads

    ways: dict[str, Callable[[], Sequence[Number]]] = {
        "dispatch": lambda: dispatch.run(given.comfyui, given.comfyui_outputs),
        "post": lambda: post.run(given.fastify),
        "waiting": store.run,
        "footprint": footprint.run,
        "files": files.run,
        "fanout": fanout.run,
        "uploads": uploads.run,
        "scrape": scrape.run,
    }
    return ways[name]()


if __name__ == "__main__":
    main()
