"""Named keys at work in the real service: what each may do, how much of it, and who is remembered (CONTRACT 1, 2)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sqlite3
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from litestar.routes import HTTPRoute, WebSocketRoute
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from management_api.app import Application, create_app
from management_api.keys import KeyRing, add_key, revoke_key
from management_api.logging import SILENT, Logs
from management_api.security import needed_scope
from managers.callers import KeyScope
from managers.clock import SystemClock
from managers.events.session import StreamConfig
from managers.workflows.sqlite_schema import FILE_NAME, MIGRATIONS
from tests.queue_kit import PATH, picture
from tests.serving import KEY, Log, SettingsMaker, StartServer, lifespan
from tests.stream_house import next_frame, open_house

READ, SUBMIT, ADMIN = KeyScope.READ, KeyScope.SUBMIT, KeyScope.ADMIN
DOCS = Path(__file__).parent.parent / "docs" / "configuration.md"
STREAM = "/v1/comfyui/stream"
ID = "5b2f3c1e-8a4d-4c59-9b6a-1d7e2f3a4b5c"
A_KEY = re.compile(r"cma_[A-Za-z0-9_-]{43}")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the keys are kept; nothing is there yet."""
    return tmp_path / "keys.toml"


class Ahead(SystemClock):
    """A clock that the test may put forward."""

    seconds = 0.0

    def now_ms(self) -> int:
        return super().now_ms() + int(self.seconds * 1000)

    def monotonic(self) -> float:
        return super().monotonic() + self.seconds


class House:
    """The real app with a file of keys. `ask` sends a request with the key of that name."""

    def __init__(self, app: Application, file: Path, clock: Ahead, made: dict[str, str]) -> None:
        self.app = app
        self.file = file
        self.clock = clock
        self.made = made
        self._stack = contextlib.AsyncExitStack()

    async def ask(
        self,
        name: str,
        method: str,
        path: str,
        *,
        peer: str = "127.0.0.1",
        headers: dict[str, str] | None = None,
        **options: Any,
    ) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, client=(peer, 50000))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            shown = {"X-API-Key": self.made.get(name, name), **(headers or {})}
            return await client.request(method, path, headers=shown, **options)

    async def submit(self, name: str, **options: Any) -> httpx.Response:
        return await self.ask(name, "POST", PATH, json={"workflow": picture()}, **options)

    def add(self, name: str, *scopes: KeyScope, **options: Any) -> None:
        """Another key, known from the next second on."""
        self.made[name] = add_key(self.file, name, scopes=scopes, **options)
        self.clock.seconds += 1

    def revoke(self, name: str) -> None:
        revoke_key(self.file, name)
        self.clock.seconds += 1


class OpenHouse:
    """`async with open_house_of(…) as house`."""

    def __init__(self, make_settings: SettingsMaker, file: Path) -> None:
        self._make_settings, self._file = make_settings, file
        self.made = {"the admin": KEY}

    @contextlib.asynccontextmanager
    async def __call__(self, *, logs: Logs = SILENT, **environ: str) -> AsyncIterator[House]:
        if not self._file.exists():
            for name, scopes in (
                ("reader", [READ]),
                ("sender", [SUBMIT]),
                ("shop", [READ, SUBMIT]),
                ("boss", [ADMIN]),
            ):
                self.made[name] = add_key(self._file, name, scopes=scopes)
        clock = Ahead()
        settings = self._make_settings(MANAGEMENT_API_KEYS_FILE=str(self._file), **environ)
        app = create_app(settings, logs=logs, clock=clock)
        async with lifespan(app):
            yield House(app, self._file, clock, self.made)


@pytest.fixture
def opened(make_settings: SettingsMaker, file: Path) -> OpenHouse:
    return OpenHouse(make_settings, file)


@pytest.fixture
async def house(opened: OpenHouse) -> AsyncIterator[House]:
    """The service with the keys `reader`, `sender`, `shop` (both) and `boss`."""
    async with opened() as found:
        yield found


HOLDERS = {READ: {"reader", "shop"}, SUBMIT: {"sender", "shop"}, ADMIN: set[str]()}


def doors(app: Application) -> Iterator[tuple[str, str]]:
    """Every operation that asks for a key: method (WS for the stream; HEAD is like GET), and template of the path."""
    for route in app.litestar.routes:
        template = route.path_format or "/"
        if not template.startswith("/v1"):
            continue
        if isinstance(route, WebSocketRoute):
            yield "WS", template
        elif isinstance(route, HTTPRoute):
            yield from ((method, template) for method in sorted(route.methods - {"HEAD", "OPTIONS"}))


def table(app: Application) -> str:
    """As docs/configuration.md has it."""
    order = list(KeyScope)
    rows = sorted(
        (order.index(needed_scope("GET" if method == "WS" else method, template)), template, method)
        for method, template in doors(app)
    )
    lines = [f"| `{method} {template}` | `{order[place]}` |" for place, template, method in rows]
    return "\n".join(["| operation | scope |", "|---|---|", *lines]) + "\n"


async def test_the_documentation_has_this_table(house: House) -> None:
    assert table(house.app) in DOCS.read_text("utf-8"), f"docs/configuration.md, Keys: paste\n{table(house.app)}"


async def test_each_operation_asks_for_its_scope_and_names_it(house: House) -> None:
    seen = set()
    for method, template in doors(house.app):
        if method == "WS":
            continue
        path = re.sub(r"\{n\}", "0", re.sub(r"\{(?!n\})[^}]*\}", "unknown-thing", template))
        needed = needed_scope(method, template)
        seen.add(needed)
        for name in ("reader", "sender", "shop", "boss", "the admin"):
            reply = await house.ask(name, method, path)
            where = (name, method, template, reply.status_code, reply.text)
            if name in HOLDERS[needed] | {"boss", "the admin"}:
                assert reply.status_code not in {401, 403, 500}, where
                continue
            assert reply.status_code == 403, where
            assert reply.headers["www-authenticate"] == f'Bearer error="insufficient_scope", scope="{needed}"'
            assert reply.headers["content-type"] == "application/problem+json"
            problem = reply.json()
            assert problem["detail"] == f"The key {name} has not the scope {needed}, which this needs"
            assert (problem["status"], problem["title"]) == (403, "Forbidden")
            if method == "GET":
                assert (await house.ask(name, "HEAD", path)).status_code in {403, 405}, where
    assert seen == set(KeyScope)


async def test_admin_operations_are_these(house: House) -> None:
    """By hand, so that a change of the rule is seen."""
    admin = {door for door in doors(house.app) if needed_scope(*door) is ADMIN}
    assert ("POST", "/v1/comfyui/queue/{action}") in admin
    assert ("DELETE", "/v1/comfyui/output/{path}") in admin
    read = {template for method, template in admin if method in {"GET", "WS"}}
    assert read == {"/v1/webhooks", "/v1/webhooks/{webhook_id}", "/v1/webhooks/secret"}, "addresses and a secret"
    for template in (
        "/v1/comfyui/backends/{name}/{action}",
        "/v1/comfyui/backends/{name}/drain",
        "/v1/comfyui/workflow/retry",
        "/v1/tasks",
    ):
        assert needed_scope("POST", template) is ADMIN
    assert needed_scope("POST", "/v1/comfyui/workflow/{workflow_id}/retry") is SUBMIT
    assert needed_scope("PUT", "/v1/something/new") is SUBMIT, "what nobody thought of is not for readers"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/comfyui/queue/pause",
        "/v1/comfyui/queue/pause/",
        "/v1/comfyui//queue/pause",
        "//v1/comfyui/queue/pause",
        "/v1/comfyui/%71ueue/pause",
        "/v1/comfyui/x/../queue/pause",
        "/docs/../v1/comfyui/queue/pause",
        "/docs//../v1/comfyui/queue/pause",
    ],
)
async def test_no_way_to_write_a_path_leads_past_the_scope(house: House, path: str) -> None:
    status = 0  # httpx would tidy the path, so the ASGI scope is made by hand

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {
        "type": "http",
        "method": "POST",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"x-api-key", house.made["shop"].encode()), (b"host", b"service")],
        "client": ("127.0.0.1", 1),
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "server": ("service", 80),
        "root_path": "",
    }
    await house.app(scope, receive, send)
    assert status in {403, 404, 405}
    assert house.app.running[0].workflows.counts().paused is False


async def test_what_is_not_there_is_404_for_any_key(house: House) -> None:
    for name in ("reader", "sender"):
        assert (await house.ask(name, "GET", "/v1/nothing")).status_code == 404
        assert (await house.ask(name, "PUT", PATH)).status_code == 405
    for path in ("/", "/health", "/docs"):
        assert (await house.ask("nobody", "GET", path)).status_code == 200


async def test_metrics_may_ask_for_a_key_that_reads(opened: OpenHouse) -> None:
    async with opened(MANAGEMENT_API_METRICS_AUTH="true") as house:
        asked = {name: (await house.ask(name, "GET", "/metrics")).status_code for name in ("reader", "sender", "no")}
    assert asked == {"reader": 200, "sender": 403, "no": 401}


async def test_workflows_remember_who_handed_them_in(house: House) -> None:
    ids = {}
    for name in ("shop", "sender", "boss", "the admin"):
        reply = await house.submit(name)
        assert reply.status_code == 202, reply.text
        ids[name] = reply.json()["workflowId"]
    named = ids | {"admin": ids["the admin"]}
    for name in ("shop", "sender", "boss", "admin"):
        view = (await house.ask("reader", "GET", f"{PATH}/{named[name]}")).json()
        assert view["submittedBy"] == name
        listed = (await house.ask("reader", "GET", PATH, params={"submittedBy": name})).json()["workflows"]
        assert [one["workflowId"] for one in listed] == [named[name]]
    assert (await house.ask("sender", "DELETE", f"{PATH}/{ids['shop']}")).status_code == 200, "there are no tenants"
    again = await house.ask("boss", "POST", f"{PATH}/{ids['shop']}/retry")
    assert again.status_code == 202
    view = (await house.ask("reader", "GET", f"{PATH}/{again.json()['workflowId']}")).json()
    assert (view["submittedBy"], view["retryOf"]) == ("boss", ids["shop"]), "of the key that asked for it"


async def test_an_idempotency_key_belongs_to_the_name_not_to_the_secret(house: House) -> None:
    body = {"workflow": picture()}

    async def submit(name: str) -> tuple[str, bool]:
        reply = await house.ask(name, "POST", PATH, json=body, headers={"Idempotency-Key": "order 7"})
        assert reply.status_code == 202, reply.text
        return reply.json()["workflowId"], "idempotency-replayed" in reply.headers

    shop, boss, admin = await submit("shop"), await submit("boss"), await submit("the admin")
    assert len({shop[0], boss[0], admin[0]}) == 3
    assert await submit("shop") == (shop[0], True)
    old = house.made["shop"]
    house.revoke("shop")
    house.add("shop", READ, SUBMIT)
    assert house.made["shop"] != old
    assert (await house.ask(old, "GET", PATH)).status_code == 401
    assert await submit("shop") == (shop[0], True)


async def test_idempotency_keys_from_before_keys_had_names_go_on_working(opened: OpenHouse, tmp_path: Path) -> None:
    body = json.dumps({"workflow": picture()}).encode()
    (tmp_path / "data").mkdir()
    with contextlib.closing(sqlite3.connect(tmp_path / "data" / FILE_NAME)) as connection:
        connection.executescript(f"{MIGRATIONS[0]}; PRAGMA user_version = 1;")
        connection.execute(
            "INSERT INTO workflow (number, id, status, priority, gpu, rank, created_at, max_attempts,"
            " timeout_seconds) VALUES (1, ?, 'queued', 'normal', 'local', 1, 1, 3, 60)",
            (ID,),
        )
        connection.execute("INSERT INTO workflow_graph VALUES (1, ?, NULL)", (json.dumps(picture()),))
        connection.execute(
            "INSERT INTO idempotency VALUES (?, 'order 7', ?, 1, 0, 'queued', ?)",
            (f"POST {PATH}", sha256(body).hexdigest(), SystemClock().now_ms()),
        )
        connection.commit()
    async with opened() as house:

        async def submit(name: str) -> str:
            headers = {"Idempotency-Key": "order 7", "Content-Type": "application/json"}
            reply = await house.ask(name, "POST", PATH, content=body, headers=headers)
            assert reply.status_code == 202, reply.text
            return str(reply.json()["workflowId"])

        assert await submit("the admin") == ID
        assert await submit("shop") != ID
        assert (await house.ask("reader", "GET", f"{PATH}/{ID}")).json()["submittedBy"] is None


async def test_a_key_may_have_so_many_waiting(opened: OpenHouse) -> None:
    async with opened() as house:
        house.add("small", READ, SUBMIT, max_queued=3)
        replies = await asyncio.gather(*(house.submit("small") for _ in range(8)))
        assert sorted(reply.status_code for reply in replies) == [202] * 3 + [429] * 5
        refused = next(reply for reply in replies if reply.status_code == 429)
        assert (
            refused.json()["detail"] == "3 workflows of the key small wait already, and it may have no more waiting"
        )
        assert refused.headers["retry-after"] == str(refused.json()["retryAfter"])
        assert (await house.submit("shop")).status_code == 202, "others are not concerned"
        assert (await house.submit("boss")).status_code == 202
        first = next(reply.json()["workflowId"] for reply in replies if reply.status_code == 202)
        assert (await house.ask("small", "DELETE", f"{PATH}/{first}")).status_code == 200
        assert (await house.ask("small", "POST", f"{PATH}/{first}/retry")).status_code == 202
        assert (await house.ask("small", "POST", f"{PATH}/{first}/retry")).status_code == 429
    async with opened() as house:
        assert (await house.submit("small")).status_code == 429, "counted again after a restart"
        text = house.file.read_text()
        house.file.write_text(text.replace("maxQueued = 3", "maxQueued = 4"))
        house.clock.seconds += 1
        assert (await house.submit("small")).status_code == 202


# ---- the rate limit


async def test_a_key_with_its_own_limit_is_counted_wherever_it_comes_from(opened: OpenHouse) -> None:
    async with opened(MANAGEMENT_API_RATE_LIMIT="5/minute", MANAGEMENT_API_RATE_LIMIT_ALLOW="10.0.0.0/8") as house:
        house.add("quick", READ, rate_limit="7/minute")
        house.add("free", READ, rate_limit="off")
        peers = [f"192.0.2.{n}" for n in range(6)] + ["10.1.2.3", "192.0.2.1"]
        replies = [await house.ask("quick", "GET", PATH, peer=peer) for peer in peers]
        assert [reply.status_code for reply in replies] == [200] * 7 + [429]
        assert [reply.headers["x-ratelimit-remaining"] for reply in replies] == list("65432100")
        assert {reply.headers["x-ratelimit-limit"] for reply in replies} == {"7"}
        assert replies[-1].headers["retry-after"] == str(replies[-1].json()["retryAfter"])
        assert "7 per 1 minute" in replies[-1].json()["detail"]
        assert (await house.ask("quick", "GET", "/v1/comfyui/output/x.png")).status_code == 404, "files stay free"

        left = [(await house.ask("reader", "GET", PATH, peer="192.0.2.1")).status_code for _ in range(6)]
        assert left == [200] * 5 + [429], "what the key used is not taken from its address"
        for _ in range(20):
            reply = await house.ask("free", "GET", PATH, peer="192.0.2.1")
            assert reply.status_code == 200
            assert "x-ratelimit-limit" not in reply.headers


async def test_wrong_keys_count_against_the_address_and_do_not_touch_a_key_with_its_own_limit(
    opened: OpenHouse,
) -> None:
    async with opened(MANAGEMENT_API_RATE_LIMIT="4/minute") as house:
        house.add("quick", READ, rate_limit="100/minute")
        guess = "cma_" + "A" * 43
        for path in (PATH, "/v1/comfyui/output/x.png"):
            asked = [(await house.ask(guess, "GET", path)).status_code for _ in range(6)]
            assert asked == [401] * 4 + [429] * 2
            assert (await house.ask("reader", "GET", path)).status_code == 429
            assert (await house.ask("quick", "GET", path)).status_code in {200, 404}
        house.revoke("quick")
        assert (await house.ask("quick", "GET", PATH)).status_code == 429


async def test_keys_keep_their_limits_where_addresses_have_none(opened: OpenHouse) -> None:
    async with opened(MANAGEMENT_API_RATE_LIMIT="off") as house:
        house.add("slow", READ, rate_limit="1/minute")
        assert [(await house.ask("slow", "GET", PATH)).status_code for _ in range(2)] == [200, 429]
        for _ in range(3):
            assert (await house.ask("reader", "GET", PATH)).status_code == 200
            assert (await house.ask("wrong", "GET", PATH)).status_code == 401
            assert (await house.ask("wrong", "GET", "/v1/comfyui/output/x.png")).status_code == 401
        text = house.file.read_text()
        house.file.write_text(text.replace("1/minute", "2/second"))
        house.clock.seconds += 1
        assert (await house.ask("slow", "GET", PATH)).status_code == 200, "a new limit begins anew"


# ---- the stream


async def test_the_stream_and_its_tickets_are_for_readers(start_server: StartServer, file: Path) -> None:
    reader, sender, gone = (
        add_key(file, name, scopes=[scope]) for name, scope in (("reader", READ), ("sender", SUBMIT), ("gone", READ))
    )
    server = await start_server(MANAGEMENT_API_KEYS_FILE=str(file))
    address = server.websocket_url + STREAM
    for options in (
        {"additional_headers": {"X-API-Key": sender}},
        {"additional_headers": {"Authorization": f"Bearer {sender}"}},
        {"subprotocols": ["bearer", sender]},
    ):
        with pytest.raises(InvalidStatus) as caught:
            async with connect(address, **options):
                pass
        assert caught.value.response.status_code == 403
        problem = json.loads(caught.value.response.body or b"")
        assert problem["detail"] == "The key sender has not the scope read, which this needs"

    async def ticket(key: str) -> httpx.Response:
        return await server.client.post(STREAM + "/ticket", headers={"X-API-Key": key})

    assert (await ticket(sender)).status_code == 403
    good, late = (await ticket(reader)).json()["ticket"], (await ticket(gone)).json()["ticket"]
    async with connect(address, subprotocols=["bearer", reader]) as socket:  # type: ignore[list-item]
        assert socket.subprotocol == "bearer"
    async with connect(f"{address}?ticket={good}"):
        pass
    revoke_key(file, "gone")
    async with asyncio.timeout(10):
        while (await server.client.get(PATH, headers={"X-API-Key": gone})).status_code != 401:
            pass
    with pytest.raises(InvalidStatus) as caught:
        async with connect(f"{address}?ticket={late}"):
            pass
    assert caught.value.response.status_code == 401


async def only_heartbeats(socket: ClientConnection) -> None:
    """Until the end."""
    async with asyncio.timeout(10):
        while True:
            assert (await next_frame(socket))["type"] == "heartbeat"


@pytest.mark.parametrize("fast", [True, False])
async def test_open_streams_of_a_revoked_key_end(tmp_path: Path, file: Path, fast: bool) -> None:
    clock = Ahead()
    gone, stays = (add_key(file, name, scopes=[READ]) for name in ("gone", "stays"))
    config = StreamConfig(heartbeat_seconds=0.05)
    async with open_house(tmp_path / "data", fast=fast, config=config, keys=KeyRing(file, clock)) as house:
        base = f"http://127.0.0.1:{house.port}"
        async with (
            house.connect(additional_headers={"X-API-Key": gone}) as ends,
            house.connect(additional_headers={"X-API-Key": stays}) as lives,
            httpx.AsyncClient(base_url=base, headers={"X-API-Key": gone}, timeout=10) as client,
            client.stream("GET", "/v1/ticker") as events,
        ):
            lines = events.aiter_lines()
            assert (await anext(lines)) == ": stream"
            assert (await next_frame(ends))["type"] == "heartbeat"
            revoke_key(file, "gone")
            clock.seconds += 1
            with pytest.raises(ConnectionClosed) as caught:
                await only_heartbeats(ends)
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1008
            assert "key" in caught.value.rcvd.reason
            async with asyncio.timeout(10):
                assert {line async for line in lines} <= {"", ": heartbeat"}
                await house.ticker_closed.wait()
            await lives.send('{"type":"ping"}')
            async with asyncio.timeout(10):
                while (await next_frame(lives))["type"] != "pong":
                    pass


# ---- what is logged


async def test_the_access_log_names_the_key_and_shows_none(opened: OpenHouse, log: Log) -> None:
    async with opened(logs=log.logs) as house:
        secret = house.made["shop"]
        await house.submit("shop", headers={"X-Request-Id": "by-shop"})
        await house.ask("sender", "GET", PATH, headers={"X-Request-Id": "refused"})
        await house.ask("the admin", "GET", f"/v1/{secret}/x={secret}:{secret}", headers={"X-Request-Id": "in-path"})
        await house.ask("cma_" + "B" * 43, "GET", PATH, headers={"X-Request-Id": "unknown"})
        await house.ask("shop", "GET", "/health", headers={"X-Request-Id": "open"})
    text = log.stream.getvalue()
    assert not A_KEY.search(text)
    access = {line["request_id"]: line for line in log.lines() if line["event"] == "request"}
    named = {name: (line.get("key"), line["status"]) for name, line in access.items()}
    assert named == {
        "by-shop": ("shop", 202),
        "refused": ("sender", 403),
        "in-path": ("admin", 404),
        "unknown": (None, 401),
        "open": (None, 200),
    }
