#!/usr/bin/env bash
# Is this service all right, from the outside? Needs bash, curl and python3 (for JSON). Ends with 0 only if all is well.
#
#   MANAGEMENT_API_KEY=… [MANAGEMENT_API_URL=http://127.0.0.1:9090] ./test-comfyui.sh
#
# It hands in two small workflows: one that cannot run, and one that ComfyUI runs in a moment (a plain 64x64 picture).
set -uo pipefail

url="${MANAGEMENT_API_URL:-http://127.0.0.1:9090}"
url="${url%/}"
if [[ -z "${MANAGEMENT_API_KEY:-}" ]]; then
    echo "MANAGEMENT_API_KEY is not set: give the key of the service" >&2
    exit 2
fi

body="$(mktemp)"
trap 'rm -f "$body"' EXIT
failed=0
status=000

# ask METHOD PATH [curl options]: sets status, leaves the reply in $body. Never follows a redirect.
# The key goes in by standard input, where `ps` does not show it.
ask() {
    status="$(curl --silent --max-time 90 --output "$body" --write-out '%{http_code}' --request "$1" \
        --header @- "${@:3}" "$url$2" <<<"X-API-Key: $MANAGEMENT_API_KEY")" || true
}

ask_without_key() {
    status="$(curl --silent --max-time 30 --output "$body" --write-out '%{http_code}' --request "$1" "${@:3}" "$url$2")" || true
}

# step NAME COMMAND…: one line, and the reply when the command says no.
step() {
    local name="$1"
    shift
    if "$@"; then
        echo "ok    $name"
    else
        failed=$((failed + 1))
        echo "FAIL  $name (status $status)"
        head -c 600 "$body" | sed 's/^/      /'
        echo
    fi
}

# is STATUS [EXPRESSION]: the status, and a Python expression about `reply`, the JSON that came back, and `id`.
is() {
    [[ "$status" == "$1" ]] || return 1
    [[ $# -lt 2 ]] || python3 - "$body" "$2" "${id:-}" <<'PYTHON' 2>/dev/null
import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    reply = json.load(file)
id = sys.argv[3]
sys.exit(not eval(sys.argv[2]))
PYTHON
}

# value NAME: a member of the reply.
value() {
    python3 -c 'import json, sys; print(json.load(open(sys.argv[1], encoding="utf-8")).get(sys.argv[2]) or "")' \
        "$body" "$1" 2>/dev/null
}

contains() { is 200 && grep -q "$1" "$body"; }

json=(--header 'Content-Type: application/json')
prefix="test-comfyui/$$-$(date +%s)"
load='{"workflow": {"1": {"class_type": "LoadImage", "inputs": {"image": "input.png"}}}, "priority": "normal"}'
picture='{"priority": "high", "workflow": {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 3368652}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "'"$prefix"'"}}}}'

echo "Testing $url"

ask_without_key GET /health
step "health" is 200 'reply["status"] == "healthy"'

ask_without_key GET /
step "the root lists the ComfyUI endpoints" is 200 '"submit" in reply["endpoints"]["comfyui"]'

ask_without_key GET /ready
step "ready, and ComfyUI is there" is 200 'reply["ready"] and reply["checks"]["comfyui"] == "ok"'

ask_without_key GET /v1/comfyui/workflow
step "without a key: 401" is 401 'reply["statusCode"] == 401'

ask POST /v1/comfyui/workflow "${json[@]}" --data "$load"
step "submit a workflow" is 202 'reply["workflowId"] and reply["queuePosition"] >= 0'
id="$(value workflowId)"

ask GET "/v1/comfyui/workflow/$id"
step "its status" is 200 'reply["workflowId"] == id'

ask DELETE "/v1/comfyui/workflow/$id"
step "cancel it" is 200 'reply["workflowId"] == id'

ask POST /v1/comfyui/workflow "${json[@]}" --header 'Prefer: wait=60' --data "$picture"
step "a picture, waited for" is 200 'reply["status"] == "completed" and reply["progress"] == 100 and reply["outputs"]'
id="$(value workflowId)"

ask GET "/v1/comfyui/workflow/$id/outputs/0"
step "its file is a PNG" eval '[[ "$status" == 200 ]] && head -c 4 "$body" | grep -aq PNG'

ask GET /v1/comfyui/models
step "models" is 200 'isinstance(reply["models"], list)'

ask GET "/v1/comfyui/outputs?limit=5"
step "outputs" is 200 'isinstance(reply["outputs"], list)'

ask POST /v1/comfyui/stream/ticket
step "a ticket for the stream" is 200 'reply["ticket"] and reply["expiresAt"] > 0'

ask GET /metrics
step "metrics" contains '^comfyui_'

ask_without_key GET /docs
step "the documentation, without key or redirect" contains '<html'

if ((failed)); then
    echo "$failed of the steps failed" >&2
    exit 1
fi
echo "All is well"
