"""LoRA adapters as PEFT's folders: adapter_config.json and adapter_model.safetensors.

PEFT names a layer's adapter by the layer's path in the transformers model that contains it, and has one pair of A and
B for each tensor of the checkpoint. Where a family keeps several of our layers in one tensor, they share that A, and
each has its rows of that B.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, PyTree
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as serialised

from sublim_jax import assets, storage
from sublim_jax.errors import UserError
from sublim_jax.models.decoder import decoder
from sublim_jax.models.families import AS_IS, QKV_LAST, Config, Rule, family
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.models.lora import Lora
from sublim_jax.models.settings import Settings
from sublim_jax.sharding import fetch
from sublim_jax.weights import adapter_config, residual
from sublim_jax.weights.adapter_config import MOVED_STARTS, RANDOM_STARTS, AdapterConfig, Number
from sublim_jax.weights.config_fields import WRAPPER, check_fetched

PREFIX = "base_model.model."
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# The path of a text model in a multimodal one: in today's transformers, and until 4.51.
TODAY = "model.language_model."
INSIDE = re.compile(r"^(model\.language_model|language_model\.model)\.")
MODEL_WEIGHTS = r"(pytorch_)?model.*\.(safetensors|bin)$"
OTHER_SENSES = re.compile(r"(^|\.)(vision_tower|vision_model|audio_tower|multi_modal_projector)\.")
Leaf = Array | np.ndarray
Fields = dict[str, object]  # of adapter_config.json


class Place(NamedTuple):
    """A linear layer of the checkpoint: the rule of its tensor, and the number of the decoder's layer that it is in."""

    rule: Rule
    layer: int
    inputs: int
    outputs: int


class Pair(NamedTuple):
    """One adapter as PEFT has it; it adds alpha / rank · B A, or with rslora alpha / √rank · B A."""

    a: np.ndarray  # (rank, inputs)
    b: np.ndarray  # (outputs, rank)
    alpha: Number


# ------------------------------------------------------------------------------------------------------- loading


def load(folder: str | Path, settings: Settings, config: Config, base: Params | None = None) -> tuple[Lora, Params]:
    """Adapters from a PEFT folder, in float32 as PEFT has them.

    Where their ranks or scales differ, the scales are folded into B, and lower ranks are padded with zeros.

    Args:
      base: the model's parameters, needed for adapters that were initialised with a part of them (PiSSA, OLoRA).

    Raises:
      UserError: the folder holds no LoRA, one of another model, or one with unsupported options.
    """
    folder = storage.local(folder)
    described = adapter_config.read(folder, getattr(config, WRAPPER, None) or config.model_type)
    places = _places(settings, config)
    pairs = _pairs(folder, described, places, config)
    if described.start in MOVED_STARTS:
        pairs = _with_parts(folder, described, places, pairs, settings, base)
    spec = _spec(described, places, pairs, settings)
    return spec, _stacked(spec, described.rslora, places, pairs, settings)


def merged(model: Model, folder: str) -> Model:
    """The model with a folder's adapters merged into its weights; unchanged if `folder` is empty."""
    if not folder:
        return model
    adapter, adapters = load(folder, model.settings, model.config, model.params)
    return model.merged(adapters, adapter)


def check_folder(where: str, folder: str) -> None:
    """Raises UserError, naming the value, for a folder that is not there."""
    if not assets.is_folder(folder):
        raise UserError(f"{where}: {folder} is not a PEFT adapter, there is no such folder")


def _places(settings: Settings, config: Config) -> dict[str, Place]:
    """The linear layers of the decoder's layers, by their paths in the text model."""
    kernels = _kernels(settings)
    places = {}
    for rule in _linear_rules(settings, config):
        inputs, outputs = kernels[rule.paths[0]][0], sum(kernels[path][1] for path in rule.paths)
        for layer in range(settings.layers):
            module = rule.tensor.removesuffix(".weight").format(i=layer)
            places[module] = Place(rule, layer, inputs, outputs)
    return places


def _linear_rules(settings: Settings, config: Config) -> list[Rule]:
    rules = family(config).rules(settings)
    return [rule for rule in rules if rule.paths[0].startswith("layers/") and rule.paths[0].endswith("/kernel")]


def _kernels(settings: Settings) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the decoder's linear layers, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(decoder(settings).init, jax.random.key(0))["layers"])
    named = {"layers/" + jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {path: leaf.shape[1:] for path, leaf in named.items() if path.endswith("/kernel")}


def _pairs(folder: Path, described: AdapterConfig, places: Mapping[str, Place], config: Config) -> dict[str, Pair]:
    """Every adapter in a folder, by its layer's path in the text model; every tensor is read or refused."""
    halves: dict[str, dict[str, np.ndarray]] = {}
    named = {}
    last = max(place.layer for place in places.values())
    for name, tensor in _tensors(folder).items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])(\.default)?\.weight", name)
        written = match[1] if match else ""
        module = INSIDE.sub(TODAY, written)
        if OTHER_SENSES.search(module):  # text alone does not go through them
            continue
        text = INSIDE.sub("model.", module)
        if not name.startswith(PREFIX):
            raise UserError(
                f"{folder}: {name} lacks peft's prefix {PREFIX}, and PEFT would not read it; save it with peft"
            )
        if not match or text not in places:
            raise UserError(
                f"{folder} adapts {name}; here only linear layers inside {config.model_type}'s layers have adapters, 0 "
                f"to {last}: merge the adapter into its model with peft, and name the merged folder"
            )
        _check_wrapper(folder, name, config, wrapped=text != module)
        if not described.adapts(module) and not described.adapts(written):
            raise UserError(
                f"{folder}: {name} is not of target_modules in {adapter_config.FILE}; PEFT would not read it"
            )
        rank, (_, _, inputs, outputs) = described.rank_of(module), places[text]
        expected = (rank, inputs) if match[2] == "A" else (outputs, rank)
        if tensor.shape != expected:
            raise UserError(
                f"{folder}: {name} has shape {tensor.shape}, and this model with rank {rank} asks for {expected}"
            )
        halves.setdefault(text, {})[match[2]] = np.asarray(tensor, np.float32)
        named[text] = module
    for text, half in halves.items():
        for which in {"A", "B"} - set(half):
            raise UserError(f"{folder}: {PREFIX}{named[text]}.lora_{which}.weight is missing")
    if not halves:
        raise UserError(f"{folder} has no adapter of a text model")
    if described.start in RANDOM_STARTS:
        _check_none_is_random(folder, described, places, named)
    return {text: Pair(half["A"], half["B"], described.alpha_of(named[text])) for text, half in halves.items()}


def _check_wrapper(folder: Path, name: str, config: Config, *, wrapped: bool) -> None:
    """Raises UserError for the name of a multimodal model's tensor if the model is a text model alone, or vice versa.

    PEFT warns of such names, and does not load them.
    """
    wrapper = getattr(config, WRAPPER, None)
    if wrapper and not wrapped:
        raise UserError(
            f"{folder}: {name} is a name of the text model alone, and this one is part of a {wrapper} (as "
            f"{PREFIX}{TODAY}…), where PEFT would not put it; name the text model's own folder, saved apart"
        )
    if wrapper == "" and wrapped:
        raise UserError(
            f"{folder}: {name} is a name inside a multimodal model, and this {config.model_type} stands alone "
            f"(as {PREFIX}model.layers…), where PEFT would not put it; name the folder of the whole model"
        )


def _check_none_is_random(
    folder: Path, described: AdapterConfig, places: Mapping[str, Place], named: Mapping[str, str]
) -> None:
    """Raises UserError where PEFT would adapt a layer that has no tensors.

    Args:
      named: paths of the layers that have some, by their paths in the text model.
    """
    inside = any(module.startswith(TODAY) for module in named.values())
    for text in places.keys() - named.keys():
        module = re.sub(r"^model\.", TODAY, text) if inside else text
        if described.adapts(module):
            raise UserError(
                f"{folder}: {PREFIX}{module}.lora_A.weight is missing, and init_lora_weights={described.start!r} "
                "begins with what is drawn at random"
            )


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    path = _file_of(folder)
    check_fetched(path)
    try:
        stored = load_file(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); copy the adapter again") from error
    for name, tensor in stored.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise UserError(f"{folder}: {name} holds {tensor.dtype}, no floating-point numbers")
    return stored


def _file_of(folder: Path) -> Path:
    """The path of the tensors. Raises UserError where they are missing, or there only as a pickle."""
    if not (folder / TENSORS).is_file():
        if (folder / PICKLE).is_file():
            raise UserError(f"{folder / PICKLE} is a pickle, which can run code; load it with peft, and save it anew")
        raise UserError(f"{folder} is not a PEFT adapter: {TENSORS} is missing")
    return folder / TENSORS


def _scale(alpha: Number, rank: int, rslora: bool) -> float:
    return Lora(rank, alpha, rslora).scale


def _by_outputs(rule: Rule) -> bool:
    """Whether the checkpoint's tensor is (outputs, inputs), as torch's Linear; a Conv1D is (inputs, outputs)."""
    return rule.layout not in (AS_IS, QKV_LAST)


def _weight(base: Params, place: Place, settings: Settings) -> np.ndarray:
    """The weight (outputs, inputs) of one layer of the checkpoint, in float32."""
    kernels = []
    for path in place.rule.paths:
        node: PyTree = base
        for part in path.split("/"):
            node = node[part]
        kernels.append(np.asarray(fetch(node[place.layer].astype(jnp.float32))))
    joined = place.rule.layout.join(kernels, settings)
    return joined if _by_outputs(place.rule) else joined.T


def _with_parts(
    folder: Path,
    described: AdapterConfig,
    places: Mapping[str, Place],
    pairs: Mapping[str, Pair],
    settings: Settings,
    base: Params | None,
) -> dict[str, Pair]:
    """Pairs of twice the rank that also subtract the initial adapters from the base, at the same scales."""
    start = str(described.start)
    if base is None:
        raise UserError(
            f"{folder}: init_lora_weights={start!r} took a part out of the base; it is read where the base's weights "
            "are at hand, or convert it with peft's path_initial_model_for_weight_conversion"
        )
    augmented = {}
    for module, pair in pairs.items():
        if start == "olora" and not _by_outputs(places[module].rule):
            raise UserError(f"{folder}: init_lora_weights='olora' of {module} is not repeated, which is a Conv1D")
        rank = len(pair.a)
        weight = _weight(base, places[module], settings)
        a, b = residual.part(start, weight, rank, _scale(pair.alpha, rank, described.rslora))
        doubled = np.concatenate([pair.a, a]), np.concatenate([pair.b, -b], 1)
        ratio = _scale(1.0, rank, described.rslora) / _scale(1.0, len(doubled[0]), described.rslora)
        augmented[module] = Pair(*doubled, pair.alpha * ratio)
    return augmented


def _spec(described: AdapterConfig, places: Mapping[str, Place], pairs: Mapping[str, Pair], settings: Settings) -> Lora:
    adapted = {places[module].layer for module in pairs}
    layers = () if len(adapted) == settings.layers else tuple(sorted(adapted))
    names = {path.split("/")[-2] for module in pairs for path in places[module].rule.paths}
    kinds = {(len(pair.a), pair.alpha) for pair in pairs.values()}
    rank, alpha = max(kinds)
    if len(kinds) == 1:
        return Lora(rank, alpha, described.rslora, tuple(sorted(names)), layers)
    return Lora(rank, rank, modules=tuple(sorted(names)), layers=layers)


def _stacked(
    spec: Lora, rslora: bool, places: Mapping[str, Place], pairs: Mapping[str, Pair], settings: Settings
) -> Params:
    """Our tree of adapters: stacked over layers, with zeros where a layer has none."""
    kernels = _kernels(settings)
    arrays: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for module, pair in pairs.items():
        rule, layer, *_ = places[module]
        rank = len(pair.a)
        factor = _scale(pair.alpha, rank, rslora) / (spec.scale or 1.0)
        b = pair.b if factor == 1 else pair.b * np.float32(factor)
        for path, part in zip(rule.paths, rule.layout.split(b if _by_outputs(rule) else b.T, settings)):
            inputs, outputs = kernels[path]
            if path not in arrays:
                shapes = (settings.layers, inputs, spec.rank), (settings.layers, spec.rank, outputs)
                arrays[path] = np.zeros(shapes[0], np.float32), np.zeros(shapes[1], np.float32)
            arrays[path][0][layer, :, :rank] = pair.a.T
            arrays[path][1][layer, :rank] = part
    adapters: Params = {}
    for path, (whole_a, whole_b) in arrays.items():
        node = adapters
        for name in path.split("/")[:-1]:
            node = node.setdefault(name, {})
        node |= {"a": jnp.asarray(whole_a), "b": jnp.asarray(whole_b)}
    return adapters


# -------------------------------------------------------------------------------------------------------- saving


def save(
    folder: epath.PathLike, adapters: Params, lora: Lora, settings: Settings, config: Config, base: str = ""
) -> None:
    """Writes adapters that `peft.PeftModel.from_pretrained` applies to the transformers model that `base` names.

    That is the whole multimodal model where the config is of its text model. Adapters already in the folder are
    replaced.

    Args:
      config: as `huggingface.load_config` returns it, which records the multimodal model around its text model.
      base: name or path of the base model, for readers of the folder.

    Raises:
      UserError: an adapter is of a layer that PEFT does not adapt, or the folder holds a model.
    """
    folder = epath.Path(folder)
    if folder.is_dir() and any(re.match(MODEL_WEIGHTS, path.name) for path in folder.iterdir()):
        raise UserError(f"{folder} holds a model, which would then load with these adapters; name another folder")
    rules = _adapted(settings, config, adapters)
    written = lora.layers or tuple(range(settings.layers))
    kernels = _kernels(settings)
    tensors = {}
    for rule, pairs in rules.items():
        for layer in written:
            name = PREFIX + _path(rule, config).format(i=layer)
            blocks = {path: (np.asarray(a[layer]), np.asarray(b[layer])) for path, (a, b) in pairs.items()}
            widths = [kernels[path][1] for path in rule.paths]
            a, b = _joined(rule, blocks, widths, settings)
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b)
    described: Fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    described |= _targets(rules, _linear_rules(settings, config), lora, config)
    _replace(
        folder,
        {
            TENSORS: serialised(tensors, metadata={"format": "pt"}),
            adapter_config.FILE: (json.dumps(described, indent=1) + "\n").encode(),
        },
    )


def _adapted(settings: Settings, config: Config, adapters: Params) -> dict[Rule, dict[str, tuple[Leaf, Leaf]]]:
    """The rules whose tensors have adapters, with (A, B) of each of our layers in them, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(adapters)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    pairs = {path.removesuffix("/a"): (named[path], named[f"{path[:-1]}b"]) for path in named if path.endswith("/a")}
    by_rule = {}
    for rule in _linear_rules(settings, config):
        names = [path.removesuffix("/kernel") for path in rule.paths]
        if rule_pairs := {f"{name}/kernel": pairs.pop(name) for name in names if name in pairs}:
            by_rule[rule] = rule_pairs
    if pairs or not by_rule:
        raise UserError(
            f"an adapter of {min(pairs, default='nothing')} does not go into a PEFT folder; merge the adapters "
            "(models.lora.merge) and save the whole model"
        )
    return by_rule


def _joined(
    rule: Rule, blocks: Mapping[str, tuple[np.ndarray, np.ndarray]], widths: Sequence[int], settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of one tensor; for several layers in it, their A are concatenated, and their B use separate ranks.

    Args:
      blocks: our (inputs, rank) and (rank, outputs) of the layers that have adapters.
      widths: outputs of all layers in the tensor.
    """
    a = np.concatenate([block.T for block, _ in blocks.values()])
    parts = [np.zeros((len(a), width), a.dtype) for width in widths]
    start = 0
    for path, (_, block) in blocks.items():
        parts[rule.paths.index(path)][start : start + len(block)] = block
        start += len(block)
    joined = rule.layout.join(parts, settings)
    return a, joined if _by_outputs(rule) else joined.T


def _path(rule: Rule, config: Config) -> str:
    """A layer's path in the transformers model that holds it, `{i}` for the layer."""
    module = rule.tensor.removesuffix(".weight")
    return re.sub(r"^model\.", TODAY, module) if getattr(config, WRAPPER, None) else module


def _targets(rules: Mapping[Rule, Mapping[str, object]], every: Sequence[Rule], lora: Lora, config: Config) -> Fields:
    """The fields that name the modules for PEFT to adapt, and those of other ranks than the usual one.

    Modules are named by suffixes; inside a multimodal model, whose parts may share them, by whole names.
    """
    ends = {rule: _end(rule, [other for other in every if other not in rules]) for rule in rules}
    described: Fields = {"target_modules": sorted(ends.values())}
    if getattr(config, WRAPPER, None):
        layers = "|".join(map(str, lora.layers)) or r"\d+"
        whole = [re.escape(_path(rule, config)).replace(r"\{i\}", f"({layers})") for rule in rules]
        described["target_modules"] = "|".join(whole)
    elif lora.layers:
        described["layers_to_transform"] = list(lora.layers)
    several = {re.escape(ends[rule]): len(pairs) for rule, pairs in rules.items() if len(pairs) > 1}
    if several:
        alphas = {end: lora.alpha * (count**0.5 if lora.rslora else count) for end, count in several.items()}
        described |= {
            "rank_pattern": {end: lora.rank * count for end, count in several.items()},
            "alpha_pattern": alphas,
        }
    return described


def _end(rule: Rule, others: Sequence[Rule]) -> str:
    """The shortest suffix of a module's name that is a suffix of no other."""
    names = [other.tensor.removesuffix(".weight") for other in others]
    parts = rule.tensor.removesuffix(".weight").split(".")
    ends = (".".join(parts[-length:]) for length in range(1, len(parts)))
    return next(end for end in ends if not any(name.endswith(f".{end}") for name in names))


def _replace(folder: epath.Path, contents: Mapping[str, bytes]) -> None:
    """Replaces an adapter by another; an interruption leaves the old, the new or none, never a mixture."""
    here = not storage.in_bucket(folder)
    if here:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            (folder / f"{name}.new").write_bytes(data)
    (folder / adapter_config.FILE).unlink(missing_ok=True)
    for name in (TENSORS, adapter_config.FILE):
        if here:
            (folder / f"{name}.new").replace(folder / name)
        else:
            storage.write(folder / name, contents[name])
    (folder / PICKLE).unlink(missing_ok=True)


def digest(folder: str) -> str:
    """Identifies the content of an adapter's folder, whose name may later hold other adapters; "" without a folder.

    Raises UserError where a file is missing.
    """
    if not folder:
        return ""
    path = storage.local(folder)
    return " ".join(assets.digest(file) for file in (adapter_config.file_of(path), _file_of(path)))
