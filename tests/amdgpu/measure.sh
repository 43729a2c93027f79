#!/bin/sh
# For owners of an AMD GPU: checks and times this checkout, and what only hardware decides, into one file, report.txt.
# Run it in a checkout, in an environment with a ROCm build of PyTorch and this package installed (docs/amd.md).
cd "$(dirname "$0")/../.." || exit

benchmark() {
  echo "== benchmark: $1"
  shift
  env "$@" python -m gemma_norm.benchmark --suite forward,decode,qk,gated,backward --dtype bfloat16 --quick
}

plain_stores() (
  copy=build/plain-stores
  rm -rf $copy && mkdir -p $copy && git archive HEAD | tar -x -C $copy && cd $copy || exit
  sed -i 's/__builtin_nontemporal_store(\(.*\), (\(Global[A-Za-z0-9]*\)\*)p);/*(\2*)p = \1;/' csrc/device/hip.h
  grep -q __builtin_nontemporal_store csrc/device/hip.h && echo 'the stores could not be replaced' && exit
  pip install -q --no-build-isolation --no-deps --target site . && benchmark "plain stores" PYTHONPATH="$PWD/site"
)

{
  date -u
  git log -1 --format='%H %s'
  rocminfo 2>/dev/null | grep -E 'Marketing Name|Compute Unit|Max Clock' | sort | uniq -c
  python -m gemma_norm
  python -m pytest -q tests/python
  python -m gemma_norm.benchmark
  benchmark "as it is"
  benchmark "kernel arguments in device memory" HIP_FORCE_DEV_KERNARG=1
  benchmark "kernel arguments in host memory" HIP_FORCE_DEV_KERNARG=0
  plain_stores
  benchmark "as it is, again"
} 2>&1 | tee report.txt
