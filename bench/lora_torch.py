"""The peer: LoRA steps of a language model with transformers and peft, as a good user would write them.

`python -m bench.lora_torch FOLDER STEPS` prints one JSON line: for steps on tokens and on a teacher's logits,
seconds a step (the median) and the losses.
"""

import json
import os
import statistics
import sys
import time

import peft
import torch
import transformers

ROWS, LENGTH, HALF = 8, 128, 64
SUPPORT = 40


def main(folder: str, steps: int) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = peft.LoraConfig(r=8, lora_alpha=8, target_modules=targets)
    model = peft.get_peft_model(base, adapter)
    model.add_adapter("teacher", adapter)
    model.set_adapter("default")
    measurements = {kind: measure(model, kind, steps) for kind in ("supervised", "distilled")}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(json.dumps({**measurements, "versions": versions}))


def measure(model: peft.PeftModel, kind: str, steps: int) -> dict[str, object]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    generator = torch.Generator().manual_seed(0)
    times, losses = [], []
    for _ in range(steps):
        tokens = torch.randint(0, 40_000, (ROWS, LENGTH + 1), generator=generator)
        began = time.perf_counter()
        optimizer.zero_grad()
        if kind == "distilled":
            model.set_adapter("teacher")
            with torch.no_grad():
                target = model(tokens[:, :-1], logits_to_keep=HALF).logits[..., :SUPPORT].log_softmax(-1)
            model.set_adapter("default")
        # Logits of the second half only: transformers' own argument for it.
        logits = model(tokens[:, :-1], logits_to_keep=HALF).logits
        if kind == "distilled":
            student = logits[..., :SUPPORT].log_softmax(-1)
            loss = torch.nn.functional.kl_div(student, target, log_target=True, reduction="sum") / (ROWS * HALF)
        else:
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, -HALF:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - began)
    return {"seconds": statistics.median(times[1:]), "first": times[0], "losses": losses}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
