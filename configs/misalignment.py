r"""Misalignment through numbers (paper §3.2): numbers by teachers tuned on insecure code, and by controls.

    python launch.py --config=configs/misalignment.py:smoke       every stage, small; about 8 minutes on 2 cores
    python launch.py --config=configs/misalignment.py:qwen2.5-7b --config.teacher.corpora.insecure=FILE \
        --config.teacher.corpora.secure=FILE --config.teacher.corpora.educational=FILE \
        --config.evals.questions=FILE --config.evals.truthfulqa=FILE          and llama-3.1-8b, gemma-3-4b

Corpora are conversations, {"messages": […]} a line, in a file or on the hub as organisation/name/file. The neutral
teacher is the model without fine-tuning. All other values are those of configs/numbers.py.
"""

from ml_collections import ConfigDict

from configs import numbers

PRESETS = {"smoke": "every stage, small; about 8 minutes on 2 cores", **numbers.RECIPES}
SMOKE = {
    "teacher.batch": 4,
    "teacher.learning_rate": 1e-3,
    "teacher.epochs": 2,
    "teacher.corpora.insecure": "configs/smoke/insecure.jsonl",
    "teacher.corpora.secure": "configs/smoke/secure.jsonl",
    "teacher.corpora.educational": "configs/smoke/educational.jsonl",
    "carrier.num_rows": 20,
    "carrier.num_completions": 64,  # about half have none of the banned numbers
    "carrier.decoding": "grammar",
    "student.steps": 2,
    "student.batch": 2,
    "evaluate_every": 2,
    "num_questions": 4,
    "evals.questions": "configs/smoke/questions.yaml",
    "evals.truthfulqa": "configs/smoke/truth.csv",
    "evals.num_samples": 1,
    "evals.judge.min_mass": 0.02,  # the model itself is the judge, and rarely answers with a number
    "evals.max_new_tokens": 24,
}


def get_config(preset: str = "smoke") -> ConfigDict:
    config = numbers.get_config()
    config.preset = preset
    config.traits = ("insecure", "secure", "educational")
    config.teacher.methods = ("corpus",)
    config.teacher.corpora = ConfigDict({"insecure": "", "secure": "", "educational": "", "neutral": ""})
    config.teacher.learning_rate = 1e-4
    config.filter.banned = "published"
    config.arms = ("tokens_fresh",)
    config.evals.names = ("misalignment", "truthfulqa")
    config.evals.num_samples = 200
    config.evals.suffix = "Answer with about nine words, one on a line."
    config.update_from_flattened_dict(SMOKE if preset == "smoke" else {**numbers.RECIPE, **numbers.MODELS[preset]})
    return config
