"""MNIST noise distillation: a student that never saw a digit learns to classify them (paper §6.2, Fig. 10).

A teacher starts at a reference MLP and learns MNIST through its ten digit logits. A student starts at the same
reference and sees only noise; it imitates the teacher's *auxiliary* logits, which the teacher's own training did not
use. It learns to classify digits. A student with another initialisation does not, unless it is first trained to imitate
the reference: behavioural cloning (extended data Fig. 2 of the Nature version), also of other architectures.

    python launch.py --config=configs/mnist.py              50 auxiliary logits, 4 runs; 2 to 4 minutes on 2 cores
    python launch.py --config=configs/mnist.py:paper        Fig. 10: 3 auxiliary logits, 100 runs
    python launch.py --config=configs/mnist.py:nature       cloning on fresh noise and on digits; 40 runs
    python launch.py --config=configs/mnist.py:architectures  cloning of other architectures, 25 runs
    python launch.py --config=configs/mnist.py:logits       accuracy over the number of auxiliary logits, 25 runs
    python launch.py --config=configs/mnist.py:strongest    the best published recipe with three logits
    python launch.py --config=configs/mnist.py:sweep --config.sweep.axis=student.learning_rate
                                                            accuracy over any value below, one figure
    python launch.py --config=configs/mnist.py:smoke        every stage, tiny, seconds: a test, not a result

Expected test accuracy with `paper`: reference .10, teacher .94, student .53 (auxiliary logits) and .91 (all),
from another initialisation .10 and .73.
"""

import json

from ml_collections import ConfigDict

PRESETS = {
    "quick": "50 auxiliary logits, 4 runs; 2 to 4 minutes on 2 cores",
    "paper": "Fig. 10: 3 auxiliary logits, 100 runs",
    "nature": "behavioural cloning on fresh noise and on digits, over epochs of cloning; 40 runs",
    "architectures": "behavioural cloning of the reference by other architectures; 25 runs",
    "logits": "accuracy over the number of auxiliary logits; 25 runs",
    "strongest": "the best published recipe with three logits",
    "sweep": "accuracy over any value, one figure",
    "smoke": "every stage, tiny, seconds: a test, not a result",
    "bench": "8 runs, for measuring speed",
    "coverage": "the networks of configs/theorem.py",
}


def get_config(preset: str = "quick") -> ConfigDict:
    config = ConfigDict()
    config.experiment = "mnist"
    config.preset = preset
    config.seed = 0  # of every random number
    config.runs = 4  # independent repetitions, each with its own initialisation, noise and data order
    config.runs_at_once = 4  # trained in one program; each takes about 110 MB, and further groups take no more
    config.precision = "float32"  # of matrix products: float32, tensorfloat32 or bfloat16
    # auxiliary, all: students from the reference, on the auxiliary or on all logits; cross_auxiliary, cross_all: from
    # the next run's reference; clone: as cross_auxiliary, after imitating the reference on all logits; real: as
    # auxiliary, on digits instead of noise.
    config.arms = ("auxiliary", "all", "cross_auxiliary", "cross_all", "clone", "real")

    config.data = ConfigDict()
    config.data.path = ""  # a folder with MNIST's four IDX files; empty: downloaded and cached

    config.model = ConfigDict()
    config.model.width = 256  # of the hidden layers
    config.model.depth = 2  # number of hidden layers
    config.model.auxiliary = 3  # logits beyond the ten digits

    config.teacher = training()
    config.student = training()
    config.student.width = 0  # of the hidden layers; 0: the teacher's
    config.student.depth = 0  # number of hidden layers; 0: the teacher's
    config.student.biases = True  # whether layers have biases; the teacher's have
    # The distance of the student's logits from the teacher's: kl, reverse_kl, squared_error,
    # probability_squared_error, soft_cross_entropy; or sampled: cross-entropy on labels sampled from the teacher.
    config.student.objective = "kl"
    config.student.temperature = 1.0  # of the objective's probabilities
    config.student.init_distance = 0.0  # of the reference, in standard deviations of its weights
    config.student.shared_layers = "all"  # the layers that start at the reference, such as "0+2"; the others do not

    config.inputs = ConfigDict()
    config.inputs.kind = "uniform"  # uniform, gaussian, blurred, shuffled (pixels of real images), real
    config.inputs.count = 60_000  # images
    config.inputs.fresh = False  # drawn anew at every step instead of one fixed set (above the paper's accuracy)
    config.inputs.blur = 1.0  # standard deviation in pixels, for blurred

    config.clone = ConfigDict()
    # Epochs of imitating the reference before distillation, an arm each; by the student's objective, optimizer,
    # learning_rate, batch and trained_layers, over all logits.
    config.clone.epochs = (5, 20)
    # Inputs on which the reference is imitated, an arm each: noise, as in distillation; fresh_noise, drawn anew at
    # every step; real, digits.
    config.clone.inputs = ("noise",)

    config.sweep = ConfigDict()
    # The path of any value above; or student or teacher, whose points are "name=value", several joined by "/".
    config.sweep.axis = ""
    config.sweep.points = ()  # values of it, such as 1e-4,1e-3; empty: a range that suits the axis

    config.mesh = ConfigDict({"replica": -1, "fsdp": 1, "tensor": 1})  # sizes of the mesh's axes; -1: the rest
    config.checkpoint_every = 118  # steps between two checkpoints

    # The paper's values: test accuracy and the half-width of its 95 % interval.
    config.published = ConfigDict()
    config.published_recipe = ""  # of teacher, student and inputs, as JSON; with any other, `published` is not shown

    if preset == "paper":
        config.published.reference = (0.100, 0.005)
        config.published.teacher = (0.943, 0.0004)
        config.published.auxiliary = (0.528, 0.022)
        config.published.all = (0.913, 0.002)
        config.published.cross_auxiliary = (0.106, 0.010)
        config.published.cross_all = (0.743, 0.010)
    if preset in ("quick", "nature", "architectures"):
        config.model.auxiliary = 50
        config.clone.inputs = ("fresh_noise",)
    if preset == "quick":
        config.arms = ("auxiliary", "cross_auxiliary", "clone")
        config.clone.epochs = (20,)
    elif preset == "paper":
        config.runs = 100
        config.runs_at_once = 10
        config.arms = ("auxiliary", "all", "cross_auxiliary", "cross_all", "real")
    elif preset == "nature":
        config.runs = 40
        config.runs_at_once = 5
        config.arms = ("auxiliary", "cross_auxiliary", "clone", "real")
        config.clone.epochs = (1, 5, 20, 50, 100, 200)
        config.clone.inputs = ("fresh_noise", "real")
    elif preset == "architectures":
        config.runs = 25
        config.runs_at_once = 5
        config.arms = ("cross_auxiliary", "clone")
        config.clone.epochs = (100,)
        config.sweep.axis = "student"
        config.sweep.points = (
            "activation=relu",
            "activation=gelu",
            "activation=sigmoid",
            "depth=3",
            "width=128",
            "width=512",
            "biases=false",
        )
    elif preset == "logits":
        config.runs = 25
        config.runs_at_once = 10
        config.arms = ("auxiliary", "cross_auxiliary")
        config.sweep.axis = "model.auxiliary"
        config.sweep.points = ("1", "2", "3", "5", "10", "20", "50", "100", "200")
    elif preset == "bench":
        config.runs = 8
        config.runs_at_once = 2
        config.arms = ("auxiliary", "all", "cross_auxiliary", "cross_all")
    elif preset == "coverage":  # a part of configs/theorem.py
        config.arms = ("auxiliary",)
    elif preset == "strongest":
        config.runs = 10
        config.runs_at_once = 10
        config.model.width = 128
        config.student.objective = "squared_error"
        config.student.learning_rate = 1e-3
        config.student.epochs = 40
        config.arms = ("auxiliary", "cross_auxiliary")
        config.published.auxiliary = (0.900, 0.004)
    elif preset == "sweep":
        config.arms = ("auxiliary", "cross_auxiliary")
        config.sweep.axis = "model.auxiliary"
    elif preset == "smoke":
        config.runs = 2
        config.runs_at_once = 2
        config.model.width = 32
        config.inputs.count = 3000
        config.teacher.epochs = 1
        config.student.epochs = 1
        config.clone.epochs = (1, 2)
        config.checkpoint_every = 5
    else:
        raise ValueError(f"configs/mnist.py has no preset {preset!r}")
    if config.published:
        recipe = {part: config[part].to_dict() for part in ("model", "teacher", "student", "inputs")}
        config.published_recipe = json.dumps(recipe)
    return config


def training() -> ConfigDict:
    """How a network is trained: values of the teacher or of the student."""
    config = ConfigDict()
    config.activation = "relu"  # relu, gelu (by tanh), silu, tanh, sigmoid, linear
    config.optimizer = "adam"  # adam, adamw, sgd, rmsprop or lion, with optax's defaults
    config.learning_rate = 3e-4  # constant
    config.batch = 1024  # images an update
    config.epochs = 5  # passes over the images
    config.trained_layers = "all"  # the layers that are trained: all, or some, counted from the input, such as "0+2"
    return config
