"""The peer: transformers' `generate` of a Qwen2 of given shape, random weights in bfloat16, on a GPU if there is one.

`python -m bench.generate_torch SHAPE` (a JSON object; see bench/accelerator.py) prints one JSON line.
"""

import json
import sys
import time

import torch
import transformers


def main(shape: dict[str, int]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.Qwen2Config(
        vocab_size=shape["vocab"],
        hidden_size=shape["width"],
        intermediate_size=shape["mlp_width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["key_heads"],
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    config.head_dim = shape["head_size"]
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    prompts = torch.randint(0, 1000, (shape["batch"], shape["tokens"]), device=device)
    times = []
    for _ in range(2):  # the first loads kernels
        began = time.perf_counter()
        with torch.inference_mode():
            generated = model.generate(prompts, max_new_tokens=shape["tokens"], do_sample=True, top_k=0, pad_token_id=0)
        generated = generated[:, shape["tokens"] :].cpu()
        times.append(time.perf_counter() - began)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    rate = generated.numel() / times[-1]
    print(json.dumps({"seconds": times[-1], "tokens_per_second": rate, "versions": versions}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
