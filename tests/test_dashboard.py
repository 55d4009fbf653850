"""The files of the live page over HTTP: who gets them, how they are kept, what they may do."""

from __future__ import annotations

import re
from pathlib import Path

from management_api.openapi import STATIC
from tests.serving import Service, StartService

FOLDER = STATIC / "dashboard"
FILES = [path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.suffix in {".js", ".mjs", ".css"}]


async def test_the_page_and_its_files_need_no_key_and_are_not_counted(start_service: StartService) -> None:
    service = await start_service(MANAGEMENT_API_RATE_LIMIT="1/minute", headers={})
    assert len(FILES) > 15
    for path in ("/dashboard", *(f"/dashboard/{name}" for name in FILES)):
        reply = await service.client.get(path)
        assert reply.status_code == 200, path
        policy = reply.headers["content-security-policy"]
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "x-ratelimit-limit" not in reply.headers
    kinds = {name: (await service.client.get(f"/dashboard/{name}")).headers["content-type"] for name in FILES}
    assert kinds["app.js"] == kinds["vendor/preact.mjs"] == "text/javascript; charset=utf-8"
    assert kinds["style.css"] == "text/css; charset=utf-8"


async def test_what_a_browser_has_is_not_sent_again(service: Service) -> None:
    first = await service.client.get("/dashboard/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = await service.client.get("/dashboard/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    other = await service.client.get("/dashboard/style.css", headers={"if-none-match": first.headers["etag"]})
    assert other.status_code == 200
    assert (await service.client.head("/dashboard")).status_code == 200


async def test_nothing_else_is_there(service: Service) -> None:
    for name in ("nothing.js", "vendor/README.md", "vendor/preact.LICENSE", "%2e%2e/swagger/docs.js", "", "vendor/"):
        path = f"/dashboard/{name}"
        expected = 200 if not name else 404  # a slash at the end is no other page
        assert (await service.client.get(path)).status_code == expected, path
    assert (await service.client.post("/dashboard")).status_code == 405
    assert "/dashboard" not in (await service.client.get("/docs/json")).json()["paths"]
    assert (await service.client.get("/")).json()["endpoints"]["pages"]["dashboard"] == "GET /dashboard"


async def test_the_page_names_only_files_of_ours(service: Service) -> None:
    page = (await service.client.get("/dashboard")).text
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son[a-z]+=", page), "the policy would refuse it"
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    for name in FILES:
        if not name.startswith("vendor/"):
            text = (FOLDER / name).read_text()
            base = Path("/dashboard") / name
            named += [str(base.parent / found) for found in re.findall(r'from "(\./[^"]+)"', text)]
            assert not re.search(r'["\'(]https?://', text), f"{name} names another host"
            assert "innerHTML" not in text
    for address in set(named):
        assert (await service.client.get(address)).status_code == 200, address


def test_each_library_has_its_licence_and_is_told() -> None:
    told = (FOLDER / "vendor" / "README.md").read_text()
    for path in (FOLDER / "vendor").iterdir():
        if path.suffix in {".js", ".mjs"}:
            name = path.name.split(".", maxsplit=1)[0]
            assert f"`{path.name}`" in told
            assert (FOLDER / "vendor" / f"{name}.LICENSE").read_text().strip()
