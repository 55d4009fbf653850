"""Which programs a task may run, and with which part of our environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from management_api.variables import SECRETS
from managers.errors import InvalidRequest
from managers.processes.environment import allowed
from managers.processes.providers import BUILTIN, DEFAULT, Provider, ProvidersError, read_providers

WORDS = {"agent": "coder", "task": "do {agent} $(x)", "task_id": "7", "task_dir": "/d"}


def read(path: Path, text: str) -> dict[str, Provider]:
    file = path / "providers.toml"
    file.write_text(text)
    return read_providers(file, frozenset({"OUR_TOKEN"}))


def test_four_are_ready() -> None:
    assert DEFAULT == "claude-flow"
    assert set(read_providers(None)) == {"claude-flow", "agentic-flow", "gemini", "openai"}
    assert BUILTIN["gemini"].command(WORDS) == (
        *("agentic-flow", "--agent", "coder", "--task", "do {agent} $(x)", "--provider", "gemini"),
    )
    assert BUILTIN["openai"].command(WORDS)[-2:] == ("--provider", "openai")
    assert BUILTIN["claude-flow"].command(WORDS) == ("claude-flow", "swarm", "Work as coder: do {agent} $(x)")


def test_a_file_adds_and_replaces(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        """
        [providers.gemini]
        argv = ["gemini", "--prompt={task}"]
        [providers.mine]
        argv = ["/opt/mine", "{task_id}", "{task_dir}", "{agent}"]
        env = ["MY_*"]
        directory = "/srv/{task_id}"
        max_concurrent = 1
        timeout_seconds = 0
        max_log_bytes = 1048576
        """,
    )
    assert set(found) == {*BUILTIN, "mine"}
    assert found["gemini"].command(WORDS) == ("gemini", "--prompt=do {agent} $(x)")
    assert found["mine"].command(WORDS) == ("/opt/mine", "7", "/d", "coder")
    assert set(read(tmp_path, 'builtin = false\n[providers.mine]\nargv = ["x"]')) == {"mine"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[providers.x", "providers.toml"),
        ('[providers.x]\nargv = "x"', "argv"),
        ('[providers.x]\nargv = ["x"]\nshell = true', "shell"),
        ("[providers.x]\nargv = []", "begins with the program"),
        ('[providers.x]\nargv = ["{agent}"]', "begins with the program"),
        ('[providers.x]\nargv = ["./x"]', "absolute path"),
        ('[providers.x]\nargv = ["x", "{tsk}"]', "{tsk} is no placeholder; known: {agent}, {task}"),
        ('[providers.x]\nargv = ["x"]\ndirectory = "/srv/{agent}"', "no request may choose a folder"),
        ('[providers.X]\nargv = ["x"]', "a-z"),
        ('[providers.x]\nargv = ["x"]\nmax_concurrent = 0', "1 or more"),
        ('[providers.x]\nargv = ["x"]\ntimeout_seconds = -1.0', "0 or more"),
        ('[providers.x]\nargv = ["x"]\nmax_log_bytes = 10', "4096 or more"),
        ('[providers.x]\nargv = ["x"]\nenv = ["MANAGEMENT_API_KEY"]', "MANAGEMENT_API_KEY"),
        ('[providers.x]\nargv = ["x"]\nenv = ["AWS_SECRET_ACCESS_KEY"]', "never handed on"),
        ('[providers.x]\nargv = ["x"]\nenv = ["OUR_TOKEN"]', "OUR_TOKEN"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_clear_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ProvidersError) as caught:
        read(tmp_path, text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ProvidersError, match="cannot be read"):
        read_providers(tmp_path / "none")


def test_a_value_is_never_an_option() -> None:
    plain, safe = Provider(argv=("x", "{task}")), Provider(argv=("x", "--", "{task}"))
    with pytest.raises(InvalidRequest):
        plain.command(WORDS | {"task": "--help"})
    assert safe.command(WORDS | {"task": "--help"}) == ("x", "--", "--help")
    assert Provider(argv=("x", "-m{task}")).command(WORDS | {"task": "--help"}) == ("x", "-m--help")


def test_no_list_hands_on_our_own_secrets() -> None:
    ours = {
        "PATH": "/bin",
        "MANAGEMENT_API_KEY": "k",
        "MANAGEMENT_API_DATA_DIR": "d",
        "AWS_SESSION_TOKEN": "t",
        "OUR_TOKEN": "o",
        "OTHER": "x",
    }
    assert allowed(ours, ["*"], frozenset({"OUR_TOKEN"})) == {"PATH": "/bin", "OTHER": "x"}
    assert allowed(ours, [], frozenset()) == {"PATH": "/bin"}
    assert "MANAGEMENT_API_KEY" in SECRETS
