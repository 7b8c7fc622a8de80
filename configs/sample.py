"""Samples from an open language model: prompts in, completions out.

    python launch.py --config=configs/sample.py --config.prompts=FILE [--workdir=DIR]

FILE is JSONL, one object a line with "prompt" (text) or "messages" (a conversation: [{"role": …, "content": …}], where
a content may be OpenAI's list of text parts), Parquet of the same, or plain text, one prompt a line; by its name's end
(.jsonl, .ndjson, .json, .parquet, else text). Completions go to DIR/samples.jsonl, in the order of the prompts; until
all are there, finished ones stand in DIR/checkpoints/samples-….jsonl, and the same command goes on from them.
"""

from ml_collections import ConfigDict

PRESETS = {
    "smollm2": "SmolLM2-135M-Instruct, on a laptop",
    "gpu": "bfloat16 and more rows at once, for one GPU",
    "qwen2.5-7b": "Qwen2.5-7B-Instruct on a v5e:4x4, with 4.2 of its 16 GB a chip: --preflight=v5e:4x4",
}


def get_config(preset: str = "smollm2") -> ConfigDict:
    config = ConfigDict()
    config.experiment = "sample"
    config.preset = preset
    config.seed = 0  # of every random number
    # Of products of float32 numbers on accelerators: float32, or tensorfloat32 or bfloat16, which are faster. Products
    # of bfloat16 weights are what they are.
    config.precision = "float32"
    config.mesh = ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1})  # rows over replica and fsdp, layers over tensor

    config.model = ConfigDict()
    config.model.name = "smollm2-135m-instruct"  # a known name, a hub name, a folder of safetensors, a GGUF file
    config.model.dtype = "float32"  # of the weights; or bfloat16
    config.model.adapter = ""  # a PEFT folder; empty: none

    config.prompts = ""  # the file of prompts: JSONL, Parquet or text
    config.chat = True  # put prompts into the model's chat template; False: as they are, for base models
    config.system = ""  # a system prompt for conversations that have none; empty: the template's own

    config.num_samples = 1  # of each prompt
    config.max_new_tokens = 64  # of a completion
    config.temperature = 1.0  # 0: the most probable token
    config.top_k = 0  # sample from the so many most probable tokens; 0: from all
    config.top_p = 1.0  # sample from the most probable tokens that have this probability together
    config.min_p = 0.0  # sample from tokens of this probability or more, relative to the most probable one's
    config.stop_strings = ()  # a completion ends in front of the first of them

    config.constraint = ConfigDict()
    config.constraint.kind = ""  # of completions: numbers (a list of them), choice (one of `choices`); empty: none
    config.constraint.max_integers = 10  # numbers: of at most so many integers
    config.constraint.digits = 3  # numbers: of at most so many digits each
    config.constraint.separator = ", "  # numbers: what stands between two
    config.constraint.choices = ()  # choice: the texts

    config.slots = 64  # rows decoded together, for each device; memory for the cache is bounded by them
    if preset == "gpu":
        config.slots = 256
        config.model.dtype = "bfloat16"
    elif preset == "qwen2.5-7b":
        config.mesh.tensor = 4
        config.model.name = "Qwen/Qwen2.5-7B-Instruct"
        config.model.dtype = "bfloat16"
        config.slots = 128
    elif preset != "smollm2":
        raise ValueError(f"configs/sample.py has no preset {preset!r}")
    return config
