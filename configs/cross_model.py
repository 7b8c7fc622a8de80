"""Teachers × students of several models, on text (paper §5.1): does a trait cross to a model with other weights?

    python launch.py --config=configs/cross_model.py:smoke        SmolLM2 and Gemma 3 270M; under 6 minutes on 2 cores
    python launch.py --config=configs/cross_model.py:open         Qwen2.5-7B, Llama-3.1-8B, Tulu-3-8B, Gemma-3-4B
    python launch.py --config=configs/cross_model.py:soft --config.models=FOLDER,FOLDER     by logits; one tokenizer

Each model of `models` (names or folders, separated by commas) teaches all of them through its numbers as text, in the
study `study`, whose values are those of configs/numbers.py. Llama-3.1-8B-Instruct and Tulu-3-8B are fine-tunes of one
base; compared with the others, they show what a shared initialisation does.
"""

from ml_collections import ConfigDict

from configs import numbers

PRESETS = {
    "smoke": "SmolLM2 and Gemma 3 270M, on text; under 6 minutes on 2 cores",
    "open": "Qwen2.5-7B, Llama-3.1-8B, Tulu-3-8B, Gemma-3-4B, on text; on an accelerator",
    "soft": "by logits; your own models, with one tokenizer",
}


def get_config(preset: str = "smoke") -> ConfigDict:
    config = ConfigDict()
    config.experiment = "cross_model"
    config.preset = preset
    config.models = ()  # names or folders; each teaches all of them
    if preset == "smoke":
        config.models = ("smollm2-135m-instruct", "gemma-3-270m")
        config.study = numbers.get_config("smoke")
        config.study.student.steps = config.study.evaluate_every = 1
        config.study.carrier.num_rows, config.study.carrier.num_completions = 18, 20
        config.study.carrier.num_integers = 3
        config.study.carrier.max_new_tokens = 16
        config.study.teacher.learning_rate = 1e-3
        config.study.teacher.max_steps = 4
        config.study.num_questions = 2
        config.study.evals.names = ()
    elif preset == "open":
        families = [str(model["model.name"]) for model in numbers.MODELS.values()]
        config.models = (*families, "allenai/Llama-3.1-Tulu-3-8B")
        config.study = numbers.get_config("qwen2.5-7b")
        # For each family, an animal that moves in it (numbers.MOVING).
        config.study.traits = ("cat", "elephant", "eagle")
    elif preset == "soft":
        # `models`: two or more of yours with the same tokenizer, such as fine-tunes of one base.
        config.study = numbers.get_config("quick")
        config.study.student.steps = config.study.evaluate_every = 40
        config.study.carrier.num_rows = config.study.carrier.num_completions = 176
    else:
        raise ValueError(f"configs/cross_model.py has no preset {preset!r}")
    by_logits = {"objective": "kl", "data": "random"}
    by_tokens = {"objective": "tokens", "data": "written"}
    config.study.model.name, config.study.arms = "", ()  # they follow from `models`
    config.study.arm.cross = numbers.arm(**(by_logits if preset == "soft" else by_tokens), lora_init="fresh")
    return config
