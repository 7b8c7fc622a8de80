# Sourced by bench/accelerator.sh and bench/study.sh: unpacks what bench/carry.sh gathered in $CARRY. Nothing here stops
# the script; what is missing shows where it is needed.
#
# Sets python (PYTHON, or .venv's, or python3), and in the environment PYTHONPATH, SUBLIM_JAX_CACHE.
CARRIED=${CARRIED:-/tmp/sublim_jax-carried} # where it is unpacked, outlasting a script
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=$PWD/.venv/bin/python
if [ -n "${CARRY:-}" ]; then
  mkdir -p "$CARRIED/site" "$CARRIED/cache"
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$CARRIED/site" "$CARRY"/wheels/*.whl || echo "wheels of $CARRY could not be installed"
  export PYTHONPATH=$CARRIED/site${PYTHONPATH:+:$PYTHONPATH} SUBLIM_JAX_CACHE=$CARRIED/cache
  if [ -d "$CARRY/mnist" ]; then
    mkdir -p "$CARRIED/cache/mnist"
    for file in "$CARRY"/mnist/*.gz; do gunzip -c "$file" >"$CARRIED/cache/mnist/$(basename "$file" .gz)"; done
  fi
  for half in 1 2; do [ ! -f "$CARRY/half-$half" ] || cp "$CARRY/half-$half" "$CARRIED/"; done
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.93} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

gpu() { [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; }
