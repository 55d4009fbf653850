"""A day in the life of the service at LOG_LEVEL=debug: no key, hash of a key, ticket or extraData in any log line,
event, reply, or error (CONTRACT 1, 4)."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from management_api.keys import add_key
from managers.callers import KeyScope
from tests.program import KEY, Process, run, served
from tests.queue_kit import PATH, picture, sleeper
from tests.simulator_process import simulator

PARTNER, DRAWING, WRONG, GUESSED = "sk-partner-5Wq8", "extra-pnginfo-9Ztm", "wrong-key-3Fv7", "guessed-ticket-8Lp2"
EXTRA = {"api_key_comfy_org": PARTNER, "auth_token": PARTNER, "extra_pnginfo": {"workflow": {"note": DRAWING}}}
CHANNELS = ["workflow", "node", "comfyui", "preview", "queue", "gpu", "backend"]
SECONDS = 20


def until(stream: ClientConnection, heard: list[str], kind: str, workflow_id: str | None) -> None:
    """Listen until this was said about this workflow."""
    while True:
        message = stream.recv(SECONDS)
        if isinstance(message, bytes):
            heard.append(message.decode("latin-1"))
            continue
        heard.append(message)
        frame = json.loads(message)
        if frame["type"] == kind and frame.get("workflowId") == workflow_id:
            return


def without_a_key(url: str) -> Iterator[str]:
    """What those hear who try to come in."""
    for headers in ({"X-API-Key": WRONG}, {"Authorization": f"Bearer {WRONG}"}, {"Authorization": f"Basic {WRONG}"}):
        for method in ("GET", "POST", "DELETE"):
            reply = httpx.request(method, f"{url}{PATH}?ticket={GUESSED}", headers=headers, content=WRONG)
            assert reply.status_code == 401
            yield f"{reply.headers} {reply.text}"
    address = url.replace("http", "ws") + "/v1/comfyui/stream"
    yield from refused(f"{address}?ticket={GUESSED}")
    yield from refused(address, "bearer", WRONG)


def refused(address: str, *protocols: str) -> Iterator[str]:
    """What a socket hears that may not come in."""
    with pytest.raises(InvalidStatus) as caught:
        connect(address, subprotocols=[Subprotocol(one) for one in protocols] or None)
    reply = caught.value.response
    assert reply.status_code == 401
    yield f"{reply.headers} {(reply.body or b'').decode()}"


def named_keys(client: httpx.Client, file: Path, shop: str, sender: str, process: Process) -> Iterator[str]:
    """What may go wrong with a named key, and with the file of their hashes."""
    for key in (shop, sender):
        bearer = {"Authorization": f"Bearer {key}", "X-API-Key": ""}
        statuses = [client.get(PATH, headers=bearer).status_code, client.post(PATH, headers=bearer).status_code]
        assert statuses == [200 if key == shop else 403, 400]
        httpx.get(f"{client.base_url}/v1/{key}/x={key}?key={key}", headers=bearer)  # `instance` is what was asked for
        assert client.post("/v1/comfyui/queue/pause", headers=bearer).status_code == 403
    good = file.read_text()
    wrong = (f"[{shop}", f'[a]\nsha256 = "{shop}"', f"{good}{shop} = 1")
    for number, content in enumerate(wrong, 1):
        file.write_text(content)
        end = time.monotonic() + SECONDS
        while sum("the keys file cannot be used" in line for line in process.seen) < number:
            assert client.get(PATH, headers={"X-API-Key": shop}).status_code == 200
            assert time.monotonic() < end
        ended = run(file.parent, "serve", MANAGEMENT_API_KEYS_FILE=str(file))
        assert ended.status == 1
        yield ended.err


def test_no_secret_gets_out(tmp_path: Path) -> None:
    said: list[str] = []
    keys = tmp_path / "keys.toml"
    shop = add_key(keys, "shop", scopes=[KeyScope.READ, KeyScope.SUBMIT])
    sender = add_key(keys, "sender", scopes=[KeyScope.SUBMIT])

    def keep(reply: httpx.Response) -> None:
        reply.read()
        if not reply.url.path.endswith("/ticket"):  # the one reply that is a secret
            said.append(f"{reply.headers} {reply.text}")

    with (
        simulator(tmp_path / "comfyui", "--faults") as (comfyui, backend),
        served(
            tmp_path, COMFYUI_URL=comfyui, MANAGEMENT_API_KEYS_FILE=str(keys), LOG_LEVEL="debug", LOG_FORMAT="json"
        ) as (url, process),
        httpx.Client(
            base_url=url, headers={"X-API-Key": KEY}, timeout=SECONDS, event_hooks={"response": [keep]}
        ) as client,
    ):
        ticket = client.post("/v1/comfyui/stream/ticket").json()["ticket"]
        address = f"{url.replace('http', 'ws')}/v1/comfyui/stream"

        def submit(graph: object, **body: object) -> httpx.Response:
            return client.post(PATH, json={"workflow": graph, "extraData": EXTRA, **body})

        said.extend(without_a_key(url))
        subscribe = json.dumps({"type": "subscribe", "channels": CHANNELS, "since": 0})
        with connect(address, subprotocols=[Subprotocol("bearer"), Subprotocol(KEY)]) as stream:
            assert stream.response is not None
            said.append(str(stream.response.headers))
            stream.send(subscribe)
            until(stream, said, "subscribed", None)
        with connect(f"{address}?ticket={ticket}") as stream:
            stream.send(subscribe)
            until(stream, said, "subscribed", None)
            said.extend(refused(f"{address}?ticket={ticket}"))  # it was good once

            done = submit(picture()).json()["workflowId"]
            until(stream, said, "workflow:completed", done)
            history = httpx.get(f"{comfyui}/history").text
            assert PARTNER in history, "ComfyUI got it"
            assert DRAWING in history
            (tmp_path / "comfyui" / "output" / "blocked").touch()
            broken = picture()  # the node that fails was given extra_pnginfo, and ComfyUI tells it with the error
            broken["2"]["inputs"]["filename_prefix"] = "blocked/picture"
            failing = submit(broken).json()["workflowId"]
            until(stream, said, "workflow:error", failing)
            again = client.post(f"{PATH}/{failing}/retry").json()["workflowId"]
            until(stream, said, "workflow:error", again)
            stopped = submit(sleeper()).json()["workflowId"]
            until(stream, said, "workflow:started", stopped)
            client.delete(f"{PATH}/{stopped}")
            until(stream, said, "workflow:cancelled", stopped)

            wrong = picture() | {"9": {"class_type": "NoSuchNode", "inputs": {}}}
            submit(wrong)
            client.post(PATH, json={"workflow": wrong, "extraData": EXTRA}, headers={"Prefer": "handling=strict"})
            client.post(f"{PATH}?dryRun=true", json={"workflow": picture(), "extraData": EXTRA})
            for bad in (f'{{"workflow":{{}},"extraData":"{PARTNER}"', f'{{"workflow":[],"extraData":["{PARTNER}"]}}'):
                assert client.post(PATH, content=bad).status_code == 400
            assert submit(picture(), gpu="nowhere").status_code == 400
            assert submit(picture(), metadata=5).status_code == 400
            same = picture()
            for _ in range(2):
                body = {"workflow": same, "extraData": EXTRA}
                client.post(PATH, json=body, headers={"Idempotency-Key": "one"})
            client.post(PATH, json={"workflow": picture(), "extraData": EXTRA}, headers={"Idempotency-Key": "one"})

            lost = submit(sleeper()).json()["workflowId"]
            until(stream, said, "workflow:started", lost)
            os.kill(backend.pid, signal.SIGKILL)
            until(stream, said, "backend:disconnected", None)
            for path in ("", f"/{done}", f"/{failing}?include=attempts", f"/{failing}/events", f"/{lost}/events"):
                assert client.get(PATH + path).status_code == 200
            for path in ("/", "/metrics", "/docs/json", "/v1/comfyui/outputs", "/ready"):
                assert client.get(path).status_code == 200
            client.get(f"{PATH}?cursor={PARTNER}&ticket={ticket}&key={KEY}")
            said.extend(named_keys(client, keys, shop, sender, process))
        process.signal(signal.SIGTERM)
        assert process.wait() == 0

    logged = "\n".join(process.seen)
    assert len(process.seen) > 30
    assert len(said) > 100
    everything = logged + "\n".join(said)
    hashes = [sha256(key.encode()).hexdigest() for key in (shop, sender)]
    for secret in (KEY, ticket, PARTNER, DRAWING, WRONG, GUESSED, shop, sender, *hashes):
        assert secret not in everything, everything[max(0, everything.index(secret) - 300) :][:600]
