"""`management-api demo`: the service with a simulated ComfyUI behind it, and one picture made while you watch.

Everything is real but the ComfyUI: the same service as `serve`, on its own port, and a client that speaks to it by
HTTP and WebSocket. Must never touch the settings, the queue or the ComfyUI of somebody's real service.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import shlex
import socket
import sys
import tempfile
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import msgspec
import uvloop

from management_api import __version__
from management_api.app import create_app
from management_api.commands.client import WORKFLOWS, Client, Refused, Unreachable, Workflow
from management_api.commands.listener import CannotStart, bind, url_of
from management_api.commands.progress import display
from management_api.commands.serve import reason, serve
from management_api.commands.terminal import complain, say
from management_api.logging import configure
from management_api.settings import Settings, load
from managers.errors import ManagerError

PORT = 9090
_STEP_SECONDS = 0.15
_PATIENCE_SECONDS = 60
_INTERRUPTED = 130


def run(given: argparse.Namespace) -> int:
    """Run the demo. Gives the exit status."""
    if find_spec("PIL") is None:
        return complain("The demo draws with Pillow: pip install 'comfyui-management-api[simulator]'")
    try:
        folder = _folder(given.directory)
        listener = _listen(given.port)
    except (OSError, CannotStart) as error:
        return complain(str(error))
    status = 0
    try:
        with listener, (folder / "service.log").open("a", encoding="utf-8") as log:
            status = uvloop.run(Demo(folder, listener).run(once=given.once, log=log))
    except* (CannotStart, ManagerError, OSError) as group:
        status = complain(reason(group))
    return status


def _folder(given: Path | None) -> Path:
    if given is None:
        return Path(tempfile.mkdtemp(prefix="comfyui-management-api-demo-"))
    given.mkdir(parents=True, exist_ok=True)
    return given.absolute()


def _listen(port: int | None) -> socket.socket:
    if port is not None:
        return bind("127.0.0.1", port)
    try:
        return bind("127.0.0.1", PORT)
    except CannotStart:
        listener = bind("127.0.0.1", 0)
        say(f"Port {PORT} is taken, so this demo is on {listener.getsockname()[1]}.")
        return listener


class Demo:
    """One demo: where it lives, and its key."""

    def __init__(self, folder: Path, listener: socket.socket) -> None:
        self.folder = folder
        self.listener = listener
        self.url = url_of(listener)
        self.key = secrets.token_urlsafe(24)
        self.stop = asyncio.Event()
        self.ready = asyncio.Event()
        self.example = ""

    async def run(self, *, once: bool, log: TextIO) -> int:
        """The simulator, then the service, then the picture; up until a signal, with `once` until the picture."""
        from management_api.simulator.server import SimulatorOptions
        from management_api.simulator.server import serve as simulate

        options = SimulatorOptions(
            directory=self.folder / "comfyui", port=0, previews=True, step_seconds=_STEP_SECONDS
        )
        async with asyncio.TaskGroup() as tasks:
            found: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            simulator = tasks.create_task(simulate(options, found.set_result), name="simulator")
            settings = self._settings(await found)
            app = create_app(settings, logs=configure("info", "json", log, secrets=(self.key,)))
            service = tasks.create_task(serve(app, self.listener, self.stop, self.ready.set))
            picture = tasks.create_task(self._picture(settings.comfyui.outputs), name="picture")
            stopped = tasks.create_task(self.stop.wait())
            try:
                await asyncio.wait({picture, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if picture.done() and not picture.result() and not once:
                    self._invite()
                    await stopped
                picture.cancel()
            finally:
                self.stop.set()
                await asyncio.wait({service})
                simulator.cancel()
        return _INTERRUPTED if picture.cancelled() else picture.result()

    def _settings(self, comfyui: str) -> Settings:
        """Nothing of the environment: a demo meets nobody's real service."""
        return load(
            {
                "MANAGEMENT_API_KEY": self.key,
                "MANAGEMENT_API_HOST": "127.0.0.1",
                "MANAGEMENT_API_PORT": str(self.listener.getsockname()[1]),
                "MANAGEMENT_API_DATA_DIR": str(self.folder / "data"),
                "COMFYUI_URL": comfyui,
                "COMFY_PATH": str(self.folder / "comfyui"),
            },
            None,
        )

    async def _picture(self, outputs: Path) -> int:
        """One workflow from end to end, as any client would do it."""
        await self.ready.wait()
        say(f"ComfyUI Management API {__version__} on {self.url}, a simulated ComfyUI behind it: no model runs.")
        say("One picture, as any client would ask for it: POST a workflow, follow it on the stream.\n")
        client = Client(self.url, self.key)
        log = f"Its log: {self.folder / 'service.log'}"
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                accepted = await client.submit({"workflow": self._graph()})
                with display(sys.stdout) as shown:
                    ended = await client.watch(accepted.workflow_id, shown.show)
        except (Refused, Unreachable) as error:
            return complain(f"The demo failed: {error}. {log}")
        except TimeoutError:
            return complain(f"The demo failed: no picture in {_PATIENCE_SECONDS} s. {log}")
        finally:
            await client.aclose()
        if ended.status != "completed" or not ended.outputs:
            return complain(f"The demo failed: {ended.status}, {ended.error}. {log}")
        self._tell(ended, outputs)
        return 0

    def _graph(self) -> dict[str, Any]:
        """The sample, with a seed of its own: another picture each time. It is left in the folder, to play with."""
        text = resources.files("management_api.commands").joinpath("txt2img.json").read_bytes()
        (self.folder / "workflow.json").write_bytes(text)
        graph: dict[str, Any] = msgspec.json.decode(text)
        graph["5"]["inputs"]["seed"] = secrets.randbelow(2**32)
        return graph

    def _tell(self, ended: Workflow, outputs: Path) -> None:
        picture = ended.outputs[0]
        seconds = ((ended.completion_time or 0) - (ended.start_time or 0)) / 1000
        say(f"  completed in {seconds:.1f} s\n")
        say(f"  picture   {outputs / (picture.subfolder or '') / (picture.filename or '')}")
        say(f"            {self.url}{picture.url}")
        say(f"  page      {self.url}/dashboard")
        say(f"  docs      {self.url}/docs")
        say(f"  key       {self.key}")
        self.example = f"curl -H 'X-API-Key: {self.key}' {self.url}{WORKFLOWS}/{ended.workflow_id}"
        say(f"  folder    {self.folder}")

    def _invite(self) -> None:
        """The service stays up: what to do with it."""
        say(f"  example   {self.example}")
        say("\nMore, in another terminal:")
        say(f"  export MANAGEMENT_API_KEY={self.key} MANAGEMENT_API_URL={self.url}")
        ours = Path(sys.argv[0])
        program = f"{shlex.quote(sys.executable)} -m management_api" if ours.suffix else shlex.quote(str(ours))
        say(f"  {program} submit {shlex.quote(str(self.folder / 'workflow.json'))} --watch --out pictures")
        if Path("test-comfyui.sh").is_file():
            say("  ./test-comfyui.sh")
        say("\nThe service stays up. Ctrl-C ends it.")
