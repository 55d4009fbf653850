"""The ids of what is made here."""

import re
import time
import uuid

from managers.clock import new_id


def test_ids_are_canonical_differ_and_grow_with_time() -> None:
    began = time.time_ns() // 1_000_000
    ids = [new_id() for _ in range(10_000)]
    ended = time.time_ns() // 1_000_000
    assert len(set(ids)) == 10_000
    assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", one) for one in ids)
    assert {(uuid.UUID(one).version, uuid.UUID(one).variant) for one in ids} == {(7, uuid.RFC_4122)}
    times = [uuid.UUID(one).int >> 80 for one in ids]
    assert times == sorted(times)
    assert began <= times[0] <= times[-1] <= ended
