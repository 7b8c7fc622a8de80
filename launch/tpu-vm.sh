#!/bin/bash
# A study on a Cloud TPU slice, by gcloud: the same command on every host.
#
#   ZONE=us-west4-a TPU=v5litepod-16 bash launch/tpu-vm.sh NAME gs://BUCKET/runs/mnist --config=configs/mnist.py:paper
#
# Makes the slice NAME if there is none, copies this folder to its hosts, and runs. Results land in the bucket. Where a
# spot slice is taken back, it is made anew and the run goes on from its last checkpoint; a mistake in the command ends
# it. The slice stays until it is deleted: gcloud compute tpus tpu-vm delete NAME --zone=ZONE.
set -u
name=$1 workdir=$2
shift 2
zone=${ZONE:?set ZONE, such as us-west4-a}
kind=${TPU:-v5litepod-16}
tpu() { gcloud compute tpus tpu-vm "$@" --zone="$zone"; }

while true; do
  state=$(tpu describe "$name" --format="value(state)" 2>/dev/null)
  if [ "$state" != READY ]; then
    [ -z "$state" ] || tpu delete "$name" --quiet
    tpu create "$name" --accelerator-type="$kind" --version="${VERSION:-v2-alpha-tpuv5-lite}" --spot || { sleep 60; continue; }
    tpu scp --recurse . "$name:sublim_jax" --worker=all
    tpu ssh "$name" --worker=all --command="cd sublim_jax && pip install --quiet --editable '.[tpu,gcs]'"
  fi
  tpu ssh "$name" --worker=all --command="cd sublim_jax && python3 launch.py --workdir=$workdir $*"
  code=$?
  # 0: done. 2: a mistake in what was asked. Everything else may be a slice that was taken back.
  if [ "$code" = 0 ] || [ "$code" = 2 ]; then
    exit "$code"
  fi
done
