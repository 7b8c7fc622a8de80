"""The peer: llama.cpp (xllamacpp), its server's own slots and continuous batching, float32 weights.

`python -m bench.sampling_llama GGUF PROMPTS TOKENS SLOTS` writes the file's weights out as float32, and prints one JSON
line: the texts, and seconds.
"""

import importlib.metadata
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
import xllamacpp


def as_float32(source: str, target: str) -> None:
    """The same model with every tensor dequantised."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(source: str, file: str, tokens: int, slots: int) -> None:
    prompts = json.loads(Path(file).read_text())
    with tempfile.TemporaryDirectory() as folder:
        whole = str(Path(folder) / "model.gguf")
        as_float32(source, whole)
        params = xllamacpp.CommonParams()
        params.model.path = whole
        params.n_parallel = slots
        params.n_ctx = slots * 192
        params.n_batch = params.n_ubatch = 512
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
        params.cont_batching = True
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.warmup = True
        server = xllamacpp.Server(params)
        request: dict[str, object] = {
            "n_predict": tokens,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "seed": -1,  # drawn for each row: one number for all would draw them alike
        }
        request |= {"repeat_penalty": 1.0, "samplers": ["temperature"], "cache_prompt": True}

        def run(part: list[str]) -> tuple[list[tuple[str, str]], float]:
            began = time.perf_counter()
            choices = server.handle_completions({**request, "prompt": part})["choices"]
            assert len(choices) == len(part)
            return [(row["text"], row["finish_reason"]) for row in choices], time.perf_counter() - began

        run(prompts[:2])
        completions, seconds = run(prompts)
    versions = f"xllamacpp {importlib.metadata.version('xllamacpp')}"
    print(json.dumps({"found": completions, "seconds": seconds, "slots": slots, "versions": versions}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
