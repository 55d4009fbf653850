"""How much one client may have: open streams, names on a stream, bytes of a body. Against the real process."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.doors import SECONDS, STREAM
from tests.program import KEY, served
from tests.queue_kit import PATH, picture

Headers = dict[str, str]


class Client:
    """Somebody who opens streams, of either kind, from an address of his own choice."""

    def __init__(self, url: str, **headers: str) -> None:
        self.url = url
        self.headers = {"X-API-Key": KEY} | {name.replace("_", "-"): value for name, value in headers.items()}

    def listen(self) -> ClientConnection:
        return connect(self.url.replace("http", "ws") + STREAM, additional_headers=self.headers)

    def refused(self) -> httpx.Response:
        """The reply to an upgrade that must be refused."""
        with pytest.raises(InvalidStatus) as caught, self.listen():
            pass
        reply = caught.value.response
        return httpx.Response(reply.status_code, headers=dict(reply.headers.raw_items()), content=bytes(reply.body))

    @contextmanager
    def follow(self, workflow_id: str) -> Iterator[httpx.Response]:
        headers = self.headers | {"accept": "text/event-stream"}
        url = f"{self.url}{PATH}/{workflow_id}/events"
        with httpx.Client(headers=headers, timeout=SECONDS) as client, client.stream("GET", url) as reply:
            pieces = reply.iter_bytes()  # kept: without it the stream is closed
            if reply.status_code == 200:
                next(pieces)
            else:
                reply.read()
            yield reply
            del pieces

    def submit(self) -> str:
        reply = httpx.post(self.url + PATH, json={"workflow": picture()}, headers=self.headers)
        found: str = reply.raise_for_status().json()["workflowId"]
        return found

    def until_welcome(self) -> None:
        """The service notices a little later that a stream was closed."""
        until = time.monotonic() + SECONDS
        while True:
            try:
                with self.listen():
                    return
            except InvalidStatus:
                assert time.monotonic() < until


def test_a_client_has_so_many_streams_of_both_kinds(tmp_path: Path) -> None:
    with served(tmp_path, MANAGEMENT_API_MAX_SOCKETS="3") as (url, _), ExitStack() as streams:
        client = Client(url)
        waiting = client.submit()
        first = streams.enter_context(client.listen())
        streams.enter_context(client.listen())
        assert streams.enter_context(client.follow(waiting)).status_code == 200
        reply = client.refused()
        assert reply.status_code == 429
        assert reply.headers["content-type"] == "application/problem+json"
        problem = reply.json()
        assert problem["detail"] == "3 streams are open from this address; MANAGEMENT_API_MAX_SOCKETS allows no more"
        assert int(reply.headers["retry-after"]) == problem["retryAfter"] > 0
        with client.follow(waiting) as refused:
            assert (refused.status_code, refused.json()["detail"]) == (429, problem["detail"])
        # Everything else is answered, and those who are in hear on.
        later = client.submit()
        assert json.loads(first.recv(SECONDS))["workflowId"] == later
        first.close()
        client.until_welcome()
        streams.enter_context(client.listen())
        assert client.refused().status_code == 429


def test_who_was_refused_holds_no_place(tmp_path: Path) -> None:
    with served(tmp_path, MANAGEMENT_API_MAX_SOCKETS="1") as (url, _):
        for _ in range(3):
            assert Client(url, X_API_Key="wrong").refused().status_code == 401
            assert Client(url, Origin="https://elsewhere.example").refused().status_code == 403
            with Client(url).follow(str(uuid.uuid4())) as reply:
                assert reply.status_code == 404
        with Client(url).listen():
            for _ in range(3):
                assert Client(url).refused().status_code == 429
        Client(url).until_welcome()


@pytest.mark.parametrize(
    "environ",
    [{"MANAGEMENT_API_MAX_SOCKETS": "0"}, {"MANAGEMENT_API_RATE_LIMIT_ALLOW": "127.0.0.0/8"}],
    ids=["no limit", "allowed"],
)
def test_who_is_not_limited(tmp_path: Path, environ: Headers) -> None:
    with served(tmp_path, **{"MANAGEMENT_API_MAX_SOCKETS": "2"} | environ) as (url, _), ExitStack() as streams:
        for _ in range(4):
            streams.enter_context(Client(url).listen())


def test_who_the_client_is_says_only_a_trusted_proxy(tmp_path: Path) -> None:
    limit = {"MANAGEMENT_API_MAX_SOCKETS": "1"}
    with served(tmp_path, **limit) as (url, _), Client(url, X_Forwarded_For="198.51.100.1").listen():
        for name in ("X_Forwarded_For", "Forwarded", "X_Real_IP"):
            assert Client(url, **{name: "198.51.100.2"}).refused().status_code == 429, "anybody can say that"
    with (
        served(tmp_path, MANAGEMENT_API_TRUSTED_PROXIES="127.0.0.0/8", **limit) as (url, _),
        Client(url, X_Forwarded_For="198.51.100.1").listen(),
        Client(url, X_Forwarded_For="198.51.100.2").listen(),
        Client(url, X_Forwarded_For="2001:db8:1:2::1").listen(),
    ):
        for taken in ("198.51.100.1", "203.0.113.7, 198.51.100.2", "2001:db8:1:2::ffff"):
            assert Client(url, X_Forwarded_For=taken).refused().status_code == 429


def test_a_stream_names_so_many_workflows_and_stays(tmp_path: Path) -> None:
    def subscribe(ids: list[str]) -> dict[str, Any]:
        stream.send(json.dumps({"type": "subscribe", "workflowId": ids}))
        found: dict[str, Any] = json.loads(stream.recv(SECONDS))
        return found

    with served(tmp_path) as (url, _), Client(url).listen() as stream:
        ids = [str(uuid.uuid4()) for _ in range(1000)]
        assert len(subscribe(ids[:600])["workflowIds"]) == 600
        told = subscribe([*ids[600:], str(uuid.uuid4())])
        assert (told["type"], told["code"]) == ("error", "too_many_ids")
        assert "1000" in told["message"]
        assert subscribe(ids[600:])["workflowIds"] == sorted(ids)
        assert subscribe(ids)["type"] == "subscribed", "those it has are not counted twice"
        own = str(uuid.uuid4())
        stream.send(json.dumps({"type": "unsubscribe", "workflowId": ids[0]}))
        assert json.loads(stream.recv(SECONDS))["type"] == "unsubscribed"
        assert own in subscribe([own])["workflowIds"]
        reply = httpx.post(url + PATH, json={"workflow": picture(), "id": own}, headers={"X-API-Key": KEY})
        assert reply.status_code == 202
        assert json.loads(stream.recv(SECONDS))["workflowId"] == own


def test_what_is_too_large_says_how_large_it_may_be(tmp_path: Path) -> None:
    with (
        served(tmp_path, MANAGEMENT_API_MAX_BODY="1MiB") as (url, _),
        httpx.Client(base_url=url, headers={"X-API-Key": KEY}) as client,
    ):
        limit = "The body is larger than 1048576 bytes, which MANAGEMENT_API_MAX_BODY allows"
        for content in (b"x" * 2**21, (b"x" * 2**16 for _ in range(20))):
            reply = client.post(PATH, content=content, headers={"content-type": "application/json"})
            assert (reply.status_code, reply.json()["detail"]) == (413, limit)
        reply = client.get(PATH, headers={"x-much": "x" * 70_000})
        assert reply.status_code == 431
        assert reply.json()["detail"] == "The request line and the headers are larger than 65536 bytes"
