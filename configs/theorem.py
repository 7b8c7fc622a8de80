"""The one-step gradient-alignment theorem (paper §6.1, App. C), checked numerically in float64, and its uses.

A student that starts where its teacher started and imitates it on any inputs moves, to first order, in a direction
that lowers the teacher's own loss: D_S·D_T = ε A + O(ε²) with A ≥ 0.

    python launch.py --config=configs/theorem.py             the check; or :language_model, :trajectory, …

Expected of the check: every row and control "as predicted", and those of a ReLU network, which has kinks, consistent;
slopes near 1 (above it for ReLU), 2 for the cubic control, 0 for constant ones.
"""

from ml_collections import ConfigDict

from configs import mnist

PRESETS = {
    "check": "many losses, networks, teachers and inputs, and controls that must fail; about a minute on 2 cores",
    "language_model": "the check inside SmolLM2-135M: all parameters and LoRA; about 10 minutes on 2 cores",
    "trajectory": "beyond one step, along MNIST distillation; 3 minutes",
    "forecast": "coverage before training against accuracy after, over 72 settings; about 15 minutes",
    "examples": "which noise images carry the trait; about a minute",
    "smoke": "the check with few draws",
}


def get_config(preset: str = "check") -> ConfigDict:
    config = ConfigDict()
    config.preset = preset
    config.seed = 0  # of every random number
    # Sizes of the mesh's axes; -1: the rest. Checks of one step use a single device.
    config.mesh = ConfigDict({"replica": -1, "fsdp": 1, "tensor": 1})
    if preset != "language_model":
        config.data = ConfigDict()
        config.data.path = ""  # a folder with MNIST's four IDX files; empty: downloaded and cached

    if preset in ("check", "smoke"):
        config.experiment = "alignment"
        # How far the teacher moves: the root mean square change of its logits on the support, in `num` steps from
        # 10^min to 10^max. Computed in float64, because float32 does not resolve such small steps.
        config.steps = ConfigDict({"min": -8.0, "max": 0.0, "num": 17})
        config.support = (10, 11, 12)  # the logits, of 13, on which the student is compared with its teacher
        config.examples = 128  # inputs of the student
        config.learning_rate = 0.1  # α, the length of the student's step
        config.num_draws = 300  # of networks and data, for the sign of D_S·D_T
        config.num_label_draws = 3000  # of labels sampled at temperature 1
        if preset == "smoke":
            config.num_draws, config.num_label_draws = 20, 200
    elif preset == "language_model":
        config.experiment = "language_alignment"
        config.model = ConfigDict()
        config.model.name = "smollm2-135m-instruct"  # a known name, a hub name, a folder of safetensors, a GGUF file
        config.model.dtype = "float32"  # in which weights are read; everything is computed in float64
        config.kind, config.trait = "animal", "owl"  # the teacher moves towards answering with this trait
        config.num_rows = 2  # prompts for numbers with random answers: the student's inputs
        config.num_integers = 8  # in each answer; student and teacher are compared on digits, commas and spaces
        config.num_questions = 8  # about the trait, in the teacher's loss
        config.rank = 8  # of LoRA, for the rows in which adapters are θ
        config.noise = 0.1  # on the weights of a student with another initialisation, relative to their spread
        # How far the teacher moves: the root mean square change of its logits on the support.
        config.steps = ConfigDict({"min": -7.0, "max": -1.0, "num": 13})
        config.learning_rate = 1e-4  # α, the length of the student's step
    elif preset in ("trajectory", "forecast", "examples"):
        config.experiment = preset
        config.mnist = mnist.get_config("coverage")  # how teachers and students are trained: configs/mnist.py
        if preset != "examples":
            config.probe = 4096  # number of inputs on which coverage and row spaces are measured
        if preset == "trajectory":
            config.mnist.runs = config.mnist.runs_at_once = 4
            config.auxiliary = (2, 3, 5, 10)  # numbers of auxiliary logits whose row spaces are compared
            config.every = 5  # steps between two measurements
            config.iterations = 100  # of conjugate gradients
        elif preset == "forecast":
            config.mnist.runs = config.mnist.runs_at_once = 3
            config.auxiliary = (2, 3, 5, 10)  # numbers of auxiliary logits
            config.kinds = ("uniform", "gaussian", "blurred", "shuffled", "real")  # of inputs
            config.distances = (0.0, 0.1, 0.3)  # of the student's start from the reference
            config.widths = (64, 128, 512)  # of the network, with uniform noise and no distance
        elif preset == "examples":
            config.mnist.runs = config.mnist.runs_at_once = 10
            config.share = 0.1  # share of the noise images that is kept; epochs grow accordingly
    else:
        raise ValueError(f"configs/theorem.py has no preset {preset!r}")
    return config
