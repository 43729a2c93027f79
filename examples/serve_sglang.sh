#!/bin/sh
# SGLang with gemma_norm's kernels: the variable turns them on, without it the installed package does nothing.
# sh examples/serve_sglang.sh Qwen/Qwen3.5-4B [any other option of SGLang]
[ $# -gt 0 ] || { echo "usage: $0 MODEL [OPTIONS]" >&2; exit 2; }
model=$1
shift
GEMMA_NORM_SGLANG=1 exec python3 -m sglang.launch_server --model-path "$model" "$@"
