"""What `deploy/` gives an operator: every expression names a series the service exposes, and every alert fires.

`promtool` and `prometheus` are the real programs (Debian package prometheus); without them those tests are skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.comfy_kit import PATIENCE
from tests.queue_kit import ROOT, Site, comfy, picture
from tests.serving import Service

DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboard.json"
# Kept from the service this one replaces, against what promtool asks of new names.
KEPT = {"active_tasks_total", "completed_tasks_total"}

_STRING = re.compile(r'"[^"]*"')
_SELECTOR = re.compile(r"\{[^}]*\}|\[[^\]]*\]|(?:by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)")
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_WORDS = {"and", "or", "unless", "vector", "sum", "max", "min", "count", "rate", "increase", "topk", "by", "bool"}
_WORDS |= {"histogram_quantile", "avg_over_time", "predict_linear", "le"}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus"
)
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no prometheus: apt-get install prometheus"
)


def rules() -> Iterator[dict[str, str]]:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        yield from group["rules"]


def panels() -> Iterator[dict[str, Any]]:
    yield from json.loads(DASHBOARD.read_text())["panels"]


def series(expression: str) -> set[str]:
    """The names of series in an expression: what is no label, no function and no number."""
    bare = _SELECTOR.sub(" ", _STRING.sub('""', expression))
    return set(_NAME.findall(re.sub(r"\b\d[\w.]*", " ", bare))) - _WORDS


async def exposed(service: Service) -> set[str]:
    found = {"up"}
    for family in text_string_to_metric_families((await service.client.get("/metrics")).text):
        found.add(family.name)
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        found |= {f"{family.name}{end}" for end in ends}
    return found


def test_series_of_an_expression() -> None:
    text = 'sum by (a, le) (rate(one_bucket{job="x y"}[5m])) / on (b) two:rate5m > 0.5 or vector(0)'
    assert series(text) == {"one_bucket", "two:rate5m"}


async def test_every_expression_names_what_is_exposed(service: Service) -> None:
    known = await exposed(service) | {rule["record"] for rule in rules() if "record" in rule}
    asked = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]
    asked += [(panel["title"], target["expr"]) for panel in panels() for target in panel.get("targets", ())]
    assert len(asked) > 40
    unknown = {title: missing for title, expression in asked if (missing := series(expression) - known)}
    assert unknown == {}


def test_the_dashboard_can_be_read() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["targets"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24


def promtool(*command: str, input: str = "") -> subprocess.CompletedProcess[str]:  # noqa: A002
    argv = ["promtool", *command]
    return subprocess.run(
        argv, cwd=RULES.parent, input=input, capture_output=True, text=True, timeout=60, check=False
    )


@needs_promtool
def test_promtool_finds_nothing() -> None:
    for command in (["check", "config", "prometheus.yml"], ["check", "rules", "rules.yml"]):
        done = promtool(*command)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_every_alert_fires_and_is_silent() -> None:
    done = promtool("test", "rules", "rules.test.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    tested = RULES.with_name("rules.test.yml").read_text()
    assert [
        rule["alert"] for rule in rules() if "alert" in rule and f"alertname: {rule['alert']}" not in tested
    ] == []


@needs_promtool
async def test_promtool_likes_our_metrics(service: Service) -> None:
    text = (await service.client.get("/metrics")).text
    done = promtool("check", "metrics", input=text)
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert [line for line in complaints if line.split()[0] not in KEPT] == []


@contextlib.contextmanager
def prometheus(folder: Path, address: str) -> Iterator[None]:
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait(10)


@pytest.mark.slow
@needs_prometheus
async def test_a_real_prometheus_scrapes_and_evaluates(tmp_path: Path) -> None:
    with comfy(tmp_path / "comfyui") as simulator:
        async with Site(tmp_path / "site", simulator).fresh() as queue:
            await queue.connected()
            await queue.run(picture())
            config = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
            config = config.replace("127.0.0.1:9090", queue.url.removeprefix("http://")).replace("15s", "1s")
            (tmp_path / "prometheus.yml").write_text(config)
            shutil.copy(RULES, tmp_path)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            with prometheus(tmp_path, address):
                async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as client:
                    await scraped(client)
                    scrape = (await queue.client.get("/metrics")).text
                    for family in text_string_to_metric_families(scrape):
                        if not family.samples:
                            continue
                        found = (
                            await client.get("/api/v1/metadata", params={"metric": family.samples[0].name})
                        ).json()
                        found = (
                            found["data"]
                            or (await client.get("/api/v1/metadata", params={"metric": family.name})).json()["data"]
                        )
                        told = next(iter(found.values()))[0]
                        assert (told["type"], told["help"]) == (family.type, family.documentation)
                    loaded = (await client.get("/api/v1/rules")).json()["data"]["groups"]
                    assert [
                        rule["lastError"] for group in loaded for rule in group["rules"] if "lastError" in rule
                    ] == []
                    assert sum(len(group["rules"]) for group in loaded) == len(list(rules()))


async def scraped(client: httpx.AsyncClient) -> None:
    """Until it has taken our numbers in. Prometheus has no event for that, so it is asked again, with an end."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                reply = await client.get(
                    "/api/v1/query", params={"query": 'comfyui_workflow_total{status="completed"}'}
                )
                found = reply.json()["data"]["result"] if reply.status_code == 200 else []
            except httpx.TransportError:
                found = []
            if found and found[0]["value"][1] == "1":
                return
            await asyncio.sleep(0.1)
