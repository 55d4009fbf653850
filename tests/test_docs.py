"""The documents say what the program does: their examples are run against it, in the order in which they stand.

In `docs/COMFYUI_API.md` fences of these languages are run, in README.md only `bash` with an `http` or `json` reply:

- `bash`: by bash, in one folder; its last curl must answer what the fence directly after it shows. `http`: the status
  line, the headers that are named, the body. `json`: a 2xx with this body. `text`: what is printed. None: just works.
- `python`, `js`: as a script, which prints the `text` fence after it. JavaScript only where there is Node.
- `frames`: over the stream; `>` is sent, `<` must come, `$` is run by bash; a line set in goes on the one above.

Other languages (`sh`, `html`, …) are for reading. Replies are compared in shape: the same keys, kinds of values, and
texts, where ids, times, numbers in texts and the like may be others. `"…": "…"` stands for more members, `"…"` at the
end of a list for more of the same. `$ID`, `$TICKET`, `$CURSOR` are what the replies gave last.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import parse_headers
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import Struct
from websockets.sync.client import connect

from tests.program import KEY, served
from tests.serving import StartService
from tests.simulator_process import simulator

ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "COMFYUI_API.md"
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

PATIENCE = 8.0
"""Seconds until what an example only looks at is as the document says."""

NODE = shutil.which("node")

_FENCE = re.compile(r"^```(?P<language>[a-z]+)\n(?P<text>.*?)^```$(?P<space>\n*)", re.DOTALL | re.MULTILINE)
_VOLATILE = (
    (re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "<uuid>"),
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z|\w{3}, \d\d \w{3} \d{4} [\d:]+ GMT"), "<time>"),
    (re.compile(r"\b[0-9a-f]{12,}(-[0-9a-f]+)?\b"), "<hex>"),
    (re.compile(r"\d+"), "<n>"),
)
_OPAQUE = {"ticket", "nextCursor", "image"}
_EXACT = {"status", "statusCode", "queuePosition", "attempt", "total", "cached", "maxAttempts", "length"}
MORE = "…"


class Fence(Struct, frozen=True):
    """A fenced block; `reply` is the block directly after it."""

    language: str
    text: str
    line: int
    reply: Fence | None = None


def fences(document: str) -> list[Fence]:
    found: list[Fence] = []
    matches = list(_FENCE.finditer(document))
    for match, following in zip_longest(matches, matches[1:]):
        reply = None
        if following is not None and following.start() == match.end():
            reply = Fence(following["language"], following["text"], document.count("\n", 0, following.start()) + 1)
        line = document.count("\n", 0, match.start()) + 1
        found.append(Fence(match["language"], match["text"], line, reply))
    return found


def plain(text: str) -> str:
    """Without what is another each time."""
    for pattern, stands_for in _VOLATILE:
        text = pattern.sub(stands_for, text)
    return text


def differences(shown: Any, real: Any, at: str = "") -> Iterator[str]:
    """How a real value is not what the document shows."""
    key = at.rpartition("/")[2]
    if isinstance(shown, dict) and isinstance(real, dict):
        more = MORE in shown
        missing = [name for name in shown if name not in real and name != MORE]
        unknown = [] if more else [name for name in real if name not in shown]
        if missing or unknown:
            yield f"{at or '/'}: has not {missing}, has also {unknown}"
        for name in shown.keys() & real.keys():
            yield from differences(shown[name], real[name], f"{at}/{name}")
    elif isinstance(shown, list) and isinstance(real, list):
        more = bool(shown) and shown[-1] == MORE
        expected = shown[:-1] if more else shown
        if len(real) < len(expected) or (len(real) > len(expected) and not more):
            yield f"{at}: {len(expected)} elements are shown, there are {len(real)}"
        for n, (one, other) in enumerate(zip(expected, real, strict=False)):
            yield from differences(one, other, f"{at}/{n}")
    elif type(shown) is not type(real):
        yield f"{at}: {shown!r} is shown, it is {real!r}"
    elif isinstance(shown, str):
        if key not in _OPAQUE and plain(shown) != plain(real):
            yield f"{at}: {shown!r} is shown, it is {real!r}"
    elif (key in _EXACT or isinstance(shown, bool)) and shown != real:
        yield f"{at}: {shown!r} is shown, it is {real!r}"


class Answer(Struct, frozen=True):
    """What the last curl of a fence got, and what bash printed."""

    status: int
    headers: dict[str, str]
    out: str


class Player:
    """Runs examples one after the other against one service."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.folder.mkdir()
        (folder / ".curlrc").write_text(f'silent\nmax-time = 15\ndump-header = "{folder / ".headers"}"\n')
        self.environ = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "HOME": str(folder),
            "CURL_HOME": str(folder),
            "LANG": "C.UTF-8",
            "URL": url,
            "MANAGEMENT_API_KEY": KEY,
        }

    def play(self, fence: Fence) -> list[str]:
        """Run it; gives what is not as it is shown."""
        match fence.language:
            case "bash":
                return self._bash(fence)
            case "python":
                return self._script(fence, sys.executable, "-W", "error", "-c", fence.text)
            case "js" if NODE is not None:
                flags = ["--no-warnings", "--experimental-websocket", "--input-type=module"]
                return self._script(fence, NODE, *flags, "-e", fence.text)
            case "frames":
                return self._frames(fence)
        return []

    def run(self, command: str) -> Answer:
        (self.folder / ".headers").unlink(missing_ok=True)
        done = self._process(["bash", "-euo", "pipefail", "-c", command])
        assert done.returncode == 0, f"exit status {done.returncode}: {done.stdout}{done.stderr}"
        status, headers = self._headers()
        self._remember(status, done.stdout)
        return Answer(status, headers, done.stdout)

    def _process(self, argv: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv,
            cwd=self.folder,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=False,
        )

    def _headers(self) -> tuple[int, dict[str, str]]:
        path = self.folder / ".headers"
        if not path.exists():
            return 0, {}
        status_line, _, rest = path.read_bytes().partition(b"\r\n")
        headers = parse_headers(BytesIO(rest))
        return int(status_line.split()[1]), {name.lower(): value for name, value in headers.items()}

    def _remember(self, status: int, out: str) -> None:
        try:
            body = json.loads(out)
        except ValueError:
            return
        if isinstance(body, dict):
            names = {"TICKET": "ticket", "CURSOR": "nextCursor"} | ({"ID": "workflowId"} if status == 202 else {})
            self.environ |= {name: body[key] for name, key in names.items() if isinstance(body.get(key), str)}

    def _bash(self, fence: Fence) -> list[str]:
        looks_only = not re.search(r" -(X|d|F)\b|ticket", fence.text)
        until = time.monotonic() + PATIENCE
        while True:
            try:
                wrong = list(compared(fence.reply, self.run(fence.text)))
            except (AssertionError, subprocess.TimeoutExpired, ValueError) as error:
                wrong = [str(error)]
            if not wrong or not looks_only or time.monotonic() > until:
                return wrong
            time.sleep(0.02)  # the service is asked again, as a reader would

    def _script(self, fence: Fence, *argv: str) -> list[str]:
        done = self._process([*argv])
        if done.returncode:
            return [f"exit status {done.returncode}: {done.stdout}{done.stderr}"]
        return list(printed(fence.reply, done.stdout))

    def _frames(self, fence: Fence) -> list[str]:
        steps = re.sub(r"\n {2,}", "", fence.text.strip()).splitlines()
        websocket_url = self.url.replace("http", "ws", 1) + "/v1/comfyui/stream"
        with connect(websocket_url, additional_headers={"X-API-Key": KEY}) as socket:
            for step in steps:
                sign, _, text = step.partition(" ")
                text = text.replace("$ID", self.environ.get("ID", "$ID"))
                if sign == "$":
                    self.run(text)
                elif sign == ">":
                    socket.send(text)
                elif sign == "<" and (wrong := self._awaited(socket, json.loads(text))):
                    return wrong
        return []

    def _awaited(self, socket: Any, shown: dict[str, Any]) -> list[str]:
        nearest = ["nothing of this type came"]
        until = time.monotonic() + PATIENCE
        while (left := until - time.monotonic()) > 0:
            try:
                frame = socket.recv(timeout=left)
            except TimeoutError:
                break
            real = json.loads(frame) if isinstance(frame, str) else {}
            if real.get("type") == shown["type"]:
                wrong = list(differences(shown, real))
                if not wrong:
                    return []
                nearest = wrong
        return [f"{shown['type']}: {one}" for one in nearest]


def compared(reply: Fence | None, answer: Answer) -> Iterator[str]:
    """How an answer is not the reply that is shown."""
    if reply is None or reply.language not in ("http", "json", "text"):
        return
    if reply.language == "text":
        yield from printed(reply, answer.out)
        return
    head, body = "HTTP/1.1 200 OK", reply.text
    if reply.language == "http":
        head, _, body = reply.text.partition("\n\n")
    elif answer.status // 100 != 2:
        yield f"the status is {answer.status}"
        return
    status_line, *header_lines = head.strip().splitlines()
    if reply.language == "http" and answer.status != int(status_line.split()[1]):
        yield f"{status_line} is shown, the status is {answer.status}: {answer.out[:300]}"
        return
    for line in header_lines:
        name, _, value = line.partition(": ")
        real = answer.headers.get(name.lower())
        if real is None or plain(real) != plain(value):
            yield f"{line} is shown, it is {real}"
    if body.strip():
        yield from differences(json.loads(body), json.loads(answer.out))


def printed(reply: Fence | None, out: str) -> Iterator[str]:
    """How a print-out is not the one shown. A line `…` stands for any number of lines."""
    if reply is None or reply.language != "text":
        return
    pattern = "".join(
        r"(.*\n)*" if line == MORE else re.escape(plain(line)) + r"\n" for line in reply.text.strip().splitlines()
    )
    if not re.fullmatch(pattern, plain(out).strip() + "\n"):
        yield f"this was printed:\n{out}"


@contextmanager
def player(folder: Path) -> Iterator[Player]:
    comfyui = folder / "comfyui"
    model = comfyui / "models" / "loras" / "styles" / "ink.safetensors"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"not really")
    with (
        simulator(comfyui, "--preview") as (comfyui_url, _),
        served(
            folder, COMFYUI_URL=comfyui_url, COMFY_PATH=str(comfyui), MANAGEMENT_API_RATE_LIMIT="100000/minute"
        ) as (url, _),
    ):
        until = time.monotonic() + PATIENCE
        while httpx.get(f"{url}/ready").json()["checks"]["comfyui"] != "ok":
            assert time.monotonic() < until, "the service does not find the simulator"
            time.sleep(0.02)
        yield Player(url, folder / "reader")


@pytest.mark.skipif(shutil.which("curl") is None, reason="the examples are curl lines, and there is no curl")
def test_every_example_gives_the_reply_that_is_shown(tmp_path: Path) -> None:
    readme = [
        fence for fence in fences(README.read_text()) if fence.reply and fence.reply.language in ("http", "json")
    ]
    examples = [(API.name, fence) for fence in fences(API.read_text())]
    examples += [(README.name, fence) for fence in readme]
    assert sum(fence.language == "bash" for _, fence in examples) > 30
    with player(tmp_path) as reader:
        for name, fence in examples:
            wrong = reader.play(fence)
            assert not wrong, f"{name}:{fence.line}: " + "\n".join(wrong)


async def test_the_refusal_of_too_many_requests_is_the_one_that_is_shown(start_service: StartService) -> None:
    shown = next(fence for fence in fences(API.read_text()) if fence.text.startswith("HTTP/1.1 429"))
    service = await start_service(MANAGEMENT_API_RATE_LIMIT="100/minute")
    replies = [await service.client.get("/v1/comfyui/workflow") for _ in range(101)]
    assert replies[99].status_code == 200
    last = replies[-1]
    assert not list(compared(shown, Answer(last.status_code, dict(last.headers), last.text)))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", document.read_text())):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        place = (document.parent / name).resolve() if name else document
        if place.name in NOT_YET and not place.exists():
            continue
        assert place.exists(), f"{document.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", place.read_text()), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{document.name}: {target}"


def test_the_code_that_the_architecture_names_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py): (\w+)`", (ROOT / "docs" / "architecture.md").read_text())
    assert len(named) > 50
    sources = {path: (ROOT / "managers" / path).read_text() for path, _ in named}
    missing = [f"{path}: {name}" for path, name in named if not defines(name, sources[path])]
    assert not missing


def defines(name: str, source: str) -> bool:
    return re.search(rf"^\s*(async def|def|class) {name}\b|^{name}\b.*=", source, re.MULTILINE) is not None


NOT_YET = {"performance.md"}
"""Written by `make bench`: it may be absent from a fresh tree."""


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize(
    ("shown", "real"),
    [
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1, "b": 2}, {"a": 1}),
        ({"a": 1}, {"a": 1.5}),
        ({"a": None}, {"a": 1}),
        ({"a": True}, {"a": False}),
        ({"status": 404}, {"status": 400}),
        ({"status": "queued"}, {"status": "failed"}),
        ({"a": []}, {"a": [1]}),
        ({"a": [{"b": "x"}, "…"]}, {"a": []}),
        ({"a": "Workflow 3 not found"}, {"a": "Workflow 3 is gone"}),
    ],
)
def test_a_reply_of_another_shape_is_told(shown: Any, real: Any) -> None:
    assert list(differences(shown, real))


def test_what_is_another_each_time_may_be_another() -> None:
    shown = {
        "workflowId": "3f0c6f1e-4d3b-4d55-9f6a-0d6f2a3c9b11",
        "createdAt": 1,
        "ticket": "x",
        "a": ["1 s", "…"],
        "…": "…",
    }
    real = {
        "workflowId": "00000000-0000-4000-8000-000000000000",
        "createdAt": 9,
        "ticket": "y",
        "a": ["2 s", "z"],
        "b": 1,
    }
    assert not list(differences(shown, real))
