"""`management-api submit`: hand in a workflow, watch it, fetch its files.

The exit status tells how it went: 0 completed (or accepted, without --watch and --wait), 1 failed or cancelled,
2 refused, 3 service unreachable, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path, PurePosixPath

import aiofiles
import aiofiles.os
import msgspec
from msgspec import Raw

from management_api.commands.client import WORKFLOWS, Client, Refused, Unreachable, Workflow
from management_api.commands.progress import display
from management_api.commands.terminal import clean, complain, say, tell
from management_api.settings import SettingsError, load
from managers.clock import new_id
from managers.events.types import Finding, Output

OK, FAILED, REFUSED, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130


def run(given: argparse.Namespace) -> int:
    """Do what the command line says. Gives the exit status."""
    try:
        graph = _read(given.workflow)
        settings = load(os.environ, Path(".env"), require_key=False)
    except (OSError, ValueError, SettingsError) as error:
        return complain(str(error), REFUSED)
    url = given.url or os.environ.get("MANAGEMENT_API_URL") or f"http://127.0.0.1:{settings.api.port}"
    key = given.key or settings.api.key
    if not key:
        return complain("No key: set MANAGEMENT_API_KEY to the one the service was started with", REFUSED)
    workflow_id = new_id()
    body = {"workflow": Raw(graph), "id": workflow_id, "priority": given.priority, "gpu": given.gpu}
    try:
        return asyncio.run(_submit(Client(url, key), body, given))
    except Refused as error:
        tell(clean(str(error)))
        _show_findings([finding for finding in error.findings if finding.message not in str(error)])
        return REFUSED
    except Unreachable as error:
        return complain(f"{url} is not to be reached: {error}", UNREACHABLE)
    except KeyboardInterrupt:
        return asyncio.run(_interrupted(Client(url, key), workflow_id, cancel=given.cancel_on_interrupt))


async def _submit(client: Client, body: dict[str, object], given: argparse.Namespace) -> int:
    try:
        accepted = await client.submit(body, strict=given.strict)
        if not (given.watch or given.wait or given.out):
            _show_findings(accepted.errors)
            say(accepted.workflow_id)
            return FAILED if accepted.status == "failed" else OK
        tell(f"workflow {accepted.workflow_id}")
        with display(sys.stderr, quiet=not given.watch) as shown:
            ended = await client.watch(accepted.workflow_id, shown.show)
        _show_end(ended)
        complete = await deliver(client, ended.outputs, given.out, force=given.force)
        return OK if ended.status == "completed" and complete else FAILED
    finally:
        await client.aclose()


async def _interrupted(client: Client, workflow_id: str, *, cancel: bool) -> int:
    try:
        if cancel:
            await client.cancel(workflow_id)
            tell(f"Workflow {workflow_id} is cancelled.")
        else:
            tell(f"Workflow {workflow_id} goes on. To cancel it:")
            tell(f'  curl -X DELETE -H "X-API-Key: $MANAGEMENT_API_KEY" {client.url}{WORKFLOWS}/{workflow_id}')
    except (Refused, Unreachable) as error:
        tell(f"Workflow {workflow_id} was not cancelled: {clean(str(error))}")
    finally:
        await client.aclose()
    return INTERRUPTED


def _read(name: str) -> bytes:
    """The graph as JSON text. Raises `OSError`, and `ValueError` for what is no JSON object."""
    text = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        graph = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from None
    if not isinstance(graph, dict):
        raise ValueError(f"{name} holds no workflow: an object of nodes is expected")
    return text


# ---- what became of it


def _show_findings(findings: Sequence[Finding]) -> None:
    for finding in findings:
        place = ""
        if finding.node_id is not None:
            kind = f" ({finding.class_type})" if finding.class_type else ""
            place = f"node {finding.node_id}{kind}: "
        hint = f" Did you mean {', '.join(finding.suggestions)}?" if finding.suggestions else ""
        tell(clean(f"  {finding.severity}: {place}{finding.message}{hint}"))


def _show_end(ended: Workflow) -> None:
    words = ended.status
    if ended.start_time is not None and ended.completion_time is not None:
        words += f" in {(ended.completion_time - ended.start_time) / 1000:.1f} s on {ended.backend}"
    error = ended.error or ""
    tell(clean(f"{words}: {error}" if error else words))
    _show_findings([finding for finding in ended.errors if finding.message not in error])


async def deliver(client: Client, outputs: Sequence[Output], folder: Path | None, *, force: bool = False) -> bool:
    """List the outputs, one a line; with a folder, fetch the files into it. False when one could not be had."""
    complete = True
    taken: set[str] = set()
    for output in outputs:
        if output.url is None:
            for line in (output.text or output.filename or "").splitlines():
                say(clean(line))
        elif folder is None or not output.url.startswith("/"):
            say(clean(f"{client.url}{output.url}" if output.url.startswith("/") else output.url))
        else:
            target = folder / _free_name(output.filename or "output", taken)
            try:
                await aiofiles.os.makedirs(folder, exist_ok=True)
                async with client.download(output.url) as chunks:
                    await _write(target, chunks, force=force)
                say(str(target))
            except FileExistsError:
                complete = False
                tell(f"{target} exists already; --force replaces it")
            except (OSError, Refused, Unreachable) as error:
                complete = False
                tell(f"{target.name} could not be fetched: {clean(str(error))}")
    return complete


def _free_name(name: str, taken: set[str]) -> str:
    """A name that stays in its folder, and is not that of an earlier file of the same run."""
    name = clean(PurePosixPath(name.replace("\\", "/")).name).lstrip(".") or "output"
    path, number = PurePosixPath(name), 1
    while name in taken:
        number += 1
        name = f"{path.stem}-{number}{path.suffix}"
    taken.add(name)
    return name


async def _write(target: Path, chunks: AsyncIterator[bytes], *, force: bool) -> None:
    """Whole or not at all. Raises `FileExistsError`, `OSError`, and what the chunks raise."""
    async with aiofiles.open(target, "wb" if force else "xb") as file:
        try:
            async for chunk in chunks:
                await file.write(chunk)
        except BaseException:
            await aiofiles.os.unlink(target)
            raise
