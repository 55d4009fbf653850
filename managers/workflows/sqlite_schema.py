"""The tables of the embedded store, and how a file gets them: numbered migrations, counted by `PRAGMA user_version`.

Must never change a migration that was released: a new one goes to the end. `examine` comes before anything that
writes: a file that is refused is left byte for byte as it was.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from managers.errors import StoreUnavailable

FILE_NAME = "workflows.sqlite3"
CHECK_SECONDS = 5.0
"""How long a start may look for damage: some GB from a quick disk. What is behind that is found when it is read."""

_AGAIN_SECONDS = 0.002

_FIRST = """
CREATE TABLE workflow (
    number          INTEGER PRIMARY KEY,            -- order of acceptance
    id              TEXT    NOT NULL UNIQUE,
    status          TEXT    NOT NULL,
    priority        TEXT    NOT NULL,
    gpu             TEXT    NOT NULL,
    rank            INTEGER NOT NULL,
    created_at      INTEGER NOT NULL,               -- all times: epoch ms
    max_attempts    INTEGER NOT NULL,
    timeout_seconds REAL    NOT NULL,
    attempt         INTEGER NOT NULL DEFAULT 0,
    backend         TEXT,
    prompt_id       TEXT,
    start_time      INTEGER,
    completion_time INTEGER,
    progress        INTEGER NOT NULL DEFAULT 0,
    node_total      INTEGER NOT NULL DEFAULT 0,
    node_done       INTEGER NOT NULL DEFAULT 0,
    node_cached     INTEGER NOT NULL DEFAULT 0,
    error           TEXT,
    error_type      TEXT,
    errors          TEXT,                           -- JSON list of findings
    outputs_reused  INTEGER NOT NULL DEFAULT 0,
    metadata        TEXT,                           -- JSON object
    retry_of        TEXT
);
CREATE INDEX workflow_waiting ON workflow (gpu, rank, number) WHERE status = 'queued';
CREATE INDEX workflow_by_status ON workflow (status, number);
CREATE INDEX workflow_by_end ON workflow (completion_time) WHERE completion_time IS NOT NULL;

-- Beside the record, so that lists never read it. JSON text, or its zlib stream.
CREATE TABLE workflow_graph (
    workflow   INTEGER PRIMARY KEY REFERENCES workflow (number),
    graph      BLOB NOT NULL,
    extra_data BLOB
);

CREATE TABLE attempt (
    id         INTEGER PRIMARY KEY,
    prompt_id  TEXT    NOT NULL UNIQUE,
    workflow   INTEGER NOT NULL REFERENCES workflow (number),
    number     INTEGER NOT NULL,
    backend    TEXT    NOT NULL,
    state      TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    start_time INTEGER,
    end_time   INTEGER,
    error      TEXT,
    error_type TEXT
);
CREATE INDEX attempt_by_workflow ON attempt (workflow);
CREATE INDEX attempt_open ON attempt (id) WHERE state IN ('posted', 'running');

CREATE TABLE output (
    id        INTEGER PRIMARY KEY,                  -- order of reporting
    workflow  INTEGER NOT NULL REFERENCES workflow (number),
    n         INTEGER NOT NULL,
    backend   TEXT,
    node_id   TEXT    NOT NULL,
    kind      TEXT    NOT NULL,
    type      TEXT,
    path      TEXT,                                 -- subfolder/filename
    size      INTEGER,                              -- bytes
    data      TEXT    NOT NULL,                     -- JSON of the whole output
    UNIQUE (workflow, n)
);
CREATE INDEX output_by_path ON output (path, id) WHERE type = 'output';

CREATE TABLE event (
    seq         INTEGER PRIMARY KEY,                -- order of commit
    type        TEXT    NOT NULL,
    workflow    INTEGER REFERENCES workflow (number),
    workflow_id TEXT,
    created_at  INTEGER NOT NULL,
    data        BLOB    NOT NULL                    -- JSON as clients get it
);
CREATE INDEX event_by_workflow ON event (workflow, seq) WHERE workflow IS NOT NULL;

CREATE TABLE idempotency (
    scope          TEXT    NOT NULL,
    key            TEXT    NOT NULL,
    body_hash      TEXT    NOT NULL,
    workflow       INTEGER NOT NULL REFERENCES workflow (number),
    queue_position INTEGER NOT NULL,
    status         TEXT    NOT NULL,
    created_at     INTEGER NOT NULL,
    PRIMARY KEY (scope, key)
) WITHOUT ROWID;
CREATE INDEX idempotency_by_age ON idempotency (created_at);
CREATE INDEX idempotency_by_workflow ON idempotency (workflow);

CREATE TABLE setting (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;
"""

_KEYS_AND_DEATHS = """
ALTER TABLE workflow ADD COLUMN submitted_by TEXT;              -- the name of a key
ALTER TABLE workflow ADD COLUMN unfit TEXT;                     -- JSON list of backends that lack a class of it
ALTER TABLE attempt ADD COLUMN died INTEGER NOT NULL DEFAULT 0; -- its ComfyUI died while it executed
ALTER TABLE idempotency ADD COLUMN errors TEXT;                -- JSON list of findings, as the reply told them
UPDATE idempotency SET scope = 'admin ' || scope;               -- there was one key only
"""

_COSTS = """
-- What the attempts took that ran and ended; each is NULL where it is not known for all of them.
ALTER TABLE workflow ADD COLUMN gpu_seconds REAL;
ALTER TABLE workflow ADD COLUMN vram_peak INTEGER;              -- bytes
ALTER TABLE workflow ADD COLUMN energy REAL;                    -- joules
ALTER TABLE workflow ADD COLUMN charged INTEGER NOT NULL DEFAULT 0; -- whether there were such attempts
-- What was lost before anybody wrote down what it took.
UPDATE workflow SET charged = 1 WHERE status IN ('queued', 'running') AND EXISTS
    (SELECT 1 FROM attempt a WHERE a.workflow = workflow.number AND a.state = 'lost' AND a.start_time IS NOT NULL);

-- Added to when an attempt ends and when a workflow does; nothing is ever taken away.
CREATE TABLE usage (
    day          TEXT    NOT NULL,                   -- of the end, UTC: 2026-11-22
    submitted_by TEXT    NOT NULL,                   -- the name of a key, '' when there was none
    gpu          TEXT    NOT NULL,                   -- the backend that ran it, '' when none did
    workflows    INTEGER NOT NULL,
    completed    INTEGER NOT NULL,
    failed       INTEGER NOT NULL,
    cancelled    INTEGER NOT NULL,
    run_seconds  REAL    NOT NULL,
    gpu_seconds  REAL,                               -- sums of what is known, NULL when nothing is
    vram_peak    INTEGER,                            -- bytes, the highest
    energy       REAL,                               -- joules
    PRIMARY KEY (day, submitted_by, gpu)
) WITHOUT ROWID;
"""

_DURATIONS = """
ALTER TABLE attempt ADD COLUMN nodes BLOB;                      -- its nodes and their times, JSON or its zlib stream

CREATE TABLE node_duration (
    class_type TEXT    NOT NULL,
    steps      INTEGER NOT NULL,                    -- a power of two, 0 where the graph names no number
    backend    TEXT    NOT NULL,
    counts     TEXT    NOT NULL,                    -- JSON object: weight by bucket
    cached     REAL    NOT NULL,                    -- weight of those found in the cache
    learnt_at  INTEGER NOT NULL,
    PRIMARY KEY (class_type, steps, backend)
) WITHOUT ROWID;
"""

_DELIVERIES = """
ALTER TABLE workflow ADD COLUMN webhook_url TEXT;               -- whom its submitter wants called about it

-- Those who read the log, and how far they have: the seq of the last event that they have looked at.
CREATE TABLE destination (
    name   TEXT PRIMARY KEY,
    kind   TEXT NOT NULL,
    cursor INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE delivery (
    number      INTEGER PRIMARY KEY,                -- the order in which they were made
    id          TEXT    NOT NULL UNIQUE,
    destination TEXT    NOT NULL,
    kind        TEXT    NOT NULL,
    seq         INTEGER NOT NULL,
    workflow_id TEXT,
    type        TEXT    NOT NULL,
    data        BLOB    NOT NULL,                   -- the event, JSON as clients get it
    state       TEXT    NOT NULL,                   -- pending, delivered, dead
    attempts    INTEGER NOT NULL,
    next_at     INTEGER,                            -- NULL too while an earlier one of its workflow is pending
    last_error  TEXT,
    last_status INTEGER,
    created_at  INTEGER NOT NULL,
    ended_at    INTEGER
);
CREATE INDEX delivery_due ON delivery (destination, next_at) WHERE state = 'pending' AND next_at IS NOT NULL;
CREATE INDEX delivery_in_order ON delivery (destination, number) WHERE state = 'pending';
CREATE INDEX delivery_of_lane ON delivery (destination, workflow_id, number) WHERE state = 'pending';
CREATE INDEX delivery_by_state ON delivery (state, number);
CREATE INDEX delivery_by_workflow ON delivery (workflow_id, number);
CREATE INDEX delivery_by_destination ON delivery (destination, number);
CREATE INDEX delivery_by_end ON delivery (ended_at) WHERE state = 'delivered';

CREATE TABLE webhook (
    id         TEXT PRIMARY KEY,
    created_at INTEGER NOT NULL,
    data       BLOB    NOT NULL                     -- the endpoint, JSON
) WITHOUT ROWID;
"""

_UPLOADS = """
CREATE TABLE upload (
    workflow    INTEGER NOT NULL REFERENCES workflow (number),
    n           INTEGER NOT NULL,                    -- the output of this number
    bucket      TEXT    NOT NULL,
    key         TEXT,
    sha256      TEXT,                                -- hex
    size        INTEGER,                             -- bytes
    uploaded_at INTEGER NOT NULL,
    error       TEXT,                                -- why it never will be there; then the three before are NULL
    PRIMARY KEY (workflow, n)
) WITHOUT ROWID;
"""

_TEMPLATES = """
ALTER TABLE workflow ADD COLUMN template TEXT;                  -- the name of what it was made from
ALTER TABLE workflow ADD COLUMN template_version INTEGER;
ALTER TABLE workflow_graph ADD COLUMN parameters BLOB;          -- with which values, JSON or its zlib stream
CREATE INDEX workflow_by_template ON workflow (template, template_version, status) WHERE template IS NOT NULL;

-- Stays when its versions are deleted: numbers never come again, and files are not read in a second time.
CREATE TABLE template (
    name         TEXT PRIMARY KEY,
    last_version INTEGER NOT NULL,
    file_digest  TEXT,                              -- of what came last from a file, and from the box
    box_digest   TEXT
) WITHOUT ROWID;

CREATE TABLE template_version (
    name       TEXT    NOT NULL,
    number     INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    source     TEXT    NOT NULL,                     -- api, file, box
    saved_by   TEXT    NOT NULL,                     -- the name of a key, '' where it was none
    definition BLOB    NOT NULL,                     -- JSON or its zlib stream
    PRIMARY KEY (name, number)
);

CREATE TABLE template_alias (
    name   TEXT    NOT NULL,
    alias  TEXT    NOT NULL,
    number INTEGER NOT NULL,
    PRIMARY KEY (name, alias)
) WITHOUT ROWID;
"""

MIGRATIONS = (_FIRST, _KEYS_AND_DEATHS, _COSTS, _DURATIONS, _DELIVERIES, _UPLOADS, _TEMPLATES)


def connect_writer(path: Path) -> sqlite3.Connection:
    """The one connection that writes: every commit is on the disk (WAL, synchronous FULL)."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    try:
        # A checkpoint stalls the writer, so few and large ones: 4,000 pages are 16 MiB of log.
        connection.executescript(
            # auto_vacuum counts for a new file only: it lets retention give room back in small steps, where VACUUM
            # would stop everything and need the space twice. Its cost was not to be measured (1 page in 800).
            "PRAGMA busy_timeout = 5000; PRAGMA auto_vacuum = INCREMENTAL;"
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
            "PRAGMA wal_autocheckpoint = 4000; PRAGMA journal_size_limit = 67108864; PRAGMA cache_size = -16000;"
            "PRAGMA temp_store = MEMORY;"
        )
        if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            raise StoreUnavailable(
                "The store needs a local file system: its write-ahead log cannot be switched on here"
            )
    except BaseException:
        connection.close()
        raise
    return connection


def connect_reader(path: Path) -> sqlite3.Connection:
    """A connection that cannot write."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    connection.executescript("PRAGMA busy_timeout = 5000; PRAGMA query_only = 1;")
    return connection


def examine(path: Path, newest: int = len(MIGRATIONS), check_seconds: float = CHECK_SECONDS) -> int:
    """The schema of the file, 0 for a new one; nothing is changed, a log left by a crash is read with it.

    Raises `StoreUnavailable` for a damaged file and for a schema beyond `newest`.
    """
    log = path.with_name(f"{path.name}-wal")
    if not path.exists() or not path.stat().st_size:
        if log.exists() and log.stat().st_size:  # opening would delete it
            raise StoreUnavailable(f"{log} is there without its file {path.name}: put that back, or move both away")
        return 0
    try:
        with closing(connect_reader(path)) as connection:
            version: int = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > newest:
                raise StoreUnavailable(
                    f"The store was written by a newer version of this service (schema {version}; this one knows "
                    f"{newest}): install that version, or use another data folder"
                )
            found = _damage(connection, check_seconds)
            if found is None and not (log.exists() and log.stat().st_size):
                pages, page_size = (
                    connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size")
                )
                if path.stat().st_size < pages * page_size:  # the check takes what is cut off for zeros
                    found = "its end is missing"
    except sqlite3.DatabaseError as error:
        if not getattr(error, "sqlite_errorname", "").startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise
        found = str(error)
    if found is not None:
        raise StoreUnavailable(
            f"The store {path} is damaged ({found}) and was left as it is: move it away together with its -wal and "
            "-shm, then put a copy made by `management-api backup` in its place, or begin anew without it"
        )
    return version


def _damage(connection: sqlite3.Connection, seconds: float) -> str | None:
    """What is wrong with the structure of the file, as far as there is time to look."""
    try:
        with _interrupted_after(seconds, connection):
            finding = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname != "SQLITE_INTERRUPT":
            raise
        return None
    return None if finding == "ok" else " ".join(str(finding).split())


@contextmanager
def _interrupted_after(seconds: float, connection: sqlite3.Connection) -> Iterator[None]:
    """Stop what it does when the time is over. (A progress handler is not asked while a tree is being checked.)"""
    done = threading.Event()

    def watch() -> None:
        wait = seconds
        while not done.wait(wait):
            connection.interrupt()
            wait = _AGAIN_SECONDS

    watcher = threading.Thread(target=watch, name="store-check", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def migrate(connection: sqlite3.Connection, version: int, migrations: Sequence[str] = MIGRATIONS) -> None:
    """Bring a file of this schema to the newest one, or leave it as it is."""
    if version < len(migrations):
        script = "\n".join(migrations[version:])
        try:
            connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {len(migrations)}; COMMIT;")
        except BaseException:
            connection.rollback()
            raise
