"""LoRA adapters as PEFT's folders: adapter_config.json and adapter_model.safetensors."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as serialised

from sublim_jax import assets
from sublim_jax.errors import UserError
from sublim_jax.models.decoder import Settings, decoder
from sublim_jax.models.families import TRANSPOSED, Config, Rule, family
from sublim_jax.models.functional import Params
from sublim_jax.models.lora import Lora
from sublim_jax.weights.huggingface import usual

PREFIX = "base_model.model"


def save(
    folder: epath.PathLike, adapters: Params, lora: Lora, settings: Settings, config: Config, base: str = ""
) -> None:
    """Writes adapters that `peft.PeftModel.from_pretrained` puts on the transformers model of the same config.

    Args:
      base: name or path of the base model, for readers of the folder.

    Raises:
      UserError: the family fuses adapted layers into one tensor, which PEFT cannot adapt by parts.
    """
    tensors = {}
    modules = set()
    for rule, a, b in _adapted(settings, config, lora, adapters):
        for layer in lora.layers or range(settings.layers):
            module = rule.tensor.removesuffix(".weight").format(i=layer)
            modules.add(module.rpartition(".")[2])
            tensors[f"{PREFIX}.{module}.lora_A.weight"] = np.ascontiguousarray(np.asarray(a[layer]).T)
            tensors[f"{PREFIX}.{module}.lora_B.weight"] = np.ascontiguousarray(np.asarray(b[layer]).T)
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(serialised(tensors, metadata={"format": "pt"}))
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
    if lora.layers:
        described["layers_to_transform"] = list(lora.layers)
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=1) + "\n")


def digest(folder: str) -> str:
    """Of what a folder holds, if one is named: it may hold another run's adapters under the same name tomorrow."""
    files = ("adapter_config.json", "adapter_model.safetensors") if folder else ()
    return " ".join(assets.digest(Path(folder).expanduser() / name) for name in files)


def load(folder: str | Path, settings: Settings, config: Config) -> tuple[Lora, Params]:
    """Adapters from a PEFT folder. Raises UserError where it is no plain LoRA of this model."""
    folder = Path(folder)
    try:
        described = json.loads((folder / "adapter_config.json").read_text())
        stored = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is no PEFT adapter with safetensors ({error})") from error
    several = described.get("rank_pattern") or described.get("alpha_pattern")
    if described.get("peft_type") != "LORA" or described.get("use_dora") or several:
        raise UserError(f"{folder} is no plain LoRA of one rank and scale")
    tensors = {usual(name): tensor for name, tensor in stored.items()}
    rules = {rule.ours[0].split("/")[-2]: rule for rule in _linear_rules(settings, config)}
    chosen = described.get("layers_to_transform")
    layers = tuple([chosen] if isinstance(chosen, int) else chosen or ())
    first = layers[0] if layers else 0
    names = {name for name, rule in rules.items() if f"{_module(rule, first)}.lora_A.weight" in tensors}
    rslora = described.get("use_rslora", False)
    lora = Lora(described["r"], described["lora_alpha"], rslora, tuple(sorted(names)), layers)
    kernels = jax.eval_shape(decoder(settings).init, jax.random.key(0))["layers"]
    adapters: dict[str, Any] = {}
    for name in names:
        node, kernel = adapters, {"layers": kernels}
        for part in rules[name].ours[0].split("/")[:-1]:
            node, kernel = node.setdefault(part, {}), kernel[part]
        _, inputs, outputs = kernel["kernel"].shape
        for ours, theirs, shape in (("a", "lora_A", (inputs, lora.rank)), ("b", "lora_B", (lora.rank, outputs))):
            parts: dict[int, Any] = {}
            for layer in layers or range(settings.layers):
                tensor = f"{_module(rules[name], layer)}.{theirs}.weight"
                if tensor not in tensors:
                    raise UserError(f"{folder}: tensor {tensor} is missing")
                parts[layer] = tensors.pop(tensor).T
                if parts[layer].shape != shape:
                    raise UserError(f"{folder}: {tensor} is of another model, {parts[layer].shape} instead of {shape}")
            nothing = np.zeros_like(parts[first])
            node[ours] = jnp.asarray(np.stack([parts.get(layer, nothing) for layer in range(settings.layers)]))
    if tensors or not names:
        left = min(tensors, default="nothing")
        raise UserError(
            f"{folder} adapts {left}, which is no linear layer that stands alone in {config.model_type} here; merge "
            "the adapter into its model with peft, and name the merged folder"
        )
    return lora, adapters


def _module(rule: Rule, layer: int) -> str:
    return f"{PREFIX}.{rule.tensor.removesuffix('.weight').format(i=layer)}"


def _linear_rules(settings: Settings, config: Config) -> list[Rule]:
    """Layers that stand alone in a tensor of their own."""
    rules = family(config).rules(settings)
    return [rule for rule in rules if rule.layout is TRANSPOSED and rule.ours[0].startswith("layers/")]


def _adapted(settings: Settings, config: Config, lora: Lora, adapters: Params) -> list[tuple[Rule, Any, Any]]:
    found = []
    rules = {rule.ours[0]: rule for rule in _linear_rules(settings, config)}
    for group, layers in adapters["layers"].items():
        for name, pair in layers.items():
            path = f"layers/{group}/{name}/kernel"
            if path not in rules:
                raise UserError(
                    f"{config.model_type} fuses {name} with other layers, so that PEFT cannot adapt it alone; "
                    "merge the adapters (models.lora.merge) and save the whole model"
                )
            found.append((rules[path], pair["a"], pair["b"]))
    return found
