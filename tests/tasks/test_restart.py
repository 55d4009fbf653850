"""The whole service killed and started again while tasks run (CONTRACT 7: tasks survive a restart)."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx

from tests.program import KEY, Process, run, served
from tests.tasks.kit import SECONDS, TASKS, Desk, Gate, environment, lines_of


def client_of(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, headers={"X-API-Key": KEY}, timeout=SECONDS)


def end(process: Process, how: signal.Signals) -> None:
    process.signal(how)
    process.wait()


async def test_a_restart_loses_no_line_and_no_exit_status(tmp_path: Path) -> None:
    """Killed without a word, then stopped politely: the stream goes on where the reader was, each time."""
    gates = [Gate(tmp_path / f"gate{n}") for n in range(3)]
    program = "print('start')\n" + "\n".join(f"{gate.wait}; print('{n}' * 3)" for n, gate in enumerate(gates))
    given = environment(tmp_path)
    heard: list[str] = []
    with served(tmp_path, **given) as (url, process):
        async with client_of(url) as client:
            task_id = await Desk(client).start(program + "\nraise SystemExit(7)")
            async with Desk(client).following(task_id) as stream:
                first = await anext(stream)
        end(process, signal.SIGKILL)
    heard.append(first.data["line"])
    await gates[0].open()

    with served(tmp_path, **given) as (url, process):
        async with client_of(url) as client:
            active = (await client.get(TASKS)).json()
            assert [(task["taskId"], task["status"]) for task in active["activeTasks"]] == [(task_id, "running")]
            async with Desk(client).following(task_id, first.id) as stream:
                second = await anext(stream)
        end(process, signal.SIGTERM)
    heard.append(second.data["line"])
    await gates[1].open()
    await gates[2].open()

    with served(tmp_path, **given) as (url, _):
        async with client_of(url) as client:
            async with Desk(client).following(task_id, second.id) as stream:
                rest = [told async for told in stream]
            task = await Desk(client).get(task_id)
            metrics = (await client.get("/metrics")).text
    heard += lines_of(rest)
    assert heard == ["start", "0" * 3, "1" * 3, "2" * 3]
    assert rest[-1].data == {"taskId": task_id, "status": "failed", "exitCode": 7}
    assert (task["status"], task["exitCode"], task["logTail"]) == ("failed", 7, "\n".join(heard))
    assert 'completed_tasks_total{status="failed"} 1.0' in metrics, "counted by the one who saw it"


def test_a_providers_file_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    file = tmp_path / "providers.toml"
    file.write_text('[providers.x]\nargv = ["x", "{nope}"]\n')
    ended = run(tmp_path, "serve", MANAGEMENT_API_PROVIDERS_FILE=str(file))
    assert ended.status == 1
    assert len(ended.lines) == 1
    assert "{nope} is no placeholder" in ended.lines[0]
