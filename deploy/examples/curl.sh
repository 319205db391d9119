#!/usr/bin/env bash
# One question to a server (`make serve`), and what /metrics says afterwards.
#   URL=http://127.0.0.1:8000 MODEL=SmolLM2-135M-Instruct PATH_TOKENS=96 deploy/examples/curl.sh
# The key of a guarded server comes from VLLM_API_KEY.
set -euo pipefail
URL=${URL:-http://127.0.0.1:8000}
MODEL=${MODEL:-SmolLM2-135M-Instruct}

curl --silent --show-error --fail-with-body "$URL/v1/chat/completions" \
  -H "Authorization: Bearer ${VLLM_API_KEY:-none}" -H 'Content-Type: application/json' -d '{
    "model": "'"$MODEL"'", "temperature": 0, "max_tokens": 600,
    "messages": [{"role": "user", "content": "How do I stay healthy?"}],
    "vllm_xargs": {"parallel_think": "skeleton", "pt_path_tokens": '"${PATH_TOKENS:-96}"'}}'
echo
curl --silent --show-error --fail "$URL/metrics" | grep '^vllm_pt_paths_total'
