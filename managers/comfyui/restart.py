"""The last step with a ComfyUI that does not work: start it anew, by the operator's command or by ComfyUI-Manager.

Must never use a shell, nor hand on an environment of ours: the command gets what it was configured with and no more.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import IO

import structlog
from msgspec import Struct

from managers.comfyui.client import ComfyUIClient
from managers.errors import BackendUnavailable

log = structlog.get_logger(__name__)

MANAGER = ("manager",)
"""Instead of a command: ComfyUI-Manager's own reboot."""
_OUTPUT_BYTES = 2000


class RestartConfig(Struct, frozen=True, kw_only=True):
    """`argv` and the whole environment of the command, and how long it may take. No `argv`: there is no such step."""

    argv: tuple[str, ...] = ()
    environ: Mapping[str, str] = {}
    seconds: float = 120


async def restart(config: RestartConfig, client: ComfyUIClient) -> bool:
    """Do it once. Whether it went well; if not, why is in the log."""
    if config.argv == MANAGER:
        try:
            await client.reboot()
        except BackendUnavailable as error:
            log.error("ComfyUI-Manager did not restart ComfyUI", reason=str(error))
            return False
        return True
    # A file, not a pipe: what the command leaves running may keep its output open for ever.
    output = await asyncio.to_thread(tempfile.TemporaryFile)
    try:
        return await _run(config, output)
    finally:
        output.close()


async def _run(config: RestartConfig, output: IO[bytes]) -> bool:
    try:
        process = await asyncio.create_subprocess_exec(
            *config.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=config.environ,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        log.error("the restart command cannot be run", reason=str(error))
        return False
    try:
        async with asyncio.timeout(config.seconds):
            status = await process.wait()
    except TimeoutError:
        log.error("the restart command takes too long, ending it", seconds=config.seconds)
        return False
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    told = await asyncio.to_thread(_read, output)
    log.info("the restart command has ended", status=status, output=told)
    return status == 0


def _read(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read(_OUTPUT_BYTES).decode(errors="replace").strip()
