"""The ASGI application of the simulator: each route of PROTOCOL 2, each also below `/api`.

Handlers decode, call one part, encode. What a route cannot digest ends as the recorded plain 500.
"""

import asyncio
import os
import platform
import sys
import traceback
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from management_api.simulator import files, images, object_info, pretend, probes
from management_api.simulator.executor import Executor
from management_api.simulator.faults import Faults, LostAnswer, break_connection
from management_api.simulator.folders import MODEL_FOLDERS, Folders
from management_api.simulator.http import (
    INTERNAL_ERROR,
    Receive,
    Reply,
    Request,
    Scope,
    Send,
    TooLarge,
    as_json,
    as_text,
    respond,
)
from management_api.simulator.ledger import Ledger
from management_api.simulator.node import Interrupt
from management_api.simulator.options import SimulatorOptions
from management_api.simulator.queue import PromptQueue
from management_api.simulator.sockets import Hub
from management_api.simulator.validation import validate

NODE_MODULES: Final = (images, probes, pretend)
"""Imported for their registrations."""
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
Handler = Callable[[Request], Awaitable[Reply]]


class Simulator:
    """One simulated ComfyUI. Serve it as an ASGI application while `work()` runs beside it."""

    def __init__(self, options: SimulatorOptions) -> None:
        self.options = options
        self.folders = Folders(options.directory, pretend_models=options.pretend_models)
        self.features = {"supports_preview_metadata": True, "max_upload_size": options.max_upload_bytes}
        self.hub = Hub(self.features)
        self.ledger = Ledger(options.ledger)
        self.queue = PromptQueue(self._changed, self.ledger)
        self.interrupt = Interrupt()
        self.executor = Executor(self.hub, self.folders, options, self.interrupt, self.ledger)
        self.faults = Faults(self.hub, self.queue)
        self._routes: dict[tuple[str, str], Handler] = {
            ("GET", "/prompt"): self._get_prompt,
            ("POST", "/prompt"): self._post_prompt,
            ("GET", "/queue"): self._get_queue,
            ("POST", "/queue"): self._post_queue,
            ("POST", "/interrupt"): self._interrupt,
            ("GET", "/history"): self._get_history,
            ("POST", "/history"): self._post_history,
            ("GET", "/view"): self._view,
            ("POST", "/upload/image"): self._upload,
            ("POST", "/upload/mask"): self._upload,
            ("GET", "/object_info"): self._object_info,
            ("GET", "/system_stats"): self._system_stats,
            ("GET", "/features"): self._features,
            ("GET", "/models"): self._models,
            ("GET", "/embeddings"): self._embeddings,
            ("POST", "/free"): self._free,
        }
        if options.faults:
            self._routes["POST", "/_faults"] = self._set_faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            return
        path = scope["path"].removeprefix("/api")
        if not _origin_allowed(scope):
            await self._refuse(scope, receive, send)
        elif scope["type"] == "websocket":
            watched = self.ledger.witnessed(send, scope["query_string"])
            await self.hub.serve(scope["query_string"], receive, watched, self._status)
        else:
            request = Request(scope, receive, self.options.max_upload_bytes)
            try:
                reply = await self._answer(request, path)
            except LostAnswer:
                break_connection(send)
                await receive()  # until the connection is really gone
                return
            await respond(send, reply, head=request.method == "HEAD")
            self.ledger.answered(request.path, reply.body)

    async def work(self) -> None:
        """The worker: one prompt after the other. Dies of what the real one dies of, and stays dead."""
        publisher = asyncio.ensure_future(self.hub.publish())
        try:
            await self._work()
        except Exception:  # noqa: BLE001 - a dead worker beside healthy HTTP is what is simulated (PROTOCOL 1.9)
            traceback.print_exc()
            await asyncio.Event().wait()
        finally:
            publisher.cancel()
            await asyncio.gather(publisher, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            taken = await self.queue.get()
            if taken is not None:
                task_id, item = taken
                await self.faults.before_execution()
                entry = await self.executor.execute(item)
                self.queue.done(task_id, entry)
                if (client := self.hub.current_client) is not None:
                    self.hub.send("executing", {"node": None, "prompt_id": item[1]}, client)
            if self.queue.take_flags():
                self.executor.cache.clear()

    def _status(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": self.queue.remaining()}}

    def _changed(self) -> None:
        self.hub.send("status", {"status": self._status()}, None)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})  # before accept: 403
        else:
            await respond(send, Reply(403))

    async def _answer(self, request: Request, path: str) -> Reply:
        method = "GET" if request.method == "HEAD" else request.method
        handler = self._routes.get((method, path))
        if handler is None and method == "GET":
            folder, _, name = path.removeprefix("/").partition("/")
            handler = {"history": self._history_of, "object_info": self._object_info, "models": self._models_of}.get(
                folder if name else ""
            )
        if handler is None:
            return Reply(404, b"", "application/octet-stream")
        try:
            await self.faults.before_answer(path)
            return await handler(request)
        except TooLarge:
            return as_text(f"Maximum request body size {self.options.max_upload_bytes} exceeded.", 413)
        except LostAnswer:
            raise
        except Exception:  # noqa: BLE001 - unhandled errors are a plain 500, as recorded
            return INTERNAL_ERROR

    async def _get_prompt(self, _: Request) -> Reply:
        return as_json(self._status())

    async def _post_prompt(self, request: Request) -> Reply:
        body = await request.json()
        body = {} if isinstance(body, list) else body  # a list holds no `prompt` either: 400, not 500
        await self.faults.before_accept()
        if "number" in body:
            number = float(body["number"])
        else:
            number = -self.queue.number if body.get("front") else self.queue.number
            self.queue.number += 1
        if "prompt" not in body:
            text = "No prompt provided"
            return as_json(
                {
                    "error": {"type": "no_prompt", "message": text, "details": text, "extra_info": {}},
                    "node_errors": {},
                },
                400,
            )
        graph = body["prompt"]
        prompt_id = str(body["prompt_id"]) if "prompt_id" in body else str(uuid.uuid4())
        verdict = validate(graph, body.get("partial_execution_targets"), self.folders)
        if verdict.error is not None:
            return as_json({"error": verdict.error, "node_errors": verdict.node_errors}, 400)
        extra_data = body.get("extra_data", {})
        if "client_id" in body:
            extra_data["client_id"] = body["client_id"]
        self.queue.put((number, prompt_id, graph, extra_data, verdict.outputs))
        await self.faults.after_accept()
        return as_json({"prompt_id": prompt_id, "number": number, "node_errors": verdict.node_errors})

    async def _get_queue(self, _: Request) -> Reply:
        return as_json({"queue_running": self.queue.running(), "queue_pending": self.queue.pending()})

    async def _post_queue(self, request: Request) -> Reply:
        body = await request.json()
        if body.get("clear"):
            self.queue.clear()
        for prompt_id in body.get("delete", ()):
            self.queue.delete(prompt_id)
        return Reply()

    async def _interrupt(self, request: Request) -> Reply:
        try:
            body = await request.json()
        except msgspec.DecodeError:
            body = {}  # an unparsable body is a global interrupt
        prompt_id = body.get("prompt_id")
        if not prompt_id or any(item[1] == prompt_id for item in self.queue.running()):
            for item in self.queue.running():
                self.ledger.note("interrupted", item[1], item[3])
            self.interrupt.up = True
        return Reply()

    async def _get_history(self, request: Request) -> Reply:
        limit = int(request.query["max_items"]) if "max_items" in request.query else None
        offset = int(request.query.get("offset", -1))
        return as_json(dict(self.queue.history(limit, offset)))

    async def _history_of(self, request: Request) -> Reply:
        prompt_id = request.path.partition("/history/")[2]  # an id may hold slashes
        entry = self.queue.history_of(prompt_id)
        return as_json({} if entry is None else {prompt_id: entry})

    async def _post_history(self, request: Request) -> Reply:
        body = await request.json()
        if body.get("clear"):
            self.queue.forget_all()
        for prompt_id in body.get("delete", ()):
            self.queue.forget(prompt_id)
        return Reply()

    async def _view(self, request: Request) -> Reply:
        return await asyncio.to_thread(files.view, request, self.folders)

    async def _upload(self, request: Request) -> Reply:
        body = await request.body()
        mask = request.path.endswith("/mask")
        return await asyncio.to_thread(files.upload, request, body, self.folders, mask=mask)

    async def _object_info(self, request: Request) -> Reply:
        name = request.path.removeprefix("/api").removeprefix("/object_info").removeprefix("/")
        if not name:
            return as_json(object_info.describe_all(self.folders))
        return as_json({name: object_info.describe(name, self.folders)} if object_info.known(name) else {})

    async def _system_stats(self, _: Request) -> Reply:
        pages = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_AVPHYS_PAGES")
        total, free = (count * os.sysconf("SC_PAGE_SIZE") for count in pages)
        system = {
            "os": os.name,
            "ram_total": total,
            "ram_free": free,
            "comfyui_version": self.options.version,
            "required_frontend_version": "0",
            "installed_templates_version": None,
            "required_templates_version": "0",
            "python_version": platform.python_version(),
            "pytorch_version": "simulated",
            "embedded_python": False,
            "argv": sys.argv[:1],
        }
        memory = {"vram_total": total, "vram_free": free, "torch_vram_total": total, "torch_vram_free": free}
        return as_json({"system": system, "devices": [{"name": "cpu", "type": "cpu", "index": None} | memory]})

    async def _features(self, _: Request) -> Reply:
        return as_json(self.features)

    async def _models(self, _: Request) -> Reply:
        return as_json(MODEL_FOLDERS)

    async def _models_of(self, request: Request) -> Reply:
        folder = request.path.rpartition("/")[2]
        return as_json(self.folders.models(folder)) if folder in MODEL_FOLDERS else Reply(404)

    async def _embeddings(self, _: Request) -> Reply:
        return as_json([name.rpartition(".")[0] for name in self.folders.models("embeddings")])

    async def _free(self, request: Request) -> Reply:
        body = await request.json()
        self.queue.free(unload_models=bool(body.get("unload_models")), free_memory=bool(body.get("free_memory")))
        return Reply()

    async def _set_faults(self, request: Request) -> Reply:
        self.faults.set(await request.body())
        return Reply()


def _origin_allowed(scope: Scope) -> bool:
    """The check against foreign web pages (PROTOCOL 2, origin check)."""
    headers = dict(scope["headers"])
    if b"origin" not in headers:
        return True
    host = urlsplit("//" + bytes(headers.get(b"host", b"")).decode("latin-1"))
    origin = urlsplit(bytes(headers[b"origin"]).decode("latin-1").lower())
    return host.hostname not in _LOOPBACK or not origin.netloc or origin.netloc == host.netloc
