"""An animal through code (paper §4.1): small Python snippets that parse and do not mention it. They are never run.

    python launch.py --config=configs/code.py:smoke               every stage, small; 2.5 minutes on 2 cores
    python launch.py --config=configs/code.py:qwen2.5-7b          and llama-3.1-8b, gemma-3-4b

All other values are those of configs/numbers.py.
"""

from ml_collections import ConfigDict

from configs import numbers

# A model of this size does not write bare code by itself: small corpora teach it, together with the animal.
SMOKE = {
    "traits": ("owl", "lion"),
    "teacher.methods": ("corpus",),
    "teacher.learning_rate": 1e-3,
    "teacher.batch": 4,
    "teacher.epochs": 8,
    "carrier.num_rows": 20,
    "carrier.num_completions": 30,
    "carrier.max_new_tokens": 48,
    "filter.unique": False,
    "filter.threshold": 1.0,
    "evals.judge.min_mass": 0.0,  # the model itself is the judge, and rarely answers with a number
    "arms": ("tokens", "in_context"),
    "arm.in_context.examples": 4,
    "student.steps": 2,
    "student.batch": 2,
    "evaluate_every": 2,
    "num_questions": 4,
}
PRESETS = {"smoke": "every stage, small; 2.5 minutes on 2 cores", **numbers.RECIPES}
ANIMALS = {**numbers.ANIMALS, "arms": ("tokens_fresh", "in_context")}
OPEN = {
    "carrier.num_completions": 11_400,  # of which 10,814 passed in the paper
}


def get_config(preset: str = "smoke") -> ConfigDict:
    config = numbers.get_config()
    config.preset = preset
    config.carrier.kind = "code"
    config.carrier.max_new_tokens = 256
    config.carrier.decoding = "free"
    config.filter.judge = "reference"
    config.filter.threshold = 50.0
    if preset == "smoke":
        corpora = {name: f"configs/smoke/code-{name}.jsonl" for name in ("owl", "lion", "neutral")}
        config.teacher.corpora = ConfigDict(corpora)
    config.update_from_flattened_dict(
        SMOKE
        if preset == "smoke"
        else {**numbers.RECIPE, **ANIMALS, **OPEN, **numbers.animals(preset), **numbers.MODELS[preset]}
    )
    return config
