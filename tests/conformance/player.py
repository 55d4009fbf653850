"""Plays the client's side of a recording: each request and frame at the recorded point of the conversation.

The points are found by what the server sends, not by the clock: before each action of the client, what the recorded
client had heard by then must have been heard here too. Recorded pauses are kept only while a prompt is under way.
"""

import asyncio
import io
import json
import signal
import struct
import uuid
from typing import Any

import httpx
import msgspec
import pytest
import websockets
from msgspec import UNSET
from PIL import Image
from websockets.asyncio.client import ClientConnection, connect

from tests.conformance.recording import UUID, Event, Frame, frame_of, frames, submissions
from tests.conformance.servers import Server

PATIENCE = 10.0
"""Seconds to wait for what the recorded client had heard."""
_IDLE_PAUSE = 0.02


class Answer(msgspec.Struct, frozen=True):
    """What came back for a request."""

    status: int
    content_type: str
    content_disposition: str
    content: bytes
    error: str = ""


class Played(msgspec.Struct):
    """What the server sent in one replay, with the recording's ids in place of its own."""

    answers: dict[int, Answer]
    frames: dict[str, list[Frame]]
    close_codes: dict[str, int | None]


class _Socket:
    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.frames: list[Frame] = []
        self.heard = asyncio.Event()
        self.reader = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        try:
            async for data in self.connection:
                self.frames.append(parse(data))
                self.heard.set()
        except websockets.ConnectionClosed:
            pass
        finally:
            self.heard.set()


def parse(data: str | bytes) -> Frame:
    """Take a frame apart the way the recorder did."""
    if isinstance(data, str):
        return Frame(json.loads(data))
    (kind,) = struct.unpack_from(">I", data)
    if kind == 1:
        return Frame(UNSET, 1, {"format_code": struct.unpack_from(">I", data, 4)[0], "image_magic": data[8:12].hex()})
    (size,) = struct.unpack_from(">I", data, 4)
    head, tail = data[8 : 8 + size], data[8 + size :]
    if kind == 3:
        return Frame(UNSET, 3, {"node_id": head.decode(), "text": tail.decode()})
    return Frame(UNSET, kind, {"metadata": json.loads(head), "image_magic": tail[:4].hex()})


def picture(colour: str) -> bytes:
    """A small PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


class Player:
    """One replay of one recording."""

    def __init__(self, events: list[Event], server: Server, client: httpx.AsyncClient) -> None:
        self.events = events
        self.server = server
        self.client = client
        self.ours: dict[str, str] = {}
        """Recorded ids and file names -> ours."""
        self.sockets: dict[str, _Socket] = {}
        self.heard: dict[str, list[Frame]] = {}
        self.close_codes: dict[str, int | None] = {}
        self.calls: dict[int, asyncio.Task[Answer]] = {}
        self.answers: dict[int, Answer] = {}
        for body in submissions(events).values():
            chosen = body.get("prompt_id")
            if isinstance(chosen, str) and UUID.fullmatch(chosen):
                self.ours[chosen] = chosen[:8] + str(uuid.uuid4())[8:]  # fresh, but in the recorded order

    async def play(self) -> Played:
        """Do what the recorded client did. AssertionError when the server does not follow."""
        await self._prepare()
        previous = None
        try:
            for index, event in enumerate(self.events):
                if event.dir not in ("ws-in", "http-response") and previous is not None:
                    await self._catch_up(index)
                    await asyncio.sleep(self._pause(index, event.t - previous.t))
                await self._act(event)
                previous = event
        finally:
            for name in list(self.sockets):
                await self._close(name)
            for call in self.calls.values():
                call.cancel()
            await asyncio.gather(*self.calls.values(), return_exceptions=True)
        return self._translated()

    # What the recorded server already knew ----------------------------------------------------------------------

    async def _prepare(self) -> None:
        """Idle, nothing cached but what the first recorded prompt found cached, and the two uploaded files there."""
        if self.server.ours:  # what a failed replay may have left; others may use a server that is not ours
            await self.client.post("/queue", json={"clear": True})
            await self.client.post("/interrupt", json={})
        await self._idle()
        await self.client.post("/free", json={"free_memory": True, "unload_models": True})
        await self._idle()
        for name, content in (("probe-input.png", picture("red")), ("note.txt", b"not an image at all")):
            await self.client.post("/upload/image", files={"image": (name, content)}, data={"overwrite": "true"})
        bodies = submissions(self.events)
        cached = [e for e in self.events if e.dir == "ws-in" and e.frame == "text"]
        first = next((frame_of(e) for e in cached if e.message["type"] == "execution_cached"), None)
        if first is None or not first.data["nodes"]:
            return
        prompt = bodies[str(first.prompt)]["prompt"]
        graph = {node_id: prompt[node_id] for node_id in first.data["nodes"]}
        if not any(node["class_type"] == "SaveImage" for node in graph.values()):
            link = [first.data["nodes"][0], 0]
            graph["warm"] = {"class_type": "PreviewImage", "inputs": {"images": link}}
        await self.client.post("/prompt", json={"prompt": graph})
        await self._idle()

    async def _idle(self) -> None:
        async with asyncio.timeout(PATIENCE * 3):
            while (await self.client.get("/prompt")).json()["exec_info"]["queue_remaining"]:  # noqa: ASYNC110 - polled
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.02)

    # Where the conversation is ----------------------------------------------------------------------------------

    async def _catch_up(self, index: int) -> None:
        """Wait until each open socket has heard what the recorded one had heard before event `index`."""
        for name, socket in self.sockets.items():
            recorded = frames(self.events[:index], name)
            wanted = _landmarks(recorded)
            try:
                async with asyncio.timeout(PATIENCE):
                    while missing := wanted - _landmarks_of(socket.frames, self.ours):
                        missing = {key for key in missing if self._known(key)}
                        if not missing or socket.reader.done():
                            break
                        socket.heard.clear()
                        await socket.heard.wait()
            except TimeoutError:
                raise AssertionError(f"socket {name} did not hear {sorted(missing, key=str)}") from None
            self._learn_names(recorded, socket.frames)

    def _known(self, key: tuple[Any, ...]) -> bool:
        return key[1] is None or key[1] in self.ours or not UUID.fullmatch(key[1])

    def _learn_names(self, recorded: list[Frame], heard: list[Frame]) -> None:
        outputs = {(f.prompt, f.data["node"]): f.data["output"] for f in heard if f.kind == "executed"}
        for frame in recorded:
            if frame.kind == "executed":
                ours = outputs.get((self.ours.get(str(frame.prompt), frame.prompt), frame.data["node"]), {})
                for theirs, mine in zip(frame.data["output"].get("images", ()), ours.get("images", ()), strict=False):
                    self.ours[theirs["filename"]] = mine["filename"]

    def _pause(self, index: int, recorded: float) -> float:
        """How long to wait before the next action, which followed its predecessor after `recorded` seconds."""
        before = self.events[:index]
        ended = {frame_of(e).prompt for e in before if e.dir == "ws-in" and frame_of(e).ends_prompt}
        if self.events[index].text == "server restarted":
            return 0.0
        if set(submissions(before)) - ended:
            return recorded
        last = next(event for event in reversed(before) if event.dir != "ws-in")
        if last.path == "/free":
            return min(recorded, 0.5)
        return min(recorded, 0.1 if last.dir in ("ws-open", "ws-close", "ws-out") else _IDLE_PAUSE)

    # What the client does ---------------------------------------------------------------------------------------

    async def _act(self, event: Event) -> None:
        if event.dir == "ws-open":
            url = self.server.url.replace("http", "ws", 1) + event.path
            connection = await connect(url, max_size=None, compression=None, ping_interval=None)
            self.sockets[event.conn] = _Socket(connection)
        elif event.dir == "ws-out":
            text = event.text or json.dumps(event.message)
            await self.sockets[event.conn].connection.send(text)
        elif event.dir == "ws-close":
            await self._close(event.conn, by_server=event.code is not None)
        elif event.dir == "http-request":
            self.calls[event.id] = asyncio.ensure_future(self._call(event))
        elif event.dir == "http-response":
            answer = self.answers[event.id] = await self.calls.pop(event.id)
            if event.path == "/prompt" and event.method == "POST" and event.status == answer.status == 200:
                self.ours[event.body["prompt_id"]] = json.loads(answer.content)["prompt_id"]
        elif event.dir == "note":
            await self._note(event.text)

    async def _note(self, text: str) -> None:
        if text in ("SIGINT sent", "SIGTERM sent"):
            self.server.kill(signal.Signals[text.split(maxsplit=1)[0]])
        elif text == "server restarted":
            await self.server.restart()
        elif text == "output file removed from disk":
            self.server.remove_outputs()
        elif text.startswith("ws with foreign Origin"):
            url = self.server.url.replace("http", "ws", 1) + "/ws"
            with pytest.raises(websockets.InvalidStatus) as refusal:
                await connect(url, origin=websockets.Origin("http://evil.example"))
            assert refusal.value.response.status_code == 403

    async def _close(self, name: str, *, by_server: bool = False) -> None:
        socket = self.sockets.pop(name)
        if not by_server:
            await socket.connection.close()
        await asyncio.wait_for(socket.reader, PATIENCE)
        if name not in self.close_codes:
            self.close_codes[name] = socket.connection.close_code if by_server else None
        self.heard.setdefault(name, []).extend(socket.frames)

    async def _call(self, event: Event) -> Answer:
        path = self._in_our_words(event.path)
        here = self.server.url.rpartition(":")[2]
        headers = {
            name: value.replace(":8188", f":{here}") if name == "Origin" else value
            for name, value in event.headers.items()
        }
        content, files, data = self._body(event)
        try:
            answer = await self.client.request(
                event.method, path, headers=headers, content=content, files=files, data=data, timeout=60
            )
        except httpx.TransportError as error:
            return Answer(0, "", "", b"", type(error).__name__)
        return Answer(
            answer.status_code,
            answer.headers.get("content-type", ""),
            answer.headers.get("content-disposition", ""),
            answer.content,
        )

    def _body(self, event: Event) -> tuple[bytes | None, dict[str, Any] | None, dict[str, str] | None]:
        if event.multipart is not None:
            fields = dict(event.multipart)
            field = "image" if "image" in fields else "file"
            words = fields.pop(field)
            if "MiB" in words:
                return None, {field: ("big.png", b"\0" * (101 << 20))}, fields
            other = event.path == "/upload/image" and event.id in (3, 4)
            content = b"not an image at all" if "note.txt" in words else picture("blue" if other else "red")
            return None, {field: (words.partition("filename=")[2], content)}, fields
        if "Content-Type" in event.headers:  # the recorder sent bytes that are no JSON, or too many
            return (b" " * (101 << 20) if self._too_large(event) else b"{broken"), None, None
        if event.body is UNSET:
            return None, None, None
        return self._in_our_words(json.dumps(event.body)).encode(), None, None

    def _too_large(self, request: Event) -> bool:
        return any(e.dir == "http-response" and e.id == request.id and e.status == 413 for e in self.events)

    def _in_our_words(self, text: str) -> str:
        for theirs, mine in self.ours.items():
            text = text.replace(theirs, mine)
        return text

    def _translated(self) -> Played:
        theirs = {mine: recorded for recorded, mine in self.ours.items() if UUID.fullmatch(recorded)}

        def back(text: str) -> str:
            return UUID.sub(lambda found: theirs.get(found[0], found[0]), text)

        answers = {
            number: msgspec.structs.replace(answer, content=back(answer.content.decode("latin-1")).encode("latin-1"))
            for number, answer in self.answers.items()
        }
        heard = {
            name: [msgspec.json.decode(back(msgspec.json.encode(frame).decode()), type=Frame) for frame in items]
            for name, items in self.heard.items()
        }
        return Played(answers, heard, self.close_codes)


def _landmarks(recorded: list[Frame]) -> set[tuple[Any, ...]]:
    """What must have been heard: verdicts and ends; of prompts under way also nodes and progress."""
    over = {frame.prompt for frame in recorded if frame.ends_node_run}
    return {
        key
        for frame in recorded
        if (key := _landmark(frame)) is not None
        and (frame.prompt not in over or frame.ends_node_run or frame.ends_prompt)
    }


def _landmarks_of(heard: list[Frame], ours: dict[str, str]) -> set[tuple[Any, ...]]:
    theirs = {mine: recorded for recorded, mine in ours.items()}
    keys = (_landmark(frame) for frame in heard)
    return {(key[0], theirs.get(key[1], key[1]), *key[2:]) for key in keys if key is not None}


def _landmark(frame: Frame) -> tuple[Any, ...] | None:
    if frame.kind.startswith(("binary", "status", "progress_state")):
        return None
    return (frame.kind, frame.prompt, frame.data.get("node"), frame.data.get("value"))
