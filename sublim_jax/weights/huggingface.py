"""Safetensors folders of transformers: read tensor by tensor straight onto the mesh, and written back bit by bit."""

import copy
import dataclasses
import gc
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sublim_jax import cluster
from sublim_jax.data.tokenizer import Tokenizer
from sublim_jax.errors import UserError, one_line
from sublim_jax.models.decoder import decoder
from sublim_jax.models.families import AS_IS, TRANSPOSED, Config, Rule, family
from sublim_jax.models.functional import Params
from sublim_jax.models.settings import Settings
from sublim_jax.progress import Track
from sublim_jax.sharding import agreed, fetch, parameter_shardings
from sublim_jax.weights import config_fields
from sublim_jax.weights.config_fields import WRAPPER, check_fetched, read_json
from sublim_jax.weights.replacing import INDEX, WHOLE, check, replaced

SHARD_BYTES = 4 << 30
REOPEN_BYTES = 8 << 20
HELD = 256 << 20  # bytes read, after which host copies are freed
# Tensors that are not weights of a text model: rotary tables, attention masks, a vision tower and its projector.
WEIGHTLESS = re.compile(
    r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.(attn|attention)\.(bias|masked_bias)$"
    r"|^(model\.)?(vision_tower|multi_modal_projector)\."
)
FLOATS = ("F64", "F32", "F16", "BF16")

# A tensor by name: its shape, and the part of it that an index asks for.
Shape = Callable[[str], tuple[int, ...]]
Index = slice | tuple[slice, ...]
Read = Callable[[str, Index], np.ndarray]


def load_config(folder: str | Path) -> Config:
    """The config.json of a folder; for a multimodal model, that of its text model.

    `tie_word_embeddings` follows the tensors: it is False where they include a head that differs from the embedding.

    Raises UserError where there is none, or it has an unknown field that may change what is computed.
    """
    folder = Path(folder)
    config = config_fields.load(folder)
    if config.tie_word_embeddings and _has_untied_head(folder, config):
        config.tie_word_embeddings = False
    return config


def _has_untied_head(folder: Path, config: Config) -> bool:
    """Whether the file holds a head that differs from its embedding; as in transformers, it overrides the config."""
    if not (folder / WHOLE).is_file() and not (folder / INDEX).is_file():
        return False
    settings = dataclasses.replace(family(config).settings(config), tied=False)
    names = {rule.paths[0]: rule.tensor for rule in family(config).rules(settings)}
    embedding, head = names["embedding"], names["unembedding/kernel"]
    tensors = Tensors(_shards(folder), str(folder))
    try:
        if not {embedding, head} <= tensors.names:
            return False
        shape = tensors.shape(embedding)
        if tensors.shape(head) != shape:
            raise UserError(f"{folder}: tensor {head} has another shape than {embedding}, {tensors.shape(head)}")
        rows = max(REOPEN_BYTES // (8 * shape[1]), 1)
        parts = (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))
        return any(not np.array_equal(tensors.read(embedding, part), tensors.read(head, part)) for part in parts)
    finally:
        tensors.close()


def load(folder: str | Path, mesh: Mesh | None = None, dtype: DTypeLike | None = None) -> tuple[Settings, Params]:
    """Settings and parameters of a folder with config.json and model*.safetensors.

    Args:
      mesh: where to put them, by the rules of `sharding`; each process reads only its slices. The default device if
        left out.
      dtype: of the parameters; that of the file if left out.

    Raises:
      UserError: a file or tensor is missing, truncated, of another shape or number type than the config says; a tensor
        is there that the model does not have; the config has an unknown field that may change the result.
    """
    config = load_config(folder)
    settings = family(config).settings(config)
    rules = family(config).rules(settings)
    tensors = Tensors(_shards(Path(folder)), str(folder))
    try:
        _check_names(tensors, rules, settings, str(folder))
        return settings, place(settings, rules, tensors.shape, tensors.read, mesh, dtype, str(folder))
    finally:
        tensors.close()


def usual(name: str) -> str:
    """A tensor's name as transformers' text models have it.

    Removes the prefix of a text model inside a multimodal one, and adds the one that the hub's GPT-2 lacks.
    """
    name = name.replace("language_model.", "", 1)
    return f"transformer.{name}" if re.match(r"(wte|wpe|ln_f|h\.\d+)\.", name) else name


class Tensors:
    """The tensors of some safetensors files, by their usual names.

    Files are memory-mapped, and pages that were read stay in memory until a file is closed: each is therefore closed
    after `REOPEN_BYTES` and opened again, so that loading needs little more memory than the parameters.
    """

    def __init__(self, paths: list[Path], what: str):
        self._what = what
        self._opened: dict[Path, safe_open] = {}
        self._read = 0
        self._stored: dict[str, tuple[Path, str]] = {}  # by name: the file, and the name in it
        for path in paths:
            for name in self._open(path).keys():  # noqa: SIM118
                if usual(name) in self._stored:
                    raise UserError(f"{what} holds tensor {usual(name)} twice; fetch the model again")
                self._stored[usual(name)] = path, name
        if any(name.startswith("gpt_neox.") for name in self._stored) and "lm_head.weight" in self._stored:
            self._stored.setdefault("embed_out.weight", self._stored.pop("lm_head.weight"))
        self.close()

    @property
    def names(self) -> set[str]:
        return set(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises UserError for a tensor that is missing or holds no floats."""
        if name not in self._stored:
            raise UserError(f"{self._what}: tensor {name} is missing; fetch the model again")
        path, stored = self._stored[name]
        tensor = self._open(path).get_slice(stored)
        if tensor.get_dtype() not in FLOATS:
            raise UserError(
                f"{path}: tensor {stored} holds {tensor.get_dtype()}, a quantised or unknown type; fetch the "
                f"model in one of {', '.join(FLOATS)}"
            )
        return tuple(tensor.get_shape())

    def read(self, name: str, index: Index) -> np.ndarray:
        path, stored = self._stored[name]
        part = self._open(path).get_slice(stored)[index]
        self._read += part.nbytes
        if self._read > REOPEN_BYTES:
            self.close()
        return part

    def close(self) -> None:
        self._opened.clear()
        self._read = 0

    def _open(self, path: Path) -> safe_open:
        if path not in self._opened:
            try:
                check_fetched(path)
                self._opened[path] = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} is truncated or not a safetensors file ({one_line(error)}); fetch it again"
                ) from error
        return self._opened[path]


def _check_names(tensors: Tensors, rules: tuple[Rule, ...], settings: Settings, what: str) -> None:
    """Raises UserError for a tensor that is missing, or that would not be read and may change the result."""
    expected = {rule.tensor.format(i=layer) for rule in rules for layer in range(settings.layers)}
    if missing := expected - tensors.names:
        if any(name.endswith(f".{stored}") for name in missing for stored in tensors.names):
            raise UserError(
                f"{what} holds a model without its language head (an embedding model?), by its tensors' names"
            )
        name = min(missing)
        raise UserError(
            f"{what}: tensor {name} is missing, which config.json asks for; the files are not whole, or another model's"
        )
    heads = {"lm_head.weight", "embed_out.weight"} if settings.tied else set()  # equal to the embedding: `load_config`
    unread = {name for name in tensors.names - expected - heads if not WEIGHTLESS.search(name)}
    if unread:
        raise UserError(
            f"{what}: tensor {min(unread)} is in the file and not in the model that config.json describes"
            f"{f' ({len(unread)} such tensors)' if len(unread) > 1 else ''}"
        )


def place(
    settings: Settings,
    rules: tuple[Rule, ...],
    shape: Shape,
    read: Read,
    mesh: Mesh | None,
    dtype: DTypeLike | None,
    what: str,
) -> Params:
    """Parameters on the mesh, from a reader of named tensors; every shape is checked before anything is read."""
    abstract = jax.eval_shape(decoder(settings).init, jax.random.key(0))
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    sources = {path: (rule, part) for rule in rules for part, path in enumerate(rule.paths)}
    if missing := set(paths) - set(sources):
        raise UserError(f"{what}: no tensor is known for {sorted(missing)[0]}")
    for rule in rules:
        _check_shape(settings, rule, dict(zip(paths, (leaf for _, leaf in leaves))), shape, what)
    shardings = jax.tree.leaves(parameter_shardings(abstract, mesh)) if mesh else [None] * len(paths)
    with Track(f"parameters of {what}", len(paths)) as track:
        arrays, held = [], 0
        for number, (path, (_, leaf), sharding) in enumerate(zip(paths, leaves, shardings), 1):
            rule, part = sources[path]

            def fill(
                index: tuple[slice, ...] | None, rule: Rule = rule, part: int = part, leaf: jax.ShapeDtypeStruct = leaf
            ) -> np.ndarray:
                return _slices(settings, rule, part, leaf.shape, index or (slice(None),) * leaf.ndim, read, dtype)

            if sharding is None:
                array = jax.device_put(fill(None))
            else:
                array = jax.make_array_from_callback(leaf.shape, sharding, fill)
            arrays.append(jax.block_until_ready(array))
            held += sum(shard.data.nbytes for shard in array.addressable_shards)
            if held > HELD:  # jax then frees its host copies, which otherwise pile up
                gc.collect()
                held = 0
            track.update(number)
    return jax.tree.unflatten(structure, arrays)


def save(
    folder: str | Path, params: Params, settings: Settings, config: Config, tokenizer: Tokenizer | None = None
) -> None:
    """Writes config.json and model*.safetensors that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    They replace a checkpoint in the folder and, where a tokenizer is given, its files. Of a multimodal model, only the
    text model is written. On several processes all must call it, and the first one writes.

    Raises UserError where the folder holds an adapter, which transformers would apply to the model, or a multimodal
    model, which would be lost.
    """
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    path = epath.Path(folder)
    agreed(lambda: check(path))
    tensors = _tensors(settings, family(config).rules(settings), flat)
    if jax.process_index():
        for _ in tensors:  # its parts of the arrays go to the first
            pass
        return cluster.meet()
    with replaced(path) as scratch:
        _config_of(flat, settings, config).save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(scratch))
        files: list[list[str]] = []
        size = 0
        for shard in _shards_of(tensors):
            save_file(shard, scratch / f"{len(files)}", metadata={"format": "pt"})
            files.append(list(shard))
            size += sum(tensor.nbytes for tensor in shard.values())
        _name(scratch, files, size)
    cluster.meet()


def _name(scratch: Path, files: Sequence[Sequence[str]], size: int) -> None:
    """Gives files of tensors, "0", "1", …, their names, and writes the index of several."""
    if len(files) == 1:
        (scratch / "0").rename(scratch / WHOLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        (scratch / f"{number}").rename(scratch / file)
        weight_map |= dict.fromkeys(names, file)
    (scratch / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1))


def _config_of(flat: Mapping[str, jax.Array | np.ndarray], settings: Settings, config: Config) -> Config:
    """The config to write: with the dtype of the parameters, untied where they are, and of a text model by itself."""
    written = copy.deepcopy(config)
    written.dtype = jnp.result_type(*{leaf.dtype for leaf in flat.values()}).name
    written.tie_word_embeddings = settings.tied
    if hasattr(written, WRAPPER):
        delattr(written, WRAPPER)
    return written


def _shards_of(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """Tensors by name, in groups that fit into one file of `SHARD_BYTES`."""
    shard: dict[str, np.ndarray] = {}
    for name, tensor in tensors:
        if shard and sum(array.nbytes for array in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _tensors(
    settings: Settings, rules: tuple[Rule, ...], flat: Mapping[str, jax.Array | np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor of a checkpoint."""
    for rule in rules:
        stacked = [np.asarray(fetch(flat[path])) for path in rule.paths]
        if "{i}" not in rule.tensor:
            yield rule.tensor, np.ascontiguousarray(rule.layout.join(stacked, settings))
            continue
        for layer in range(settings.layers):
            parts = [part[layer] for part in stacked]
            yield rule.tensor.format(i=layer), np.ascontiguousarray(rule.layout.join(parts, settings))


def _slices(
    settings: Settings,
    rule: Rule,
    part: int,
    shape: tuple[int, ...],
    index: tuple[slice, ...],
    read: Read,
    dtype: DTypeLike | None,
) -> np.ndarray:
    """The slice of one of our parameters at an index."""

    def read_slice(name: str, index: tuple[slice, ...]) -> np.ndarray:
        if rule.layout is AS_IS:
            return read(name, index)
        if rule.layout is TRANSPOSED:
            return read(name, index[::-1]).T
        whole = read(name, (slice(None),))
        return rule.layout.split(whole, settings)[part][index]

    if "{i}" not in rule.tensor:
        return np.asarray(read_slice(rule.tensor, index), dtype)
    rows = range(*index[0].indices(shape[0]))
    first = read_slice(rule.tensor.format(i=rows[0]), index[1:])
    stacked = np.empty((len(rows), *first.shape), dtype or first.dtype)
    for row, layer in enumerate(rows):
        stacked[row] = first if row == 0 else read_slice(rule.tensor.format(i=layer), index[1:])
    return stacked


def _check_shape(
    settings: Settings, rule: Rule, leaves: Mapping[str, jax.ShapeDtypeStruct], shape: Shape, what: str
) -> None:
    """Raises UserError where a tensor's shape is not that of our parameters, joined."""
    layered = "{i}" in rule.tensor
    parts = [
        np.broadcast_to(np.int8(0), leaves[path].shape[1:] if layered else leaves[path].shape) for path in rule.paths
    ]
    expected = rule.layout.join(parts, settings).shape
    for layer in range(settings.layers if layered else 1):
        name = rule.tensor.format(i=layer)
        if (actual := shape(name)) != expected:
            raise UserError(f"{what}: tensor {name} has shape {actual}, and its config asks for {expected}")


def _shards(folder: Path) -> list[Path]:
    """The files that hold the tensors: the single file or, where it is missing, those that the index names."""
    names = [WHOLE]
    if not (folder / WHOLE).is_file() and (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"{folder / INDEX} has no weight_map that says where tensors are; fetch it again")
        names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{folder / INDEX} names {name!r}, which is not a file beside it, and is not opened")
        if not (folder / name).is_file():
            raise UserError(_why_missing(folder, name))
    return [folder / name for name in names]


def _why_missing(folder: Path, name: str) -> str:
    """The message for a missing file of tensors, with what to do, in one line."""
    if pickles := sorted(path.name for path in folder.glob("*.bin*") if path.name.startswith("pytorch_model")):
        return (
            f"{folder} holds {pickles[0]} and no {name}: a pickle can run code, and only safetensors are read; convert "
            "it with transformers, AutoModelForCausalLM.from_pretrained(folder).save_pretrained(another_folder)"
        )
    return f"{folder / name} is missing; fetch the model again"
