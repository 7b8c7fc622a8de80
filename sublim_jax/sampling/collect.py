"""Samples written to a file as they finish, so that an interrupted run resumes with the missing rows."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import SupportsIndex, Unpack

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Key

from sublim_jax import storage
from sublim_jax.data import records
from sublim_jax.data.records import Record
from sublim_jax.models.language import Model
from sublim_jax.progress import Track
from sublim_jax.sampling.checks import Tokens
from sublim_jax.sampling.generate import Options, stream
from sublim_jax.sampling.scheduler import Sample
from sublim_jax.sharding import check_same, from_first

PART_SECONDS = 10.0
# Fields of a record that the sample sets; the others are its prompt's.
SAMPLE_FIELDS = {"adapter", "index", "sample", "completion", "finish", "tokens", "logprob"}


def collect(
    file: epath.Path,
    model: Model,
    prompts: Sequence[Sequence[int]],
    key: Key[Array, "*adapters"],
    fields: Callable[[int], Record],
    *,
    what: str = "samples",
    samples: int = 1,
    max_new_tokens: SupportsIndex | Tokens = 64,
    **options: Unpack[Options],
) -> list[Record]:
    """Every sample of every prompt under every adapter as a record, in their order.

    Args:
      file: JSON lines of finished samples; it grows during the call. Records of another prompt, or of more prompts and
        samples than these, are ignored: a row's draws do not depend on how many others there are.
      fields: the fields of a prompt, by its number; they become part of its records.
      key, max_new_tokens, options: as for `generate.stream`.
    """
    stacked = 1 if options.get("adapters") is None else jax.tree.leaves(options["adapters"])[0].shape[0]
    known = [fields(number) for number in range(len(prompts))]
    read = [file.name, [list(map(int, prompt)) for prompt in prompts], known]
    check_same(hashlib.sha256(json.dumps(read).encode()).hexdigest(), f"what {file.name} answers")

    def wanted(record: Record) -> bool:
        if record["index"] >= len(prompts) or record["sample"] >= samples:
            return False
        about = known[record["index"]]
        return all(record.get(name) == about[name] for name in about.keys() - SAMPLE_FIELDS)

    every = filter(wanted, from_first(lambda: records.repair(file)))
    finished = {(record["adapter"], record["index"], record["sample"]): record for record in every}
    began, fresh, total = time.monotonic(), 0, stacked * len(prompts) * samples
    # In a bucket, a kill may lose the rows of some seconds; the same ones are sampled again.
    kept = storage.Growing(file, PART_SECONDS) if jax.process_index() == 0 else None
    with kept or nullcontext(), Track(what, total, len(finished)) as track:
        rows = stream(
            model, prompts, key, samples=samples, max_new_tokens=max_new_tokens, done=list(finished), **options
        )
        for sample in rows:
            record = record_of(sample, known[sample.prompt])
            finished[sample.row] = record
            fresh += len(sample.logprobs)
            if kept:
                kept.add(records.line(record))
            track.update(len(finished), f"{fresh / (time.monotonic() - began):.0f} tokens/s")
    return [finished[row] for row in sorted(finished)]


def record_of(sample: Sample, fields: Record) -> Record:
    return {
        **fields,
        "adapter": sample.adapter,
        "index": sample.prompt,
        "sample": sample.sample,
        "completion": sample.text,
        "finish": sample.finish,
        "tokens": sample.tokens,
        "logprob": round(float(np.sum(sample.logprobs[: len(sample.tokens)])), 4),  # of these tokens
    }
