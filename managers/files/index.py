"""An index of the outputs folder that is kept fresh without walking it.

A folder's own timestamps change whenever a name in it comes or goes. So a listing looks at the folders, one stat
each, reads only those that changed, and looks only at names it has not met. What the folders cannot tell, a file
rewritten in place, is seen by looking again at each file of the page that is returned and at a few others in turn.

Must never be used by two threads at once, and never on the event loop: `manager.Files` owns one thread for it.
Must never follow a symlink: a file is listed once, under its real name. On a network file system we are as late as
its attribute cache.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path

from msgspec import Struct
from sortedcontainers import SortedList

from managers.files.paths import is_plain

Key = tuple[int, str]  # (mtime in ns, path): the order, read from its end

# Two changes within one tick of the file system's clock leave one timestamp. A folder that changed so lately that a
# second change might hide behind the first is read again. Linux ticks every 1-10 ms; whole seconds: FAT or old NFS.
_TICK_NS = 50_000_000
_COARSE_TICK_NS = 2_000_000_000
# Reading the names of a huge folder takes some 70 ms at 100,000 files: it then rests ten times as long, so that a
# listing is at most that much late. Files that a run has reported are looked at by name and are never late.
_HUGE, _REST = 20_000, 10
_RECHECKED = 200  # other files looked at in each listing, about 0.3 ms
_PLACE_HOLDER = "_output_images_will_be_put_here"  # ComfyUI's repository brings it
_ABSENT = (FileNotFoundError, NotADirectoryError, PermissionError)


class IndexedFile(Struct, frozen=True):
    """A file as it was a moment ago; `path` is relative to the root, with `/`, `size` in bytes."""

    path: str
    size: int
    mtime_ns: int


class IndexPage(Struct, frozen=True):
    """A part of the listing; `last` is where the next part begins, None at the end."""

    files: tuple[IndexedFile, ...]
    last: Key | None


class _Folder:
    """What is known of a folder. `entries` has every name in it: the mtime of a file, None for what is not listed."""

    __slots__ = ("entries", "folders", "not_before", "settled", "stamp")

    def __init__(self) -> None:
        self.entries: dict[str, int | None] = {}
        self.folders: set[str] = set()
        self.settled = False
        self.stamp: tuple[int, ...] = ()
        self.not_before = 0  # epoch ns: a huge folder is not read again earlier


class OutputsIndex:
    """The files below `root`, newest first."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._folders: dict[str, _Folder] = {}
        self._order: SortedList[Key] = SortedList()
        self._added: list[Key] = []
        self._turn: Iterator[str] = iter(())

    def __len__(self) -> int:
        return len(self._order)

    def page(self, limit: int, after: Key | None = None, only: Collection[str] | None = None) -> IndexPage:
        """The newest `limit` files older than the key `after`; with `only`, of those paths.

        A missing root is an empty one. Raises OSError when the root cannot be read.
        """
        self._refresh()
        self._recheck()
        found: list[tuple[Key, IndexedFile]] = []
        last = after
        while len(found) <= limit:  # one more than asked for, to know whether more follow
            keys = list(islice(self._older(last, only), limit + 1 - len(found)))
            if not keys:
                break
            last = keys[-1]
            found.extend(
                (key, IndexedFile(key[1], facts.st_size, facts.st_mtime_ns))
                for key in keys
                if (facts := self._look(*_split(key[1]))) is not None
            )
            self._flush()
        shown = found[:limit]
        return IndexPage(files=tuple(file for _, file in shown), last=shown[-1][0] if len(found) > limit else None)

    def _older(self, than: Key | None, only: Collection[str] | None) -> Iterable[Key]:
        if only is None:
            keys: Iterable[Key] = self._order.irange(None, than, inclusive=(True, False), reverse=True)
            return keys
        for path in only:
            if self._mtime(path) is None:
                self._look(*_split(path))  # a run has just written it into a folder that rests
        self._flush()
        known = ((self._mtime(path), path) for path in only)
        wanted = [(mtime, path) for mtime, path in known if mtime is not None]
        return sorted((key for key in wanted if than is None or key < than), reverse=True)

    def _mtime(self, path: str) -> int | None:
        folder, name = _split(path)
        known = self._folders.get(folder)
        return known.entries.get(name) if known else None

    def _refresh(self) -> None:
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            started = time.time_ns()
            try:
                # The root may be a link of the operator's; below it none is followed.
                facts = os.stat(self._at(folder), follow_symlinks=not folder)  # noqa: PTH116
            except _ABSENT:
                self._forget(folder)
                continue
            if not stat.S_ISDIR(facts.st_mode):
                self._forget(folder)
                continue
            known = self._folders.setdefault(folder, _Folder())
            stamp = (facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns)
            if (stamp != known.stamp or not known.settled) and started >= known.not_before:
                self._read(folder, known)
                if len(known.entries) > _HUGE:
                    now = time.time_ns()
                    known.not_before = now + _REST * (now - started)
                changed = max(facts.st_mtime_ns, facts.st_ctime_ns)
                tick = _TICK_NS if changed % 1_000_000_000 else _COARSE_TICK_NS
                known.stamp, known.settled = stamp, started - changed > tick
            waiting.extend(f"{folder}/{name}" if folder else name for name in known.folders)

    def _read(self, folder: str, known: _Folder) -> None:
        try:
            names = os.listdir(self._at(folder))  # noqa: PTH208 -- 100,000 Paths would be slow
        except _ABSENT:
            if not folder:
                raise
            names = []
        new = [name for name in names if name not in known.entries]
        if len(names) - len(new) < len(known.entries):
            for name in known.entries.keys() - set(names):
                self._drop(folder, known, name)
        for name in new:
            self._look(folder, name)
        self._flush()

    def _recheck(self) -> None:
        batch = list(islice(self._turn, _RECHECKED))
        if len(batch) < _RECHECKED:
            self._turn = iter([path for _, path in reversed(self._order)])
            batch.extend(islice(self._turn, _RECHECKED - len(batch)))
        for path in batch:
            self._look(*_split(path))
        self._flush()

    def _look(self, folder: str, name: str) -> os.stat_result | None:
        """Look at one name and set the index right about it. None unless it is a file to be listed."""
        known = self._folders.get(folder)
        if known is None:
            return None
        try:
            facts = os.lstat(f"{self._at(folder)}/{name}")
        except _ABSENT:
            self._drop(folder, known, name)
            return None
        if stat.S_ISREG(facts.st_mode) and is_plain(name) and name != _PLACE_HOLDER:
            before = known.entries.get(name)
            if before != facts.st_mtime_ns:
                self._drop(folder, known, name)
                known.entries[name] = facts.st_mtime_ns
                self._added.append((facts.st_mtime_ns, _join(folder, name)))
            return facts
        if name not in known.folders:
            self._drop(folder, known, name)
        known.entries[name] = None
        if stat.S_ISDIR(facts.st_mode) and is_plain(name):
            known.folders.add(name)
        return None

    def _flush(self) -> None:
        """Put what was met into the order, all at once: 100,000 single insertions would take seconds."""
        self._order.update(self._added)
        self._added.clear()

    def _drop(self, folder: str, known: _Folder, name: str) -> None:
        mtime = known.entries.pop(name, None)
        path = _join(folder, name)
        if mtime is not None:
            self._order.discard((mtime, path))
        elif name in known.folders:
            self._forget(path)

    def _forget(self, folder: str) -> None:
        """A folder is gone, and all below it."""
        known = self._folders.pop(folder, None)
        if known is not None:
            for name in tuple(known.entries):
                self._drop(folder, known, name)
        above, name = _split(folder)
        if folder and (parent := self._folders.get(above)) is not None:
            parent.folders.discard(name)
            parent.entries.pop(name, None)
            parent.settled = False  # something else may have taken its name

    def _at(self, folder: str) -> str:
        return f"{self._root}/{folder}" if folder else self._root


def _split(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return folder, name


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
