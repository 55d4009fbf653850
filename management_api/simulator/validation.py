"""Whether a prompt may be queued, and the exact words of a refusal (PROTOCOL 2, `POST /prompt`).

Looks only at nodes that an output depends on, like the real one: a dangling node without `inputs` passes here and
kills the worker later. It changes literals of the wrong JSON type in place (`"5"` becomes 5), as the real one does.
"""

import traceback
from typing import Any

import msgspec

from management_api.simulator import object_info
from management_api.simulator.folders import Folders
from management_api.simulator.node import REGISTRY
from management_api.simulator.queue import Graph

Error = dict[str, Any]


class Verdict(msgspec.Struct, frozen=True):
    """`error` None: accepted, `outputs` are the output nodes that will run."""

    error: Error | None
    outputs: list[str]
    node_errors: dict[str, Any]


class _Cycle(Exception):
    pass


def validate(graph: Graph, targets: list[str] | None, folders: Folders) -> Verdict:
    """Check a prompt. Raises whatever a malformed one makes Python raise (the server answers 500 then)."""
    outputs = []
    for node_id in graph:
        node = graph[node_id]
        if "class_type" not in node:
            text = "Cannot execute because a node is missing the class_type property."
            return _refused("invalid_prompt", text, f"Node ID '#{node_id}'")
        name = node["class_type"]
        if not object_info.known(name):
            text = f"Cannot execute because node {name} does not exist."
            return _refused("invalid_prompt", text, f"Node ID '#{node_id}'")
        if object_info.is_output(name) and (targets is None or node_id in targets):
            outputs.append(node_id)
    if not outputs:
        return _refused("prompt_no_outputs", "Prompt has no outputs", "")
    check = _Check(graph, folders)
    good = [node_id for node_id in outputs if check.output(node_id)]
    if good:
        return Verdict(None, good, check.node_errors())
    details = "\n".join(check.words(node_id) for node_id in outputs if check.errors.get(node_id))
    refused = _refused("prompt_outputs_failed_validation", "Prompt outputs failed validation", details)
    return Verdict(refused.error, [], check.node_errors())


def _refused(kind: str, message: str, details: str) -> Verdict:
    error = {"type": kind, "message": message, "details": details, "extra_info": {}}
    return Verdict(error, [], {})


class _Check:
    def __init__(self, graph: Graph, folders: Folders) -> None:
        self.graph = graph
        self.folders = folders
        self.errors: dict[str, list[Error]] = {}
        self.valid: dict[str, bool] = {}
        self.dependents: dict[str, list[str]] = {}

    def output(self, node_id: str) -> bool:
        """Whether one output node can run."""
        try:
            good = self._node(node_id, ())
        except _Cycle:
            return False
        except Exception as error:  # noqa: BLE001 - told to the client, as recorded
            extra = {"exception_type": type(error).__name__, "traceback": traceback.format_tb(error.__traceback__)}
            self.errors[node_id] = [
                _error("exception_during_validation", "Exception when validating node", str(error), extra)
            ]
            good = False
        if not good:
            for bad in self._bad_upstream(node_id, set()):
                self.dependents.setdefault(bad, []).append(node_id)
        return good

    def node_errors(self) -> dict[str, Any]:
        """The `node_errors` member of the answer."""
        return {
            node_id: {
                "errors": errors,
                "dependent_outputs": self.dependents.get(node_id, []),
                "class_type": self.graph[node_id]["class_type"],
            }
            for node_id, errors in self.errors.items()
            if errors
        }

    def words(self, node_id: str) -> str:
        """The complaints of one node as text."""
        return "\n".join(f"{error['message']}: {error['details']}" for error in self.errors[node_id])

    def _bad_upstream(self, node_id: str, seen: set[str]) -> list[str]:
        if node_id in seen or node_id not in self.graph:
            return []
        seen.add(node_id)
        found = [node_id] if self.errors.get(node_id) else []
        for value in self.graph[node_id].get("inputs", {}).values():
            if isinstance(value, list) and value and isinstance(value[0], str):
                found += self._bad_upstream(value[0], seen)
        return found

    def _node(self, node_id: str, above: tuple[str, ...]) -> bool:
        if node_id in self.valid:
            return self.valid[node_id]
        if node_id in above:
            raise _Cycle
        node = self.graph[node_id]
        inputs = node["inputs"]
        name = node["class_type"]
        info = object_info.describe(name, self.folders)
        errors: list[Error] = []
        upstream_good = True
        own = REGISTRY[name].validate
        complaint_of = None
        declared = info["input"].get("required", {}) | info["input"].get("optional", {})
        for key, config in declared.items():
            if key not in inputs:
                if key in info["input"].get("required", {}):
                    errors.append(
                        _error("required_input_missing", "Required input is missing", key, {"input_name": key})
                    )
                continue
            if isinstance(inputs[key], list):
                good, error = self._link(key, inputs[key], config, (*above, node_id))
                upstream_good &= good
                errors += [error] if error else []
            else:
                errors += self._literal(key, inputs, config, listed=own is None)
        if own is not None and not errors:
            complaint_of = own(self.folders, inputs)
        if complaint_of is not None:
            key, text = complaint_of
            words = "Custom validation failed for node"
            errors.append(_error("custom_validation_failed", words, f"{key} - {text}", {"input_name": key}))
        if errors:
            self.errors[node_id] = errors
        self.valid[node_id] = not errors and upstream_good
        return self.valid[node_id]

    def _link(
        self, key: str, value: list[Any], config: list[Any], above: tuple[str, ...]
    ) -> tuple[bool, Error | None]:
        if len(value) != 2:
            extra = {"input_name": key, "input_config": config, "received_value": value}
            words = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            return True, _error("bad_linked_input", words, key, extra)
        source, slot = value
        received = object_info.output_types(self.graph[source]["class_type"])[slot]
        wanted = config[0]
        if wanted != "*" and received not in ("*", wanted):
            details = f"{key}, received_type({received}) mismatch input_type({wanted})"
            extra = {"input_name": key, "input_config": config, "received_type": received, "linked_node": value}
            return True, _error("return_type_mismatch", "Return type mismatch between linked nodes", details, extra)
        return self._node(source, above), None

    def _literal(self, key: str, inputs: dict[str, Any], config: list[Any], *, listed: bool) -> list[Error]:
        kind = config[0]
        options = config[1] if len(config) > 1 else {}
        try:
            inputs[key] = value = _converted(kind, inputs[key])
        except (TypeError, ValueError) as error:
            extra = {
                "input_name": key,
                "input_config": config,
                "received_value": inputs[key],
                "exception_message": str(error),
            }
            words = f"Failed to convert an input value to a {kind} value"
            return [_error("invalid_input_type", words, f"{key}, {inputs[key]}, {error}", extra)]
        extra = {"input_name": key, "input_config": config, "received_value": value}
        if "min" in options and value < options["min"]:
            return [
                _error("value_smaller_than_min", f"Value {value} smaller than min of {options['min']}", key, extra)
            ]
        if "max" in options and value > options["max"]:
            return [_error("value_bigger_than_max", f"Value {value} bigger than max of {options['max']}", key, extra)]
        if isinstance(kind, list) and listed and value not in kind:
            shown = str(kind) if len(kind) <= 20 else f"(list of length {len(kind)})"
            return [_error("value_not_in_list", "Value not in list", f"{key}: '{value}' not in {shown}", extra)]
        return []


def _converted(kind: object, value: Any) -> Any:
    match kind:
        case "INT":
            return int(value)
        case "FLOAT":
            return float(value)
        case "STRING":
            return str(value)
        case "BOOLEAN":
            return bool(value)
    return value


def _error(kind: str, message: str, details: str, extra: dict[str, Any]) -> Error:
    return {"type": kind, "message": message, "details": details, "extra_info": extra}
