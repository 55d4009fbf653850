"""What the service says about itself (CONTRACT 3), and its metrics (CONTRACT 8)."""

from __future__ import annotations

import re

import msgspec
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from metrics.http import DURATION_BUCKETS
from tests.serving import Server, Service, StartService

ISO = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{3}Z")


async def test_root_lists_the_doors(service: Service) -> None:
    reply = (await service.client.get("/", headers={"X-API-Key": ""})).json()
    assert reply["documentation"] == "/docs"
    assert reply["authentication"].startswith("X-API-Key header required (except ")
    assert set(reply["endpoints"]["tasks"]) == {"create", "get", "list", "stop", "logs"}
    assert reply["endpoints"]["tasks"]["create"] == "POST /v1/tasks"
    assert set(reply["endpoints"]["comfyui"]) >= {
        *("submit", "status", "cancel", "list", "models", "outputs", "output", "stream"),
    }
    assert reply["endpoints"]["comfyui"]["submit"] == "POST /v1/comfyui/workflow"
    assert set(reply["endpoints"]["monitoring"]) == {"status", "health", "ready", "metrics", "usage"}


async def test_root_names_only_doors_that_exist(service: Service) -> None:
    described = (await service.client.get("/docs/json")).json()["paths"]
    endpoints = (await service.client.get("/")).json()["endpoints"]
    served = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    shapes = {re.sub(r"\{[^}]*\}", "{}", text) for text in served}
    for entry in endpoints["comfyui"].values():
        if not entry.startswith("WS "):
            assert re.sub(r"\{[^}]*\}", "{}", entry) in shapes, entry


async def test_health_does_not_need_comfyui(service: Service) -> None:
    reply = await service.client.get("/health")
    body = reply.json()
    assert reply.status_code == 200
    assert body["status"] == "healthy"
    assert ISO.fullmatch(body["timestamp"])
    assert body["version"] == service.app.running[0].service.version
    assert 0 <= body["uptime"] < 60


async def test_ready_tells_that_comfyui_is_away_and_stays_ready(service: Service) -> None:
    reply = await service.client.get("/ready")
    body = reply.json()
    assert reply.status_code == 200
    assert body["ready"] is True
    assert body["activeTasks"] == 0
    assert ISO.fullmatch(body["timestamp"])
    assert body["checks"] == {"store": "ok", "comfyui": "unreachable", "draining": False}


async def test_the_names_that_probes_know(start_service: StartService) -> None:
    """As /health and /ready, not counted by the rate limit, and once in the documentation."""
    service = await start_service(MANAGEMENT_API_RATE_LIMIT="1/minute", headers={})
    for name, alias in (("/health", "/healthz"), ("/ready", "/readyz")):
        told, same = await service.client.get(name), await service.client.get(alias)
        assert (same.status_code, same.json().keys()) == (200, told.json().keys())
        assert (await service.client.head(alias)).status_code == 200
        assert (await service.client.post(alias)).status_code == 405
        assert "x-ratelimit-limit" not in same.headers
    service.app.running[0].workflows.drain()
    assert [(await service.client.get(alias)).status_code for alias in ("/healthz", "/readyz")] == [200, 503]
    described = (await service.client.get("/docs/json")).json()["paths"]
    assert {"/health", "/ready"} <= set(described)
    assert not {"/healthz", "/readyz"} & set(described)


async def test_ready_is_503_while_draining(service: Service) -> None:
    service.app.running[0].workflows.drain()
    reply = await service.client.get("/ready")
    assert reply.status_code == 503
    assert reply.json()["ready"] is False
    assert reply.json()["checks"]["draining"] is True
    assert reply.headers["content-type"] == "application/json"


async def test_head_is_answered_without_a_body(server: Server) -> None:
    for path in ("/", "/health", "/ready", "/docs", "/docs/static/swagger-ui.css"):
        got, head = await server.client.get(path), await server.client.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]


async def test_metrics_in_both_formats(service: Service) -> None:
    await service.client.get("/health")
    text = await service.client.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=")
    names = {family.name for family in parse_text(text.text)}
    assert {"process_cpu_seconds", "process_resident_memory_bytes", "http_requests", "api_errors"} <= names

    openmetrics = await service.client.get(
        "/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")
    assert any(family.name == "http_requests" for family in parse_openmetrics(openmetrics.text))  # type: ignore[no-untyped-call]


async def test_requests_are_counted_by_template(service: Service) -> None:
    one, two = "9b2fd3a1-7d2c-4a37-9c7b-0d5b8a0c1f11", "9b2fd3a1-7d2c-4a37-9c7b-0d5b8a0c1f12"
    for path in ("/health", "/health/", f"/v1/comfyui/workflow/{one}", f"/v1/comfyui/workflow/{two}", "/a", "/b/c"):
        await service.client.get(path)
    await service.client.get("/v1/x", headers={"X-API-Key": "wrong"})
    await service.client.get(f"/v1/tasks/{one}", headers={"X-API-Key": "wrong"})
    await service.client.get("/v1/comfyui/output/a/b.png", headers={"X-API-Key": "wrong"})
    await service.client.post("/health")
    samples = await _samples(service)

    requests = samples["http_requests_total"]
    assert requests["GET", "/health", "200"] == 2
    assert requests["GET", "/v1/comfyui/workflow/{workflow_id}", "404"] == 2
    assert requests["GET", "unmatched", "404"] == 2
    assert requests["GET", "unmatched", "401"] == 1
    assert requests["GET", "/v1/tasks/{task_id}", "401"] == 1
    assert requests["GET", "/v1/comfyui/output/{path}", "401"] == 1
    assert requests["POST", "/health", "405"] == 1
    assert samples["http_request_duration_seconds_count"]["GET", "/health", "200"] == 2
    errors = samples["api_errors_total"]
    assert errors["not_found", "unmatched"] == 2
    assert errors["unauthorized", "unmatched"] == 1
    assert errors["method_not_allowed", "/health"] == 1


async def test_duration_buckets_are_those_of_the_contract(service: Service) -> None:
    await service.client.get("/health")
    families = {family.name: family for family in parse_text((await service.client.get("/metrics")).text)}
    bounds = {
        float(sample.labels["le"])
        for sample in families["http_request_duration_seconds"].samples
        if sample.name.endswith("_bucket")
    }
    assert bounds == {0.001, 0.005, 0.015, 0.05, 0.1, 0.5, 1, 5, float("inf")}
    assert sorted(bounds)[:-1] == list(DURATION_BUCKETS)


async def test_invented_methods_are_one_label(server: Server) -> None:
    for method in ("BREW", "WHEN", "PROPFIND"):
        assert (await server.client.request(method, "/health")).status_code in {400, 405}
    assert {labels[0] for labels in (await _samples(server))["http_requests_total"]} <= {"GET", "OTHER"}


async def test_the_families_are_there_from_the_first_scrape(service: Service) -> None:
    names = {family.name for family in parse_text((await service.client.get("/metrics")).text)}
    assert {"http_requests", "http_request_duration_seconds", "api_errors"} <= names


async def _samples(service: Service) -> dict[str, dict[tuple[str, ...], float]]:
    order = ("error_type", "method", "route", "status_code")
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in parse_text((await service.client.get("/metrics")).text):
        for sample in family.samples:
            labels = tuple(sample.labels[name] for name in order if name in sample.labels)
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def test_the_example_replies_are_what_the_routes_give() -> None:
    from routes import service

    for handler, kind in ((service.root, service.RootReply), (service.health, service.HealthReply)):
        msgspec.convert(handler.opt["documented"]["reply"], kind)
