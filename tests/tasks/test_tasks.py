"""Tasks over HTTP, with real programs (CONTRACT 7)."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from management_api.security import needed_scope
from managers.callers import KeyScope
from tests.scraping import values
from tests.serving import StartServer
from tests.tasks.kit import FOREVER, TASKS, Desk, Gate, Watched, environment, lines_of

UNKNOWN = "0198c6f1-4d3b-7d55-9f6a-0d6f2a3c9b11"


async def test_a_task_from_start_to_end(desk: Desk) -> None:
    before = time.time_ns() // 1_000_000
    program = "import os, sys; print(os.getcwd()); print(*sys.argv[1:]); print('oops', file=sys.stderr)"
    reply = await desk.client.post(TASKS, json={"agent": "coder", "task": program, "provider": "python"})
    assert reply.status_code == 202
    accepted = reply.json()
    assert set(accepted) == {"taskId", "status", "message", "taskDir", "logFile"}
    assert accepted["status"] == "accepted"
    await desk.ended(accepted["taskId"])

    task = await desk.get(accepted["taskId"])
    assert {
        key: task[key] for key in ("agent", "task", "provider", "status", "exitCode", "error", "submittedBy")
    } == {
        "agent": "coder",
        "task": program,
        "provider": "python",
        "status": "completed",
        "exitCode": 0,
        "error": None,
        "submittedBy": "admin",
    }
    assert (task["taskDir"], task["logFile"]) == (accepted["taskDir"], accepted["logFile"])
    said = [task["taskDir"], f"coder {task['taskId']} {task['taskDir']}", "oops"]
    assert task["logTail"] == "\n".join(said)
    assert (await asyncio.to_thread(Path(task["logFile"]).read_text)) == "\n".join(said) + "\n"
    assert before <= task["startTime"] <= task["exitTime"] <= time.time_ns() // 1_000_000
    assert task["duration"] == task["exitTime"] - task["startTime"]


@pytest.mark.parametrize(
    ("program", "code", "error"),
    [
        ("raise SystemExit(3)", 3, "It ended with status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", None, "It was ended by SIGKILL"),
    ],
)
async def test_a_task_that_fails(desk: Desk, program: str, code: int | None, error: str) -> None:
    task = await desk.run(program)
    assert (task["status"], task["exitCode"], task["error"]) == ("failed", code, error)


async def test_a_task_that_takes_too_long(desk: Desk) -> None:
    task = await desk.run(FOREVER, provider="short")
    assert (task["status"], task["exitCode"]) == ("failed", None)
    assert "longer than its provider allows" in task["error"]


async def test_no_shell_reads_what_a_client_sends(desk: Desk, tmp_path: Path) -> None:
    nasty = f"$(touch {tmp_path}/x) `id` \"; rm -rf ' \\ {{task_id}} ünïcode"
    task = await desk.run("import sys; print(sys.argv[1])", agent=nasty)
    assert task["logTail"] == nasty
    assert not (tmp_path / "x").exists()


async def test_nothing_a_client_sends_becomes_an_option(desk: Desk) -> None:
    reply = await desk.client.post(TASKS, json={"agent": "-i", "task": "pass", "provider": "python"})
    assert reply.status_code == 400
    assert "-" in reply.json()["detail"]


async def test_a_program_sees_only_what_is_allowed(desk: Desk, service_folder: Path) -> None:
    task = await desk.run("import json, os; print(json.dumps(dict(os.environ)))")
    seen = json.loads(task["logTail"])
    seen.pop("LC_CTYPE", None)  # Python's own
    assert seen == {
        "PATH": f"{service_folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(service_folder),
        "LANG": "C.UTF-8",
        "OPENAI_API_KEY": "openai-7Kq2",
        "CUSTOM_COLOUR": "blue",
        "TASK_ID": task["taskId"],
    }
    parents = await desk.run("import os; print(open(f'/proc/{os.getppid()}/environ').read())")
    assert "aws-9Xw4" not in parents["logTail"], "nor by way of its parent"


async def test_who_cannot_be_asked(desk: Desk) -> None:
    before = (await desk.client.get(f"{TASKS}?all=true&limit=1")).json()
    unknown = await desk.client.post(TASKS, json={"agent": "a", "task": "b", "provider": "shell"})
    assert unknown.status_code == 400
    assert unknown.json()["errors"][0]["pointer"] == "/provider"
    assert {"claude-flow", "agentic-flow", "gemini", "openai", "python"} <= set(
        unknown.json()["errors"][0]["allowed"]
    )
    absent = await desk.client.post(TASKS, json={"agent": "a", "task": "b", "provider": "absent"})
    assert absent.status_code == 503
    assert "no-such-program-4711" in absent.json()["detail"]
    assert int(absent.headers["retry-after"]) >= 1
    assert (await desk.client.get(f"{TASKS}?all=true&limit=1")).json() == before, "nothing is left of it"


@pytest.mark.parametrize(
    "body",
    [
        {"agent": "a"},
        {"task": "b"},
        {"agent": "", "task": "b"},
        {"agent": "a\n", "task": "b"},
        {"agent": "a", "task": "b\0"},
        {"agent": "a", "task": "x" * 30_001},
        {"agent": "a", "task": 5},
    ],
)
async def test_what_cannot_be_a_task(desk: Desk, body: dict[str, object]) -> None:
    assert (await desk.client.post(TASKS, json=body)).status_code == 400


async def test_lone_surrogates_are_refused(desk: Desk) -> None:
    reply = await desk.client.post(
        TASKS,
        content=b'{"agent":"a\\ud800","task":"b","provider":"python"}',
        headers={"content-type": "application/json"},
    )
    assert reply.status_code == 400


async def test_unknown_tasks(desk: Desk) -> None:
    for task_id in (UNKNOWN, "x", "..%2f..", UNKNOWN.upper()):
        assert (await desk.client.get(f"{TASKS}/{task_id}")).status_code == 404
        assert (await desk.client.delete(f"{TASKS}/{task_id}")).status_code == 404
        assert (await desk.client.get(f"{TASKS}/{task_id}/logs/stream")).status_code == 404


async def test_the_list_has_those_that_run_and_all_on_request(desk: Desk) -> None:
    first = (await desk.run("print(1)"))["taskId"]
    second = await desk.start(FOREVER)
    active = (await desk.client.get(TASKS)).json()
    assert active["count"] == 1
    (item,) = active["activeTasks"]
    assert set(item) == {"taskId", "agent", "task", "provider", "status", "startTime", "duration"}
    assert (item["taskId"], item["status"]) == (second, "running")
    everything = (await desk.client.get(f"{TASKS}?all=true&limit=2")).json()
    assert [(task["taskId"], task["status"]) for task in everything["activeTasks"]] == [
        (second, "running"),
        (first, "completed"),
    ]
    assert (await desk.client.get(f"{TASKS}?all=true&limit=1")).json()["count"] == 1
    assert (await desk.client.get("/ready")).json()["activeTasks"] == 1


async def test_no_more_at_once_than_the_provider_may_have(desk: Desk) -> None:
    replies = await asyncio.gather(
        *(desk.client.post(TASKS, json={"agent": "a", "task": FOREVER, "provider": "python"}) for _ in range(5))
    )
    assert sorted(reply.status_code for reply in replies) == [202, 202, 202, 503, 503]
    assert (await desk.run("pass", provider="small"))["status"] == "completed", "others are not concerned"


async def test_a_stopped_task_stays_stopped(desk: Desk) -> None:
    """Although it ends well after that."""
    program = "import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); print('ready'); signal.pause()"
    task_id = await desk.start(program)
    async with desk.following(task_id) as stream:
        assert (await anext(stream)).data["line"] == "ready"
        reply = await desk.client.delete(f"{TASKS}/{task_id}")
        assert (reply.status_code, reply.json()["status"]) == (200, "stopped")
        assert (await desk.get(task_id))["status"] == "stopped"
        last = [told async for told in stream][-1]
    assert last.event == "task-complete"
    assert last.data == {"taskId": task_id, "status": "stopped", "exitCode": 0}
    task = await desk.get(task_id)
    assert (task["status"], task["exitCode"], task["error"]) == ("stopped", 0, None)
    again = await desk.client.delete(f"{TASKS}/{task_id}")
    assert (again.status_code, again.json()["currentStatus"]) == (409, "stopped")


async def test_an_ended_task_cannot_be_stopped(desk: Desk) -> None:
    task = await desk.run("pass")
    reply = await desk.client.delete(f"{TASKS}/{task['taskId']}")
    assert (reply.status_code, reply.json()["currentStatus"]) == (409, "completed")


async def test_all_that_a_task_started_ends_with_it(desk: Desk) -> None:
    """Its children, and those that left its session: when it is stopped, and when it ends."""
    program = (
        "import os, signal, subprocess, sys\n"
        "sleeper = [sys.executable, '-ISc', 'import signal; signal.pause()']\n"
        "for session in (False, True):\n"
        "    print(subprocess.Popen(sleeper, start_new_session=session).pid)\n"
    )
    for rest in ("signal.pause()", "input() if os.isatty(0) else None; open(sys.argv[3] + '/go').read()"):
        task_id = await desk.start(program + rest)
        work = Path((await desk.get(task_id))["taskDir"])
        if "go" in rest:
            Gate(work / "go")
        async with desk.following(task_id) as stream:
            left = [Watched(int((await anext(stream)).data["line"])) for _ in range(2)]
            if "go" in rest:
                await asyncio.to_thread((work / "go").write_text, "")
            else:
                await desk.client.delete(f"{TASKS}/{task_id}")
            assert [told async for told in stream][-1].event == "task-complete"
        assert all([await one.gone() for one in left])


async def test_lines_come_whole_and_once(desk: Desk, tmp_path: Path) -> None:
    first, second = Gate(tmp_path / "first"), Gate(tmp_path / "second")
    program = (
        f"import sys; print('one'); sys.stdout.write('tw'); {first.wait}\n"
        f"sys.stdout.write('o\\r\\nthr'); {second.wait}; sys.stdout.write('ee\\n\\nfö\\nlast')"
    )
    task_id = await desk.start(program)
    async with desk.following(task_id) as stream:
        assert (await anext(stream)).data["line"] == "one"
        await first.open()
        two = await anext(stream)
        assert two.data["line"] == "two"
        assert abs(two.data["timestamp"] - time.time_ns() // 1_000_000) < 5000
        await second.open()
        rest = [told async for told in stream]
    assert lines_of(rest) == ["three", "", "fö", "last"]
    assert rest[-1].event == "task-complete"
    assert rest[-1].data == {"taskId": task_id, "status": "completed", "exitCode": 0}

    log = await asyncio.to_thread(Path((await desk.get(task_id))["logFile"]).read_bytes)
    assert log[: two.id] == b"one\ntwo\r\n"
    async with desk.following(task_id, two.id) as stream:
        resumed = [told async for told in stream]
    assert [(told.event, told.id) for told in resumed] == [(told.event, told.id) for told in rest]
    assert lines_of(resumed) == lines_of(rest)
    async with desk.following(task_id, rest[-1].id + 1000) as stream:
        assert [told.event async for told in stream] == ["task-complete"], "an offset that nobody gave"


async def test_the_log_keeps_to_its_size_and_tells_of_the_gap(desk: Desk) -> None:
    task = await desk.run("for n in range(10000): print('line', n)", provider="small")
    parts = list(Path(task["logFile"]).parent.glob("output.*.log"))
    assert 1 <= len(parts) <= 2
    assert 4000 < sum(part.stat().st_size for part in parts) <= 16384
    assert task["logTail"].splitlines() == [f"line {n}" for n in range(9950, 10000)]
    newer = await asyncio.to_thread(Path(task["logFile"]).read_text)
    assert newer.endswith("line 9999\n"), "the path leads to the newer part"

    told = await desk.ended(task["taskId"])
    assert told[0].event == "log-gap"
    assert told[0].data["from"] == 0
    said = lines_of(told)
    assert said == [f"line {n}" for n in range(10000 - len(said), 10000)]
    assert told[0].data["to"] == sum(len(f"line {n}\n") for n in range(10000 - len(said)))


async def test_many_follow_one_task(desk: Desk, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    task_id = await desk.start(f"{gate.wait}\nfor n in range(3000): print(n)")
    followers = [asyncio.create_task(desk.ended(task_id)) for _ in range(5)]
    await gate.open()
    for told in await asyncio.gather(*followers):
        assert lines_of(told) == [str(n) for n in range(3000)]
        assert told[-1].event == "task-complete"


async def test_tasks_are_counted(desk: Desk) -> None:
    before = await metrics(desk.client)
    for program in ("pass", "pass", "raise SystemExit(1)"):
        await desk.run(program)
    running = await desk.start(FOREVER)
    assert (await metrics(desk.client))["active_tasks_total", ()] == 1
    await desk.client.delete(f"{TASKS}/{running}")
    await desk.ended(running)
    after = await metrics(desk.client)
    assert after["active_tasks_total", ()] == 0
    more = {
        key: value - before.get(key, 0) for key, value in after.items() if "_tasks_" in key[0] or "task_d" in key[0]
    }
    for status, count in (("completed", 2), ("failed", 1), ("stopped", 1)):
        assert more["completed_tasks_total", (("status", status),)] == count
        assert more["task_duration_seconds_count", (("status", status), ("task_type", "python"))] == count


async def metrics(client: httpx.AsyncClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (name, tuple(sorted(labels))): value
        for (name, labels), value in values(parse((await client.get("/metrics")).text)).items()
    }


async def test_no_new_task_while_the_service_stops(start_server: StartServer, tmp_path: Path) -> None:
    given: Any = environment(tmp_path)
    server = await start_server(**given)
    task_id = await Desk(server.client).start(FOREVER)
    async with Desk(server.client).following(task_id) as stream:
        await anext(stream)
        server.app.running[0].tasks.drain()
        assert [told async for told in stream] == [], "who follows is sent away, without an end"
    reply = await server.client.post(TASKS, json={"agent": "a", "task": "b", "provider": "python"})
    assert reply.status_code == 503
    await server.client.delete(f"{TASKS}/{task_id}")


@pytest.mark.parametrize(
    ("method", "scope"), [("GET", KeyScope.READ), ("POST", KeyScope.ADMIN), ("DELETE", KeyScope.ADMIN)]
)
def test_tasks_run_programs_so_they_need_admin(method: str, scope: KeyScope) -> None:
    for template in (TASKS, f"{TASKS}/{{task_id}}"):
        assert needed_scope(method, template) is scope
