"""`management-api doctor`: everything the service needs, looked at one by one, with what to do about each.

It changes nothing: no file is left behind, no prompt is handed to ComfyUI.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx
from msgspec import Struct

from management_api.commands.listener import CannotStart, bind
from management_api.commands.template_checks import template_checks
from management_api.commands.terminal import clean, complain, say
from management_api.keys import KeysError, read_keys
from management_api.services import backend_configs
from management_api.settings import Settings, SettingsError, load
from managers.clock import SystemClock, new_id
from managers.comfyui.backend import Backend, BackendConfig
from managers.comfyui.protocol import FeatureFlags, Message
from managers.comfyui.socket import ComfyUISocket, Frame
from managers.errors import BackendUnavailable
from managers.workflows.sqlite_schema import FILE_NAME, MIGRATIONS, connect_reader
from managers.workflows.sqlite_writer import unavailable

_KEY_LENGTH = 16
_SOCKET_SECONDS = 10
_EARLIEST, _LATEST = 1_750_000_000, 4_000_000_000
_SIGNS = {"good": "✓", "doubtful": "!", "bad": "✗"}

Verdict = Literal["good", "doubtful", "bad"]


class Check(Struct, frozen=True):
    """What was found, and what to do when it is not good. `doubtful` is worth a look and fails nothing."""

    verdict: Verdict
    text: str
    advice: str = ""


def run() -> int:
    """Print a line for each check. Gives the exit status: 1 when one is bad."""
    try:
        settings = load(os.environ, Path(".env"), require_key=False)
    except SettingsError as error:
        return complain(f"{_SIGNS['bad']} {error}")
    return asyncio.run(_examine(settings))


async def _examine(settings: Settings) -> int:
    status = 0
    async for check in _checks(settings):
        say(clean(f"{_SIGNS[check.verdict]} {check.text}"))
        if check.advice:
            say(clean(f"    {check.advice}"))
        if check.verdict == "bad":
            status = 1
    return status


async def _checks(settings: Settings) -> AsyncIterator[Check]:
    yield _key(settings.api.key)
    if settings.api.keys_file is not None:
        yield await asyncio.to_thread(_keys, settings.api.keys_file)
    yield await asyncio.to_thread(_data_folder, settings.api.data_dir)
    yield await asyncio.to_thread(_store, settings.api.data_dir / FILE_NAME)
    yield await _port(settings.api.host, settings.api.port)
    yield _clock()
    for config in backend_configs(settings):
        async for check in _comfyui(config):
            yield check
    if settings.s3.bucket is not None:
        yield await _bucket(settings)
    async for good, text, advice in template_checks(settings):
        yield Check("good" if good else "doubtful", text, advice)
    for check in await asyncio.to_thread(lambda: list(_folders(settings))):
        yield check


# ---- this machine


def _key(key: str) -> Check:
    advice = (
        'Set MANAGEMENT_API_KEY, for example to what `python3 -c "import secrets; print(secrets.token_hex(24))"` says'
    )
    if not key:
        return Check("bad", "no key: the service will not start", advice)
    if len(key) < _KEY_LENGTH:
        return Check("bad", f"the key has {len(key)} characters, which can be guessed", advice)
    return Check("good", f"key: {len(key)} characters")


def _keys(path: Path) -> Check:
    try:
        keys, _ = read_keys(path)
    except KeysError as error:
        return Check(
            "bad", f"named keys: {error}", "Make or mend it with `management-api keys`, as the user of the service"
        )
    return Check("good", f"named keys: {len(keys)} in {path}")


def _data_folder(folder: Path) -> Check:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    advice = f"Give the user of the service the right to write there, or set MANAGEMENT_API_DATA_DIR (now {folder})"
    if not existing.is_dir():
        return Check("bad", f"data folder: {existing} is not a folder", advice)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Check("bad", f"data folder: {existing} cannot be written: {error.strerror}", advice)
    if existing != folder:
        return Check("good", f"data folder: {folder} will be made at the first start")
    return Check("good", f"data folder: {folder}")


def _store(path: Path) -> Check:
    if not path.exists():
        return Check("good", "store: none yet, it will be made at the first start")
    try:
        with closing(connect_reader(path)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > len(MIGRATIONS):
                return Check(
                    "bad",
                    "store: written by a newer version",
                    "Install that version, or restore a backup of this one",
                )
            count = connection.execute("SELECT count(*) FROM workflow").fetchone()[0] if version else 0
            waiting = "SELECT count(*) FROM workflow WHERE status = 'queued'"
            queued = connection.execute(waiting).fetchone()[0] if version else 0
    except sqlite3.Error as error:
        return Check("bad", f"store: {path}: {unavailable(error)}", "Restore a backup, or move the file away")
    return Check("good", f"store: {count} workflows, {queued} of them waiting")


async def _port(host: str, port: int) -> Check:
    if port == 0:
        return Check("good", "port: any free one")
    try:
        bind(host, port).close()
    except CannotStart as error:
        address = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
        try:
            async with httpx.AsyncClient(timeout=2, trust_env=False) as client:
                found = (await client.get(f"http://{address}:{port}/")).json()
        except (httpx.HTTPError, ValueError):
            found = None
        if isinstance(found, dict) and "ComfyUI Management API" in str(found.get("name")):
            return Check("good", f"port {port}: the service answers, version {found.get('version')}")
        return Check("bad", str(error), f"Find what holds it with `ss -ltnp 'sport = :{port}'`, or choose another")
    return Check("good", f"port {port}: free")


def _clock() -> Check:
    if not _EARLIEST < time.time() < _LATEST:
        return Check("bad", f"clock: it says {time.ctime()}", "Set the clock: times and waiting order depend on it")
    return Check("good", f"clock: {time.strftime('%Y-%m-%d %H:%M:%S %Z')}")


def _folders(settings: Settings) -> Iterator[Check]:
    models = settings.comfyui.models
    named: dict[str, Path] = {"outputs": settings.comfyui.outputs} | {
        f"models {name}": getattr(models, name) for name in models.__struct_fields__
    }
    missing = []
    for name, folder in named.items():
        try:
            with os.scandir(folder) as entries:
                next(entries, None)
        except FileNotFoundError:
            missing.append(f"{name} ({folder})")
        except OSError as error:
            variable = f"COMFYUI_{name.upper().replace(' ', '_')}"
            advice = f"Give the user of the service the right to read it, or set {variable}"
            yield Check("bad", f"{name}: {folder} cannot be read: {error.strerror}", advice)
        else:
            yield Check("good", f"{name}: {folder}")
    if missing:
        advice = "Right for a ComfyUI on another machine. Else set COMFY_PATH, or the variable of the folder"
        yield Check("doubtful", f"not there, so their lists are empty: {', '.join(missing)}", advice)


# ---- the bucket


async def _bucket(settings: Settings) -> Check:
    """Put an object there, open its link, take it away again."""
    from management_api.uploads import link_config, make_bucket
    from managers.delivery.s3_bucket import BucketTrouble

    bucket, config = make_bucket(settings), link_config(settings)
    assert bucket is not None  # noqa: S101 - asked before
    name = f"bucket {bucket.name}"
    key = "/".join(part for part in (settings.s3.prefix, f"doctor-{new_id()}.txt") if part)
    try:
        await bucket.put(key, b"doctor", size=6, attributes={"Content-Type": "text/plain"})
    except BucketTrouble as error:
        advice = "Look at S3_BUCKET, S3_ENDPOINT_URL, AWS_REGION, the keys, and what they may do: docs/delivery.md"
        return Check("bad", f"{name}: {error}", advice)
    try:
        link = f"{config.base}/{key}" if config.base else (await bucket.sign(bucket.name, [key], 60))[0]
        async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
            status: object = (await client.get(link)).status_code
    except (BucketTrouble, httpx.HTTPError) as error:
        status = type(error).__name__
    try:
        await bucket.delete(key)
    except BucketTrouble as error:
        return Check("doubtful", f"{name}: takes objects; {key} stays there, as it may not be deleted: {error}")
    if status != 200:
        advice = "Others may reach it all the same. Look at S3_PUBLIC_ENDPOINT_URL, S3_PUBLIC_BASE_URL"
        return Check("doubtful", f"{name}: takes objects, but their link does not open from here ({status})", advice)
    return Check("good", f"{name}: takes objects, and their links open")


# ---- ComfyUI


async def _comfyui(config: BackendConfig) -> AsyncIterator[Check]:
    backend = Backend(config, new_id(), clock=SystemClock(), publish=lambda _: None, on_event=lambda _: None)
    name = f"ComfyUI {config.name}"
    try:
        stats = await backend.client.system_stats()
    except BackendUnavailable as error:
        where = urlsplit(config.url)
        address = where.netloc.rpartition("@")[2]
        advice = (
            f"Is it started, and does it listen at {address} (its options --listen and --port)? Else set COMFYUI_URL"
        )
        yield Check("bad", f"{name}: {error}", advice)
        return
    finally:
        await backend.client.aclose()
    backend.version = stats.system.comfyui_version
    devices = ", ".join(str(device.get("name")) for device in stats.devices) or "no device"
    yield Check("good", f"{name}: version {backend.version}, {devices}")
    if backend.interrupts_by_id:
        yield Check("good", f"{name}: takes our prompt ids, and interrupts a prompt by its id")
    else:
        advice = "It works, without handing out the next workflow early; a newer ComfyUI leaves no gap"
        yield Check("doubtful", f"{name}: may interrupt whatever runs, not the prompt we name", advice)
    yield await _socket(config, name)


async def _socket(config: BackendConfig, name: str) -> Check:
    """Greet it as the service does, under an id that nobody else uses."""
    frames: asyncio.Queue[Frame] = asyncio.Queue()
    up = asyncio.Event()
    socket = ComfyUISocket(
        config.url, new_id(), on_frame=frames.put_nowait, on_up=up.set, on_down=lambda _reason: None
    )
    task = asyncio.create_task(socket.run())
    try:
        async with asyncio.timeout(_SOCKET_SECONDS):
            await up.wait()
            while not (isinstance(frame := await frames.get(), Message) and isinstance(frame.body, FeatureFlags)):
                pass
    except TimeoutError:
        if up.is_set():
            advice = "An older ComfyUI: all works, but previews do not say which node they are of"
            return Check("doubtful", f"{name}: the socket opens, without feature flags", advice)
        advice = "Does a proxy on the way let WebSockets through, and does it drop or rewrite the Origin header?"
        return Check("bad", f"{name}: the socket does not open", advice)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    return Check("good", f"{name}: the socket opens and greets")
