"""The program from the outside: real processes, real signals, exit statuses (CONTRACT 1, 9)."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from management_api import __version__
from management_api.cli import main
from tests.program import KEY, PROGRAM, SECONDS, Ended, environment, run, served, started
from tests.simulator_process import simulator

HEADERS = {"X-API-Key": KEY}
WORKFLOW = "/v1/comfyui/workflow"


def graph(*, steps: int = 2, seconds: float = 0.01, **inputs: Any) -> dict[str, Any]:
    """A picture that takes `steps` times `seconds`, different each time."""
    color = random.randrange(2**24)
    sleep = {"image": ["1", 0], "steps": steps, "seconds_per_step": seconds, "seed": 7, "preview": False}
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": color}},
        "2": {"class_type": "SleepSteps", "inputs": {**sleep, "fail": "none", "fail_at_step": 0, **inputs}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "cli/picture"}},
    }


def write(folder: Path, content: Any) -> str:
    """The content in a file, and its name."""
    path = folder / f"workflow-{random.randrange(2**32)}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def follow(url: str) -> ClientConnection:
    """A client of the stream."""
    return connect(f"ws{url.removeprefix('http')}/v1/comfyui/stream", additional_headers=HEADERS, proxy=None)


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A simulator, as settings of a service."""
    folder = tmp_path_factory.mktemp("comfyui")
    with simulator(folder) as (url, _):
        yield {"COMFYUI_URL": url, "COMFY_PATH": str(folder)}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, comfyui: dict[str, str]) -> Iterator[tuple[Path, str]]:
    """A service with a ComfyUI: its folder, and its URL."""
    folder = tmp_path_factory.mktemp("service")
    with served(folder, **comfyui) as (url, _):
        yield folder, url


@pytest.fixture
def submit(house: tuple[Path, str], tmp_path: Path) -> Callable[..., Ended]:
    """`submit(graph, "--watch", …)`: the command, against the running service, in an empty folder."""

    def run_it(content: Any, *args: str, **environ: str) -> Ended:
        name = write(tmp_path, content)
        return run(tmp_path, "submit", name, *args, **{"MANAGEMENT_API_URL": house[1], **environ})

    return run_it


# ---- help


@pytest.mark.parametrize("name", ["serve", "demo", "simulator", "submit", "config", "doctor", "backup"])
def test_each_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["--help"], [name, "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(args)
    shown = capsys.readouterr().out
    assert f"\n    {name}" in shown
    assert f"example:\n  {'MANAGEMENT_API_KEY=' if name == 'serve' else f'management-api {name}'}" in shown


def test_version_and_usage(tmp_path: Path) -> None:
    assert run(tmp_path, "--version").out == f"management-api {__version__}\n"
    nothing = run(tmp_path)
    assert nothing.status == 2
    assert "required: COMMAND" in nothing.err
    assert run(tmp_path, "sing").status == 2


def test_help_does_not_load_the_service(tmp_path: Path) -> None:
    code = "import sys; from management_api.cli import build_parser; build_parser(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert not {"litestar", "httpx", "uvicorn", "rich", "PIL", "structlog"} & set(loaded.stdout.split())


# ---- serve: what it refuses


def refused(ended: Ended) -> str:
    """The one line."""
    assert ended.status == 1
    assert ended.out == ""
    assert len(ended.lines) == 1, ended.err
    return ended.lines[0]


def test_it_does_not_start_without_a_key(tmp_path: Path) -> None:
    assert "MANAGEMENT_API_KEY is not set" in refused(run(tmp_path, "serve", MANAGEMENT_API_KEY=""))


def test_a_wrong_value_is_one_line_that_shows_no_secret(tmp_path: Path) -> None:
    line = refused(run(tmp_path, "serve", MANAGEMENT_API_PORT="web"))
    assert line == "MANAGEMENT_API_PORT='web' is not understood: give a whole number from 0 to 65535"
    line = refused(run(tmp_path, "serve", MANAGEMENT_API_KEY=" secret-with-space"))
    assert "MANAGEMENT_API_KEY=****" in line
    assert "secret-with-space" not in line


def test_an_address_that_is_none_or_taken(tmp_path: Path) -> None:
    line = refused(run(tmp_path, "serve", MANAGEMENT_API_HOST="no.such.host.invalid"))
    assert "MANAGEMENT_API_HOST='no.such.host.invalid'" in line
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(run(tmp_path, "serve", MANAGEMENT_API_PORT=str(port)))
    assert f"Cannot listen on 127.0.0.1:{port}: Address already in use" in line


def test_a_second_service_on_the_same_folder_is_told_who_has_it(tmp_path: Path) -> None:
    with served(tmp_path) as (_, process):
        line = refused(run(tmp_path, "serve"))
    assert f"The data folder {tmp_path / 'data'} is in use by {process.pid}@" in line


def test_a_data_folder_or_store_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refused(run(tmp_path, "serve", MANAGEMENT_API_DATA_DIR=str(tmp_path / "file" / "data")))
    assert f"The data folder {tmp_path / 'file' / 'data'} cannot be used: Not a directory" in line
    store = tmp_path / "data" / "workflows.sqlite3"
    store.parent.mkdir()
    store.write_bytes(b"no database" * 1000)
    line = refused(run(tmp_path, "serve"))
    assert str(store) in line
    assert "damaged" in line
    store.unlink()
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("PRAGMA user_version = 4000")
    assert "newer" in refused(run(tmp_path, "serve"))


# ---- serve: its life


def test_the_first_line_says_what_is_needed(tmp_path: Path) -> None:
    with started(tmp_path, "serve", COMFYUI_URL="http://me:password9@127.0.0.1:9") as process:
        ready = process.event("ready")
        assert httpx.get(ready["docs"], trust_env=False).status_code == 200
        assert ready["docs"] == f"{ready['url']}/docs"
        assert (ready["version"], ready["data"]) == (__version__, str(tmp_path / "data"))
        assert ready["backends"] == "local=http://********@127.0.0.1:9"
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    assert not [line for line in process.seen if KEY in line or "password9" in line]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(tmp_path: Path, number: signal.Signals) -> None:
    with served(tmp_path) as (url, process), follow(url) as stream:
        stream.send('{"type":"subscribe","channels":["workflow"]}')
        assert json.loads(stream.recv(SECONDS))["type"] == "subscribed"
        process.signal(number)
        assert list(stream) == []  # ends without an error at 1000 and 1001
        assert stream.close_code == 1001
        assert process.wait() == 0
    events = [json.loads(line)["event"] for line in process.seen]
    told = [event for event in events if event not in ("request", "backend cannot be reached")]
    assert told == ["ready", "stopping", "stopped"]


@contextmanager
def unfinished(url: str) -> Iterator[socket.socket]:
    """A request whose body does not come, while the service waits for it."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as raw:
        raw.sendall(
            f"POST {WORKFLOW} HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Type: application/json\r\n"
            "Content-Length: 100\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert raw.recv(1000).startswith(b"HTTP/1.1 100 ")
        yield raw


def test_open_requests_do_not_hold_it_up_for_longer_than_allowed(tmp_path: Path) -> None:
    with served(tmp_path, MANAGEMENT_API_SHUTDOWN_SECONDS="1.5") as (url, process), unfinished(url):
        began = time.monotonic()
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert time.monotonic() - began < 2
    assert process.seen[-1].startswith('{"event":"stopped"')  # and not by the last resort


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with served(tmp_path, MANAGEMENT_API_SHUTDOWN_SECONDS="600") as (url, process), unfinished(url):
        process.signal(signal.SIGTERM)
        process.event("stopping")
        began = time.monotonic()
        process.signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - began < 2


# ---- submit


def test_submit_watches_to_the_end_and_fetches_the_files(submit: Callable[..., Ended], tmp_path: Path) -> None:
    ended = submit(graph(steps=4), "--watch", "--priority", "high", "--out", str(tmp_path / "pictures"))
    assert ended.status == 0, ended.err
    (path,) = ended.out.splitlines()
    assert Path(path).parent == tmp_path / "pictures"
    assert Path(path).read_bytes().startswith(b"\x89PNG")
    assert re.search(r"^workflow [0-9a-f-]{36}$", ended.err, re.MULTILINE)
    assert re.search(r"^ +\d+%  .*Sleep Steps", ended.err, re.MULTILINE)
    assert re.fullmatch(r"completed in [\d.]+ s on local", ended.lines[-1])
    assert KEY not in ended.out + ended.err


def test_submit_waits_in_silence_and_lists_urls(submit: Callable[..., Ended]) -> None:
    ended = submit(graph(), "--wait")
    assert ended.status == 0
    assert "%" not in ended.err
    reply = httpx.get(ended.out.strip(), headers=HEADERS, trust_env=False)
    assert reply.content.startswith(b"\x89PNG")


def test_submit_alone_prints_the_id(submit: Callable[..., Ended], house: tuple[Path, str]) -> None:
    ended = submit(graph())
    assert (ended.status, ended.err) == (0, "")
    reply = httpx.get(f"{house[1]}{WORKFLOW}/{ended.out.strip()}", headers=HEADERS, trust_env=False)
    assert reply.status_code == 200


def test_submit_reads_standard_input_and_dotenv(house: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"MANAGEMENT_API_KEY={KEY}\nMANAGEMENT_API_PORT={house[1].rpartition(':')[2]}\n")
    text = json.dumps(graph())
    ended = run(tmp_path, "submit", "-", "--wait", stdin=text, MANAGEMENT_API_KEY="", MANAGEMENT_API_PORT="")
    assert ended.status == 0, ended.err


def test_submit_never_replaces_a_file_unasked(submit: Callable[..., Ended], tmp_path: Path) -> None:
    again = graph()  # from the cache: the same file
    first = submit(again, "--wait", "--out", str(tmp_path))
    path = Path(first.out.strip())
    path.write_text("mine")
    second = submit(again, "--wait", "--out", str(tmp_path))
    assert (second.status, second.out, path.read_text()) == (1, "", "mine")
    assert f"{path} exists already; --force replaces it" in second.err
    third = submit(again, "--wait", "--out", str(tmp_path), "--force")
    assert (third.status, third.out) == (0, f"{path}\n")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_submit_tells_of_a_failure(submit: Callable[..., Ended]) -> None:
    ended = submit(graph(fail="value_error", fail_at_step=1), "--watch")
    assert (ended.status, ended.out) == (1, "")
    assert re.fullmatch(r"failed in [\d.]+ s on local: .*deliberate failure.*", ended.lines[-1])


def test_submit_shows_what_was_refused_and_where(submit: Callable[..., Ended]) -> None:
    editor = submit({"nodes": [], "links": []})
    assert editor.status == 2
    assert "Export (API)" in editor.err
    wrong = graph()
    wrong["1"]["class_type"] = "EmptyImages"
    strict = submit(wrong, "--strict")
    assert strict.status == 2
    assert "node 1 (EmptyImages)" in strict.err
    assert "Did you mean EmptyImage" in strict.err
    assert submit(wrong).status == 1  # accepted, and failed at once
    assert submit(graph(), "--gpu", "none-such").status == 2
    assert submit("{").status == 2
    assert submit("[]").status == 2
    assert submit(graph(), "--url", "htp:/").status == 3


def test_submit_without_the_service_or_the_key(submit: Callable[..., Ended]) -> None:
    away = submit(graph(), MANAGEMENT_API_URL="http://127.0.0.1:9")
    assert away.status == 3
    assert len(away.lines) == 1
    assert "http://127.0.0.1:9" in away.err
    wrong = submit(graph(), MANAGEMENT_API_KEY="wrong-key-0000000")
    assert wrong.status == 2
    assert "401 Unauthorized" in wrong.err
    assert "wrong-key-0000000" not in wrong.err
    assert submit(graph(), MANAGEMENT_API_KEY="").status == 2


@pytest.mark.parametrize(("flags", "status"), [((), "running"), (("--cancel-on-interrupt",), "cancelled")])
def test_interrupting_submit(house: tuple[Path, str], tmp_path: Path, flags: tuple[str, ...], status: str) -> None:
    name = write(tmp_path, graph(steps=600, seconds=0.1))
    with started(tmp_path, "submit", name, "--watch", *flags, MANAGEMENT_API_URL=house[1]) as process:
        workflow_id = process.line("workflow ").split()[1]
        process.line("Sleep Steps")
        process.signal(signal.SIGINT)
        assert process.wait() == 130
    url = f"{house[1]}{WORKFLOW}/{workflow_id}"
    assert httpx.get(url, headers=HEADERS, trust_env=False).json()["status"] == status
    if status == "running":
        assert url in process.seen[-1]
        assert httpx.delete(url, headers=HEADERS, trust_env=False).status_code == 200


@pytest.mark.slow
def test_watching_survives_a_restart_of_the_service(comfyui: dict[str, str], tmp_path: Path) -> None:
    with served(tmp_path, **comfyui) as (url, first):
        name = write(tmp_path, graph(steps=25, seconds=0.1))
        with started(tmp_path, "submit", name, "--watch", MANAGEMENT_API_URL=url) as client:
            client.line("Sleep Steps")
            first.signal(signal.SIGTERM)
            assert first.wait() == 0
            with served(tmp_path, **comfyui, MANAGEMENT_API_PORT=url.rpartition(":")[2]):
                client.line("completed in ")
                assert client.wait() == 0


def test_bars_on_a_terminal(house: tuple[Path, str], tmp_path: Path) -> None:
    name = write(tmp_path, graph(steps=8, seconds=0.1))
    ours, theirs = pty.openpty()
    environ = environment(tmp_path, MANAGEMENT_API_URL=house[1], TERM="xterm", COLUMNS="100")
    process = subprocess.Popen(
        [*PROGRAM, "submit", name, "--watch"], env=environ, stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    finally:
        process.kill()
        assert process.wait(SECONDS) == 0
        os.close(ours)
    text = shown.decode()
    assert "whole workflow" in text
    assert "/8 steps" in text
    assert "✓ Save Image" in text


# ---- config, doctor, backup


def test_config_shows_sources_and_masks_secrets(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("COMFYUI_TIMEOUT=77\nMANAGEMENT_API_KEY=from-the-file\n")
    ended = run(tmp_path, "config", COMFYUI_URL="http://me:password9@10.0.0.5:8188")
    assert ended.status == 0
    rows = {line.split()[0]: line.split()[1:] for line in ended.out.splitlines()}
    assert rows["MANAGEMENT_API_KEY"] == ["********", "environment"]
    assert rows["COMFYUI_TIMEOUT"] == ["77", ".env"]
    assert rows["COMFYUI_PREFETCH"] == ["true", "default"]
    assert rows["COMFYUI_URL"] == ["http://********@10.0.0.5:8188", "environment"]
    for secret in (KEY, "password9", "from-the-file"):
        assert secret not in ended.out + ended.err
    assert run(tmp_path, "config", COMFYUI_TIMEOUT="long").status == 1


def test_doctor_finds_all_well(house: tuple[Path, str], comfyui: dict[str, str]) -> None:
    folder, url = house
    ended = run(folder, "doctor", **comfyui, MANAGEMENT_API_PORT=url.rpartition(":")[2])
    assert ended.status == 0, ended.out
    for good in (
        *("key: ", "data folder: ", "store: ", "clock: ", f"outputs: {comfyui['COMFY_PATH']}/output"),
        f"port {url.rpartition(':')[2]}: the service answers, version {__version__}",
        *(
            "ComfyUI local: version 0.3.64",
            "ComfyUI local: takes our prompt ids",
            "ComfyUI local: the socket opens and",
        ),
    ):
        assert f"✓ {good}" in ended.out
    assert "✗" not in ended.out
    assert KEY not in ended.out


def hang_up(listener: socket.socket) -> None:
    """What does not speak HTTP."""
    listener.accept()[0].close()


def test_doctor_finds_what_is_wrong_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "workflows.sqlite3").write_bytes(b"no database" * 1000)
    (tmp_path / "outputs").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        threading.Thread(target=hang_up, args=[taken], daemon=True).start()
        ended = run(
            tmp_path,
            "doctor",
            MANAGEMENT_API_KEY="short",
            MANAGEMENT_API_PORT=str(taken.getsockname()[1]),
            COMFYUI_OUTPUTS=str(tmp_path / "outputs"),
        )
    assert ended.status == 1
    lines = ended.out.splitlines()
    bad = [place for place, line in enumerate(lines) if line.startswith("✗")]
    names = (
        "key has 5 characters",
        "store: ",
        "Cannot listen on",
        "ComfyUI local: ComfyUI does not answer",
        "outputs: ",
    )
    assert [name for name in names if not any(name in lines[place] for place in bad)] == []
    assert len(bad) == len(names)
    assert all(lines[place + 1].startswith("    ") for place in bad)
    data = run(tmp_path, "doctor", MANAGEMENT_API_DATA_DIR=str(tmp_path / "outputs" / "data"))
    assert "✗ data folder: " in data.out
    assert run(tmp_path, "doctor", MANAGEMENT_API_PORT="web").out == ""


def test_a_backup_of_a_running_service_is_whole(
    submit: Callable[..., Ended], house: tuple[Path, str], tmp_path: Path
) -> None:
    workflow_id = submit(graph()).out.strip()
    target = tmp_path / "copy.sqlite3"
    ended = run(house[0], "backup", str(target))
    assert (ended.status, ended.err) == (0, "")
    with closing(sqlite3.connect(target)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT count(*) FROM workflow WHERE id = ?", (workflow_id,)).fetchone() == (1,)
    again = run(house[0], "backup", str(target))
    assert again.status == 1
    assert len(again.lines) == 1
    assert "exists already" in again.err
    nothing = run(tmp_path, "backup", str(tmp_path / "other"))
    assert nothing.status == 1
    assert f"There is no store at {tmp_path / 'data'}" in nothing.err
    assert not (tmp_path / "other").exists()
