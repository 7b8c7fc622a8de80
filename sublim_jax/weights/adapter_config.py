"""adapter_config.json as PEFT reads it: which layers have adapters, of which rank and scale; all else is refused.

Every field is supported, or has no effect after training, or must be off, since its effect is not supported.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sublim_jax.errors import UserError
from sublim_jax.weights.config_fields import read_json

FILE = "adapter_config.json"

Number = int | float

UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
# They describe the file, or the training. Biases that `bias` trained are tensors, which are refused by name; QALoRA is
# for quantised bases, of which there are none here.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"),
    *("task_type", "bias", "ensure_weight_tying", "fan_in_fan_out", "lora_dropout", "megatron_core"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "qalora_group_size", "use_qalora"),
}
# Values of init_lora_weights. With these, PEFT leaves the base as it is, and adapters add nothing before training.
PLAIN_STARTS = (True, "gaussian", "eva", "lora_ga", "mica")
# With these, adapters add a random change, which stays in layers that have no tensors.
RANDOM_STARTS = (False, "orthogonal")
# With these, a part of the base is moved into the adapter; PEFT does so again when it loads one.
MOVED_STARTS = ("pissa", "olora")
# The modules that PEFT adapts where target_modules is null.
USUAL_TARGETS = {
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), ("q_proj", "v_proj")),
}


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA's description; modules are named by their path in the base model, as `model.layers.0.mlp.up_proj`.

    Attributes:
      targets: names or ends of names of adapted modules, or a regular expression of whole names.
      layers: numbers of adapted layers; () for all.
      layer_lists: names of the lists that `layers` counts; () for any.
      start: how the adapters were initialised: one of `PLAIN_STARTS`, `RANDOM_STARTS` or `MOVED_STARTS`.
    """

    rank: int
    alpha: Number
    rslora: bool
    ranks: Mapping[str, Number]
    alphas: Mapping[str, Number]
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str
    layers: tuple[Number, ...]
    layer_lists: tuple[str, ...]
    start: str | bool

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.ranks, module, self.rank))

    def alpha_of(self, module: str) -> Number:
        return _by_pattern(self.alphas, module, self.alpha)

    def adapts(self, module: str) -> bool:
        """Whether PEFT puts an adapter on a linear layer of the decoder, and so reads its tensors.

        As `check_target_module_exists` of peft.tuners.tuners_utils decides.
        """
        if self.excluded and _named(module, self.excluded):
            return False
        if isinstance(self.targets, str):
            return self.targets.lower() == "all-linear" or _named(module, self.targets)
        if module in self.targets or not self.layers:  # a whole name is in its layer, whatever `layers` says
            return _named(module, self.targets)
        if not _named(module, self.targets):
            return False
        places = map(_place, self.layer_lists) if self.layer_lists else [r".*?\.[^.]*\.(?P<layer>\d+)\."]
        layer_match = next((match for match in (re.match(place, module) for place in places) if match), None)
        return layer_match is not None and int(layer_match["layer"]) in self.layers


def _named(module: str, names: tuple[str, ...] | str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def _place(name: str) -> str:
    """A layer's number behind the name of a list of layers, as an expression."""
    return rf"(?:^|.*?\.){name}\.(?P<layer>\d+)\."


def _whole_name(pattern: str) -> str:
    """The end of a module's name, as an expression."""
    return rf"(.*\.)?({pattern})$"


def _by_pattern(patterns: Mapping[str, Number], module: str, otherwise: Number) -> Number:
    for pattern, value in patterns.items():
        if re.match(_whole_name(pattern), module):
            return value
    return otherwise


def file_of(folder: Path) -> Path:
    """The path of adapter_config.json. Raises UserError where it is missing."""
    if not (folder / FILE).is_file():
        raise UserError(f"{folder} is not a PEFT adapter: {FILE} is missing")
    return folder / FILE


def read(folder: Path, model_type: str) -> AdapterConfig:
    """Reads the adapter_config.json of a folder.

    Raises UserError where it is missing, and for a field, by name and value, that needs more than a plain LoRA.
    """
    path = file_of(folder)
    fields = read_json(path)
    try:
        return _understood(fields, model_type)
    except UserError as error:
        raise UserError(f"{path}: {error}; merge the adapter into its model with peft, and name that folder") from None


def _check_layers(fields: Mapping[str, object]) -> None:
    """Raises UserError for a choice of layers that PEFT refuses."""
    for name in ("layers_to_transform", "layers_pattern"):
        if fields.get(name) is not None and isinstance(fields.get("target_modules"), str):
            raise UserError(f"{name} beside target_modules={fields['target_modules']!r}, which is not a list")
    if fields.get("layers_pattern") and fields.get("layers_to_transform") is None:
        raise UserError("layers_pattern without layers_to_transform")


def _understood(fields: Mapping[str, object], model_type: str) -> AdapterConfig:
    if fields.get("peft_type") != "LORA":
        raise UserError(f"peft_type={fields.get('peft_type')!r}, and only LORA is read")
    targets = _names(fields, "target_modules") or USUAL_TARGETS.get(model_type, ())
    if not targets:
        raise UserError("target_modules is missing")
    _check_layers(fields)
    described = AdapterConfig(
        rank=_whole(fields, "r", fields.get("r", 8)),
        alpha=_number(fields, "lora_alpha", fields.get("lora_alpha", 8)),
        rslora=_flag(fields, "use_rslora"),
        ranks=_pattern(fields, "rank_pattern", _whole),
        alphas=_pattern(fields, "alpha_pattern", _number),
        targets=targets,
        excluded=_names(fields, "exclude_modules"),
        layers=_layers(fields),
        layer_lists=_listed("layers_pattern", _names(fields, "layers_pattern")),
        start=_start(fields),
    )
    for name, value in fields.items():
        if name not in UNDERSTOOD | HARMLESS and value not in (None, False, {}, [], ""):
            raise UserError(f"{name}={value!r} is not supported")
    return described


def _start(fields: Mapping[str, object]) -> str | bool:
    start = fields.get("init_lora_weights", True)
    known = start.lower() if isinstance(start, str) and start.lower() in ("gaussian", "olora") else start
    if not isinstance(known, bool | str) or known not in PLAIN_STARTS + RANDOM_STARTS + MOVED_STARTS:
        raise UserError(f"init_lora_weights={start!r} changes the base in a way that is not repeated here")
    return known


def _number(fields: Mapping[str, object], name: str, value: object) -> Number:
    if isinstance(value, bool) or not isinstance(value, Number) or not math.isfinite(value):
        raise UserError(f"{name}={fields.get(name)!r}: a number is needed")
    return value


def _whole(fields: Mapping[str, object], name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={fields.get(name)!r}: a whole number above 0 is needed")
    return value


def _flag(fields: Mapping[str, object], name: str) -> bool:
    if not isinstance(value := fields.get(name) or False, bool):
        raise UserError(f"{name}={value!r}: true or false is needed")
    return value


def _pattern(
    fields: Mapping[str, object], name: str, checked: Callable[[Mapping[str, object], str, object], Number]
) -> Mapping[str, Number]:
    patterns = fields.get(name) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{name}={patterns!r}: an object of names and numbers is needed")
    for pattern, value in patterns.items():
        _compiled(name, _whole_name(pattern), pattern)
        checked(fields, name, value)
    return patterns


def _names(fields: Mapping[str, object], name: str) -> tuple[str, ...] | str:
    names = fields.get(name) or ()
    if isinstance(names, str):
        _compiled(name, names, names)
        return names
    if not isinstance(names, list | tuple) or not all(isinstance(entry, str) for entry in names):
        raise UserError(f"{name}={names!r}: names or a regular expression are needed")
    return tuple(names)


def _listed(name: str, names: tuple[str, ...] | str) -> tuple[str, ...]:
    listed = (names,) if isinstance(names, str) else names
    for pattern in listed:
        _compiled(name, _place(pattern), pattern)
    return listed


def _layers(fields: Mapping[str, object]) -> tuple[Number, ...]:
    name = "layers_to_transform"
    value = fields.get(name)
    listed = value if isinstance(value, list) else [value]
    return tuple(_number(fields, name, layer) for layer in listed if layer is not None)


def _compiled(name: str, used: str, pattern: str) -> None:
    """Raises UserError for a pattern that is no expression where it is used."""
    try:
        re.compile(used)
    except re.error as error:
        raise UserError(f"{name}: {pattern!r} is not a regular expression ({error})") from error
