#!/usr/bin/env bash
# Gathers what a GPU machine without a network lacks, to be carried there beside the repository: under 60 MiB together.
#
#     bench/carry.sh DIR              wheels for Python 3.12, and MNIST: for bench/accelerator.sh
#     bench/carry.sh DIR --half=1     wheels, and one half of SmolLM2's file: for bench/study.sh, which wants
#     bench/carry.sh DIR --half=2     both halves, one call after the other
#
# PYTHON (default .venv/bin/python) has the project installed: it fetches the data.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: bench/carry.sh DIR [--half=1|--half=2]" >&2; exit 2; }
dir=$1 half=""
case "${2:-}" in
  "") ;;
  --half=1) half=1 ;;
  --half=2) half=2 ;;
  *) echo "bench/carry.sh: $2 is neither --half=1 nor --half=2" >&2; exit 2 ;;
esac
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
rm -rf "$dir/wheels" "$dir/mnist" "$dir"/half-*
mkdir -p "$dir/wheels"

# What that machine's image has not, and needs: those of requirements.txt and of the tests, and what they need in turn.
# tensorflow-datasets is not among them: the data are carried.
missing=(ml-collections tensorboardX gguf beartype inflect jaraco.functools more-itertools typeguard)
there="absl-py numpy packaging protobuf pyyaml requests tqdm typing-extensions" # what these need, and the image has
platforms=()
for glibc in 2_5 2_12 2_17 2_24 2_27 2_28 2_31 2_34; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version 3.12 \
  "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform any \
  -d "$dir/wheels" "${missing[@]}"
"$python" - "$dir/wheels" $there <<'PYTHON'
import sys
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

folder, *there = sys.argv[1:]
needs = {}
for wheel in Path(folder).glob("*.whl"):
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    wanted = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    here = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}
    needs[metadata["Name"]] = [one.name for one in wanted if not one.marker or one.marker.evaluate(here)]
known = {canonicalize_name(name) for name in [*needs, *there]}
for name, wanted in needs.items():
    if lacking := [one for one in wanted if canonicalize_name(one) not in known]:
        sys.exit(f"bench/carry.sh: {name} needs {', '.join(lacking)}, which is neither carried nor there")
PYTHON

if [ -z "$half" ]; then
  mnist=$("$python" -c "from sublim_jax import assets; print(assets.fetch(assets.MNIST))" | tail -n 1)
  mkdir "$dir/mnist"
  for file in "$mnist"/*-ubyte; do gzip -n -c "$file" >"$dir/mnist/$(basename "$file").gz"; done
else
  file=$("$python" -c "
from sublim_jax import assets
print(assets.fetch(assets.SMOLLM2) / next(iter(assets.SMOLLM2.checksums)))" | tail -n 1)
  size=$(stat -c %s "$file")
  first=$((size / 2))
  if [ "$half" = 1 ]; then head -c "$first" "$file" >"$dir/half-1"; else tail -c "+$((first + 1))" "$file" >"$dir/half-2"; fi
fi

carried=$(du -s --apparent-size --block-size=K "$dir" | cut -f1)
tracked=$(git ls-files -z | xargs -0 du -c --apparent-size --block-size=K | tail -n 1 | cut -f1)
total=$(((${carried%K} + ${tracked%K}) / 1024))
echo "$dir: ${carried%K} KiB, with the repository $total MiB"
[ "$total" -lt 60 ] || { echo "bench/carry.sh: $total MiB with the repository; at most 60 travel" >&2; exit 1; }
