"""AWS for tests: moto's server as a process of its own, an event bus in it, and what that bus was told.

The events come back through an SQS queue that is the target of a rule. `Front` stands between the service and moto
where something is to go wrong: it can be away, and it can refuse some entries of a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import httpx
import pytest
import uvicorn

from tests.comfy_kit import PATIENCE, PLAIN

MISSING = [name for name in ("moto", "flask", "boto3", "aiobotocore") if find_spec(name) is None]
needs_moto = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install 'moto[server]' aiobotocore"
)
KEYS = {
    "AWS_ACCESS_KEY_ID": "key-of-the-tests",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
    "AWS_REGION": "eu-west-1",
}

Told = dict[str, Any]
"""An event as a target gets it: `source`, `detail-type`, `detail`, `time`."""


class Moto:
    """The server."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                self.url = found[0]
                return
        self.end()
        raise AssertionError(f"moto's server did not start: {''.join(said)}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def client(self, service: str) -> Any:
        return import_module("boto3").client(
            service,
            endpoint_url=self.url,
            region_name=KEYS["AWS_REGION"],
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )


@contextlib.contextmanager
def started_moto() -> Iterator[Moto]:
    server = Moto()
    try:
        yield server
    finally:
        server.end()


class EventBus:
    """A bus of its own in moto, and everything it was told, in the order in which it came."""

    def __init__(self, moto: Moto) -> None:
        self.name = f"bus-{uuid.uuid4().hex[:8]}"
        self.url = moto.url
        self.told: list[Told] = []
        self._sqs = moto.client("sqs")
        self._queue = self._sqs.create_queue(QueueName=self.name)["QueueUrl"].replace(
            "http://sqs.eu-west-1.amazonaws.com", moto.url
        )
        arn = self._sqs.get_queue_attributes(QueueUrl=self._queue, AttributeNames=["QueueArn"])["Attributes"][
            "QueueArn"
        ]
        events = moto.client("events")
        events.create_event_bus(Name=self.name)
        pattern = json.dumps({"source": ["comfyui.monitor"]})
        events.put_rule(Name="all", EventBusName=self.name, EventPattern=pattern, State="ENABLED")
        events.put_targets(Rule="all", EventBusName=self.name, Targets=[{"Id": "ear", "Arn": arn}])

    def environ(self, **environ: str) -> dict[str, str]:
        """What the service needs to know of it."""
        return {**KEYS, "EVENTBRIDGE_BUS_NAME": self.name, "EVENTBRIDGE_ENDPOINT_URL": self.url, **environ}

    async def until(self, detail_type: str, **fields: Any) -> Told:
        """The first event of this type with these fields in its detail."""
        return await self.until_right(lambda event: event["detail-type"] == detail_type and _has(event, fields))

    async def until_right(self, right: Callable[[Told], bool]) -> Told:
        """The first event that is right, of those that came and that will come."""
        number = 0
        async with asyncio.timeout(PATIENCE):
            while True:
                while number == len(self.told):
                    await self.read(1)
                found = self.told[number]
                if right(found):
                    return found
                number += 1

    async def read(self, seconds: int = 0) -> list[Told]:
        """All there is by now; where there is nothing new, what comes first within so many seconds."""
        while messages := await asyncio.to_thread(self._receive, seconds):
            self.told += messages
            seconds = 0
        return self.told

    def types(self, workflow_id: str | None = None, *, live: bool = False) -> list[str]:
        """The detail types that came, of one workflow; without progress and nodes unless `live`."""
        skipped = () if live else ("Progress Update", "Node ", "Queue Status")
        return [
            event["detail-type"]
            for event in self.told
            if (workflow_id is None or event["detail"].get("workflowId") == workflow_id)
            and not any(event["detail-type"].startswith(one) for one in skipped)
        ]

    def details(self, detail_type: str, **fields: Any) -> list[dict[str, Any]]:
        return [event["detail"] for event in self.told if event["detail-type"] == detail_type and _has(event, fields)]

    def _receive(self, seconds: int) -> list[Told]:
        reply = self._sqs.receive_message(QueueUrl=self._queue, MaxNumberOfMessages=10, WaitTimeSeconds=seconds)
        messages = reply.get("Messages", [])
        for message in messages:
            self._sqs.delete_message(QueueUrl=self._queue, ReceiptHandle=message["ReceiptHandle"])
        return [json.loads(message["Body"]) for message in messages]


def _has(event: Told, fields: dict[str, Any]) -> bool:
    return all(event["detail"].get(name) == value for name, value in fields.items())


class Front:
    """A server before moto. `refuses` says which entries of a call fail; `calls` has the entries of each call."""

    def __init__(self, target: str) -> None:
        self.calls: list[list[dict[str, Any]]] = []
        self.refuses: Callable[[dict[str, Any]], bool] = lambda _: False
        self._target = target
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        """It listens; outside of this nothing does."""
        config = uvicorn.Config(self, host="127.0.0.1", port=self._port, log_config=None, lifespan="off")
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        await server.startup()
        assert server.started
        ticks = asyncio.create_task(server.main_loop())
        try:
            yield
        finally:
            server.should_exit = True
            await ticks
            await server.shutdown()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        status, content = await self._answer(body, headers)
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", b"application/x-amz-json-1.1")],
            }
        )
        await send({"type": "http.response.body", "body": content})

    async def _answer(self, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        entries = json.loads(body)["Entries"]
        self.calls.append(entries)
        bad = [self.refuses(entry) for entry in entries]
        good = [entry for entry, refused in zip(entries, bad, strict=True) if not refused]
        told: list[dict[str, Any]] = []
        if good:
            kept = {name: headers[name] for name in ("x-amz-target", "content-type", "authorization", "x-amz-date")}
            async with httpx.AsyncClient(timeout=10, **PLAIN) as client:
                reply = await client.post(self._target, content=json.dumps({"Entries": good}), headers=kept)
            if reply.status_code != 200:
                return reply.status_code, reply.content
            told = reply.json()["Entries"]
        failure = {"ErrorCode": "InternalFailure", "ErrorMessage": "An injected failure"}
        taken = iter(told)
        answers = [failure if refused else next(taken) for refused in bad]
        return 200, json.dumps({"FailedEntryCount": sum(bad), "Entries": answers}).encode()
