"""`make demo`, and `test-comfyui.sh` against it and against what is broken: real processes from end to end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.program import KEY, SECONDS, Process, environment, run, started

SCRIPT = Path(__file__).parent.parent / "test-comfyui.sh"
STEPS = 14


def ask(url: str, key: str) -> tuple[int, list[str]]:
    """The script's exit status, and its lines."""
    environ = {"PATH": os.environ["PATH"], "MANAGEMENT_API_URL": url, "MANAGEMENT_API_KEY": key}
    done = subprocess.run(
        ["bash", SCRIPT], env=environ, capture_output=True, text=True, timeout=2 * SECONDS, check=False
    )
    assert not key or key not in done.stdout + done.stderr
    return done.returncode, done.stdout.splitlines() + done.stderr.splitlines()


def failed(lines: list[str]) -> list[str]:
    """The steps that failed."""
    return [line.removeprefix("FAIL  ").rpartition(" (")[0] for line in lines if line.startswith("FAIL")]


@contextmanager
def answering_anything(status: int, body: bytes) -> Iterator[str]:
    """A server that says the same to everything."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(SECONDS)


class Demo:
    """A demo that stays up, read as its user reads it."""

    def __init__(self, process: Process) -> None:
        self.process = process
        process.line("Ctrl-C ends it")
        self.said = list(process.seen)
        self.key = self.after("key")
        self.url = self.after("docs").removesuffix("/docs")

    def after(self, name: str) -> str:
        """What is told under a name."""
        return next(line.split(None, 1)[1] for line in self.said if line.startswith(f"  {name} "))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("demo")
    (folder / SCRIPT.name).symlink_to(SCRIPT)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 9090))
            taken.listen()
        except OSError:
            pass  # somebody else's: just as taken
        # Settings of a real service, which must not be touched.
        with started(folder, "demo", MANAGEMENT_API_DATA_DIR=str(folder / "real"), COMFYUI_URL="http://x") as process:
            yield Demo(process)
            process.signal(signal.SIGINT)
            assert process.wait() == 0
            assert not (folder / "real").exists()


def test_once_makes_a_picture_without_a_terminal(tmp_path: Path) -> None:
    ended = run(tmp_path, "demo", "--once", "--port", "0", "--directory", "here")
    log = (tmp_path / "here" / "service.log").read_text()
    assert (ended.status, ended.err) == (0, ""), log
    assert re.search(r"^ +\d+%  Generating image using K-Sampler: 20/20 steps \(100%\)$", ended.out, re.MULTILINE)
    (picture,) = re.findall(r"^  picture +(.+)$", ended.out, re.MULTILINE)
    assert Path(picture).is_relative_to(tmp_path / "here")
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert "Ctrl-C" not in ended.out
    (key,) = re.findall(r"^  key +(.+)$", ended.out, re.MULTILINE)
    assert '"event":"ready"' in log
    assert key not in log
    assert KEY not in ended.out


def test_it_says_which_port_it_took(demo: Demo) -> None:
    port = demo.url.rpartition(":")[2]
    assert port != "9090"
    assert f"Port 9090 is taken, so this demo is on {port}." in demo.said


def test_its_example_works_when_pasted(demo: Demo) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{demo.after('example')} --silent"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    assert '"status":"completed"' in done.stdout


@pytest.mark.slow
def test_its_submit_line_works_when_pasted(demo: Demo, tmp_path: Path) -> None:
    (line,) = [place for place, line in enumerate(demo.said) if line.startswith("  export ")]
    done = subprocess.run(
        ["bash", "-c", "\n".join(demo.said[line : line + 2])],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / done.stdout.strip()).read_bytes().startswith(b"\x89PNG")


def test_the_script_is_content_with_it(demo: Demo) -> None:
    assert "  ./test-comfyui.sh" in demo.said
    status, lines = ask(demo.url, demo.key)
    assert failed(lines) == []
    assert len([line for line in lines if line.startswith("ok    ")]) == STEPS
    assert status == 0


def test_the_script_sees_a_wrong_key(demo: Demo) -> None:
    status, lines = ask(demo.url, "not-the-key-0000")
    assert status == 1
    assert set(failed(lines)) == {
        *("submit a workflow", "its status", "cancel it", "a picture, waited for", "its file is a PNG"),
        *("models", "outputs", "a ticket for the stream"),
    }


@pytest.mark.parametrize(("status", "content"), [(200, {"health", "models", "outputs"}), (500, set())])
def test_the_script_looks_at_status_and_content(status: int, content: set[str]) -> None:
    with answering_anything(status, b'{"status": "healthy", "models": [], "outputs": []}') as url:
        ended, lines = ask(url, KEY)
    assert ended == 1
    assert {line.removeprefix("ok    ") for line in lines if line.startswith("ok    ")} == content
    assert len(failed(lines)) == STEPS - len(content)


def test_the_script_fails_when_nobody_answers_or_no_key_is_given() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        status, lines = ask(f"http://127.0.0.1:{nobody.getsockname()[1]}", KEY)
    assert status == 1
    assert len(failed(lines)) == STEPS
    status, lines = ask("http://127.0.0.1:9", "")
    assert (status, lines) == (2, ["MANAGEMENT_API_KEY is not set: give the key of the service"])


@pytest.mark.parametrize("command", ["demo", "simulator --directory x"])
def test_without_pillow_it_names_what_to_install(tmp_path: Path, command: str) -> None:
    code = "import sys; sys.modules['PIL'] = None; from management_api.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "comfyui-management-api[simulator]" in done.stderr
