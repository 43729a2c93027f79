#!/bin/sh
# vLLM with gemma_norm's kernels: the variable turns them on, without it the installed package does nothing. Mode none
# is CUDA graphs without Inductor, which would rather see the norms' formula; GEMMA_NORM_VLLM=inductor needs no mode.
# sh examples/serve_vllm.sh Qwen/Qwen3.5-4B [any other option of vLLM]
[ $# -gt 0 ] || { echo "usage: $0 MODEL [OPTIONS]" >&2; exit 2; }
model=$1
shift
GEMMA_NORM_VLLM=1 exec vllm serve "$model" -cc.mode=none "$@"
