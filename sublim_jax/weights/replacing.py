"""Replaces the checkpoint of a folder."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from etils import epath

from sublim_jax import storage
from sublim_jax.errors import UserError
from sublim_jax.weights.config_fields import read_json

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
HEADS = (INDEX, WHOLE)  # the files that readers start from
WEIGHTS = re.compile(
    r"model.*\.safetensors(\.index\.json)?|consolidated.*\.safetensors(\.index\.json)?"
    r"|pytorch_model.*\.bin(\.index\.json)?|tf_model.*\.h5|flax_model.*\.msgpack"
)
SETTINGS = ("generation_config.json",)  # of the old checkpoint: its stop tokens, which ours has in config.json
TOKENIZER = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)


@contextmanager
def replaced(folder: epath.Path) -> Iterator[Path]:
    """A local folder to write a checkpoint into, which replaces the one in `folder` when the block ends.

    Until then nothing in `folder` changes. The file that readers start from is removed first and written last, so that
    an interruption leaves the old checkpoint, the new one or none, never a mixture. The old tokenizer's files go where
    there is a new one. Other files stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    away = storage.in_bucket(folder)
    with TemporaryDirectory(dir=None if away else folder, prefix=".saving-") as scratch:
        yield Path(scratch)
        files = (path for path in Path(scratch).rglob("*") if path.is_file())
        new = sorted((path.relative_to(scratch).as_posix() for path in files), key=lambda name: (name in HEADS, name))
        outdated = (*SETTINGS, *TOKENIZER) if TOKENIZER[0] in new else SETTINGS
        old = [path for path in (folder.iterdir() if folder.exists() else ()) if WEIGHTS.fullmatch(path.name)]
        for path in sorted(old, key=lambda path: path.name not in HEADS):
            if path.name not in new or path.name in HEADS:
                path.unlink()
        for path in (folder / name for name in outdated if name not in new):
            if path.is_dir():
                path.rmtree()
            else:
                path.unlink(missing_ok=True)
        for name in new:
            if away:
                storage.bucket_of(str(folder)).put_file(f"{scratch}/{name}", str(folder / name))
            else:
                (folder / name).parent.mkdir(exist_ok=True)
                (Path(scratch) / name).replace(folder / name)


def check(folder: epath.Path) -> None:
    """Raises UserError where a folder holds what a checkpoint in it would break.

    An adapter, which transformers would apply to the checkpoint, or a multimodal model, which would be lost.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter, which would be put onto the model again; name another folder")
    if (folder / "config.json").exists() and "text_config" in read_json(storage.local(folder / "config.json")):
        raise UserError(f"{folder} holds a multimodal model, which would be lost; name another folder")
