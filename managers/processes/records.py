"""A task as it is kept on disk: one folder a task, with its record, its log and the folder it works in.

Nothing of it is in the store of workflows: a record lies beside the log it belongs to, and is read only when somebody
asks. Must never leave a record half written. Everything that touches the disk blocks: call it in a thread.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import msgspec
import structlog
from msgspec import Struct

from managers.processes.supervised import Outcome
from managers.processes.supervisor import LOG, replace_file

log = structlog.get_logger(__name__)

_RECORD, _WORK = "task.json", "work"
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class TaskStatus(StrEnum):
    """Where a task is. All but `running` are final: a stopped task stays stopped, whatever its exit status."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"


class Task(Struct, frozen=True, kw_only=True):
    """One task. Times are epoch ms; `exit_time` is None while it runs, and for ever when nobody saw its end."""

    id: str
    agent: str
    task: str
    provider: str
    start_time: int
    submitted_by: str | None = None
    status: TaskStatus = TaskStatus.RUNNING
    settled: bool = False
    """Its end has been looked at: there is nothing more to learn."""
    exit_time: int | None = None
    exit_code: int | None = None
    error: str | None = None


def judged(task: Task, outcome: Outcome | None) -> Task:
    """The task with how it ended. None: its supervisor was killed, or the machine."""
    if outcome is None:
        lost = "Nobody saw its end: its supervisor was killed, or the machine was restarted"
        status = TaskStatus.STOPPED if task.status is TaskStatus.STOPPED else TaskStatus.FAILED
        return msgspec.structs.replace(task, status=status, settled=True, error=lost)
    error, status = _error(outcome), task.status
    if status is TaskStatus.RUNNING:
        status = TaskStatus.COMPLETED if error is None else TaskStatus.FAILED
    else:
        error = None
    if outcome.lost_bytes:
        error = f"{error or 'It ended'}; {outcome.lost_bytes} bytes of its output could not be written"
    return msgspec.structs.replace(
        task, status=status, settled=True, exit_time=outcome.ended_at, exit_code=outcome.exit_code, error=error
    )


def _error(outcome: Outcome) -> str | None:
    match outcome.reason:
        case "start":
            return outcome.error
        case "timeout":
            return "It ran longer than its provider allows, and was ended"
        case "stop":
            return "It was told to stop"
    if outcome.signal is not None:
        return f"It was ended by {outcome.signal}"
    return f"It ended with status {outcome.exit_code}" if outcome.exit_code else None


class Records:
    """The folder of all tasks."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, task_id: str) -> Path:
        """Where all of a task is."""
        return self._root / task_id

    def work(self, task_id: str) -> Path:
        """The folder it works in, of which we want nothing."""
        return self._root / task_id / _WORK

    def log_file(self, task_id: str) -> Path:
        """The newer part of its log."""
        return self._root / task_id / LOG

    def create(self, task: Task) -> None:
        """Its folder and its record. Raises `OSError`."""
        self.folder(task.id).mkdir(mode=0o700)
        self.work(task.id).mkdir(mode=0o700)
        self.write(task)

    def write(self, task: Task) -> None:
        """Its record, safely. Raises `OSError`."""
        replace_file(self.folder(task.id) / _RECORD, msgspec.json.encode(task))

    def read(self, task_id: str) -> Task | None:
        """Its record; None when there is no such task."""
        try:
            return msgspec.json.decode((self.folder(task_id) / _RECORD).read_bytes(), type=Task)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            log.error("the record of a task cannot be read", task=task_id, reason=str(error))
            return None

    def newest_first(self) -> Iterator[Task]:
        """All of them. Ids begin with the time, so names are in order."""
        try:
            names = sorted((path.name for path in self._root.iterdir() if _ID.fullmatch(path.name)), reverse=True)
        except FileNotFoundError:
            return
        for name in names:
            task = self.read(name)
            if task is not None:
                yield task

    def forget(self, before_ms: int) -> int:
        """Remove what ended before this time. What a task left in its folder stays, and so does the folder then."""
        count = 0
        for task in self.newest_first():
            if task.settled and (task.exit_time or task.start_time) < before_ms:
                self.discard(task.id)
                count += 1
        return count

    def discard(self, task_id: str) -> None:
        """Remove the record and the log of a task."""
        folder = self.folder(task_id)
        work = self.work(task_id)
        if work.is_dir() and any(work.iterdir()):
            for path in folder.iterdir():
                if path != work:
                    path.unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)
