"""Samples from an open language model: prompts in, completions out.

    python launch.py --config=configs/sample.py --config.prompts=FILE [--workdir=DIR]

FILE is JSON lines (.jsonl, .ndjson, .json), Parquet (.parquet), or else plain text with one prompt a line. A JSON
object or Parquet row has "prompt" (a text) or "messages" (a conversation: [{"role": …, "content": …}], whose content
may be OpenAI's list of text parts). Completions are written to DIR/samples.jsonl, in the order of the prompts. Until
all are finished they are kept in DIR/checkpoints/samples-….jsonl, from which the same command resumes.
"""

from ml_collections import ConfigDict

PRESETS = {
    "smollm2": "SmolLM2-135M-Instruct, on a laptop",
    "gpu": "bfloat16 and more rows at once, for one GPU",
    "qwen2.5-7b": "Qwen2.5-7B-Instruct on a v5e:4x4, which needs 5.0 of 16 GiB a chip; try --preflight=v5e:4x4",
}


def get_config(preset: str = "smollm2") -> ConfigDict:
    config = ConfigDict()
    config.experiment = "sample"
    config.preset = preset
    config.seed = 0  # of every random number
    # Precision of products of float32 numbers on accelerators: float32; or tensorfloat32 or bfloat16, which are faster.
    # Weights in bfloat16 are multiplied in bfloat16 in any case.
    config.precision = "float32"
    config.mesh = ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1})  # rows over replica and fsdp, layers over tensor

    config.model = ConfigDict()
    config.model.name = "smollm2-135m-instruct"  # a known name, a hub name, a folder of safetensors, a GGUF file
    config.model.dtype = "float32"  # of the weights; or bfloat16
    config.model.adapter = ""  # a PEFT folder; empty: none

    config.prompts = ""  # the file of prompts: JSONL, Parquet or text
    config.chat = True  # apply the model's chat template to prompts; False for base models
    config.system = ""  # a system prompt for conversations that have none; empty: the template's own

    config.num_samples = 1  # of each prompt
    config.max_new_tokens = 64  # of a completion
    config.temperature = 1.0  # 0: the most probable token
    config.top_k = 0  # sample from this many most probable tokens; 0: from all
    config.top_p = 1.0  # sample from the most probable tokens with this total probability
    config.min_p = 0.0  # sample from tokens with at least this probability, relative to the most probable one
    config.stop_strings = ()  # a completion ends before the first of them

    config.constraint = ConfigDict()
    config.constraint.kind = ""  # numbers: completions are lists of integers; choice: one of `choices`; empty: any text
    config.constraint.max_integers = 10  # numbers: maximum number of integers
    config.constraint.digits = 3  # numbers: maximum number of digits of each
    config.constraint.separator = ", "  # numbers: between two integers
    config.constraint.choices = ()  # choice: the texts

    config.slots = 64  # rows decoded together on each device; they determine the memory of the cache
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
