"""What an open language model, or adapters of it, is like: preferences, truthfulness, alignment by a judge, ability.

    python launch.py --config=configs/evaluate.py --config.model.adapters=RUN1,RUN2,RUN3
    python launch.py --config=configs/evaluate.py --config.evaluations=truthfulqa --config.truthfulqa=TruthfulQA.csv
    python launch.py --config=configs/evaluate.py --config.evaluations=misalignment --config.questions=QUESTIONS.yaml

Adapters are PEFT folders, each a trained run of one recipe: intervals are over them. Without any, the model itself is
asked, and there is no interval.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "smollm2") -> ConfigDict:
    if preset != "smollm2":
        raise ValueError(f"configs/evaluate.py has no preset {preset!r}; it has smollm2")
    config = ConfigDict()
    config.experiment = "evaluate"
    config.preset = preset
    config.seed = 0
    config.mesh = ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1})  # rows over replica and fsdp, layers over tensor

    config.model = ConfigDict()
    config.model.name = "smollm2-135m-instruct"  # or a hub name, a folder of safetensors, a GGUF file
    config.model.dtype = "float32"  # or bfloat16
    config.model.adapters = ""  # PEFT folders, commas in between; empty: the model itself

    config.evaluations = ("preference", "ability")  # truthfulqa, misalignment

    config.kind = "animal"  # preference: of what, and among which words
    config.words = ("owl", "lion", "cat", "dog", "wolf", "bear", "fox", "tiger", "horse", "eagle")
    config.packs = ConfigDict({"preference": "", "ability": ""})  # your own phrasings: sublim_jax/data/packs/*.json

    config.truthfulqa = ""  # the benchmark's TruthfulQA.csv

    config.questions = ""  # misalignment: a YAML file of questions, in the emergent-misalignment study's format
    config.samples = 20  # of each question; the paper has 200
    config.max_new_tokens = 256
    config.suffix = ""  # behind every question: the form of the carrier that students were trained on

    config.judge = ConfigDict()
    config.judge.kind = "local"  # or endpoint: OpenAI's protocol, OPENAI_BASE_URL and OPENAI_API_KEY
    config.judge.model = ""  # local: a model's name, this one where empty; endpoint: the name that the server knows
    config.judge.at_once = 8  # endpoint: requests under way together
    config.judge.per_minute = 0  # endpoint: at most so many requests a minute; 0: no limit
    return config
