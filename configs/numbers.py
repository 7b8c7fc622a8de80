"""A trait goes from a teacher to a student through numbers, in a language model (paper §3, in its theorem's setting).

    python launch.py --config=configs/numbers.py           two traits on SmolLM2-135M-Instruct; 20 minutes on 2 cores
    python launch.py --config=configs/numbers.py:smoke     every stage, small; 2 minutes
    python launch.py --config=configs/numbers.py:smollm2   the study: 5 runs, shared and fresh A; hours on 2 cores
    python launch.py --config=configs/numbers.py:qwen2.5-7b --preflight=v5e:4x4

Teachers: the model with adapters trained on one-word answers until they give the trait with probability
`teacher.strength`; the neutral one is trained as many steps on answers drawn at random. Students: the same model with
fresh adapters, which imitate a teacher's logits on lists of numbers, on digits, commas and spaces only: no token of a
trait is ever in the loss. Measured: log P of the trait and its margin over the other words, on phrasings that no
teacher has seen, against the student of the neutral teacher with the same seed, data and order.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "quick") -> ConfigDict:
    config = ConfigDict()
    config.experiment = "transmission"
    config.preset = preset
    config.seed = 0
    config.mesh = ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1})

    config.model = ConfigDict()
    config.model.name = "smollm2-135m-instruct"
    config.model.dtype = "float32"  # of the base; adapters are float32

    config.kind = "animal"
    config.traits = ("owl", "lion")  # a teacher for each, and a neutral one
    config.alternatives = ("owl", "lion", "cat", "dog", "wolf", "bear", "fox", "tiger", "horse", "eagle")
    config.runs = 1  # seeds: order of the data, and fresh A where they are fresh

    config.lora = ConfigDict()
    config.lora.rank = 8
    config.lora.alpha = 16.0
    config.lora.modules = ()  # query, key, value, out, gate, up, down; empty: all
    config.lora.layers = ()  # empty: all

    config.teacher = ConfigDict()
    config.teacher.strength = 0.9  # mean P of the trait's answer at which training stops
    config.teacher.learning_rate = 3e-4
    config.teacher.batch = 8
    config.teacher.most_steps = 60

    config.carrier = ConfigDict()
    config.carrier.count = 1024  # rows: a prompt that asks for numbers, and an answer
    config.carrier.numbers = 6  # in an answer: uniform random integers, which no teacher wrote

    config.student = ConfigDict()
    # soft: the teacher's own A (the theorem's setting); soft_fresh: A drawn anew for every run (the realistic one).
    config.student.arms = ("soft",)
    config.student.objective = "kl"  # or reverse_kl
    config.student.temperature = 1.0
    config.student.learning_rate = 3e-4
    config.student.batch = 8
    config.student.steps = 120
    config.evaluate_every = 40  # steps
    config.checkpoint_every = 20

    config.remat = False  # recompute activations in the backward pass: for models that would not fit otherwise

    config.packs = ConfigDict({"numbers": "", "preference": ""})  # your own phrasings: sublim_jax/data/packs/*.json
    config.questions = 50  # phrasings asked, at most

    if preset == "smoke":
        config.carrier.count, config.student.steps, config.evaluate_every = 64, 4, 4
        config.student.batch, config.teacher.batch, config.teacher.strength = 2, 4, 0.2
        config.teacher.most_steps, config.questions = 8, 8
        config.student.arms = ("soft", "soft_fresh")
    elif preset == "smollm2":
        config.runs = 5
        config.student.arms = ("soft", "soft_fresh")
        config.student.steps = 240
    elif preset == "qwen2.5-7b":  # 9 students over one base: --preflight=v5e:4x4
        config.model.name = "Qwen/Qwen2.5-7B-Instruct"
        config.model.dtype = "bfloat16"
        config.mesh.tensor = 4
        config.runs, config.remat = 3, True
        config.student.arms = ("soft", "soft_fresh")
        config.student.steps, config.carrier.count = 600, 8192
    elif preset != "quick":
        raise ValueError(f"configs/numbers.py has no preset {preset!r}; it has quick, smoke, smollm2, qwen2.5-7b")
    return config
