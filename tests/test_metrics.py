"""Metrics through the real app and a real simulator: counted exactly, and bounded."""

from __future__ import annotations

import asyncio
import copy
import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from websockets.asyncio.client import connect

from management_api.app import Application, create_app
from managers.events.types import (
    BackendConnected,
    BackendDisconnected,
    ComfyUIMessage,
    ErrorType,
    Event,
    NodeExecuting,
    WorkflowStarted,
)
from tests.graphs import WORKFLOWS
from tests.scraping import Sample, nodes, sample, total, values
from tests.serving import DEADLINE, KEY, Service, SettingsMaker, StartServer, StartService, lifespan
from tests.simulator_process import end, simulator, start_simulator

SUBMIT = "/v1/comfyui/workflow"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
KEPT = {
    "comfyui_workflow_total": "counter",
    "comfyui_workflow_duration_seconds": "histogram",
    "comfyui_workflow_errors_total": "counter",
    "comfyui_queue_length": "gauge",
    "comfyui_gpu_utilization": "gauge",
    "comfyui_vram_usage_bytes": "gauge",
}


async def scrape(client: httpx.AsyncClient) -> dict[Sample, float]:
    reply = await client.get("/metrics")
    assert reply.status_code == 200
    return values(parse_text(reply.text))


def changes(before: dict[Sample, float], after: dict[Sample, float]) -> dict[Sample, float]:
    """What is different, without the sums and ages that time decides."""
    found = {key: value - before.get(key, 0.0) for key, value in after.items()}
    return {
        key: value
        for key, value in found.items()
        if value and not key[0].endswith("_sum") and key[0] not in TIMELY
    }  # fmt: skip


TIMELY = {"comfyui_queue_oldest_seconds", "comfyui_backend_busy", "comfyui_backend_up"}


def picture(color: int) -> dict[str, Any]:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": color}},
        "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": f"met/{color:x}"}},
    }


def recorded(name: str, color: int) -> dict[str, Any]:
    """One of the recorded workflows, in a colour of its own: nothing of it is in the cache."""
    graph = copy.deepcopy(WORKFLOWS[name])
    graph["1"]["inputs"]["color"] = color
    return dict(graph)


def sleeping(color: int, steps: int) -> dict[str, Any]:
    graph = recorded("long_sleep", color)
    graph["2"]["inputs"]["steps"] = steps
    return graph


def client_of(app: Application) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://service", headers={"X-API-Key": KEY}
    )


async def submit(client: httpx.AsyncClient, graph: Any, *, wait: int = 0, **fields: Any) -> dict[str, Any]:
    headers = {"Prefer": f"wait={wait}"} if wait else {}
    reply = await client.post(SUBMIT, json={"workflow": graph, **fields}, headers=headers, timeout=DEADLINE)
    assert reply.status_code == (200 if wait else 202), reply.text
    return dict(reply.json())


@asynccontextmanager
async def told(service: Service, wanted: Callable[[Any], bool]) -> AsyncIterator[None]:
    """At the end of the block, wait until such an event was published since its beginning."""
    heard = asyncio.Event()

    def listener(event: Any) -> None:
        if wanted(event):
            heard.set()

    stop = service.app.running[0].hub.listen(listener)
    try:
        yield
        async with asyncio.timeout(DEADLINE):
            await heard.wait()
    finally:
        stop()


def a(kind: type[Event]) -> Callable[[Any], bool]:
    return lambda event: isinstance(event, kind)


def is_message(kind: str) -> Callable[[Any], bool]:
    return lambda event: isinstance(event, ComfyUIMessage) and event.type == f"comfyui:{kind}"


async def connected(start: StartService, url: str) -> Service:
    """The service when its ComfyUI is up."""
    service = await start(COMFYUI_URL=url)
    [dispatcher] = service.app.running[0].workflows.dispatchers
    async with asyncio.timeout(DEADLINE):
        await dispatcher.backend.wait_up()
    return service


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with simulator(tmp_path_factory.mktemp("comfyui")) as (url, _):
        yield url


@pytest.fixture
async def running(comfyui: str, start_service: StartService) -> Service:
    return await connected(start_service, comfyui)


# ---- the page


async def test_the_first_scrape_has_every_kept_name_and_zero_for_known_labels(service: Service) -> None:
    text = (await service.client.get("/metrics")).text
    for name, kind in KEPT.items():
        assert f"\n# TYPE {name} {kind}\n" in text
        assert re.search(rf"^# HELP {name} \S", text, re.MULTILINE)
    found = values(parse_text(text))
    known = [total(status) for status in ("queued", "started", "completed", "failed", "cancelled")]
    for error_type in get_args(ErrorType):
        known.append(sample("comfyui_workflow_errors_total", error_type=error_type))
        known.append(sample("comfyui_retries_total", error_type=error_type))
    for priority in ("high", "normal", "low"):
        known.append(sample("comfyui_queue_depth", priority=priority))
        known.append(sample("comfyui_workflow_queue_seconds_count", priority=priority))
    known.append(sample("comfyui_workflow_duration_seconds_count", gpu_type="local"))
    known += [sample("comfyui_backend_up", backend="local"), sample("comfyui_backend_busy", backend="local")]
    known += [sample(name) for name in ("comfyui_queue_length", "active_tasks_total", "comfyui_outputs_bytes_total")]
    assert {key: found.get(key) for key in known} == dict.fromkeys(known, 0.0)


async def test_buckets_are_those_of_the_contract(service: Service) -> None:
    text = (await service.client.get("/metrics")).text
    bounds = re.findall(
        r'^comfyui_workflow_duration_seconds_bucket\{gpu_type="local",le="(.+?)"\}', text, re.MULTILINE
    )
    assert bounds == ["1.0", "5.0", "10.0", "30.0", "60.0", "120.0", "300.0", "600.0", "+Inf"]


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("text/html", "text/plain; version=0.0.4"),
        ("text/plain;version=0.0.4", "text/plain; version=0.0.4"),
        (OPENMETRICS, "application/openmetrics-text; version=1.0.0"),
        (
            "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;q=0.3",
            "application/openmetrics-text; version=1",
        ),
        ('application/openmetrics-text; version="1.0.0"', "text/plain; version=0.0.4"),
    ],
)
async def test_the_format_follows_accept(service: Service, accept: str, content_type: str) -> None:
    reply = await service.client.get("/metrics", headers={"accept": accept})
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith(content_type)
    assert "charset=utf-8" in reply.headers["content-type"]
    assert reply.text.endswith("# EOF\n") == content_type.startswith("application")


def openmetrics(text: str) -> Iterable[Metric]:
    return list(parse_openmetrics(text))  # type: ignore[no-untyped-call]


async def test_both_formats_say_the_same(running: Service) -> None:
    await submit(running.client, picture(0xF0F0F0), wait=20)
    plain = (await running.client.get("/metrics")).text
    rich = (await running.client.get("/metrics", headers={"accept": OPENMETRICS})).text
    timely = {sample("comfyui_backend_busy", backend="local")}
    first, second = values(parse_text(plain)), values(openmetrics(rich))
    assert {k: v for k, v in first.items() if k not in timely} == {k: v for k, v in second.items() if k not in timely}
    assert "_created" not in plain + rich


async def test_the_same_app_can_be_started_again(make_settings: SettingsMaker) -> None:
    app = create_app(make_settings())
    for _ in range(2):
        async with lifespan(app), client_of(app) as client:
            assert total("queued") in await scrape(client)


# ---- counted


async def test_a_workflow_that_completes_and_the_same_from_the_cache(running: Service) -> None:
    before = await scrape(running.client)
    done = await submit(running.client, picture(0x010101), wait=20, priority="high")
    after = await scrape(running.client)
    [output] = done["outputs"]
    once = {
        total("queued"): 1,
        total("started"): 1,
        total("completed"): 1,
        sample("comfyui_workflow_duration_seconds_count", gpu_type="local"): 1,
        sample("comfyui_workflow_queue_seconds_count", priority="high"): 1,
    }
    assert changes(before, after) == once | {
        nodes("EmptyImage"): 1,
        nodes("ImageInvert"): 1,
        nodes("SaveImage"): 1,
        sample("comfyui_outputs_bytes_total"): output["size"],
    }
    waited = after[sample("comfyui_workflow_queue_seconds_sum", priority="high")]
    assert waited == pytest.approx((done["startTime"] - done["createdAt"]) / 1000)
    took = after[sample("comfyui_workflow_duration_seconds_sum", gpu_type="local")]
    assert took == pytest.approx((done["completionTime"] - done["startTime"]) / 1000)

    again = await submit(running.client, picture(0x010101), wait=20, priority="high")
    assert again["outputsReused"]
    found = changes(after, await scrape(running.client))
    assert found.pop(sample("comfyui_dispatch_gap_seconds_count")) == 1
    assert found == once


async def test_a_failure_in_a_node(running: Service) -> None:
    before = await scrape(running.client)
    failed = await submit(running.client, recorded("fail_value_error", 0x070701), wait=20, priority="low")
    assert failed["errorType"] == "node"
    assert changes(before, await scrape(running.client)) == {
        total("queued"): 1,
        total("started"): 1,
        total("failed"): 1,
        sample("comfyui_workflow_errors_total", error_type="node"): 1,
        sample("comfyui_workflow_queue_seconds_count", priority="low"): 1,
        nodes("EmptyImage"): 1,
        nodes("PreviewImage"): 1,
    }


async def test_what_can_run_nowhere_was_never_queued(running: Service) -> None:
    before = await scrape(running.client)
    failed = await submit(running.client, WORKFLOWS["invalid_node_type"])
    assert failed["status"] == "failed"
    assert changes(before, await scrape(running.client)) == {
        total("failed"): 1,
        sample("comfyui_workflow_errors_total", error_type="validation"): 1,
    }


async def test_what_comfyui_refuses_never_started(running: Service) -> None:
    before = await scrape(running.client)
    refused = await submit(running.client, WORKFLOWS["invalid_missing_input_file"], wait=20)
    assert (refused["status"], refused["startTime"]) == ("failed", None)
    assert changes(before, await scrape(running.client)) == {
        total("queued"): 1,
        total("failed"): 1,
        sample("comfyui_workflow_errors_total", error_type="validation"): 1,
    }


async def test_cancelled_while_running_and_while_waiting(running: Service) -> None:
    before = await scrape(running.client)
    async with told(running, lambda event: isinstance(event, NodeExecuting) and event.node_type == "SleepSteps"):
        first = await submit(running.client, sleeping(0x020202, 200))
    found = await scrape(running.client)
    assert found[sample("comfyui_backend_busy", backend="local")] == 1
    assert found[sample("comfyui_backend_up", backend="local")] == 1
    second = await submit(running.client, picture(0x020203))
    async with told(running, is_message("execution_interrupted")):
        for workflow in (second, first):
            reply = await running.client.delete(f"{SUBMIT}/{workflow['workflowId']}")
            assert reply.status_code == 200
    assert changes(before, await scrape(running.client)) == {
        total("queued"): 2,
        total("started"): 1,
        total("cancelled"): 2,
        sample("comfyui_workflow_queue_seconds_count", priority="normal"): 1,
        nodes("EmptyImage"): 1,
    }


async def test_a_second_attempt_counts_as_a_retry_and_not_as_a_workflow(running: Service) -> None:
    before = await scrape(running.client)
    failed = await submit(running.client, recorded("fail_oom_torch", 0x070703), wait=20)
    assert (failed["errorType"], failed["attempt"]) == ("oom", 2)
    found = changes(before, await scrape(running.client))
    assert found.pop(nodes("EmptyImage")) in (1, 2)  # /free may come before or after the second attempt
    assert found == {
        total("queued"): 1,
        total("started"): 1,
        total("failed"): 1,
        sample("comfyui_retries_total", error_type="oom"): 1,
        sample("comfyui_workflow_errors_total", error_type="oom"): 1,
        sample("comfyui_workflow_queue_seconds_count", priority="normal"): 1,
    }


async def test_lost_ones_start_once_whichever_attempt_it_was(tmp_path: Path, start_service: StartService) -> None:
    url, process = start_simulator(tmp_path / "sim")
    try:
        service = await connected(start_service, url)
        before = await scrape(service.client)

        def both_posted(event: Any) -> bool:
            return (
                is_message("status")(event)
                and msgspec.json.decode(event.data)["status"]["exec_info"]["queue_remaining"] == 2
            )

        async with told(service, both_posted), told(service, a(WorkflowStarted)):
            runs = await submit(service.client, sleeping(1, 12))
            waits = await submit(service.client, picture(2))
        async with told(service, a(BackendDisconnected)):
            end(process)
        assert (await scrape(service.client))[sample("comfyui_backend_up", backend="local")] == 0
        async with told(service, a(BackendConnected)):
            _, process = start_simulator(tmp_path / "sim", "--port", str(urlsplit(url).port))
        for workflow in (runs, waits):
            ended = await service.app.running[0].workflows.wait(workflow["workflowId"], DEADLINE)
            assert (ended.status, ended.attempt) == ("completed", 2)
        found = changes(before, await scrape(service.client))
    finally:
        end(process)
    assert {
        key: value for key, value in found.items() if key[0] in ("comfyui_workflow_total", "comfyui_retries_total")
    } == {
        total("queued"): 2,
        total("started"): 2,
        total("completed"): 2,
        sample("comfyui_retries_total", error_type="lost"): 2,
    }
    assert found[sample("comfyui_workflow_queue_seconds_count", priority="normal")] == 2


async def test_a_workflow_of_before_a_restart_is_timed_whole(comfyui: str, make_settings: SettingsMaker) -> None:
    async with (
        lifespan(app := create_app(make_settings(COMFYUI_BACKENDS="a=http://127.0.0.1:9"))),
        client_of(app) as client,
    ):
        waiting = await submit(client, picture(0x030303), priority="low", gpu="a")
        assert (await scrape(client))[total("queued")] == 1
    async with (
        lifespan(app := create_app(make_settings(COMFYUI_BACKENDS=f"a={comfyui}"))),
        client_of(app) as client,
    ):
        ended = await app.running[0].workflows.wait(waiting["workflowId"], DEADLINE)
        found = await scrape(client)
    assert ended.start_time is not None
    assert [found[total(status)] for status in ("queued", "started", "completed")] == [0, 1, 1]
    assert found[sample("comfyui_workflow_duration_seconds_count", gpu_type="a")] == 1
    assert found[sample("comfyui_workflow_queue_seconds_count", priority="low")] == 1
    waited = found[sample("comfyui_workflow_queue_seconds_sum", priority="low")]
    assert waited == pytest.approx((ended.start_time - ended.created_at) / 1000)


async def test_an_expanded_node_is_timed_once_and_as_a_whole(running: Service) -> None:
    before = await scrape(running.client)
    done = await submit(running.client, recorded("subgraph_expand", 0x070704), wait=20)
    assert done["status"] == "completed"
    after = await scrape(running.client)
    found = {key: value for key, value in changes(before, after).items() if "node_duration" in key[0]}
    assert found == {nodes("EmptyImage"): 1, nodes("ProbeExpand"): 1, nodes("SaveImage"): 1}
    assert after[sample("comfyui_node_duration_seconds_sum", node_type="ProbeExpand")] >= 0.1  # its two steps


# ---- as it is now


async def test_the_queue_as_it_is(running: Service) -> None:
    assert (await running.client.post("/v1/comfyui/queue/pause")).status_code == 200
    workflows = [
        await submit(running.client, picture(0x040400 + n), priority=priority)
        for n, priority in enumerate(("high", "high", "low"))
    ]
    found = await scrape(running.client)
    assert found[sample("comfyui_queue_length")] == 3
    depths = {p: found[sample("comfyui_queue_depth", priority=p)] for p in ("high", "normal", "low")}
    assert depths == {"high": 2, "normal": 0, "low": 1}
    clock = running.app.base.clock
    most = (clock.now_ms() - workflows[0]["createdAt"]) / 1000
    assert 0 <= found[sample("comfyui_queue_oldest_seconds")] <= most
    later = (await scrape(running.client))[sample("comfyui_queue_oldest_seconds")]
    assert found[sample("comfyui_queue_oldest_seconds")] <= later

    assert (await running.client.post("/v1/comfyui/queue/resume")).status_code == 200
    for workflow in workflows:
        await running.app.running[0].workflows.wait(workflow["workflowId"], DEADLINE)
    found = await scrape(running.client)
    assert found[sample("comfyui_queue_length")] == found[sample("comfyui_queue_oldest_seconds")] == 0
    # Three in a row: the first follows none, so there are two gaps.
    assert found[sample("comfyui_dispatch_gap_seconds_count")] == 2


async def test_the_age_is_that_of_the_oldest(service: Service) -> None:
    first = await submit(service.client, picture(1), priority="low")
    while service.app.base.clock.now_ms() < first["createdAt"] + 20:
        await scrape(service.client)
    second = await submit(service.client, picture(2), priority="high")
    before = service.app.base.clock.now_ms()
    age = (await scrape(service.client))[sample("comfyui_queue_oldest_seconds")]
    assert age >= (before - first["createdAt"]) / 1000 > (before - second["createdAt"]) / 1000


async def test_those_who_listen(start_server: StartServer) -> None:
    server = await start_server()
    address = f"{server.websocket_url}/v1/comfyui/stream"
    async with connect(address, additional_headers={"X-API-Key": KEY}, proxy=None) as socket:
        await socket.send('{"type":"ping"}')
        await socket.recv()
        assert (await scrape(server.client))[sample("comfyui_stream_clients")] == 1
    server.app.running[0].hub.count_dropped()
    assert (await scrape(server.client))[sample("comfyui_stream_dropped_total")] == 1


def database_of(service: Service) -> Path:
    [found] = service.app.base.settings.api.data_dir.glob("*.sqlite3")
    return found


async def test_a_scrape_waits_for_no_lock_of_the_store(running: Service) -> None:
    await submit(running.client, picture(0x080801), wait=20)
    holder = sqlite3.connect(database_of(running), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        stuck = asyncio.create_task(submit(running.client, picture(0x080802)))
        await asyncio.wait({stuck}, timeout=0.3)
        assert (await scrape(running.client))[total("queued")] == 1
        assert not stuck.done()
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    assert (await stuck)["status"] == "queued"
    assert (await scrape(running.client))[total("queued")] == 2


# ---- bounded


async def test_no_label_names_a_workflow_a_prompt_or_a_file(running: Service) -> None:
    graph = picture(0x050505)
    graph["3"]["inputs"]["filename_prefix"] = "secretname"
    graph["4"] = {"class_type": "ProbeText", "inputs": {"text": "secretprompt"}, "_meta": {"title": "secrettitle"}}
    done = [
        await submit(running.client, graph, wait=20, metadata={"who": "secretmeta"}),
        await submit(running.client, recorded("fail_value_error", 0x070702), wait=20),
    ]
    text = (await running.client.get("/metrics")).text
    assert 'node_type="ProbeText"' in text
    for workflow in done:
        assert workflow["workflowId"] not in text
        assert workflow["promptId"] not in text
    assert "secret" not in text
    for color in range(0x050506, 0x05050B):
        await submit(running.client, picture(color), wait=20)
    more = (await running.client.get("/metrics")).text
    assert series(more) == series(text)


def series(text: str) -> set[str]:
    return {line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith(("#", "http_"))}


# ---- told


def documented() -> dict[str, tuple[str, str]]:
    """`name -> (type, labels)` from the tables of docs/metrics.md."""
    text = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| .+ \|$", text, re.MULTILINE)
    assert len({name for name, _, _ in rows}) == len(rows)
    return {name: (kind, labels) for name, kind, labels in rows}


async def test_every_metric_is_documented_and_every_documented_one_exists(running: Service) -> None:
    await submit(running.client, picture(0x060606), wait=20)
    await running.client.get("/nowhere")
    found: dict[str, tuple[str, set[str] | None]] = {}
    for family in parse_text((await running.client.get("/metrics")).text):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for one in family.samples for label in one.labels} - {"le"} if family.samples else None
        found[name] = (family.type, labels)
    told = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, (kind, labels) in documented().items()}
    assert {name: kind for name, (kind, _) in told.items()} == {name: kind for name, (kind, _) in found.items()}
    silent = {name for name, (_, labels) in found.items() if labels is None}
    cards = {name for name in found if name.startswith(("comfyui_gpu_", "comfyui_vram_"))}  # as this machine has any
    assert silent - cards == {"task_duration_seconds"}
    for name, (_, labels) in found.items():
        if labels is not None:
            assert told[name][1] == labels, name


def test_queries_of_the_documentation_use_metrics_that_exist() -> None:
    text = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    queries = "\n".join(re.findall(r"^    (.*)$", text, re.MULTILINE))
    used = set(re.findall(r"\b((?:comfyui|http|api|process)_\w+|\w+_tasks_total)\b", queries))
    known = set(documented())
    unknown = {name for name in used if name not in known and re.sub(r"_(bucket|sum|count)$", "", name) not in known}
    assert len(used) >= 5
    assert not unknown
