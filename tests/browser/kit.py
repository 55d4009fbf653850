"""What the browser tests are made of: the processes, a line between them to break, and a page that is watched.

Nothing here waits for a time to pass: the page is asked until it shows what was expected, the service holds its reply
until a workflow has ended.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

pytest.importorskip("playwright.async_api", reason="no playwright: the live page cannot be looked at")

from playwright.async_api import Browser as Browser  # noqa: PLC0414 - for the tests, which must not ask before
from playwright.async_api import ConsoleMessage, Locator, Page, WebSocket, async_playwright
from playwright.async_api import expect as expect  # noqa: PLC0414

from tests.comfy_kit import PLAIN, Graph, picture
from tests.program import KEY, SECONDS, Process, started
from tests.simulator_process import simulator

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
STORED = "management-api-key"
WORKFLOWS = "/v1/comfyui/workflow"
PATIENCE_MS = SECONDS * 1000
expect.set_options(timeout=PATIENCE_MS)


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Debian's, with a profile of its own. Skips the test where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium: the live page cannot be looked at")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        try:
            yield browser
        finally:
            await browser.close()


def steps(count: int = 20, seconds: float = 0.2, **inputs: Any) -> Graph:
    """A picture that takes so many steps, with previews; another one each time."""
    sleep = {"image": ["1", 0], "steps": count, "seconds_per_step": seconds, "seed": 1, "preview": True}
    sleep |= {"fail": "none", "fail_at_step": 0} | inputs
    graph = picture(width=512, height=384)
    graph["1"]["_meta"] = {"title": "Blank canvas"}
    graph["3"] = {"class_type": "SleepSteps", "_meta": {"title": "Denoise"}, "inputs": sleep}
    graph["2"]["inputs"]["images"] = ["3", 0]
    return graph


class House:
    """The service on a port that it keeps when it is started again, a ComfyUI behind it, and a client that asks."""

    def __init__(self, folder: Path, comfyui: str, environ: Mapping[str, str]) -> None:
        self.folder = folder
        self._environ = {"COMFYUI_URL": comfyui, "GPU_SAMPLE_SECONDS": "0"} | dict(environ)
        self._stack = contextlib.ExitStack()
        self.process: Process
        self.url = ""

    def start(self, **environ: str) -> None:
        """Until it is ready."""
        self.process = self._stack.enter_context(started(self.folder, "serve", **self._environ | environ))
        self.url = str(self.process.event("ready")["url"])
        self._environ["MANAGEMENT_API_PORT"] = str(urlsplit(self.url).port)

    def kill(self) -> None:
        """At once."""
        self._stack.close()

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """The reply, which has to be a good one."""
        async with httpx.AsyncClient(base_url=self.url, timeout=SECONDS * 2, **PLAIN) as client:
            reply = await client.request(method, path, json=body, headers={"X-API-Key": KEY, **headers})
        assert reply.is_success, reply.text
        return reply.json() if "json" in reply.headers["content-type"] else reply.content

    async def submit(self, graph: Graph, name: str, **more: Any) -> str:
        """Its id."""
        reply = await self.ask("POST", WORKFLOWS, {"workflow": graph, "metadata": {"name": name}, **more})
        return str(reply["workflowId"])

    async def finish(self, graph: Graph, name: str) -> dict[str, Any]:
        """The workflow, ended."""
        body = {"workflow": graph, "metadata": {"name": name}}
        found: dict[str, Any] = await self.ask("POST", WORKFLOWS, body, Prefer=f"wait={SECONDS}")
        assert found["status"] in {"completed", "failed"}
        return found

    async def look(self, workflow_id: str, include: str = "") -> dict[str, Any]:
        """How it stands."""
        found: dict[str, Any] = await self.ask("GET", f"{WORKFLOWS}/{workflow_id}?include={include}")
        return found


@contextlib.contextmanager
def house(folder: Path, *comfyui_args: str, **environ: str) -> Iterator[House]:
    """A house with everything running."""
    with simulator(folder / "comfyui", *comfyui_args) as (comfyui, _):
        found = House(folder, comfyui, environ)
        try:
            found.start()
            yield found
        finally:
            found.kill()


class Line:
    """A line between the page and the service that can be cut: nothing passes, nobody comes through."""

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._cut = False
        self.url = ""

    def cut(self) -> None:
        """Break what is open, refuse what is new."""
        self._cut = True
        for writer in self._open:
            writer.transport.abort()

    def mend(self) -> None:
        """Whole again."""
        self._cut = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open.add(writer)
        ours = {writer}
        try:
            if self._cut:
                return
            there, behind = await asyncio.open_connection(self._target.hostname, self._target.port)
            ours.add(behind)
            self._open.add(behind)
            passing = {asyncio.create_task(_pass(reader, behind)), asyncio.create_task(_pass(there, writer))}
            try:
                await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in passing:
                    one.cancel()
                await asyncio.gather(*passing, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # the end of a connection, or of the test
        finally:
            for end in ours:
                end.transport.abort()
            self._open -= ours
            self._tasks.discard(task)

    async def close(self) -> None:
        """No connection is left."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


@contextlib.asynccontextmanager
async def line(target: str) -> AsyncIterator[Line]:
    """A line to this service, whole at first."""
    found = Line(target)
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield found
    finally:
        server.close()
        await found.close()
        await server.wait_closed()


class Watched:
    """A page, everything it asked for, and everything it complained of."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.asked: list[str] = []
        self.sockets: list[str] = []
        self.complaints: list[str] = []
        self.excused: Callable[[str], bool] = lambda _: False
        """Of what the browser itself says of the net, in tests that break it."""
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(f"{error}\n{error.stack}"))
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("websocket", self._socket)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(message.text)

    def _socket(self, socket: WebSocket) -> None:
        self.sockets.append(socket.url)

    async def open(self, key: str | None = KEY) -> None:
        """The page as it is with this key; None: as a stranger sees it."""
        await self.page.goto(f"{self.url}/dashboard")
        if key is not None:
            await self.enter(key)
            await expect(self.page.get_by_text("live", exact=True)).to_be_visible()
            await expect(self.page.get_by_role("main")).to_have_attribute("aria-busy", "false")

    async def enter(self, key: str) -> None:
        """Type the key."""
        await self.page.get_by_label("Key").fill(key)
        await self.page.keyboard.press("Enter")

    async def drop(self, name: str, data: bytes) -> None:
        """Let a file fall on the page."""
        transfer = await self.page.evaluate_handle(
            """([name, data]) => {
              const transfer = new DataTransfer();
              transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name));
              return transfer;
            }""",
            [name, base64.b64encode(data).decode()],
        )
        await self.page.dispatch_event("body", "drop", {"dataTransfer": transfer})

    async def drop_graph(self, name: str, graph: Graph) -> None:
        """And hand it in."""
        await self.drop(name, json.dumps(graph).encode())
        await self.dialog.get_by_role("button", name="Submit", exact=True).click()
        await expect(self.dialog).to_be_hidden()

    @property
    def dialog(self) -> Locator:
        return self.page.get_by_role("dialog")

    @property
    def running(self) -> Locator:
        return self.page.get_by_role("region", name="Running")

    @property
    def queue(self) -> Locator:
        return self.page.get_by_role("list", name="Waiting workflows")

    @property
    def ended(self) -> Locator:
        return self.page.get_by_role("list", name="Ended workflows")

    @property
    def outputs(self) -> Locator:
        return self.page.get_by_role("region", name="Outputs")

    async def has_drawn(self, image: Locator) -> None:
        """Not only an element: a picture with pixels."""
        await expect(image).to_be_visible()
        await expect(image).to_have_js_property("complete", True)
        assert await image.evaluate("async (image) => (await image.decode(), image.naturalWidth)") > 0

    async def judge(self) -> None:
        """What holds for every test: no complaint, and the key is nowhere but where it belongs."""
        assert [text for text in self.complaints if not self.excused(text)] == []
        assert [url for url in [*self.asked, *self.sockets] if KEY in url or "cma_" in url] == []
        assert all(url.startswith((self.url, "blob:", "data:")) for url in self.asked)
        kept = await self.page.evaluate("JSON.stringify(localStorage)")
        assert KEY not in kept
        assert "cma_" not in kept
