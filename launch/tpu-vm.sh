#!/bin/bash
# A study on a Cloud TPU slice, by gcloud: the same command on every host.
#
#   ZONE=us-west4-a TPU=v5litepod-16 bash launch/tpu-vm.sh NAME gs://BUCKET/runs/mnist \
#       --config=configs/mnist.py:paper --config.runs=96 --config.runs_at_once=96
#
# Makes the slice NAME if there is none, copies the files that git knows to its hosts, and runs. Results land in the
# bucket. Where a spot slice is taken back, it is made anew and the run goes on from its last checkpoint; a mistake in
# the command or a bug ends it. The slice stays until it is deleted: gcloud compute tpus tpu-vm delete NAME --zone=ZONE.
set -u
name=$1 workdir=$2
shift 2
asked=$(printf '%q ' "--workdir=$workdir" "$@")  # quoted for the hosts' shells
installed=
zone=${ZONE:?set ZONE, such as us-west4-a}
kind=${TPU:-v5litepod-16}
case "$kind" in  # the image of each generation
  v5lite*) image=v2-alpha-tpuv5-lite ;;
  v5p*) image=v2-alpha-tpuv5 ;;
  v6e*) image=v2-alpha-tpuv6e ;;
  *) image=tpu-ubuntu2204-base ;;
esac
failed=0  # installations in a row
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git ls-files -z | tar --create --null --files-from=- --file="$folder/sublim_jax.tar" || exit 2
tpu() { gcloud compute tpus tpu-vm "$@" --zone="$zone"; }
state() { tpu describe "$name" --format="value(state)" 2>/dev/null; }

while true; do
  found=$(state)
  if [ "$found" != READY ]; then
    installed=
    [ -z "$found" ] || tpu delete "$name" --quiet
    tpu create "$name" --accelerator-type="$kind" --version="${VERSION:-$image}" --spot ||
      { sleep 60; continue; }  # there may be no spot slice at the moment
  fi
  if [ -z "$installed" ]; then
    # The image's own Python is 3.10, which is too old; uv brings another.
    tpu scp "$folder/sublim_jax.tar" "$name:" --worker=all &&
      tpu ssh "$name" --worker=all --command="mkdir -p sublim_jax && tar xf sublim_jax.tar -C sublim_jax && \
      cd sublim_jax && pip install --quiet uv && \
      python3 -m uv venv --clear --python 3.12 .venv && python3 -m uv pip install --quiet --editable '.[tpu,gcs]'" ||
      {
        failed=$((failed + 1))
        [ "$failed" -lt 5 ] || exit 1
        sleep 60
        continue
      }
    installed=yes failed=0
  fi
  tpu ssh "$name" --worker=all --command="cd sublim_jax && .venv/bin/python launch.py $asked"
  code=$?
  # 0: done. 2: a mistake in what was asked. 1: a bug, or gcloud found no slice. Everything else may be a slice that was
  # taken back.
  case "$code" in
    0 | 2) exit "$code" ;;
    1)
      sleep 60
      [ "$(state)" != READY ] || exit 1
      ;;
  esac
done
