"""What an open language model, or adapters of it, is like: preferences, truthfulness, alignment by a judge, ability.

    python launch.py --config=configs/evaluate.py --config.model.adapters=RUN1,RUN2,RUN3
    python launch.py --config=configs/evaluate.py --config.evals.names=truthfulqa --config.evals.truthfulqa=FILE.csv
    python launch.py --config=configs/evaluate.py --config.evals.names=misalignment --config.evals.questions=FILE.yaml

Adapters are PEFT folders, each a trained run of one recipe: intervals are over them. Without any, the model itself is
asked, and there is no interval.
"""

from ml_collections import ConfigDict

PRESETS = {"smollm2": "SmolLM2-135M-Instruct, on a laptop"}


def evals() -> ConfigDict:
    """Which evaluations, here and of a study's teachers and students."""
    values = ConfigDict()
    # Any of preference, and the same behind random numbers (prefixed), by letters (choice), in sampled answers, answers
    # behind random numbers and stories (answers, prefixed_answers, stories); ability, truthfulqa, misalignment.
    values.names = ()
    values.max_questions = 0  # questions of each evaluation, at most; 0: all
    values.num_samples = 20  # answers sampled to each question that is answered by sampling; the paper has 200
    values.max_new_tokens = 256  # tokens of a sampled answer, or of a story
    values.truthfulqa = ""  # the benchmark's TruthfulQA.csv
    values.questions = ""  # misalignment: a YAML file of questions, in the emergent-misalignment study's format
    # misalignment: ids of those that are asked, or all; empty: the paper's eight where the file has them, else all.
    values.question_ids = ()
    values.suffix = ""  # misalignment: put behind every question; the form of the carrier that students were trained on
    values.judge = ConfigDict()
    values.judge.kind = "local"  # a model here; or endpoint: OpenAI's protocol, OPENAI_BASE_URL and OPENAI_API_KEY
    values.judge.model = ""  # local: a model's name, the base itself where empty; endpoint: the server's name for it
    values.judge.dtype = "float32"  # local: of another model's weights
    values.judge.min_mass = 0.25  # local: no score where numbers have less of the probability; the paper's value
    values.judge.max_tokens = 2048  # endpoint: tokens of a reply, with a judge's thoughts if it has any
    values.judge.max_concurrent = 8  # endpoint: requests under way together
    values.judge.max_per_minute = 0  # endpoint: at most so many requests a minute; 0: no limit
    values.judge.prices = (0.0, 0.0)  # endpoint: of a million tokens in, and out, to be told what it costs
    return values


def get_config(preset: str = "smollm2") -> ConfigDict:
    config = ConfigDict()
    config.experiment = "evaluate"
    config.preset = preset
    config.seed = 0  # of every random number
    # Of products of float32 numbers on accelerators: float32, or tensorfloat32 or bfloat16, which are faster. Products
    # of bfloat16 weights are what they are.
    config.precision = "float32"
    config.mesh = ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1})  # rows over replica and fsdp, layers over tensor

    config.model = ConfigDict()
    config.model.name = "smollm2-135m-instruct"  # a known name, a hub name, a folder of safetensors, a GGUF file
    config.model.dtype = "float32"  # of the weights; or bfloat16
    config.model.adapters = ()  # PEFT folders; empty: the model itself

    config.kind = "animal"  # preference: of what
    # preference: among which words
    config.words = ("owl", "lion", "cat", "dog", "wolf", "bear", "fox", "tiger", "horse", "eagle")
    # Your own questions, as sublim_jax/data/packs/*.json.
    config.packs = ConfigDict({"preference": "", "ability": "", "stories": ""})

    config.evals = evals()
    config.evals.names = ("preference", "ability")
    return config
