"""What each ComfyUI can run: its /object_info, fetched once a connection and asked again where in doubt.

Must never hold a request up for a backend that does not answer: one that is away counts as able (CONTRACT 4).
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

_PATIENCE_SECONDS = 5.0
_ASK_AT_MOST = 20  # one by one; beyond that the whole list is cheaper


class Catalogs:
    """The node classes of every backend, cached."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = {backend.name: backend for backend in backends}
        self._known: dict[str, tuple[int, dict[str, NodeClass]]] = {}  # name -> (connection, classes)
        self._locks = {name: asyncio.Lock() for name in self._backends}

    async def current(self, names: Collection[str]) -> list[Catalog]:
        """One catalog for each named backend, from the cache where the connection is still the same."""
        return [Catalog(name=name, object_info=await self._classes(self._backends[name])) for name in names]

    async def afresh(self, names: Collection[str], class_types: Collection[str]) -> list[Catalog]:
        """The same, after asking each backend again for these classes."""
        await asyncio.gather(*(self._ask(self._backends[name], class_types) for name in names))
        return await self.current(names)

    def node_class(self, class_type: str) -> NodeClass | None:
        """What ComfyUI says of the class, if any backend has told."""
        found = (classes.get(class_type) for _, classes in self._known.values())
        return next((node_class for node_class in found if node_class is not None), None)

    async def _classes(self, backend: Backend) -> Mapping[str, NodeClass] | None:
        if not backend.up:
            return None
        known = self._known.get(backend.name)
        if known is not None and known[0] == backend.connections:
            return known[1]
        async with self._locks[backend.name]:
            known = self._known.get(backend.name)
            if known is not None and known[0] == backend.connections:
                return known[1]
            connection = backend.connections
            try:
                async with asyncio.timeout(_PATIENCE_SECONDS):
                    body = await backend.client.object_info()
                classes = await asyncio.to_thread(decode_object_info, body)
            except (TimeoutError, BackendUnavailable, msgspec.DecodeError) as error:
                log.warning("no object_info", backend=backend.name, reason=str(error) or "no answer in time")
                return None
            self._known[backend.name] = (connection, classes)
            return classes

    async def _ask(self, backend: Backend, class_types: Collection[str]) -> None:
        classes = await self._classes(backend)
        if classes is None:
            return
        if len(class_types) > _ASK_AT_MOST:
            self._known.pop(backend.name, None)
            await self._classes(backend)
            return
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                bodies = await asyncio.gather(*(backend.client.object_info(name) for name in class_types))
            answers = [decode_object_info(body) for body in bodies]
        except (TimeoutError, BackendUnavailable, msgspec.DecodeError) as error:
            log.warning("could not ask for classes", backend=backend.name, reason=str(error) or "no answer in time")
            return
        fresh = dict(classes)
        for name, answer in zip(class_types, answers, strict=True):
            found = answer.get(name)
            if found is not None:
                fresh[name] = found
            else:
                fresh.pop(name, None)
        self._known[backend.name] = (backend.connections, fresh)
