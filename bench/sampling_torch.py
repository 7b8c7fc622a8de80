"""The peer: transformers' `generate`, batched, as a good user would write it.

`python -m bench.sampling_torch FOLDER PROMPTS TOKENS BATCH…` reads tokens of prompts (JSON lists), finds the batch size
that is fastest on the first 256, and prints one JSON line for all: seconds, useful tokens (up to the stop token).
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import transformers


def sample(
    model: transformers.GenerationMixin, prompts: list[list[int]], batch: int, tokens: int, stops: list[int]
) -> tuple[int, float]:
    """Useful tokens and seconds; prompts of like length together, padded on the left."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    useful, began = 0, time.perf_counter()
    for start in range(0, len(order), batch):
        rows = [prompts[i] for i in order[start : start + batch]]
        longest = max(map(len, rows))
        padded = torch.tensor([stops[:1] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            generated = model.generate(
                padded,
                attention_mask=mask,
                max_new_tokens=tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=stops[0],
                eos_token_id=stops,
            )[:, longest:]
        for row in generated.tolist():
            useful += next((number for number, token in enumerate(row, 1) if token in stops), len(row))
    return useful, time.perf_counter() - began


def main(folder: str, file: str, tokens: int, batches: list[int]) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    prompts = json.loads(Path(file).read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ends = model.config.eos_token_id
    stops = ends if isinstance(ends, list) else [ends]
    rates = {}
    for batch in batches:
        useful, seconds = sample(model, prompts[:256], batch, tokens, stops)
        rates[batch] = useful / seconds
    best = max(rates, key=lambda batch: rates[batch])
    useful, seconds = sample(model, prompts, best, tokens, stops)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(json.dumps({"useful": useful, "seconds": seconds, "batch": best, "rates": rates, "versions": versions}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), [int(batch) for batch in sys.argv[4:]])
