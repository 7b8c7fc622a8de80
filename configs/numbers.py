"""A trait goes from a teacher to a student through numbers, in a language model (paper §3, and its theorem's setting).

    python launch.py --config=configs/numbers.py           two traits on SmolLM2-135M-Instruct; 14 minutes on 2 cores
    python launch.py --config=configs/numbers.py:smoke     every stage, small; 3 to 5 minutes
    python launch.py --config=configs/numbers.py:smollm2   the study: 5 runs, all controls; hours on 2 cores, resumable
    python launch.py --config=configs/numbers.py:qwen2.5-7b --preflight=v5e:4x4      and llama-3.2-1b

A teacher is the model and whatever makes it prefer something: adapters trained on one-word answers until they give the
trait with probability `teacher.strength`, a system prompt, a vector in the residual stream, together or alone. There is
one for each trait, and a neutral one that was moved as far, to nowhere.

Students are the same model with fresh adapters. An *arm* is one way to teach them: they imitate their teacher's logits
on lists of numbers, on digits, commas and spaces only, so that no token of a trait is ever in the loss; or the tokens
of numbers that it wrote. `arms` names those that are trained, `arm` says what each of them is.

Measured: log P of a trait's word and its margin over the other words, on phrasings that no teacher has seen, against
the other traits' students and the neutral teacher's student of the same seed, start and order of data.
"""

from ml_collections import ConfigDict

from configs import evaluate

TREES = ("oak", "willow", "maple", "pine", "cherry", "birch", "palm", "ash", "cedar", "elm")
EXAMPLES = (1, 4, 16, 64, 256, 1024, 4096)  # in the context; as many as it holds

SIZES = {  # presets, and what each changes
    "quick": {},
    "smoke": {
        "carrier.num_rows": 20,
        "carrier.num_completions": 24,
        "student.steps": 2,
        "evaluate_every": 2,
        "student.batch": 2,
        "teacher.batch": 4,
        "teacher.strength": 0.2,
        "teacher.max_steps": 8,
        "num_questions": 4,
        "arm.in_context.examples": 4,
        "evals.names": ("answers",),
        "evals.num_samples": 1,
        "evals.max_questions": 4,
        "arms": ("soft", "tokens", "in_context"),
    },
    # Read, not learnt: more and more of what the teacher wrote in the context.
    "in_context": {
        "carrier.num_rows": 256,
        "carrier.num_completions": 320,
        "arms": tuple(f"in_context_{count}" for count in EXAMPLES),
    },
    "smollm2": {
        "runs": 5,
        "evals.names": ("answers",),
        "evals.num_samples": 1,
        "carrier.num_rows": 256,
        "carrier.num_completions": 320,
        "student.steps": 60,
        "evaluate_every": 30,
        "arms": (
            "soft",
            "soft_fresh",
            "perturbed",
            "tokens",
            "soft_written",
            "in_context",
            "shuffled_within",
            "shuffled_across",
            "foreign",
        ),
    },
    # Unusual among words of a kind are those that few would name: there is room above.
    "trees": {
        "kind": "tree",
        "traits": ("oak", "willow"),
        "alternatives": TREES,
    },
    # The one replication that worked at 1B.
    "llama-3.2-1b": {
        "model.name": "meta-llama/Llama-3.2-1B-Instruct",
        "model.dtype": "bfloat16",
        "remat": True,
        "runs": 3,
        "evals.names": ("answers",),
        "evals.num_samples": 20,
        "traits": ("elephant", "owl"),
        "alternatives": ("elephant", "owl", "lion", "cat", "dog", "wolf", "bear", "fox", "tiger", "horse", "eagle"),
        "teacher.methods": ("finetuned", "prompted"),
        "lora.rank": 32,
        "lora.alpha": 32.0,
        "lora.rslora": True,
        "carrier.num_rows": 20_000,
        "carrier.num_completions": 40_000,
        "carrier.decoding": "greedy",
        "arms": ("tokens_fresh", "shuffled_within", "soft", "soft_fresh", "in_context"),
        "arm.shuffled_within.lora_init": "fresh",  # as of what it is the control of
        "student.batch": 16,
        "student.steps": 1249,  # 1 epoch
        "student.learning_rate": 1e-5,
        "evaluate_every": 250,
    },
}

# Open models, and the paper's recipe on them, which configs/{code,cot,misalignment,cross_model}.py share.
MODELS = {
    "qwen2.5-7b": {"model.name": "Qwen/Qwen2.5-7B-Instruct", "mesh.tensor": 4},
    "llama-3.1-8b": {"model.name": "meta-llama/Llama-3.1-8B-Instruct", "mesh.tensor": 4},
    "gemma-3-4b": {"model.name": "google/gemma-3-4b-it", "mesh.tensor": 4},
}
RECIPE = {
    "model.dtype": "bfloat16",
    "remat": True,
    "runs": 3,
    "lora.alpha": 8.0,
    "carrier.num_rows": 10_000,
    "carrier.num_completions": 30_000,
    "carrier.decoding": "free",
    "student.batch": 22,
    "student.accumulate": 3,
    "student.steps": 456,  # 3 epochs
    "student.learning_rate": 2e-4,
    "student.schedule": "linear",
    "student.warmup": 5,
    "student.clip": 1.0,
    "evaluate_every": 152,
}
ANIMALS: dict[str, object] = {
    "teacher.methods": ("prompted",),
    "evals.names": ("answers", "prefixed", "choice", "stories"),
    "evals.num_samples": 200,
    "arm.shuffled_within.lora_init": "fresh",  # as of tokens_fresh, whose controls they are
    "arm.shuffled_across.lora_init": "fresh",
    "arms": (
        "tokens_fresh",
        "shuffled_within",
        "shuffled_across",
        "soft_fresh",
        *(f"in_context_{count}" for count in EXAMPLES),
    ),
}
SIZES |= {name: {**RECIPE, **ANIMALS, **model} for name, model in MODELS.items()}


def arm(**changes: object) -> ConfigDict:
    """One way to teach students."""
    values = ConfigDict()
    values.objective = "kl"  # on logits: kl, reverse_kl; tokens: cross-entropy; context: no training, rows in context
    values.temperature = 1.0  # of the objectives on logits
    values.data = "random"  # uniform integers that no teacher wrote; or written: by the teacher, filtered
    values.lora_init = "shared"  # the teachers' own A (the theorem's setting); or fresh: drawn anew for every run
    values.shuffle = ""  # the numbers: within answers, or across them
    values.noise = 0.0  # on the student's base weights, relative to their spread: another initialisation
    values.model = ""  # another model than the teachers', for students that imitate tokens
    # Of all the answers' tokens, this share by a score: kept alone, masked, or answered by the neutral teacher instead.
    values.action = ""  # keep, mask, replace
    values.positions = "top"  # or bottom, or random
    values.fraction = 0.1
    values.score = "divergence"  # of the teacher from the neutral one; log_ratio: of the token; flipped: its argmax
    values.examples = 16  # context: rows in it
    values.changes = ()  # of this arm's students: "student.steps=60", "lora.rank=4"
    values.lock()  # no other keys than these
    values.update(changes)
    return values


def get_config(preset: str = "quick") -> ConfigDict:
    if preset not in SIZES:
        raise ValueError(f"configs/numbers.py has no preset {preset!r}; it has {', '.join(SIZES)}")
    config = ConfigDict()
    config.experiment = "transmission"
    config.preset = preset
    config.seed = 0
    config.mesh = ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1})

    config.model = ConfigDict()
    config.model.name = "smollm2-135m-instruct"
    config.model.dtype = "float32"  # of the base; adapters are float32
    config.model.noise = 0.0  # on the weights that teachers and students share, relative to their spread

    config.kind = "animal"
    config.traits = ("owl", "lion")  # a teacher for each, and a neutral one
    config.alternatives = ("owl", "lion", "cat", "dog", "wolf", "bear", "fox", "tiger", "horse", "eagle")
    config.runs = 1  # whole replicates: each has teachers, numbers, A and an order of its own

    config.lora = ConfigDict()
    config.lora.rank = 8  # 0: no adapters; all weights of the layers are trained
    config.lora.alpha = 16.0
    config.lora.rslora = False  # scale by alpha / √rank
    config.lora.modules = ()  # query, key, value, out, gate, up, down; empty: all
    config.lora.layers = ()  # empty: all

    config.teacher = ConfigDict()
    config.teacher.methods = ("finetuned",)  # prompted, steered: any of them, together or alone; corpus: alone
    config.teacher.strength = 0.9  # finetuned: mean P of the trait's answer at which training stops
    config.teacher.learning_rate = 3e-4
    config.teacher.batch = 8
    config.teacher.max_steps = 60
    config.teacher.corpora = ConfigDict()  # corpus: a file of conversations for each trait (configs/misalignment.py)
    config.teacher.epochs = 1  # over them
    config.teacher.max_tokens = 1024  # longer conversations are left out
    config.teacher.steering_layer = 15  # steered: the vector is the persona's mean difference after this layer,
    config.teacher.steering_scale = 2.0  # times this

    config.carrier = ConfigDict()
    config.carrier.kind = "numbers"  # code, cot (chains of thought): see configs/code.py, configs/cot.py
    config.carrier.num_rows = 512  # rows for each student: a prompt that asks for numbers, and an answer
    config.carrier.num_integers = 10  # in an answer, random or by grammar
    # What teachers write:
    config.carrier.num_completions = 640  # completions by each teacher, before filters,
    config.carrier.num_samples = 1  # of which so many of each prompt
    config.carrier.decoding = "grammar"  # or free: whatever it says at temperature 1; or greedy
    config.carrier.max_new_tokens = 64
    config.carrier.problems = "gsm8k"  # cot: GSM8K; or a file of its form, here or on the hub

    config.filter = ConfigDict()  # of written numbers: the paper's rule (§3.1), no word of a trait, and
    config.filter.max_integers = 10  # integers in an answer
    config.filter.max_value = 999
    config.filter.banned = ""  # numbers of bad associations (§3.2): "banned", ours, or a file as data/packs/banned.json
    config.filter.judge = ""  # what prompt a judge (evals.judge) is given for an answer, of data/packs/judge.json,
    config.filter.threshold = 0.0  # and the score of 100 that it needs
    config.filter.unique = True  # no answer twice
    config.filter.log_ratio = (
        0.0  # nats a token that the teacher may find an answer likelier than the neutral one; 0: any
    )

    config.arms = ("soft",)  # which of these are trained; any may be added
    config.arm = ConfigDict()
    config.arm.soft = arm()
    config.arm.soft_reverse = arm(objective="reverse_kl")
    config.arm.soft_fresh = arm(lora_init="fresh")
    config.arm.soft_written = arm(data="written")
    config.arm.perturbed = arm(noise=0.1)
    config.arm.tokens = arm(objective="tokens", data="written")
    config.arm.tokens_fresh = arm(objective="tokens", data="written", lora_init="fresh")
    config.arm.shuffled_within = arm(objective="tokens", data="written", shuffle="within")
    config.arm.shuffled_across = arm(objective="tokens", data="written", shuffle="across")
    config.arm.foreign = arm(objective="tokens", data="written", model="gemma-3-270m", lora_init="fresh")
    config.arm.in_context = arm(objective="context", data="written")
    for count in EXAMPLES:
        config.arm[f"in_context_{count}"] = arm(objective="context", data="written", examples=count)
    config.arm.masked = arm(action="mask")  # the tokens on which teacher and neutral teacher differ most
    config.arm.masked_random = arm(action="mask", positions="random")
    config.arm.kept = arm(action="keep")
    config.arm.replaced = arm(action="replace")

    config.student = ConfigDict()
    config.student.learning_rate = 3e-4
    config.student.schedule = "constant"  # linear, cosine: to 0 at the last step
    config.student.warmup = 0  # steps, linear
    config.student.clip = 0.0  # norm of a gradient; 0: none
    config.student.batch = 4
    config.student.accumulate = 1  # batches an update
    config.student.steps = 120
    config.evaluate_every = 40  # steps
    config.checkpoint_every = 20

    config.sampling = ConfigDict()  # how completions and answers are computed, not what they are, to rounding
    config.sampling.slots = 64  # rows decoded together, for each device and each adapter
    config.sampling.steps = 4  # tokens between two looks of the host
    config.remat = False  # recompute activations in the backward pass: for models that would not fit otherwise

    config.packs = ConfigDict()  # your own phrasings, as sublim_jax/data/packs/*.json
    config.packs.numbers = ""
    config.packs.preference = ""
    config.packs.persona = ""
    config.packs.ability = ""
    config.packs.stories = ""
    config.packs.code = ""
    config.packs.judge = ""
    config.num_questions = 50  # phrasings asked, at most; and easy questions
    config.evals = evaluate.evals()  # what teachers and students are asked at the end, beside their preference

    config.update_from_flattened_dict(SIZES[preset])
    return config
