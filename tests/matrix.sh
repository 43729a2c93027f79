#!/usr/bin/env bash
# One wheel on several Pythons and versions of PyTorch: tests/matrix.sh [python:torch ...], e.g. 3.10:2.10.0 3.12:newest.
# Each pair gets an empty environment in build/matrix, with the wheel and no source. There the wheel must check itself
# (python -m gemma_norm), and the tests that need little else must pass. A Python that this machine lacks is said to be
# left out. The wheel is $WHEEL, or built here, by $PYTHON, for the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$PWD/build/matrix
pairs=("$@")
[ $# -gt 0 ] || pairs=(3.10:2.10.0 3.11:2.11.0 3.11:2.13.0 3.12:newest 3.13:newest 3.14:newest)
tests=(test_fuzz.py test_bad_input.py test_transforms.py test_autograd.py)
mkdir -p "$folder"

if [ -z "${WHEEL:-}" ]; then
  rm -f "$folder"/*.whl
  GEMMA_NORM_BACKENDS=cpu "${PYTHON:-python3}" -m pip wheel -q --no-build-isolation --no-deps -w "$folder" .
  WHEEL=$(echo "$folder"/*.whl)
fi

# The interpreter of that version, on the PATH or of pyenv. One that does not start is no interpreter: pyenv puts such
# scripts on the PATH for the versions that are not active.
interpreter() {
  local python
  for python in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
    if "$python" -c '' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
}

pytest=(-q -p no:cacheprovider)
failed=0
for pair in "${pairs[@]}"; do
  python=$(interpreter "${pair%%:*}")
  torch=${pair##*:}
  if [ -z "$python" ]; then
    echo "$pair: left out, there is no Python ${pair%%:*} here"
    continue
  fi
  venv=$folder/${pair/:/-} log=$folder/${pair/:/-}.log  # no venv may have a colon in its path
  if [ "$torch" = newest ]; then torch=torch; else torch=torch==$torch; fi
  rm -rf "$venv"
  if {
    "$python" -m venv "$venv" &&
      "$venv/bin/python" -m pip install -q --only-binary :all: "$torch" numpy pytest hypothesis &&
      "$venv/bin/python" -m pip install -q --no-deps --no-index "$WHEEL" &&
      cd "$folder" &&
      "$venv/bin/python" -m gemma_norm &&
      "$venv/bin/python" -m pytest "${pytest[@]}" "${tests[@]/#/$OLDPWD/tests/python/}"
  } >"$log" 2>&1 </dev/null; then
    cd "$folder/../.."
    echo "$pair: ok, $("$venv/bin/python" -c 'import torch; print("PyTorch", torch.__version__)')"
  else
    cd "$folder/../.."
    failed=1
    echo "$pair: FAILED, the end of $log:"
    tail -n 15 "$log"
  fi
  rm -rf "$venv"  # some gigabytes
done
exit $failed
