"""Who comes in, how often, and what every reply carries (CONTRACT 1)."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from management_api.limits import ClientAddress, RateLimiter
from management_api.security import Authenticator, is_limited, is_open
from management_api.values import networks
from managers.callers import Caller, KeyScope
from tests.serving import KEY, Server, Service, StartServer, StartService

WORKFLOW = "9b2fd3a1-7d2c-4a37-9c7b-0d5b8a0c1f11"


# ---- the key


async def test_the_key_opens(start_service: StartService) -> None:
    service = await start_service(headers={})
    for headers in (
        {"X-API-Key": KEY},
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer {KEY}"},
        {"Authorization": f"BEARER   {KEY}"},
        {"X-API-Key": "wrong", "Authorization": f"Bearer {KEY}"},
    ):
        assert (await service.client.get("/v1/comfyui/workflow", headers=headers)).status_code == 200, headers


WRONG: tuple[dict[str, str | bytes], ...] = (
    {},
    {"X-API-Key": ""},
    {"X-API-Key": KEY + "x"},
    {"X-API-Key": KEY.lower()},
    {"X-API-Key": "ключ".encode()},
    {"Authorization": KEY},
    {"Authorization": f"Basic {KEY}"},
    {"Authorization": f"Bearer{KEY}"},
    {"Authorization": "Bearer"},
    {"Cookie": f"X-API-Key={KEY}"},
    {"Sec-WebSocket-Protocol": f"bearer, {KEY}"},
)
CLOSED = (
    ("GET", "/v1/comfyui/workflow"),
    ("GET", f"/v1/comfyui/workflow?key={KEY}&api_key={KEY}"),
    ("POST", "/v1/comfyui/workflow"),
    ("DELETE", f"/v1/comfyui/workflow/{WORKFLOW}"),
    ("OPTIONS", "/v1/comfyui/workflow"),
    ("GET", "/v1/comfyui/output/a.png"),
    ("GET", "/no/such/path"),
    ("GET", "/docsx"),
    ("GET", "/health/x"),
    ("GET", "/v1/%2e%2e/docs"),
)


async def test_without_the_key_everything_else_is_401(start_service: StartService) -> None:
    service = await start_service(headers={})
    for headers in WRONG:
        for method, path in CLOSED:
            reply = await service.client.request(method, path, headers=list(_raw(headers)))
            assert reply.status_code == 401, (method, path)
            assert reply.headers["www-authenticate"] == "Bearer"
            assert reply.headers["content-type"] == "application/problem+json"
            assert reply.json()["statusCode"] == 401
            assert KEY not in reply.text


def _raw(headers: dict[str, str | bytes]) -> Iterator[tuple[bytes, bytes]]:
    for name, value in headers.items():
        yield name.encode(), value if isinstance(value, bytes) else value.encode()


@pytest.mark.parametrize("query", ["", "?a=b", "?ticket=x&ticket=y"])
async def test_open_paths_need_no_key(start_service: StartService, query: str) -> None:
    service = await start_service(headers={})
    for path in (
        "/",
        "/health",
        "/ready",
        "/healthz",
        "/readyz",
        "/metrics",
        "/docs",
        "/docs/",
        "/docs/json",
        "/docs/static/swagger-ui.css",
        "/dashboard",
        "/dashboard/app.js",
    ):
        assert (await service.client.get(path + query)).status_code == 200, path
    assert (await service.client.get("/docs/nothing" + query)).status_code == 404


async def test_metrics_can_be_closed(start_service: StartService) -> None:
    service = await start_service(MANAGEMENT_API_METRICS_AUTH="true", headers={})
    assert (await service.client.get("/metrics")).status_code == 401
    assert (await service.client.get("/metrics/")).status_code == 401
    assert (await service.client.get("/metrics", headers={"X-API-Key": KEY})).status_code == 200
    assert "/metrics" not in (await service.client.get("/")).json()["authentication"]


def test_what_is_open_is_a_short_list() -> None:
    assert is_open("/docs/static/x")
    assert is_open("/docs//x")
    for path in ("/v1", "/v1/docs", "//docs", "/docs.json", "/Docs", "/healthzz", "/dashboards", "", "/v1/health"):
        assert not is_open(path) or path == "", path


# ---- tickets and sub-protocols (the stream brings the tickets)


def _authenticator() -> tuple[Authenticator, set[str]]:
    authenticator, tickets = Authenticator(KEY), {"t1", "t2"}
    shop = Caller(name="shop", scopes=frozenset({KeyScope.READ}))

    def redeem(ticket: str) -> Caller | None:
        good = ticket in tickets
        tickets.discard(ticket)
        return shop if good else None

    authenticator.register_ticket_checker(redeem)
    return authenticator, tickets


def test_tickets_count_for_streams_only_and_once() -> None:
    authenticator, tickets = _authenticator()
    scope = {"type": "http", "method": "GET", "path": "/v1/x/events", "query_string": b"ticket=t1", "headers": []}
    assert not authenticator.authenticate(scope)  # type: ignore[arg-type]
    scope["headers"] = [(b"accept", b"text/event-stream")]
    assert not authenticator.authenticate(scope | {"path": "/v1/x"})  # type: ignore[arg-type]
    assert authenticator.authenticate(scope)  # type: ignore[arg-type]
    assert not authenticator.authenticate(scope)  # type: ignore[arg-type]
    socket = {"type": "websocket", "path": "/v1/x", "query_string": b"since=1&ticket=t2", "headers": []}
    assert authenticator.authenticate(socket)  # type: ignore[arg-type]
    assert not authenticator.authenticate(socket)  # type: ignore[arg-type]
    assert not tickets


def test_a_post_cannot_use_a_ticket() -> None:
    authenticator, tickets = _authenticator()
    headers = [(b"accept", b"text/event-stream")]
    scope = {"type": "http", "method": "POST", "path": "/v1/x", "query_string": b"ticket=t1", "headers": headers}
    assert not authenticator.authenticate(scope)  # type: ignore[arg-type]
    assert tickets == {"t1", "t2"}


async def test_a_socket_is_refused_by_http_before_the_upgrade(server: Server) -> None:
    for path, headers, protocols, status in (
        ("/v1/comfyui/stream", {}, None, 401),
        ("/v1/comfyui/stream?ticket=guess", {}, None, 401),
        ("/v1/comfyui/stream?ticket=", {}, None, 401),
        ("/v1/comfyui/stream?ticket=a&ticket=b", {}, None, 401),
        ("/v1/comfyui/stream?" + "ticket=a&" * 200, {}, None, 401),
        ("/v1/comfyui/stream", {"X-API-Key": "wrong"}, None, 401),
        ("/v1/comfyui/stream", {}, ["bearer", "wrong"], 401),
        ("/v1/nothing", {"X-API-Key": KEY}, None, 404),
        ("/v1/comfyui/workflow", {"X-API-Key": KEY}, None, 404),
    ):
        with pytest.raises(InvalidStatus) as caught:
            async with connect(server.websocket_url + path, additional_headers=headers, subprotocols=protocols):  # type: ignore[arg-type]
                pass
        response = caught.value.response
        assert response.status_code == status, path
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["x-request-id"]
        problem = json.loads(response.body or b"")
        assert (problem["status"], problem["instance"]) == (status, path.partition("?")[0])
        if status == 401:
            assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("scheme", ["bearer", "Bearer"])
async def test_a_socket_opens_with_the_key_in_any_clothes(server: Server, scheme: str) -> None:
    address = server.websocket_url + "/v1/comfyui/stream"
    for headers in ({"X-API-Key": KEY}, {"Authorization": f"{scheme} {KEY}"}):
        async with connect(address, additional_headers=headers) as socket:
            assert socket.response is not None
            assert socket.response.headers["x-request-id"]
    async with connect(address, subprotocols=[scheme, KEY]) as socket:  # type: ignore[list-item]
        assert socket.subprotocol == scheme


# ---- the rate limit


async def test_the_limit_is_told_and_kept(start_service: StartService) -> None:
    service = await start_service(MANAGEMENT_API_RATE_LIMIT="3/minute")
    for left in (2, 1, 0):
        reply = await service.client.get("/v1/comfyui/workflow")
        assert reply.status_code == 200
        assert reply.headers["x-ratelimit-limit"] == "3"
        assert reply.headers["x-ratelimit-remaining"] == str(left)
        assert 0 < int(reply.headers["x-ratelimit-reset"]) <= 60
    reply = await service.client.get("/v1/comfyui/workflow")
    assert reply.status_code == 429
    assert reply.headers["x-ratelimit-remaining"] == "0"
    assert reply.headers["retry-after"] == reply.headers["x-ratelimit-reset"] == str(reply.json()["retryAfter"])
    assert reply.json()["title"] == "Too Many Requests"
    assert (await service.client.get("/")).status_code == 429, "`/` is limited too"


async def test_exactly_the_limit_passes_however_many_come_at_once(start_server: StartServer) -> None:
    server = await start_server(MANAGEMENT_API_RATE_LIMIT="50/minute")
    paths = [("/v1/comfyui/workflow", "/v1/comfyui/models", "/nothing", "/")[number % 4] for number in range(200)]
    replies = await asyncio.gather(*(server.client.get(path) for path in paths))
    assert sum(reply.status_code != 429 for reply in replies) == 50
    remaining = sorted(int(reply.headers["x-ratelimit-remaining"]) for reply in replies if reply.status_code != 429)
    assert remaining == list(range(50))


async def test_wrong_keys_unknown_paths_and_upgrades_count(start_server: StartServer) -> None:
    server = await start_server(MANAGEMENT_API_RATE_LIMIT="4/minute")
    assert (await server.client.get("/nothing")).status_code == 404
    assert (await server.client.get("/v1/comfyui/workflow", headers={"X-API-Key": "x"})).status_code == 401
    assert (await server.client.put("/v1/comfyui/workflow")).status_code == 405
    address = server.websocket_url + "/v1/comfyui/stream"
    async with connect(address, additional_headers={"X-API-Key": KEY}):
        pass
    with pytest.raises(InvalidStatus) as caught:
        async with connect(address, additional_headers={"X-API-Key": KEY}):
            pass
    assert caught.value.response.status_code == 429
    assert int(caught.value.response.headers["retry-after"]) > 0


async def test_exempt_paths_stay_free_but_not_for_guessing(start_service: StartService) -> None:
    service = await start_service(MANAGEMENT_API_RATE_LIMIT="5/minute")
    bound = f"/v1/comfyui/workflow/{WORKFLOW}/outputs/0"
    for path in ("/health", "/ready", "/metrics", "/docs", "/docs/json", "/v1/comfyui/output/x.png", bound):
        for _ in range(3):
            reply = await service.client.get(path)
            assert reply.status_code in {200, 404}, path
            assert "x-ratelimit-limit" not in reply.headers
    guesses = [
        (await service.client.get("/v1/comfyui/output/x.png", headers={"X-API-Key": f"guess {number}"})).status_code
        for number in range(8)
    ]
    assert guesses == [401] * 5 + [429] * 3
    assert (await service.client.get("/v1/comfyui/output/x.png")).status_code == 429, "not even the right one"
    assert (await service.client.get("/health")).status_code == 200


def test_only_reading_an_output_is_exempt() -> None:
    assert not is_limited("GET", "/v1/comfyui/output/a/b.png")
    assert not is_limited("HEAD", f"/v1/comfyui/workflow/{WORKFLOW}/outputs/3")
    assert is_limited("DELETE", "/v1/comfyui/output/a.png")
    assert is_limited("GET", "/v1/comfyui/outputs")
    assert is_limited("GET", f"/v1/comfyui/workflow/{WORKFLOW}")
    assert is_limited("GET", "/nothing")


@pytest.mark.parametrize(("rate", "allow"), [("1/minute", "192.0.2.1,10.0.0.0/8"), ("off", "")])
async def test_allowed_addresses_and_off_are_not_limited(start_service: StartService, rate: str, allow: str) -> None:
    service = await start_service(
        peer="10.9.8.7", MANAGEMENT_API_RATE_LIMIT=rate, MANAGEMENT_API_RATE_LIMIT_ALLOW=allow
    )
    for _ in range(3):
        reply = await service.client.get("/v1/comfyui/workflow")
        assert reply.status_code == 200
        assert "x-ratelimit-limit" not in reply.headers


async def test_forwarded_for_counts_only_from_a_trusted_proxy(start_service: StartService) -> None:
    service = await start_service(MANAGEMENT_API_RATE_LIMIT="2/minute", MANAGEMENT_API_TRUSTED_PROXIES="127.0.0.0/8")

    async def ask(forwarded: str) -> int:
        return (await service.client.get("/", headers={"X-Forwarded-For": forwarded})).status_code

    assert [await ask("198.51.100.1") for _ in range(3)] == [200, 200, 429]
    assert await ask("198.51.100.2") == 200
    assert await ask("203.0.113.9, 198.51.100.1") == 429, "what stands left of it is the client's own invention"


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("198.51.100.1", "1.2.3.4", "198.51.100.1"),
        ("10.0.0.1", "1.2.3.4", "1.2.3.4"),
        ("10.0.0.1", "9.9.9.9, 1.2.3.4, 10.0.0.2", "1.2.3.4"),
        ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("10.0.0.1", "1.2.3.4, nonsense", "10.0.0.1"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "1.2.3.4:5678", "1.2.3.4"),
        ("10.0.0.1", "[2001:db8::1]:5678", "2001:db8::1"),
        ("::ffff:10.0.0.1", "1.2.3.4", "1.2.3.4"),
        ("local", "1.2.3.4", "local"),
    ],
)
def test_who_the_client_is(peer: str, forwarded: str, client: str) -> None:
    addresses = ClientAddress(networks("10.0.0.0/8"))
    assert addresses.of(peer, [(b"x-forwarded-for", forwarded.encode())]) == client


def test_an_ipv6_client_is_its_network() -> None:
    limiter = RateLimiter("1/minute")
    verdicts = [limiter.hit(address) for address in ("2001:db8:1:2::1", "2001:db8:1:2::ffff", "2001:db8:1:3::1")]
    assert [verdict and verdict.allowed for verdict in verdicts] == [True, False, True]


# ---- CORS, headers, ids


async def test_no_origin_is_let_in_by_default(service: Service) -> None:
    reply = await service.client.get("/health", headers={"Origin": "https://evil.example"})
    assert not [name for name in reply.headers if name.startswith("access-control")]
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    reply = await service.client.options("/v1/comfyui/workflow", headers=asked)
    assert not [name for name in reply.headers if name.startswith("access-control")]


async def test_configured_origins(start_service: StartService) -> None:
    service = await start_service(
        CORS_ALLOWED_ORIGINS="https://a.example,https://b.example", MANAGEMENT_API_RATE_LIMIT="3/minute", headers={}
    )
    asked = {
        "Origin": "https://b.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-api-key,content-type,idempotency-key",
    }
    reply = await service.client.options("/v1/comfyui/workflow", headers=asked)
    assert (reply.status_code, reply.content) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == "https://b.example"
    allowed = {name.strip().lower() for name in reply.headers["access-control-allow-headers"].split(",")}
    assert set(asked["Access-Control-Request-Headers"].split(",")) <= allowed
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "Origin" in reply.headers["vary"]
    assert "content-length" not in reply.headers

    reply = await service.client.options("/v1/comfyui/workflow", headers={**asked, "Origin": "https://c.example"})
    assert "access-control-allow-origin" not in reply.headers
    assert "Origin" in reply.headers["vary"]

    statuses = []
    for _ in range(4):
        reply = await service.client.get("/v1/comfyui/workflow", headers={"Origin": "https://a.example"})
        statuses.append(reply.status_code)
        assert reply.headers["access-control-allow-origin"] == "https://a.example", "a page must see refusals too"
        assert "X-RateLimit-Remaining" in reply.headers["access-control-expose-headers"]
        assert reply.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in reply.headers
    assert statuses == [401, 401, 401, 429], "preflights were not counted"
    assert (await service.client.get("/health")).headers["vary"] == "Origin", "caches must know, also without Origin"


async def test_every_reply_has_the_security_headers(service: Service) -> None:
    for method, path in (
        ("GET", "/"),
        ("GET", "/docs"),
        ("GET", "/nothing"),
        ("PUT", "/health"),
        ("GET", "/docs/yaml"),
    ):
        for headers in ({}, {"X-API-Key": "wrong"}):
            reply = await service.client.request(method, path, headers=headers)
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["x-frame-options"] == "DENY"
            assert reply.headers["referrer-policy"] == "no-referrer"
            assert "default-src 'none'" in reply.headers["content-security-policy"]
            assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
            assert "server" not in reply.headers


async def test_request_ids(service: Service) -> None:
    for sane in ("a", "A-b_c.9", "x" * 128):
        reply = await service.client.get("/nothing", headers={"x-request-id": sane})
        assert reply.headers.get_list("x-request-id") == [sane]
        assert reply.json()["requestId"] == sane
    seen = set()
    for wrong in ("", "a b", "x" * 129, "a\tb", "é", '"', "a/b"):
        reply = await service.client.get("/nothing", headers=[(b"x-request-id", wrong.encode())])
        ours = reply.headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", ours)
        assert reply.json()["requestId"] == ours
        seen.add(ours)
    assert len(seen) == 7
