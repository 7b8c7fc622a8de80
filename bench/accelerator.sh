#!/usr/bin/env bash
# All that is measured on one GPU, in under 540 seconds, in order of value. Needs no network.
#
#     [CARRY=DIR] bash bench/accelerator.sh OUT [--tiny]
#
# DIR is what bench/carry.sh gathered. Each part has a time limit of its own; one that fails, hangs or finds no GPU
# leaves a row that says so, and the others run. OUT gets each part's JSON as it is measured, status.tsv, logs.txt
# and at the end summary.md: eight files at most. --tiny shows on any machine that the parts run, not how fast.
# docs/bench-accelerator.md is written from OUT afterwards: python -m bench.accelerator --write=OUT
set -u
began=$SECONDS
[ $# -ge 1 ] || { echo "usage: bash bench/accelerator.sh OUT [--tiny]" >&2; exit 2; }
out=$1 tiny=${2:-}
if [ -n "$tiny" ] && [ "$tiny" != --tiny ]; then echo "bench/accelerator.sh: $tiny is not --tiny" >&2; exit 2; fi
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
rm -f "$out"/{mnist,mnist_torch,small,large,generate}.json "$out"/{status.tsv,logs.txt,summary.md}
. bench/carried.sh >>"$out/logs.txt" 2>&1
total=535

part() { # part NAME LIMIT COMMAND…: its output to logs.txt, how it ended to status.tsv
  local name=$1 limit=$2 start=$SECONDS left outcome log
  shift 2
  left=$((total - SECONDS + began))
  [ -z "$tiny" ] || left=$limit
  [ "$limit" -le "$left" ] || limit=$left
  if [ -z "$tiny" ] && ! gpu; then
    outcome="no GPU on this machine"
  elif [ "$limit" -lt 5 ]; then
    outcome="no time left"
  else
    log=$(mktemp)
    echo "=== $name: $*" >>"$out/logs.txt"
    timeout --kill-after=3 "$limit" "$@" >"$log" 2>&1
    case $? in
      0) outcome=done ;;
      124 | 137) outcome="stopped after $limit s" ;;
      *) outcome="failed: $(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c 1-200 | tr '\t' ' ')" ;;
    esac
    [ "$name" != gpu_tests ] || [ "$outcome" != done ] || outcome=$(grep -E '[0-9]+ (passed|skipped)' "$log" | tail -n 1)
    cat "$log" >>"$out/logs.txt"
    rm -f "$log"
  fi
  printf '%s\t%s\t%s\n' "$name" "$((SECONDS - start))" "$outcome" >>"$out/status.tsv"
  echo "$name: $outcome ($((SECONDS - start)) s, $((SECONDS - began)) s in all)"
}

measure() { part "$1" "$2" "$python" -m bench.accelerator --parts="$1" --out="$out" $tiny; }
limit() { if [ -n "$tiny" ]; then echo 300; else echo "$1"; fi; }

platforms=cuda,cpu
[ -z "$tiny" ] || platforms=cpu
part gpu_tests "$(limit 50)" env JAX_PLATFORMS=$platforms "$python" -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py tests/models/test_attention.py
measure mnist "$(limit 110)"
measure mnist_torch "$(limit 50)"
measure small "$(limit 140)"
measure large "$(limit 130)"
measure generate "$(limit 50)"
"$python" -m bench.accelerator_report "$out"
