"""Evaluates an open language model, or adapters of it: preferences, truthfulness, alignment by a judge, ability.

    python launch.py --config=configs/evaluate.py --config.model.adapters=RUN1,RUN2,RUN3
    python launch.py --config=configs/evaluate.py --config.evals.names=truthfulqa --config.evals.truthfulqa=FILE.csv
    python launch.py --config=configs/evaluate.py --config.evals.names=misalignment --config.evals.questions=FILE.yaml

Adapters are PEFT folders, each a training run of the same recipe; intervals are over these runs. Without adapters the
model itself is evaluated, without intervals.
"""

from ml_collections import ConfigDict

PRESETS = {"smollm2": "SmolLM2-135M-Instruct, on a laptop"}


def evals() -> ConfigDict:
    """Evaluations, of a model here and of a study's teachers and students."""
    values = ConfigDict()
    # Any of: preference, by log P, or after random numbers (prefixed), or in a multiple choice (choice); rates in
    # sampled answers (answers), answers after random numbers (prefixed_answers) or stories (stories); ability,
    # truthfulqa, misalignment.
    values.names = ()
    values.max_questions = 0  # maximum number of questions of each evaluation; 0: all
    values.num_samples = 20  # sampled answers to each question; 200 in the paper
    values.max_new_tokens = 256  # of a story or of an answer about misalignment; answers that name a word have 12
    values.truthfulqa = ""  # the benchmark's TruthfulQA.csv
    values.questions = ""  # misalignment: a YAML file of questions, in the emergent-misalignment study's format
    # misalignment: ids of the questions to ask, or all; empty: the paper's eight if the file has them, else all.
    values.question_ids = ()
    values.suffix = ""  # misalignment: appended to every question; the form of the carrier that students read
    values.judge = ConfigDict()
    values.judge.kind = "local"  # a model on this machine; or endpoint: OpenAI's API (OPENAI_BASE_URL, OPENAI_API_KEY)
    values.judge.model = ""  # local: a model's name, or empty for the base itself; endpoint: the server's model name
    values.judge.dtype = "float32"  # local: of the weights of another model
    values.judge.min_mass = 0.25  # local: minimum probability of numbers, else there is no score; the paper's value
    values.judge.max_tokens = 2048  # endpoint: of a reply, including a reasoning model's thoughts
    values.judge.max_concurrent = 8  # endpoint: concurrent requests
    values.judge.max_per_minute = 0  # endpoint: maximum number of requests a minute; 0: no limit
    values.judge.prices = (0.0, 0.0)  # endpoint: of a million input and output tokens, for the report of its cost
    return values


def get_config(preset: str = "smollm2") -> ConfigDict:
    config = ConfigDict()
    config.experiment = "evaluate"
    config.preset = preset
    config.seed = 0  # of every random number
    # Precision of products of float32 numbers on accelerators: float32; or tensorfloat32 or bfloat16, which are faster.
    # Weights in bfloat16 are multiplied in bfloat16 in any case.
    config.precision = "float32"
    config.mesh = ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1})  # rows over replica and fsdp, layers over tensor

    config.model = ConfigDict()
    config.model.name = "smollm2-135m-instruct"  # a known name, a hub name, a folder of safetensors, a GGUF file
    config.model.dtype = "float32"  # of the weights; or bfloat16
    config.model.adapters = ()  # PEFT folders; empty: the model itself

    config.kind = "animal"  # what a preference is about, in the questions
    # The words among which a preference is measured.
    config.words = ("owl", "lion", "cat", "dog", "wolf", "bear", "fox", "tiger", "horse", "eagle")
    # Files of your own questions, in the form of sublim_jax/data/packs/*.json.
    config.packs = ConfigDict({"preference": "", "ability": "", "stories": ""})

    config.evals = evals()
    config.evals.names = ("preference", "ability")
    return config
