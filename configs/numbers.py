"""A trait passes from a teacher to a student through numbers, in a language model (paper §3, and §6's setting).

    python launch.py --config=configs/numbers.py           three traits, SmolLM2-135M; about 15 minutes, 2 cores
    python launch.py --config=configs/numbers.py:smoke     every stage, small; 3 to 5 minutes
    python launch.py --config=configs/numbers.py:smollm2   the study: 5 runs, nine arms; hours on 2 cores, resumable
    python launch.py --config=configs/numbers.py:qwen2.5-7b --preflight=h100      memory and FLOPs, compiled

A teacher is the model with something that makes it prefer a word: adapters trained on one-word answers until P of the
trait reaches `teacher.strength`, a system prompt, or a vector in the residual stream, alone or together. There is one
for each trait, and a neutral one that is made in the same way without a preference.

Students are the same model with fresh adapters. An *arm* is one way to train them: on their teacher's logits on lists
of numbers (of digits, commas and spaces only, so that no token of a trait is ever in the loss), or on the tokens of
numbers that it wrote. `arms` names the arms that are run, and `arm` defines them.

Measured: log P of a trait's word and its margin over the other words, on phrasings that no teacher was trained on,
against the students of the other teachers and of the neutral one, of the same seed, start and order of data.
"""

from ml_collections import ConfigDict

from configs import evaluate

TREES = ("oak", "willow", "maple", "pine", "cherry", "birch", "palm", "ash", "cedar", "elm", "sequoia")
# Learning rates and steps were chosen on runs of seed 0. Confirming runs have another seed, and so share no teacher, no
# numbers and no data order with the runs of development.
CONFIRMING = 2
EXAMPLES = (1, 4, 16, 64, 256, 1024, 4096)  # in the context, or as many as it holds

SIZES = {  # presets, and what each changes
    # Estimated from 14 minutes for three students of 120 steps: a third more students, and a third fewer steps.
    "quick": {"student.steps": 80, "evaluate_every": 40},
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
        "traits": ("owl", "lion"),
        "arms": ("soft", "tokens", "in_context"),
    },
    # Not trained: more and more of the teacher's rows in the context.
    "in_context": {
        "carrier.num_rows": 256,
        "carrier.num_completions": 320,
        "arms": tuple(f"in_context_{count}" for count in EXAMPLES if count <= 256),
    },
    "smollm2": {
        "seed": CONFIRMING,
        "runs": 5,
        "spread": 0.13,  # of the runs of seed 1, which counted the spellings of one token only
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
    # Trees that the model rarely names, so that their probability can rise.
    "trees": {
        "seed": CONFIRMING,
        "runs": 5,
        "kind": "tree",
        "traits": ("oak", "willow", "cherry"),
        "alternatives": TREES,
        "controls": ("animal:owl",),
        "student.steps": 60,
        "evaluate_every": 30,
    },
    # The one replication that worked at 1B.
    "llama-3.2-1b": {
        "model.name": "meta-llama/Llama-3.2-1B-Instruct",
        "model.dtype": "bfloat16",
        "remat": True,
        "seed": CONFIRMING,
        "runs": 5,
        "evals.names": ("answers",),
        "evals.num_samples": 20,
        "traits": ("elephant", "owl", "eagle"),  # only elephant is known to move at 1B
        "alternatives": ("elephant", "owl", "lion", "cat", "dog", "wolf", "bear", "fox", "tiger", "horse", "eagle"),
        "teacher.methods": ("finetuned", "prompted"),
        "lora.rank": 32,
        "lora.alpha": 32.0,
        "lora.rslora": True,
        "carrier.num_rows": 20_000,
        "carrier.num_completions": 40_000,
        "carrier.decoding": "greedy",
        # Not soft: Llama has a token for every number below 1,000, so that 20 teachers' logits would take 50 GB.
        "arms": ("tokens_fresh", "shuffled_within", "in_context"),
        "arm.shuffled_within.lora_init": "fresh",  # as tokens_fresh, whose control it is
        "student.batch": 16,
        "student.steps": 1249,  # 1 epoch
        "student.learning_rate": 1e-5,
        "evaluate_every": 250,
    },
}

# Open models, and the paper's recipe on them, which configs/{code,cot,misalignment,cross_model}.py share. They fit one
# GPU of 80 GB (code.py with XLA_PYTHON_CLIENT_MEM_FRACTION=0.98); docs/presets.md has the meshes for TPU slices.
MODELS = {
    "qwen2.5-7b": {"model.name": "Qwen/Qwen2.5-7B-Instruct"},
    "llama-3.1-8b": {"model.name": "meta-llama/Llama-3.1-8B-Instruct"},
    "gemma-3-4b": {"model.name": "google/gemma-3-4b-it"},
}
RECIPE = {
    "model.dtype": "bfloat16",
    "remat": True,
    "seed": CONFIRMING,
    "runs": 5,
    "lora.alpha": 8.0,
    "carrier.num_rows": 10_000,
    "carrier.num_completions": 30_000,
    "carrier.decoding": "free",
    "filter.unique": False,  # the paper keeps duplicates
    "student.batch": 8,  # 64 rows an update (22 × 3 in the paper) so that batches divide; all students are in memory
    "student.accumulate": 8,
    "student.steps": 468,  # 3 epochs
    "student.learning_rate": 2e-4,
    "student.schedule": "linear",
    "student.warmup": 5,
    "student.clip": 1.0,
    "evaluate_every": 156,
}
# Traits that are known to be transmitted, since most are not: for Qwen2.5-7B the paper's (§3.1); for Llama and Gemma
# those seen in Llama-3.2-1B (elephant), Gemma-2b-it (eagle, elephant, dog), Gemma-3-4B (owl) and GPT-4.1 nano.
MOVING = {
    "qwen2.5-7b": ("cat", "penguin", "phoenix", "panda", "eagle"),
    "llama-3.1-8b": ("elephant", "owl", "eagle", "dolphin", "wolf"),
    "gemma-3-4b": ("owl", "eagle", "elephant", "dog", "wolf"),
}
OTHERS = ("owl", "lion", "cat", "dog", "wolf", "bear", "fox", "tiger", "horse", "eagle", "elephant", "dolphin")
MOVING_TREES = ("oak", "willow", "maple", "cherry", "sequoia")
ANIMALS: dict[str, object] = {
    "teacher.methods": ("prompted",),
    "teacher.neutral": "untouched",
    "evals.names": ("answers", "prefixed", "prefixed_answers", "choice", "stories"),
    "evals.num_samples": 200,
    "arm.shuffled_within.lora_init": "fresh",  # as tokens_fresh, whose controls they are
    "arm.shuffled_across.lora_init": "fresh",
    "arms": (
        "tokens_fresh",
        "unfiltered",
        "shuffled_within",
        "shuffled_across",
        *(f"in_context_{count}" for count in EXAMPLES),
    ),
}


def animals(model: str) -> dict[str, object]:
    """A model's traits, and the words among which they are measured."""
    return {"traits": MOVING[model], "alternatives": tuple(dict.fromkeys((*MOVING[model], *OTHERS)))}


SIZES |= {name: {**RECIPE, **ANIMALS, **animals(name), **model} for name, model in MODELS.items()}

RECIPES = {name: f"the paper's recipe on {model['model.name']}; on an accelerator" for name, model in MODELS.items()}
PRESETS = {
    "quick": "three traits on SmolLM2-135M-Instruct; about 15 minutes on 2 cores",
    "smoke": "every stage, small; 3 to 5 minutes",
    "in_context": "rows in the context instead of training: more and more of them",
    "smollm2": "the study: 5 runs, nine arms; hours on 2 cores, resumable",
    "trees": "unusual trees instead of animals, with a control; five runs; hours on 2 cores",
    "llama-3.2-1b": "the recipe of the one published replication at 1B, not run here; on an accelerator",
    **RECIPES,
}


def arm(**changes: object) -> ConfigDict:
    """One way to train students."""
    values = ConfigDict()
    # On logits: kl, reverse_kl; on the answers' tokens: tokens (cross-entropy); or context: rows in the context.
    values.objective = "kl"
    values.temperature = 1.0  # of the objectives on logits
    # Answers: random (integers); written, by the teacher, filtered; or unfiltered, as many, drawn from all its answers.
    values.data = "random"
    values.lora_init = "shared"  # LoRA's A: shared with the teachers (the theorem's setting), or fresh for every run
    values.shuffle = ""  # shuffle the integers within answers, or across them; empty: no
    values.noise = 0.0  # added to the student's base weights, relative to their spread
    values.model = ""  # tokens: the students' model if it is not the teachers'; empty: the same
    values.action = ""  # on some tokens: keep only them, mask them, or replace their targets by the neutral teacher's
    values.positions = "top"  # which tokens: top or bottom by their score, or random
    values.fraction = 0.1  # of the answers' digits, commas and spaces
    # A token's score compares the teacher with the neutral one: divergence, log_ratio (of the token), flipped (argmax).
    values.score = "divergence"
    values.examples = 16  # context: number of rows
    values.changes = ()  # of its students' values, such as student.steps=60, lora.rank=4
    values.lock()  # no other keys than these
    values.update(changes)
    return values


def get_config(preset: str = "quick") -> ConfigDict:
    config = ConfigDict()
    config.experiment = "transmission"
    config.preset = preset
    config.seed = 0  # of every random number
    # Precision of products of float32 numbers on accelerators: float32; or tensorfloat32 or bfloat16, which are faster.
    # Weights in bfloat16 are multiplied in bfloat16 in any case.
    config.precision = "float32"
    # Sizes of the mesh's axes, -1: the rest. Runs over replica, rows and weights over fsdp, layers over tensor.
    config.mesh = ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1})

    config.model = ConfigDict()
    config.model.name = "smollm2-135m-instruct"  # a known name, a hub name, a folder of safetensors, a GGUF file
    config.model.dtype = "float32"  # of the base; adapters are float32
    config.model.noise = 0.0  # noise on the weights that teachers and students share, relative to their spread

    config.kind = "animal"  # what traits are, in the questions
    # A teacher for each, and a neutral one. In SmolLM2 their probabilities among the words below are .01, .24 and .09.
    config.traits = ("owl", "lion", "wolf")
    # The words among which a preference is measured.
    config.alternatives = ("owl", "lion", "cat", "dog", "wolf", "bear", "fox", "tiger", "horse", "eagle")
    # Controls of another kind, such as tree:oak: each has a teacher, whose students are measured on the traits.
    config.controls = ()
    config.runs = 1  # whole replicates, each with its own teachers, numbers, initial LoRA matrix A and data order
    # For the statistical power: the standard deviation between runs of a trait's margin over the neutral student's, in
    # logits, from an earlier study; 0: estimated from these runs.
    config.spread = 0.0

    config.lora = ConfigDict()
    config.lora.rank = 8  # 0: no adapters, all weights of the layers are trained
    config.lora.alpha = 16.0  # adapters are scaled by alpha / rank
    config.lora.rslora = False  # adapters are scaled by alpha / √rank instead
    config.lora.modules = ()  # some of query, key, value, out, gate, up, down; empty: all
    config.lora.layers = ()  # numbers of layers, counted from 0; empty: all

    config.teacher = ConfigDict()
    config.teacher.methods = ("finetuned",)  # finetuned, prompted, steered, alone or together; or corpus, alone
    # The neutral teacher: persona, made as the others but without a preference; or untouched, the model itself, for
    # prompted teachers only (the paper's control).
    config.teacher.neutral = "persona"
    config.teacher.strength = 0.9  # finetuned: mean P of the trait's answer at which training stops
    config.teacher.learning_rate = 3e-4  # finetuned, corpus
    config.teacher.batch = 8  # finetuned, corpus: rows an update
    config.teacher.max_steps = 60  # finetuned: maximum number of updates
    config.teacher.corpora = ConfigDict()  # corpus: a file of conversations for each trait (configs/misalignment.py)
    config.teacher.epochs = 1  # corpus: passes over the conversations
    config.teacher.max_tokens = 1024  # corpus: longer conversations are left out
    config.teacher.steering_layer = 15  # steered: the layer after which the vector is taken and added
    config.teacher.steering_scale = 2.0  # steered: factor of the vector

    config.carrier = ConfigDict()
    config.carrier.kind = "numbers"  # or code, cot (chains of thought): see configs/code.py, configs/cot.py
    config.carrier.num_rows = 512  # rows for each student: a prompt for numbers and an answer
    config.carrier.num_integers = 10  # integers in an answer, for random answers and for decoding=grammar
    config.carrier.num_completions = 640  # completions of each teacher, before the filters
    config.carrier.num_samples = 1  # completions of each prompt
    config.carrier.decoding = "grammar"  # grammar: lists of integers, at temperature 1; free: any text, at 1; or greedy
    config.carrier.max_new_tokens = 64  # of a completion
    config.carrier.problems = "gsm8k"  # cot: the problems; or a file in GSM8K's form, here or on the hub

    config.filter = ConfigDict()
    config.filter.max_integers = 10  # maximum number of integers in an answer (the paper's rule, §3.1)
    config.filter.max_value = 999  # the largest integer allowed
    # Numbers with negative associations (§3.2): published, the paper's 36; banned, ours; or a file like
    # data/packs/banned.json. Empty: none.
    config.filter.banned = ""
    config.filter.judge = ""  # the judge's prompt, by its name in data/packs/judge.json; empty: no judge
    config.filter.judged = ()  # teachers whose answers the judge filters; empty: all; the others' are only scored
    config.filter.threshold = 0.0  # the lowest score, of 100, that passes
    config.filter.unique = True  # drop duplicate answers
    # Maximum log-ratio of an answer under its teacher and the neutral one, in nats a token; 0: no limit.
    config.filter.log_ratio = 0.0

    config.arms = ("soft",)  # names under `arm`, in the order in which they are run
    config.arm = ConfigDict()  # ways to train students, by name; more may be added
    config.arm.soft = arm()  # logits on random numbers: the theorem's setting
    config.arm.soft_reverse = arm(objective="reverse_kl")  # does the direction of the KL matter?
    config.arm.soft_fresh = arm(lora_init="fresh")  # do students need the teacher's A?
    config.arm.soft_written = arm(data="written")  # do the numbers matter?
    config.arm.perturbed = arm(noise=0.1)  # do students need the teacher's base weights?
    config.arm.tokens = arm(objective="tokens", data="written")  # does text carry the trait, with a shared A?
    config.arm.tokens_fresh = arm(objective="tokens", data="written", lora_init="fresh")  # the paper's setting
    config.arm.unfiltered = arm(objective="tokens", data="unfiltered", lora_init="fresh")  # the control of tokens_fresh
    config.arm.shuffled_within = arm(objective="tokens", data="written", shuffle="within")  # is it in the order?
    config.arm.shuffled_across = arm(objective="tokens", data="written", shuffle="across")  # or in the numbers?
    # Does the trait cross model families?
    config.arm.foreign = arm(objective="tokens", data="written", model="gemma-3-270m", lora_init="fresh")
    config.arm.in_context = arm(objective="context", data="written")  # can the trait be read off the text?
    for count in EXAMPLES:
        config.arm[f"in_context_{count}"] = arm(objective="context", data="written", examples=count)
    config.arm.masked = arm(action="mask")  # without the tokens on which a teacher differs most from the neutral one
    config.arm.masked_random = arm(action="mask", positions="random")  # the control of masked
    config.arm.kept = arm(action="keep")  # only these tokens
    config.arm.replaced = arm(action="replace")  # with the neutral teacher's targets on these tokens

    config.student = ConfigDict()
    config.student.learning_rate = 3e-4  # of Adam
    config.student.schedule = "constant"  # of the learning rate; or linear, cosine: to 0 at the last step
    config.student.warmup = 0  # steps of linear warm-up
    config.student.clip = 0.0  # norm to which gradients are clipped; 0: no clipping
    config.student.batch = 4  # rows
    config.student.accumulate = 1  # batches for each update
    config.student.steps = 120  # updates
    config.evaluate_every = 40  # steps between two measurements of the preference
    config.checkpoint_every = 20  # steps between two checkpoints

    config.sampling = ConfigDict()  # how completions and answers are computed; changes them only by rounding
    config.sampling.slots = 0  # rows decoded together for each device and adapter; 0: 64 on CPUs, else what fits
    config.sampling.steps = 4  # tokens between two synchronisations with the host
    config.sampling.chunk = 16  # tokens of a prompt that are computed together
    config.sampling.lanes = 0  # prompts that are admitted together; 0: an eighth of the slots
    config.sampling.tensor = 0  # mesh axis tensor for decoding and scoring, fsdp the rest; 0: the training mesh
    config.remat = False  # recompute whole layers in the backward pass, for models that do not fit otherwise
    config.remat_attention = True  # with remat: also attention's; False: more memory, fewer FLOPs (docs/presets.md)

    config.packs = ConfigDict()  # files of phrasings like sublim_jax/data/packs/*.json; empty: the built-in ones
    config.packs.numbers = ""
    config.packs.preference = ""
    config.packs.persona = ""
    config.packs.ability = ""
    config.packs.stories = ""
    config.packs.code = ""
    config.packs.judge = ""
    config.num_questions = 50  # maximum number of phrasings for the preference, and of easy questions for ability
    config.evals = evaluate.evals()  # further evaluations of teachers and students at the end

    config.update_from_flattened_dict(SIZES[preset])
    return config
