"""The times of nodes in the embedded store: those of each attempt, and what was learnt from all of them.

Must never judge a time: that is `durations`. The table is small (`MAX_KINDS` rows), and read once, at the start.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence

import msgspec

from managers.workflows import sqlite_statements as sql
from managers.workflows.course import NodeTime
from managers.workflows.durations import Kind, NodeDuration
from managers.workflows.sqlite_rows import pack, unpack
from managers.workflows.sqlite_writer import Transaction

_counts = msgspec.json.Decoder(dict[int, float])
_times = msgspec.json.Decoder(tuple[NodeTime, ...])
_encode = msgspec.json.Encoder().encode


def keep(
    transaction: Transaction,
    prompt_id: str,
    times: Sequence[NodeTime],
    learnt: Sequence[NodeDuration],
    dropped: Sequence[Kind],
) -> None:
    """What an attempt has shown."""
    transaction.execute(sql.KEEP_NODES, (pack(_encode(times)), prompt_id))
    for row in learnt:
        kind, counts = row.kind, _encode(row.counts).decode()
        transaction.execute(
            sql.KEEP_DURATION, (kind.class_type, kind.steps, kind.backend, counts, row.cached, row.learnt_at)
        )
    for kind in dropped:
        transaction.execute(sql.FORGET_DURATION, (kind.class_type, kind.steps, kind.backend))


def durations(connection: sqlite3.Connection) -> list[NodeDuration]:
    """All that was learnt, the newest at the end."""
    return [
        NodeDuration(
            kind=Kind(class_type, steps, backend), counts=_counts.decode(counts), cached=cached, learnt_at=learnt_at
        )
        for class_type, steps, backend, counts, cached, learnt_at in connection.execute(sql.DURATIONS)
    ]


def node_times(connection: sqlite3.Connection, workflow_id: str) -> Sequence[NodeTime]:
    """Those of the attempt in hand, or of the last one."""
    row = connection.execute(sql.GET_NODES, (workflow_id,)).fetchone()
    return () if row is None or row[0] is None else _times.decode(unpack(row[0]))


def graphs(connection: sqlite3.Connection, workflow_ids: Collection[str]) -> dict[str, bytes]:
    """JSON text by workflow; unknown ids are left out."""
    rows = connection.execute(sql.GET_GRAPHS, (_encode(list(workflow_ids)).decode(),))
    return {workflow_id: unpack(graph) for workflow_id, graph in rows}
