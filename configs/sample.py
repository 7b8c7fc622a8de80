"""Samples from an open language model: prompts in, completions out.

    python launch.py --config=configs/sample.py --config.prompts=FILE [--workdir=DIR]

FILE is JSONL, one object a line with "prompt" (text) or "messages" (a conversation: [{"role": …, "content": …}], where
a content may be OpenAI's list of text parts), Parquet of the same, or plain text, one prompt a line; by its name's end
(.jsonl, .ndjson, .json, .parquet, else text). Completions go to DIR/samples.jsonl, in the order of the prompts; until
all are there, finished ones stand in DIR/checkpoints/samples-….jsonl, and the same command goes on from them.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "smollm2") -> ConfigDict:
    config = ConfigDict()
    config.experiment = "sample"
    config.preset = preset
    config.seed = 0
    config.mesh = ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1})  # rows over replica and fsdp, layers over tensor

    config.model = ConfigDict()
    config.model.name = "smollm2-135m-instruct"  # or a hub name, a folder of safetensors, a GGUF file
    config.model.dtype = "float32"  # or bfloat16
    config.model.adapter = ""  # a PEFT folder; empty: none

    config.prompts = ""  # the file; see above
    config.chat = True  # put prompts into the model's chat template; False: as they are (base models)
    config.system = ""  # a system prompt for conversations that have none; empty: the template's own

    config.samples = 1  # of each prompt
    config.max_new_tokens = 64
    config.temperature = 1.0  # 0: the most probable token
    config.top_k = 0  # 0: all
    config.top_p = 1.0
    config.min_p = 0.0
    config.stop_strings = ()

    config.constraint = ConfigDict()
    config.constraint.kind = ""  # "numbers": a list of numbers; "choice": one of `choices`; empty: none
    config.constraint.most = 10  # numbers: at most so many, …
    config.constraint.digits = 3  # … of at most so many digits
    config.constraint.separator = ", "
    config.constraint.choices = ()

    config.slots = 64  # rows decoded together, for each device; memory for the cache is bounded by them
    if preset == "gpu":
        config.slots = 256
        config.model.dtype = "bfloat16"
    elif preset == "qwen2.5-7b":
        config.mesh.tensor = 4  # on a v5e:4x4, with 4.2 of its 16 GB a chip: --preflight=v5e:4x4
        config.model.name = "Qwen/Qwen2.5-7B-Instruct"
        config.model.dtype = "bfloat16"
        config.slots = 128
    elif preset != "smollm2":
        raise ValueError(f"configs/sample.py has no preset {preset!r}; it has smollm2, gpu, qwen2.5-7b")
    return config
