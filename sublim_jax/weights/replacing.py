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
WEIGHTS = re.compile(
    r".*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?|tf_model.*\.h5|flax_model.*\.msgpack"
)


@contextmanager
def replaced(folder: epath.Path) -> Iterator[Path]:
    """A local folder to write a checkpoint into, which replaces the one in `folder` when the block ends.

    Until then nothing in `folder` changes. The file that readers start from is removed first and written last, so that
    an interruption leaves the old checkpoint, the new one or none, never a mixture. Other files stay.

    Raises UserError where the folder holds an adapter, which transformers would apply to the checkpoint, or a
    multimodal model, which would be lost.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter, which would be put onto the model again; name another folder")
    if (folder / "config.json").exists() and "text_config" in read_json(storage.local(folder / "config.json")):
        raise UserError(f"{folder} holds a model with other senses, which would be lost; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    away = storage.in_bucket(folder)
    with TemporaryDirectory(dir=None if away else folder, prefix=".saving-") as scratch:
        yield Path(scratch)
        new = sorted((path.name for path in Path(scratch).iterdir()), key=lambda name: (name in (INDEX, WHOLE), name))
        old = [path for path in (folder.iterdir() if folder.exists() else ()) if WEIGHTS.fullmatch(path.name)]
        for path in sorted(old, key=lambda path: path.name not in (INDEX, WHOLE)):
            if path.name not in new or path.name in (INDEX, WHOLE):
                path.unlink()
        for name in new:
            if away:
                storage.bucket_of(str(folder)).put_file(f"{scratch}/{name}", str(folder / name))
            else:
                (Path(scratch) / name).replace(folder / name)
