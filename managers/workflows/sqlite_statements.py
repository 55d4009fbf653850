"""Every SQL statement of the embedded store, by name.

Must never be built from what a client sent: values go in as parameters.
"""

# ruff: noqa: S608 - the pieces are constants of this file
from __future__ import annotations

_OUTPUTS = "(SELECT group_concat(data, ',') FROM (SELECT data FROM output WHERE workflow = w.number ORDER BY n))"

_WORKFLOW = (
    "w.id, w.number, w.status, w.priority, w.gpu, w.rank, w.created_at, w.max_attempts, w.timeout_seconds, w.attempt,"
    " w.backend, w.prompt_id, w.start_time, w.completion_time, w.progress, w.node_total, w.node_done, w.node_cached,"
    f" w.error, w.error_type, w.errors, w.outputs_reused, w.metadata, w.retry_of, w.submitted_by, w.unfit,"
    f" w.charged, w.gpu_seconds, w.vram_peak, w.energy, w.webhook_url, w.template, w.template_version,"
    f" {_OUTPUTS}"
)
WORKFLOW_WIDTH = 34

_ATTEMPT = (
    "a.prompt_id, w.id, a.number, a.backend, a.state, a.created_at, a.start_time, a.end_time, a.error, a.error_type,"
    " a.died"
)
ATTEMPT_WIDTH = 11

_OPEN = "a.state IN ('posted', 'running')"

# ---- writing

INSERT_WORKFLOWS = (
    "INSERT INTO workflow (number, id, status, priority, gpu, rank, created_at, max_attempts, timeout_seconds,"
    " completion_time, node_total, error, error_type, errors, metadata, retry_of, submitted_by, unfit, webhook_url,"
    " template, template_version) VALUES "
)
INSERT_GRAPHS = "INSERT INTO workflow_graph (workflow, graph, extra_data, parameters) VALUES "
INSERT_EVENTS = "INSERT INTO event (seq, type, workflow, workflow_id, created_at, data) VALUES "
INSERT_OUTPUTS = "INSERT INTO output (workflow, n, backend, node_id, kind, type, path, size, data) VALUES "

# Compare-and-set on (status, attempt): whoever comes too late changes no row.
UPDATE_WORKFLOW = (
    "UPDATE workflow SET status = ?, priority = ?, rank = ?, attempt = ?, backend = ?, prompt_id = ?, start_time = ?,"
    " completion_time = ?, progress = ?, node_total = ?, node_done = ?, node_cached = ?, error = ?, error_type = ?,"
    " errors = ?, outputs_reused = ?, charged = ?, gpu_seconds = ?, vram_peak = ?, energy = ?"
    " WHERE number = ? AND status = ? AND attempt = ?"
)
UPDATE_RANK = "UPDATE workflow SET rank = ? WHERE number = ?"

INSERT_ATTEMPT = (
    "INSERT INTO attempt (prompt_id, workflow, number, backend, state, created_at) VALUES (?, ?, ?, ?, ?, ?)"
)
UPDATE_ATTEMPT = (
    "UPDATE attempt SET state = ?, start_time = ?, end_time = ?, error = ?, error_type = ?, died = ?"
    " WHERE prompt_id = ? AND state = ?"
)

# A sum of nothing known is NULL; from then on it is that of what is known.
ADD_USAGE = (
    "INSERT INTO usage (day, submitted_by, gpu, workflows, completed, failed, cancelled, run_seconds, gpu_seconds,"
    " vram_peak, energy) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (day, submitted_by, gpu) DO"
    " UPDATE SET"
    " workflows = workflows + excluded.workflows, completed = completed + excluded.completed,"
    " failed = failed + excluded.failed, cancelled = cancelled + excluded.cancelled,"
    " run_seconds = run_seconds + excluded.run_seconds,"
    " gpu_seconds = coalesce(gpu_seconds + excluded.gpu_seconds, gpu_seconds, excluded.gpu_seconds),"
    " vram_peak = coalesce(max(vram_peak, excluded.vram_peak), vram_peak, excluded.vram_peak),"
    " energy = coalesce(energy + excluded.energy, energy, excluded.energy)"
)

KEEP_NODES = "UPDATE attempt SET nodes = ? WHERE prompt_id = ?"
KEEP_DURATION = (
    "INSERT OR REPLACE INTO node_duration (class_type, steps, backend, counts, cached, learnt_at)"
    " VALUES (?, ?, ?, ?, ?, ?)"
)
FORGET_DURATION = "DELETE FROM node_duration WHERE class_type = ? AND steps = ? AND backend = ?"

INSERT_IDEMPOTENCY = (
    "INSERT OR REPLACE INTO idempotency (scope, key, body_hash, workflow, queue_position, status, errors,"
    " created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
FIND_IDEMPOTENCY = (
    "SELECT body_hash, workflow, queue_position, status, errors FROM idempotency"
    " WHERE scope = ? AND key = ? AND created_at > ?"
)
PRUNE_IDEMPOTENCY = (
    "DELETE FROM idempotency WHERE (scope, key) IN"
    " (SELECT scope, key FROM idempotency WHERE created_at <= ? ORDER BY created_at LIMIT ?)"
)

DRAINED = "drained "
"""A setting of this name and a backend's is there while that gets no work."""
GET_SETTING = "SELECT value FROM setting WHERE name = ?"
SET_SETTING = "INSERT OR REPLACE INTO setting (name, value) VALUES (?, ?)"
REMOVE_SETTING = "DELETE FROM setting WHERE name = ?"
SETTINGS_BELOW = "SELECT substr(name, length(?1) + 1) FROM setting WHERE substr(name, 1, length(?1)) = ?1"

# The newest workflow and event always stay: their numbers are where counting goes on after a restart.
# A workflow goes after its events. They carry our own time and go in the order of the log, so when its last one has
# gone, it ended long ago, whatever the clock of its ComfyUI says: `completion_time` is only the quick way to it.
FORGETTABLE = (
    "SELECT w.number FROM workflow w WHERE (w.completion_time < ? OR w.completion_time > ?)"
    " AND NOT EXISTS (SELECT 1 FROM event e WHERE e.workflow = w.number)"
    f" AND NOT EXISTS (SELECT 1 FROM attempt a WHERE a.workflow = w.number AND {_OPEN})"
    " AND w.number < (SELECT max(number) FROM workflow) LIMIT ?"
)
PRUNE_WORKFLOWS = tuple(
    f"DELETE FROM {table} WHERE {column} IN (SELECT value FROM json_each(?))"
    for table, column in (
        ("workflow_graph", "workflow"),
        ("attempt", "workflow"),
        ("output", "workflow"),
        ("upload", "workflow"),
        ("idempotency", "workflow"),
        ("workflow", "number"),
    )
)
OLDEST_EVENTS = "SELECT seq, created_at FROM event WHERE seq <= ? ORDER BY seq LIMIT ?"
PRUNE_EVENTS = "DELETE FROM event WHERE seq <= ? AND seq < (SELECT max(seq) FROM event)"
FREE_PAGES = "PRAGMA freelist_count"
ALL_PAGES = "PRAGMA page_count"
GIVE_BACK = "PRAGMA incremental_vacuum(1)"  # the module takes one step of it, whatever the number

# ---- reading

LAST_NUMBER = "SELECT coalesce(max(number), 0) FROM workflow"
LAST_SEQ = "SELECT coalesce(max(seq), 0) FROM event"
FIRST_SEQ = "SELECT min(seq) FROM event"
LIVE = (
    "SELECT number, id, status, priority, gpu, rank, created_at, submitted_by, unfit FROM workflow"
    " WHERE status IN ('queued', 'running')"
)
HELD = f"SELECT DISTINCT w.id FROM attempt a JOIN workflow w ON w.number = a.workflow WHERE {_OPEN}"

GET_STATUS = "SELECT status FROM workflow WHERE id = ?"
GET_NUMBER = "SELECT number FROM workflow WHERE id = ?"
GET_WORKFLOW = f"SELECT {_WORKFLOW} FROM workflow w WHERE w.id = ?"
GET_WORKFLOW_BY_NUMBER = f"SELECT {_WORKFLOW} FROM workflow w WHERE w.number = ?"
GET_WORKFLOWS = f"SELECT {_WORKFLOW} FROM workflow w WHERE w.id IN (SELECT value FROM json_each(?)) ORDER BY w.number"
GET_RUNNING = f"SELECT {_WORKFLOW} FROM workflow w WHERE w.status = 'running' ORDER BY w.number"
GET_GRAPH = (
    "SELECT g.graph, g.extra_data FROM workflow w JOIN workflow_graph g ON g.workflow = w.number WHERE w.id = ?"
)

GET_GRAPHS = (
    "SELECT w.id, g.graph FROM workflow w JOIN workflow_graph g ON g.workflow = w.number"
    " WHERE w.id IN (SELECT value FROM json_each(?))"
)
GET_MADE_FROM = (
    "SELECT w.template, w.template_version, g.parameters FROM workflow w"
    " JOIN workflow_graph g ON g.workflow = w.number WHERE w.id = ?"
)
GET_NODES = "SELECT a.nodes FROM workflow w JOIN attempt a ON a.prompt_id = w.prompt_id WHERE w.id = ?"
DURATIONS = "SELECT class_type, steps, backend, counts, cached, learnt_at FROM node_duration ORDER BY learnt_at"

LIST_WORKFLOWS = f"SELECT {_WORKFLOW} FROM workflow w WHERE w.number < :before"
LIST_BY_STATUS = " AND w.status = :status"
LIST_BY_GPU = " AND w.gpu = :gpu"
LIST_BY_ERROR_TYPE = " AND w.error_type = :error_type"
LIST_BY_SUBMITTER = " AND w.submitted_by = :submitted_by"
LIST_SINCE = " AND w.created_at >= :since"
LIST_ORDER = " ORDER BY w.number DESC LIMIT :limit"

GET_ATTEMPT = (
    f"SELECT {_ATTEMPT}, {_WORKFLOW} FROM attempt a JOIN workflow w ON w.number = a.workflow WHERE a.prompt_id = ?"
)
COUNT_DEATHS = "SELECT count(*) FROM attempt WHERE workflow = ? AND died"
GET_ATTEMPTS = (
    f"SELECT {_ATTEMPT} FROM attempt a JOIN workflow w ON w.number = a.workflow WHERE w.id = ? ORDER BY a.id"
)
OPEN_ATTEMPTS = (
    f"SELECT {_ATTEMPT}, {_WORKFLOW}, g.graph, g.extra_data FROM attempt a JOIN workflow w ON w.number = a.workflow"
    f" JOIN workflow_graph g ON g.workflow = a.workflow WHERE {_OPEN} AND (?1 IS NULL OR a.backend = ?1)"
    " ORDER BY a.id"
)

USAGE = {
    by: (
        f"SELECT {column}, sum(workflows), sum(completed), sum(failed), sum(cancelled), round(sum(run_seconds), 3),"
        " round(sum(gpu_seconds), 3), max(vram_peak), round(sum(energy), 3) FROM usage WHERE day BETWEEN ? AND ?"
        " GROUP BY 1 ORDER BY 1"
    )
    for by, column in (("key", "submitted_by"), ("gpu", "gpu"), ("day", "day"))
}
"""By what it is rolled up; within days, the first and the last one in."""

EVENTS_AFTER = "SELECT seq, type, workflow_id, data FROM event WHERE seq > ? ORDER BY seq LIMIT ?"
EVENTS_OF = (
    "SELECT e.seq, e.type, e.workflow_id, e.data FROM workflow w JOIN event e ON e.workflow = w.number"
    " WHERE w.id = ? AND e.seq > ? ORDER BY e.seq"
)

OWNERS = (
    "SELECT o.path, w.id, o.node_id FROM output o JOIN workflow w ON w.number = o.workflow WHERE o.id IN"
    " (SELECT (SELECT max(x.id) FROM output x WHERE x.type = 'output' AND x.path = p.value"
    " AND (?1 IS NULL OR x.backend = ?1)) FROM json_each(?2) p)"
)
OUTPUT_PATHS = (
    "SELECT o.path FROM workflow w JOIN output o ON o.workflow = w.number"
    " WHERE w.id = ? AND o.type = 'output' AND o.path IS NOT NULL ORDER BY o.n"
)
