"""What a task may run: named argv templates (CONTRACT 7), four of them in the box, more in the operator's TOML file.

Must never build a line for a shell: each placeholder stays inside the argument it stands in.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from managers.errors import InvalidRequest, ManagerError
from managers.processes.environment import allowed, forbidden

DEFAULT = "claude-flow"
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_KNOWN = ("agent", "task", "task_id", "task_dir")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_LEAST_LOG_BYTES = 4096


class ProvidersError(ManagerError):
    """The providers file cannot be used; the message is one line for the operator."""


class Provider(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the file. `argv` and `directory` take {agent}, {task}, {task_id} and {task_dir}.

    `env` are names of variables (or patterns, like `OPENAI_*`) that are handed on beside PATH, HOME and LANG.
    `timeout_seconds` 0 is no limit; `max_log_bytes` is what the log of one task may take.
    """

    argv: tuple[str, ...]
    env: tuple[str, ...] = ()
    directory: str = "{task_dir}"
    max_concurrent: int = 4
    timeout_seconds: float = 6 * 3600
    max_log_bytes: int = 64 * 2**20

    def command(self, words: Mapping[str, str]) -> tuple[str, ...]:
        """The argv of one task. `words` are the values of the placeholders.

        Raises `InvalidRequest` where a value would be read as an option: it begins with `-` at the start of an
        argument, and no `--` stands before it.
        """
        command: list[str] = []
        for template in self.argv:
            argument = fill(template, words)
            if argument.startswith("-") and not template.startswith("-") and "--" not in command:
                raise InvalidRequest("agent and task must not begin with '-': the program would read an option")
            command.append(argument)
        return tuple(command)

    def executable(self, environ: Mapping[str, str]) -> str | None:
        """Where its program is, in the PATH that it would be started with; None when it is not installed."""
        return shutil.which(self.argv[0], path=environ.get("PATH", ""))


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    providers: dict[str, Provider] = {}
    builtin: bool = True


def fill(template: str, words: Mapping[str, str]) -> str:
    """Every placeholder by its value, once: what a value contains is left as it is."""
    return _PLACEHOLDER.sub(lambda found: words[found[1]], template)


_AGENTIC_KEYS = ("ANTHROPIC_API_KEY", "OPENROUTER_API_KEY", "GOOGLE_GEMINI_API_KEY", "OPENAI_API_KEY")


def _agentic(*more: str, env: tuple[str, ...] = _AGENTIC_KEYS) -> Provider:
    return Provider(argv=("agentic-flow", "--agent", "{agent}", "--task", "{task}", *more), env=env)


BUILTIN: Mapping[str, Provider] = {
    # The one command all its versions have; it knows no agent, so that is said in words.
    DEFAULT: Provider(
        argv=("claude-flow", "swarm", "Work as {agent}: {task}"), env=("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN")
    ),
    "agentic-flow": _agentic(),
    "gemini": _agentic("--provider", "gemini", env=("GOOGLE_GEMINI_API_KEY", "GEMINI_API_KEY")),
    "openai": _agentic("--provider", "openai", env=("OPENAI_API_KEY",)),
}
"""Ready ones. Whether their programs are there is another matter."""


def read_providers(path: Path | None, withheld: frozenset[str] = frozenset()) -> dict[str, Provider]:
    """Those in the box, and those of the file above them. `withheld` may never be handed on.

    Raises `ProvidersError`.
    """
    if path is None:
        return dict(BUILTIN)
    try:
        file = msgspec.toml.decode(path.read_bytes(), type=_File)
    except OSError as error:
        raise ProvidersError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProvidersError(f"{path} cannot be used: {error}") from None
    for name, provider in file.providers.items():
        wrong = _wrong(name, provider, withheld)
        if wrong:
            raise ProvidersError(f"{path} cannot be used: provider {name!r}: {wrong}")
    return {**(BUILTIN if file.builtin else {}), **file.providers}


def _wrong(name: str, provider: Provider, withheld: frozenset[str]) -> str | None:
    unknown = [
        word
        for text in (*provider.argv, provider.directory)
        for word in _PLACEHOLDER.findall(text)
        if word not in _KNOWN
    ]
    secret = [variable for variable in provider.env if forbidden(variable, withheld)]
    if not _NAME.fullmatch(name):
        return "a name has 1 to 64 of a-z 0-9 _ -"
    if not provider.argv or not provider.argv[0] or _PLACEHOLDER.search(provider.argv[0]):
        return "argv begins with the program, which no request may choose"
    if "/" in provider.argv[0] and not provider.argv[0].startswith("/"):
        return "argv begins with a name to be found in PATH, or with an absolute path"
    if any("\0" in text for text in (*provider.argv, provider.directory)):
        return "there is a NUL in it"
    if unknown:
        return f"{{{unknown[0]}}} is no placeholder; known: {', '.join(f'{{{known}}}' for known in _KNOWN)}"
    if "{agent}" in provider.directory or "{task}" in provider.directory:
        return "directory takes {task_id} and {task_dir}: no request may choose a folder"
    if secret:
        return f"env may not have {secret[0]}: secrets of this service are never handed on"
    if provider.max_concurrent < 1 or provider.max_log_bytes < _LEAST_LOG_BYTES or not provider.timeout_seconds >= 0:
        return f"max_concurrent is 1 or more, timeout_seconds 0 or more, max_log_bytes {_LEAST_LOG_BYTES} or more"
    return None


def environment(provider: Provider, environ: Mapping[str, str], withheld: frozenset[str]) -> dict[str, str]:
    """What its program gets of our environment."""
    return allowed(environ, provider.env, withheld)
