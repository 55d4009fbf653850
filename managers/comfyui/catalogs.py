"""What each ComfyUI can run: its /object_info, fetched once a connection and asked again where in doubt.

Must never hold a request up for long for a backend that does not answer: one that is away, or says nothing, counts as
able (CONTRACT 4).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence

import msgspec
import structlog

from managers.comfyui.backend import Backend
from managers.comfyui.object_info import Catalog, NodeClass, decode_object_info
from managers.errors import BackendUnavailable

log = structlog.get_logger(__name__)

_PATIENCE_SECONDS = 2.0  # of all who wait together; only the first fetch of a connection is waited for
_FETCH_SECONDS = 60.0  # ComfyUI looks through all its folders for this, and custom nodes through the network
_REST_SECONDS = 30.0
_ASK_AT_MOST = 20  # one by one; beyond that the whole list is cheaper


class Catalogs:
    """The node classes of every backend, cached."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._books = {backend.name: _Book(backend) for backend in backends}

    async def current(self, names: Collection[str]) -> list[Catalog]:
        """One catalog for each named backend, from the cache where the connection is still the same."""
        books = [self._books[name] for name in names]
        await _wait(books)
        return [Catalog(name=name, object_info=book.classes) for name, book in zip(names, books, strict=True)]

    def remembered(self, names: Collection[str]) -> list[Catalog]:
        """The same from memory: nobody is waited for, though one that has not told yet is asked."""
        for name in names:
            self._books[name].fetch()
        return [Catalog(name=name, object_info=self._books[name].classes) for name in names]

    async def afresh(self, names: Collection[str], class_types: Collection[str]) -> list[Catalog]:
        """The same, after asking each backend again for these classes. One that cannot be asked now is not quoted."""
        books = [self._books[name] for name in names]
        await _wait(books)
        found = await asyncio.gather(*(book.ask(class_types) for book in books))
        return [Catalog(name=name, object_info=classes) for name, classes in zip(names, found, strict=True)]

    def node_class(self, class_type: str) -> NodeClass | None:
        """What ComfyUI says of the class, if any backend has told."""
        found = (book.told.get(class_type) for book in self._books.values())
        return next((node_class for node_class in found if node_class is not None), None)


async def _wait(books: Sequence[_Book]) -> None:
    """For the fetches that are worth it, together."""
    fetches = {fetch for book in books if (fetch := book.fetch()) is not None}
    if fetches:
        await asyncio.wait(fetches, timeout=max(book.patience for book in books))


class _Book:
    """The classes of one backend. A fetch goes on when nobody waits for it any more, and ends with its client."""

    def __init__(self, backend: Backend) -> None:
        self.told: Mapping[str, NodeClass] = {}
        """What it has said last, perhaps on an earlier connection."""
        self._backend = backend
        self._told_on = -1  # the number of that connection
        self._fetch: asyncio.Task[None] | None = None
        self._fetched_on = -1
        self._patient_until = 0.0
        self._rests_until = 0.0

    @property
    def classes(self) -> Mapping[str, NodeClass] | None:
        """What it has said on this connection; None when it is away, or has not said it yet."""
        return self.told if self._backend.up and self._told_on == self._backend.connections else None

    @property
    def patience(self) -> float:
        """How long to wait for the fetch under way, in seconds."""
        return max(0.0, self._patient_until - self._backend.clock.monotonic())

    def fetch(self) -> asyncio.Task[None] | None:
        """See that the classes are on their way. A task where that is worth waiting for."""
        if not self._backend.up or self.classes is not None:
            return None
        connection, now = self._backend.connections, self._backend.clock.monotonic()
        if self._fetched_on != connection:
            if self._fetch is not None:
                self._fetch.cancel()
            self._fetch, self._fetched_on = None, connection
            self._patient_until, self._rests_until = now + _PATIENCE_SECONDS, 0.0
        if (self._fetch is None or self._fetch.done()) and not self._rests():
            self._fetch = asyncio.create_task(self._read(connection), name=f"object_info {self._backend.name}")
        return self._fetch if self._fetch is not None and not self._fetch.done() and self.patience else None

    async def ask(self, class_types: Collection[str]) -> Mapping[str, NodeClass] | None:
        """All classes, these as they are now; None when it cannot be asked."""
        if self.classes is None or self._rests():
            return None
        connection, client = self._backend.connections, self._backend.client
        names = tuple(class_types)
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                if len(names) > _ASK_AT_MOST:
                    fresh = await _decoded(await client.object_info())
                else:
                    bodies = await asyncio.gather(*(client.object_info(name) for name in names))
                    answers = [decode_object_info(body) for body in bodies]
                    fresh = {name: found for name, found in self.told.items() if name not in names}
                    fresh |= {name: found[name] for name, found in zip(names, answers, strict=True) if name in found}
        except (TimeoutError, BackendUnavailable, msgspec.DecodeError) as error:
            self._rest("could not ask for classes", error)
            return None
        self.told, self._told_on = fresh, connection
        return fresh

    async def _read(self, connection: int) -> None:
        try:
            async with asyncio.timeout(_FETCH_SECONDS):
                classes = await _decoded(await self._backend.client.object_info())
        except (TimeoutError, BackendUnavailable, msgspec.DecodeError) as error:
            self._rest("no object_info: workflows are checked without it", error)
        else:
            self.told, self._told_on = classes, connection

    def _rests(self) -> bool:
        return self._backend.clock.monotonic() < self._rests_until

    def _rest(self, event: str, error: Exception) -> None:
        self._rests_until = self._backend.clock.monotonic() + _REST_SECONDS
        log.warning(event, backend=self._backend.name, reason=str(error) or "no answer in time")


async def _decoded(body: bytes) -> dict[str, NodeClass]:
    return await asyncio.to_thread(decode_object_info, body)
