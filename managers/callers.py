"""Who asks: the name of a key and what it may do, as the rest of the house knows it.

Must never hold the key itself, nor its hash. There are no tenants: a name says who handed something in, not who may
see it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from msgspec import Struct

ADMIN = "admin"
"""The name of `MANAGEMENT_API_KEY`; no other key may have it."""


class KeyScope(StrEnum):
    """What a key may be good for. `admin` includes the others; `read` and `submit` do not include each other."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


def always() -> bool:
    """For who cannot be sent away."""
    return True


class Caller(Struct, frozen=True, kw_only=True, eq=False):
    """One key, without its secret.

    `rate_limit` None: counted with the others of its address. `max_queued` workflows of it may wait; None: no limit
    of its own. `welcome` is asked while a stream is open: False once the key was revoked, expired or lost a scope.
    """

    name: str
    scopes: frozenset[KeyScope]
    rate_limit: str | None = None
    max_queued: int | None = None
    welcome: Callable[[], bool] = always

    def may(self, scope: KeyScope) -> bool:
        """Whether it has the scope."""
        return scope in self.scopes or KeyScope.ADMIN in self.scopes


NOBODY = Caller(name="", scopes=frozenset())
"""Who asks at a door that is open without a key."""
