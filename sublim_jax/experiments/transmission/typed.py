"""Checks for values that were set on the command line and would have no effect."""

from collections.abc import Callable, Iterable

from sublim_jax.errors import UserError
from sublim_jax.evaluation import spec as evals
from sublim_jax.experiments.transmission.arms import Arm, ContextArm
from sublim_jax.experiments.transmission.spec import Study
from sublim_jax.overrides import covers

# Keys, what reads them, and whether a study has it. A key that ends in "." or "_" is a prefix.
READ_BY: list[tuple[tuple[str, ...], str, Callable[[Study], bool]]] = [
    (
        ("teacher.strength", "teacher.max_steps"),
        "teacher.methods=finetuned",
        lambda s: "finetuned" in s.teacher.methods,
    ),
    (("teacher.steering_",), "teacher.methods=steered", lambda s: "steered" in s.teacher.methods),
    (
        ("teacher.corpora.", "teacher.epochs", "teacher.max_tokens"),
        "teacher.methods=corpus",
        lambda s: "corpus" in s.teacher.methods,
    ),
    (
        ("teacher.learning_rate", "teacher.batch"),
        "teacher.methods of finetuned or corpus",
        lambda s: bool({"finetuned", "corpus"} & set(s.teacher.methods)),
    ),
    (
        ("teacher.neutral",),
        "teacher.methods of finetuned, prompted or steered",
        lambda s: "corpus" not in s.teacher.methods,
    ),
    (("filter.threshold", "filter.judged"), "filter.judge", lambda s: bool(s.filter.judge)),
    (
        ("filter.banned", "filter.max_integers", "filter.max_value"),
        "carrier.kind=numbers",
        lambda s: s.carrier.kind == "numbers",
    ),
    (
        ("carrier.num_integers",),
        "carrier.decoding=grammar or an arm of data=random",
        lambda s: s.carrier.decoding == "grammar" or any(arm.data == "random" for arm in s.arms),
    ),
    (("carrier.problems",), "carrier.kind=cot", lambda s: s.carrier.kind == "cot"),
    (("packs.code",), "carrier.kind=code", lambda s: s.carrier.kind == "code"),
    (("packs.judge",), "filter.judge", lambda s: bool(s.filter.judge)),
    (
        ("packs.persona",),
        "teacher.methods of prompted or steered",
        lambda s: bool({"prompted", "steered"} & set(s.teacher.methods)),
    ),
    (("packs.stories",), "evals.names=stories", lambda s: "stories" in s.evals.names),
    (
        ("lora.alpha", "lora.rslora"),
        "lora.rank of 1 or more",
        lambda s: s.lora.rank > 0 or any(arm.lora.rank > 0 for arm in s.trained_arms),
    ),
    (("spread",), "two runs or more, of traits that are words", lambda s: s.runs > 1 and s.has_words),
    (("student.", "evaluate_every"), "an arm whose students are trained", lambda s: bool(s.trained_arms)),
    (
        ("carrier.num_completions", "carrier.num_samples", "carrier.decoding", "carrier.max_new_tokens", "filter."),
        "arms on what teachers write (data=written or unfiltered)",
        lambda s: s.uses_written,
    ),
]


def check_typed(study: Study, keys: Iterable[str]) -> None:
    """Raises UserError for a key of READ_BY or of an arm, "teacher.strength", that nothing of the study reads."""
    for key in keys:
        check_read(study, key, "config.")
        group, *rest = key.split(".")
        if group == "arm":
            name, value = rest
            run = {arm.name: arm for arm in study.arms}
            if name not in run:
                arms = ",".join([*run, name])
                raise UserError(f"config.{key}: arm {name} is not run; to run it, --config.arms={arms}")
            check_arm(run[name], key, value)


def check_read(study: Study, key: str, prefix: str) -> None:
    """Raises UserError, naming the key behind `prefix`, if it is in READ_BY and nothing of the study reads it."""
    for names, reader, is_there in READ_BY:
        if any(covers(name, key) for name in names) and not is_there(study):
            raise UserError(f"{prefix}{key} is read only with {reader}, which this study does not have")
    evals.check_read(study.evals, key, prefix, judged=bool(study.filter.judge))


def check_arm(arm: Arm, key: str, value: str) -> None:
    """Raises UserError, naming the key, if `value` of an arm is not read by an arm of this kind."""
    if value == "examples" and not isinstance(arm, ContextArm):
        raise UserError(f"config.{key}: rows in the context are of objective=context; this arm's students train")
    if value in ("lora_init", "temperature") and isinstance(arm, ContextArm):
        raise UserError(f"config.{key} is of students that are trained; this arm reads rows in its context")
    if value == "lora_init" and not (isinstance(arm, ContextArm) or arm.lora.adapters):
        raise UserError(f"config.{key} is of adapters, and lora.rank=0 trains all weights of the layers")
    if value in ("positions", "fraction", "score") and not getattr(arm, "selection", None):
        raise UserError(
            f"config.{key} says which tokens, and {key.rpartition('.')[0]}.action is empty: keep, mask or replace"
        )
