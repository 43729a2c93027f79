#!/bin/sh
# Runs nvcc, has ptxas report on each kernel, and keeps the report in a file beside the object: keep_report.sh nvcc ... -o x.o
# The option is in the environment, since setup.py's build has it there too if a report is wanted. ccache keeps objects with
# their reports and those without apart.
export NVCC_APPEND_FLAGS="-Xptxas=-v"
object=
previous=
for argument in "$@"; do
  if [ "$previous" = -o ]; then object=$argument; fi
  previous=$argument
done
if [ -z "$object" ]; then exec "$@"; fi
"$@" 2>"$object.report"
status=$?
grep -v '^ptxas info' "$object.report" | grep -v '^ *[0-9]* bytes stack frame' >&2
exit $status
