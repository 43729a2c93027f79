#!/bin/sh
# Runs a compiler and keeps what it says, such as ptxas' report, in a file beside the object: keep_report.sh nvcc ... -o x.o ...
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
