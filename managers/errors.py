"""What can go wrong, as one small tree. `management_api.errors` turns it into problem details; nobody else does.

Must never know about HTTP: the status codes of CONTRACT 2 are given there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from managers.events.types import Finding


class ManagerError(Exception):
    """The root: the message is a sentence for the caller, without paths or secrets."""


class NotFound(ManagerError):
    """There is no such thing, or none that the caller may see."""


class Gone(ManagerError):
    """It was there, but what is there now is something else."""


class Conflict(ManagerError):
    """The thing is in a state that forbids this; `current_status` names the state."""

    def __init__(self, message: str, current_status: str) -> None:
        super().__init__(message)
        self.current_status = current_status


class InvalidRequest(ManagerError):
    """What was sent cannot be understood; `findings` point at the places."""

    def __init__(self, message: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


class InvalidWorkflow(InvalidRequest):
    """The graph was understood and cannot run (strict handling)."""


class TooLarge(ManagerError):
    """There is more of it than somebody allows, whom the message names."""


class IdempotencyMismatch(ManagerError):
    """The idempotency key was used before with another body."""


class Unavailable(ManagerError):
    """Not now: `retry_after` is a hint in seconds."""

    def __init__(self, message: str, retry_after: float = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(Unavailable):
    """As many workflows wait as the configuration allows."""


class ShareFull(Unavailable):
    """As many workflows of this caller wait as it may have waiting."""


class Draining(Unavailable):
    """The service is about to stop and takes no new work."""


class StoreUnavailable(Unavailable):
    """The store cannot write: full, read-only, or closed."""


class BackendUnavailable(Unavailable):
    """A ComfyUI did not answer."""
