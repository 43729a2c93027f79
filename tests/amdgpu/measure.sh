#!/bin/sh
# For owners of an AMD GPU: checks and times this checkout, and what only hardware decides, into one file, report.txt.
# Run it in a checkout, in an environment with a ROCm build of PyTorch and this package installed (docs/amd.md).
cd "$(dirname "$0")/../.." || exit

python - <<'END' || exit
import sys

try:
    import torch

    import gemma_norm
except ImportError as error:
    sys.exit(f"measure.sh: {error}; docs/amd.md says how to install PyTorch for ROCm and this package")
if not torch.version.hip:
    sys.exit(f"measure.sh: PyTorch {torch.__version__} is not a ROCm build; docs/amd.md says how to install one")
if not torch.cuda.is_available():
    sys.exit("measure.sh: PyTorch finds no AMD GPU; rocminfo and /dev/kfd's permissions may say why")
END

failed=0

# Runs a command; if it fails, the report says so, and what follows is run all the same.
run() {
  echo "== $*"
  "$@" && return
  echo "== failed with status $?: $*"
  failed=$((failed + 1))
}

benchmark() {
  echo "== benchmark: $1"
  shift
  run env "$@" python -m gemma_norm.benchmark --suite forward,decode,qk,gated,backward --dtype bfloat16 --quick
}

# Of the last commit, a second copy whose stores are ordinary ones.
build_plain_stores() (
  copy=build/plain-stores
  rm -rf $copy && mkdir -p $copy && git archive HEAD | tar -x -C $copy && cd $copy || exit
  sed -i 's/__builtin_nontemporal_store(\(.*\), (\(Global[A-Za-z0-9]*\)\*)p);/*(\2*)p = \1;/' csrc/device/hip.h
  if grep -q __builtin_nontemporal_store csrc/device/hip.h; then
    echo 'the stores could not be replaced'
    exit 1
  fi
  pip install -q --no-build-isolation --no-deps --target site .
)

{
  date -u
  git log -1 --format='%H %s'
  rocminfo 2>/dev/null | grep -E 'Marketing Name|Compute Unit|Max Clock' | sort | uniq -c
  run python -m gemma_norm
  run python -m pytest -q tests/python
  run python -m gemma_norm.benchmark
  benchmark "as it is"
  benchmark "kernel arguments in device memory" HIP_FORCE_DEV_KERNARG=1
  benchmark "kernel arguments in host memory" HIP_FORCE_DEV_KERNARG=0
  run build_plain_stores
  [ -d build/plain-stores/site ] && benchmark "plain stores" PYTHONPATH="$PWD/build/plain-stores/site"
  benchmark "as it is, again"
  echo "== done; steps that failed: $failed"
} 2>&1 | tee report.txt
