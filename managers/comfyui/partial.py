"""Whether ComfyUI took a workflow only in part, for who has not heard its answer to the POST (PROTOCOL §2).

Must never be asked on the ordinary way: who has heard the answer knows.
"""

from __future__ import annotations

import msgspec

from managers.comfyui.client import ComfyUIClient
from managers.comfyui.graph import ancestors, parse_graph
from managers.comfyui.object_info import NodeClass, decode_object_info
from managers.comfyui.protocol import HistoryEntry
from managers.comfyui.verdicts import Job, Result, Verdict
from managers.events.types import Finding


async def partial(client: ComfyUIClient, job: Job, entry: HistoryEntry, now: int) -> Verdict | None:
    """The refusal it deserves: half a result is no result (CONTRACT 4). None: ComfyUI took all, or does not say.

    The history names the output nodes that were taken; one that is not among them was refused. Raises
    `BackendUnavailable`.
    """
    if entry.taken is None:
        return None
    graph = parse_graph(msgspec.json.decode(job.graph))
    idle = graph.keys() - ancestors(graph, entry.taken)
    known: dict[str, NodeClass] = {}
    for class_type in {graph[node_id].class_type for node_id in idle}:
        known |= decode_object_info(await client.object_info(class_type))
    refused = [
        node
        for node in graph.values()
        if node.id in idle and (info := known.get(node.class_type)) and info.output_node
    ]
    if not refused:
        return None
    findings = tuple(
        Finding(
            code="output_refused",
            message=f"ComfyUI left out {node.class_type} (node {node.id}): its check found something there",
            node_id=node.id,
            class_type=node.class_type,
        )
        for node in refused
    )
    words = "; ".join(finding.message for finding in findings)
    return Verdict(
        result=Result.FAILED,
        end_time=now,
        error=f"ComfyUI ran only a part of the workflow: {words}",
        error_type="validation",
        errors=findings,
    )
