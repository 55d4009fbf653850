"""The description of the API and its page (CONTRACT 3)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import httpx
import msgspec
import pytest

from management_api.security import is_open, needed_scope
from tests.serving import Server, Service

PROBLEM = "application/problem+json"


@pytest.fixture
async def described(service: Service) -> dict[str, Any]:
    reply = await service.client.get("/docs/json", headers={"X-API-Key": ""})
    assert reply.status_code == 200
    document: dict[str, Any] = reply.json()
    return document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method in {"get", "put", "post", "delete", "patch", "head", "options"}:
                yield path, method, operation


async def test_the_three_addresses_say_the_same(service: Service) -> None:
    as_json = await service.client.get("/docs/json")
    assert as_json.headers["content-type"] == "application/json"
    assert (await service.client.get("/docs/openapi.json")).content == as_json.content
    as_yaml = await service.client.get("/docs/yaml")
    assert as_yaml.headers["content-type"].startswith(("text/plain", "application/yaml"))
    assert msgspec.yaml.decode(as_yaml.content) == as_json.json()


def test_the_head_of_the_document(described: dict[str, Any]) -> None:
    assert described["openapi"].startswith("3.1.")
    assert described["info"]["title"] == "ComfyUI Management API"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*|0\+unknown", described["info"]["version"])
    schemes = described["components"]["securitySchemes"]
    assert {key: schemes["apiKey"][key] for key in ("type", "in", "name")} == {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
    }
    assert (schemes["bearer"]["type"], schemes["bearer"]["scheme"]) == ("http", "bearer")
    assert described["security"] == [{"apiKey": []}, {"bearer": []}]


def test_every_operation_is_described(described: dict[str, Any]) -> None:
    found = list(operations(described))
    assert {("/", "get"), ("/metrics", "get"), ("/health", "get"), ("/ready", "get")} <= {
        (path, method) for path, method, _ in found
    }
    known = {tag["name"] for tag in described["tags"]}
    for path, method, operation in found:
        where = f"{method} {path}"
        assert operation["summary"], where
        assert operation["description"], where
        assert operation["tags"], where
        assert set(operation["tags"]) <= known, where
    names = [operation["operationId"] for _, _, operation in found]
    assert len(names) == len(set(names))
    assert {"health", "metrics", "submitWorkflow"} <= set(names), "names that generated clients can use"


def test_every_operation_has_examples(described: dict[str, Any]) -> None:
    for path, method, operation in operations(described):
        bodies = [operation["requestBody"]] if "requestBody" in operation else []
        for status, reply in operation["responses"].items():
            if reply.get("content") and status not in {"206", "304"}:
                bodies.append(reply)
        for body in bodies:
            for kind, media in body["content"].items():
                binary = kind == "application/octet-stream" or not kind.startswith(("application/", "text/"))
                assert binary or "example" in media or media.get("examples"), (method, path, kind, body)


def test_every_operation_has_its_error_replies(described: dict[str, Any]) -> None:
    for path, method, operation in operations(described):
        where = f"{method} {path}"
        statuses = set(operation["responses"])
        assert "500" in statuses, where
        if is_open(path):
            assert operation["security"] == [], where
            assert not {"401", "403"} & statuses, where
        else:
            assert {"401", "403"} <= statuses, where
            scope = needed_scope(method.upper(), path)
            assert operation["security"] == [{"apiKey": [scope]}, {"bearer": [scope]}], where
            assert operation["description"].endswith(f"Needs a key with the scope `{scope}`."), where
        if operation.get("parameters") or "requestBody" in operation:
            assert "400" in statuses, where
        for status, reply in operation["responses"].items():
            if int(status) >= 400 and (path, status) != ("/ready", "503"):
                assert PROBLEM in reply["content"], (where, status)
                assert reply["content"][PROBLEM]["schema"] == {"$ref": "#/components/schemas/Problem"}, (
                    where,
                    status,
                )


def test_every_reference_leads_somewhere(described: dict[str, Any]) -> None:
    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    found = set(references(described))
    assert found
    for reference in found:
        assert reference.startswith("#/components/schemas/"), reference
        assert reference.rpartition("/")[2] in described["components"]["schemas"], reference


def test_the_problem_schema_has_the_members_of_the_contract(described: dict[str, Any]) -> None:
    problem = described["components"]["schemas"]["Problem"]
    assert set(problem["properties"]) == {
        *("type", "title", "status", "detail", "instance", "requestId", "error", "message", "statusCode"),
        *("currentStatus", "errors", "retryAfter"),
    }
    assert {"title", "status", "detail", "instance", "requestId", "error", "message", "statusCode"} <= set(
        problem["required"]
    )


class _Assets(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.inline = ""
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [value for key in ("src", "href") if (value := given.get(key))]
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append(given)

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.inline += data.strip()

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False


def _page(reply: httpx.Response) -> _Assets:
    page = _Assets()
    page.feed(reply.text)
    return page


async def test_the_page_is_whole_and_ours(server: Server) -> None:
    for path in ("/docs", "/docs/"):
        reply = await server.client.get(path, headers={"X-API-Key": ""}, follow_redirects=False)
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/html")
        assert "://" not in reply.text, "nothing from another host"
        page = _page(reply)
        assert len(page.addresses) >= 4
        for address in page.addresses:
            assert address.startswith("/docs/"), address
            asset = await server.client.get(address, headers={"X-API-Key": ""})
            assert asset.status_code == 200, address
            assert len(asset.content) > 100
        kinds = {
            address.rpartition(".")[2]: (await server.client.head(address)).headers for address in page.addresses
        }
        assert kinds["js"]["content-type"].startswith(("text/javascript", "application/javascript"))
        assert kinds["css"]["content-type"].startswith("text/css")
        assert "max-age" in kinds["js"]["cache-control"]


async def test_scripts_run_by_nonce_only(service: Service) -> None:
    nonces = set()
    for _ in range(2):
        reply = await service.client.get("/docs")
        (policy,) = reply.headers.get_list("content-security-policy")
        match = re.search(r"script-src 'nonce-([A-Za-z0-9_-]{20,})';", policy)
        assert match
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        page = _page(reply)
        assert page.scripts
        assert {script.get("nonce") for script in page.scripts} == {match[1]}
        assert not page.inline
        nonces.add(match[1])
    assert len(nonces) == 2


async def test_the_page_shows_our_document(service: Service) -> None:
    script = (await service.client.get("/docs/static/docs.js")).text
    assert 'url: "/docs/json"' in script
    assert "validatorUrl: null" in script, "the validator badge would ask another host"
    assert "://" not in script


async def test_nothing_else_lies_below_docs(service: Service) -> None:
    for path in ("/docs/nothing", "/docs/static/nothing", "/docs/static/%2e%2e/%2e%2e/app.py", "/docs/static/"):
        reply = await service.client.get(path)
        assert reply.status_code == 404, path
        assert reply.headers["content-type"] == PROBLEM
