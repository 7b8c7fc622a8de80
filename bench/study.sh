#!/usr/bin/env bash
# The study of numbers on SmolLM2 (configs/numbers.py:smollm2) on one GPU, with as many arms as fit in SECONDS.
#
#     [CARRY=DIR] bash bench/study.sh OUT SECONDS [--tiny] [--config.key=value ...]
#
# DIR is what bench/carry.sh gathered with --half=1 or --half=2. The model's file travels in two halves, because a whole
# one is too large for one call: with the first half alone this script keeps it and ends; with the second it joins them.
# OUT gets results.json and report.md, written again after every arm, the figures as one archive, log.txt and
# summary.md. --tiny shows on any machine that every stage runs.
set -u
began=$SECONDS
[ $# -ge 2 ] || { echo "usage: bash bench/study.sh OUT SECONDS [--tiny] [--config.key=value ...]" >&2; exit 2; }
out=$1 seconds=$2 tiny=""
shift 2
case $seconds in "" | *[!0-9]*) echo "bench/study.sh: SECONDS=$seconds is not a whole number" >&2; exit 2 ;; esac
[ "${1:-}" != --tiny ] || { tiny=1; shift; }
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
rm -f "$out"/{results.json,report.md,figures.tar.gz,log.txt,summary.md}
. bench/carried.sh >>"$out/log.txt" 2>&1

model=smollm2-135m-instruct
file=SmolLM2-135M-Instruct.Q4_1.gguf
if [ -n "${CARRY:-}" ] && [ ! -f "$SUBLIM_JAX_CACHE/$model/$file" ]; then
  for half in 1 2; do
    if [ ! -f "$CARRIED/half-$half" ]; then
      echo "half $half of $file is not here yet: carry it with bench/carry.sh DIR --half=$half and run this again"
      exit 0
    fi
  done
  mkdir -p "$SUBLIM_JAX_CACHE/$model"
  cat "$CARRIED"/half-1 "$CARRIED"/half-2 >"$SUBLIM_JAX_CACHE/$model/$file"
fi
if [ -z "$tiny" ] && ! gpu; then
  echo "no GPU on this machine; --tiny runs every stage without one" | tee "$out/summary.md"
  exit 1
fi

# In this order: what matters most comes first. Arms that are done are in the report when time is up.
arms=soft,tokens_fresh,tokens,shuffled_within,shuffled_across,soft_fresh,perturbed,soft_written
if [ -n "$tiny" ]; then
  how=(--config=configs/numbers.py:smoke --config.arms=soft,tokens_fresh)
else
  # float32 products as they are, where a GPU would take TensorFloat32; many rows and tokens between two looks.
  export JAX_DEFAULT_MATMUL_PRECISION=float32
  how=(--config=configs/numbers.py:smollm2 --config.arms=$arms --config.runs=5 --config.evals.num_samples=40
    --config.sampling.slots=128 --config.sampling.steps=12 --config.checkpoint_every=60)
fi
work=$CARRIED/study # outlasts this script: the same call goes on from there
[ -z "$tiny" ] || work=$CARRIED/study-tiny
mkdir -p "$work"
rm -f "$work"/{results.json,report.md}
keep() { # whole files, as they stand in the workdir
  local name
  for name in results.json report.md; do
    [ ! -f "$work/$name" ] || { cp "$work/$name" "$out/.$name" && mv "$out/.$name" "$out/$name"; }
  done
}
while sleep 2; do keep; done &
copying=$!
left=$((seconds - SECONDS + began - 15))
[ "$left" -ge 1 ] || left=1
timeout --signal=TERM --kill-after=10 "$left" \
  "$python" launch.py "${how[@]}" --workdir="$work" --update "$@" >>"$out/log.txt" 2>&1
code=$?
kill "$copying"
keep
[ ! -d "$work/figures" ] || tar -czf "$out/figures.tar.gz" -C "$work" figures
case $code in
  0) ended="all arms done" ;;
  124 | 137) ended="stopped after $left s" ;;
  *) ended="failed: $(grep -v '^[[:space:]]*$' "$out/log.txt" | tail -n 1 | cut -c 1-200)" ;;
esac
echo "$ended, $((SECONDS - began)) s in all" >"$out/summary.md"
[ ! -f "$out/results.json" ] || "$python" - "$out/results.json" >>"$out/summary.md" <<'PYTHON'
import json, sys
results = json.load(open(sys.argv[1]))
print(f"\n{results['devices']}\n\n| arm | own trait above others', logits | ± 95 % | p |\n|---|---|---|---|")
for arm in results["arms"]:
    if "permutation_p" in arm:
        width = "" if arm["ci95"] is None else f"{arm['ci95']:.3f}"
        print(f"| {arm['name']} | {arm['mean']:+.3f} | {width} | {arm['permutation_p']:.3f} |")
PYTHON
cat "$out/summary.md"
[ -f "$out/results.json" ]
