"""The tables of the embedded store, and how a file gets them: numbered migrations, counted by `PRAGMA user_version`.

Must never change a migration that was released: a new one goes to the end.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from managers.errors import StoreUnavailable

FILE_NAME = "workflows.sqlite3"

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

MIGRATIONS = (_FIRST,)


def connect_writer(path: Path) -> sqlite3.Connection:
    """The one connection that writes: every commit is on the disk (WAL, synchronous FULL)."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    try:
        # A checkpoint stalls the writer, so few and large ones: 4,000 pages are 16 MiB of log.
        connection.executescript(
            "PRAGMA busy_timeout = 5000; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
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


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the file to the newest schema, each step in a transaction. Raises `StoreUnavailable` for a newer one."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StoreUnavailable(
            f"The store was written by a newer version of this service (schema {version}; this one knows "
            f"{len(MIGRATIONS)}): install that version, or use another data folder"
        )
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")
