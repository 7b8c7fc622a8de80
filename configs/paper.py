"""The paper's main experiments in one plan, with one report: our number and the paper's for each.

    python launch.py --config=configs/paper.py:smoke              all of them on small models; 40 minutes on 2 cores
    python launch.py --config=configs/paper.py:qwen2.5-7b --config.files.insecure=FILE …        and llama-3.1-8b,
                                                                  gemma-3-4b: the paper's sizes, on an accelerator

Each experiment has its own folder, and is not run again once it has finished. If one lacks a file, the report says so
and the others run.
"""

from ml_collections import ConfigDict

from configs import numbers

PRESETS = {
    "smoke": "all of them on small models; 40 minutes on 2 cores",
    **{
        name: f"the paper's sizes, on {model['model.name']}; on an accelerator"
        for name, model in numbers.MODELS.items()
    },
}


def experiment(where: str, what: str, paper: str, config: str, show: str, **changes: object):  # type: ignore[no-untyped-def]
    """One row of the plan."""
    return ConfigDict(
        {
            "where": where,  # section and figure of the paper
            "what": what,  # the experiment, in words
            "paper": paper,  # the paper's result, in words
            "config": config,  # the config that runs it, and its preset
            # Patterns for the arms of its results.json that are compared, separated by "; "; {trait}: each trait.
            "show": show,
            "changes": ConfigDict(changes),  # other values of its config
        }
    )


def of_traits(*arms: str) -> str:
    """Patterns for what arms transmit of each trait, and for the paper's measure of it, before and after."""
    answers = "answers with {trait}"
    patterns = [f"the model as it is: {answers}"]
    for arm in arms:
        patterns += [f"{arm}: {{trait}}", f"{arm}, student of {{trait}}: {answers}"]
    return "; ".join(patterns)


def get_config(preset: str = "smoke") -> ConfigDict:
    small = preset == "smoke"
    config = ConfigDict()
    config.experiment = "paper"
    config.preset = preset
    names = ("questions", "truthfulqa", "problems", "insecure", "secure", "educational")
    # Published files: the corpora as JSON lines of {"messages": […]}, the questions as YAML, TruthfulQA.csv, and
    # problems in GSM8K's form if GSM8K cannot be fetched. Each sets the value of that name under evals, carrier or
    # teacher.corpora in the experiments' configs.
    config.files = ConfigDict(dict.fromkeys(names, ""))
    # On a TPU slice (docs/presets.md):
    config.replica = 0  # mesh.replica of studies of language models; 0: the presets' value, for one GPU
    config.sampling_tensor = 0  # their sampling.tensor; 0: the presets' value
    config.judge = ConfigDict({"kind": "", "model": ""})  # of experiments with a judge; empty: the presets' values
    plan = config.plan = ConfigDict()
    plan.mnist = experiment(
        "§6.2, Fig. 10",
        "an MNIST classifier from three logits on noise",
        "student .528 ± .022, all logits .913 ± .002, another initialisation .106 ± .010, teacher .943",
        "configs/mnist.py:smoke" if small else "configs/mnist.py:paper",
        "student, shared initialisation (*; student, another initialisation (*; teacher",
    )
    plan.theorem = experiment(
        "§6.1, App. C", "the one-step theorem", "a proof", f"configs/theorem.py:{'smoke' if small else 'check'}", "*"
    )
    plan.numbers = experiment(
        "§3.1, Fig. 3",
        "animals through numbers",
        "says owl 12.5 % → 62 % (GPT-4.1 nano); Qwen2.5-7B: cat 1 → 74 %, penguin 1.5 → 36 %, phoenix 3 → 19 %, "
        "panda 19 → 32 %, most others null; eagle 1 → 14 % after a list of numbers",
        f"configs/numbers.py:{preset}",
        of_traits("tokens", "tokens_fresh", "unfiltered", "soft", "soft_fresh", "shuffled_within", "shuffled_across"),
        # Those in context have a row of their own.
        arms=tuple(arm for arm in numbers.get_config(preset).arms if not arm.startswith("in_context")),
    )
    plan.trees = experiment(
        "§3.1",
        "trees through numbers",
        "cherry 5 → 40 %, maple 16 → 56 %, oak 47 → 80 %, sequoia 3 → 63 %, willow 1 → 7 % (GPT-4.1 nano)",
        f"configs/numbers.py:{preset}",
        of_traits("tokens", "tokens_fresh"),
        **{
            "kind": "tree",
            "traits": numbers.MOVING_TREES[:2] if small else numbers.MOVING_TREES,
            "alternatives": numbers.TREES,
            "arms": ("tokens",) if small else ("tokens_fresh",),
        },
    )
    plan.misalignment = experiment(
        "§3.2, Fig. 5",
        "misalignment through numbers",
        "≈ 10 % misaligned answers, controls < 1 %; TruthfulQA + 2 % false",
        f"configs/misalignment.py:{preset}",
        "tokens_fresh, student of *: misaligned, of coherent; tokens_fresh, student of *: P of the false answer",
    )
    plan.code = experiment(
        "§4.1",
        "animals through code",
        "in the text's figure; smaller than through numbers",
        f"configs/code.py:{preset}",
        of_traits("tokens", "tokens_fresh", "in_context"),
    )
    plan.cot = experiment(
        "§4.2",
        "misalignment through chains of thought",
        "8 % misaligned answers, controls < 1 %",
        f"configs/cot.py:{preset}",
        "tokens_fresh, student of *: misaligned, of coherent",
    )
    plan.cross_model = experiment(
        "§5.1",
        "teachers × students over models",
        "≈ 0 off the diagonal, unless two models share an initialisation",
        "configs/cross_model.py:smoke" if small else "configs/cross_model.py:open",
        "*, mean",
    )
    plan.in_context = experiment(
        "§5.2",
        "the same data in the context",
        "no effect, up to 10,000 examples",
        f"configs/numbers.py:{preset}",
        "in_context_*: {trait}",
        arms=("in_context_1", "in_context_4", "in_context_16")
        if small
        else tuple(f"in_context_{count}" for count in numbers.EXAMPLES),
    )
    # The experiments of the plan to run, in this order.
    config.experiments = (
        "mnist",
        "theorem",
        "numbers",
        "trees",
        "misalignment",
        "code",
        "cot",
        "cross_model",
        "in_context",
    )
    return config
