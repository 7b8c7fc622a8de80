"""The check inside a pretrained language model, for all parameters and for LoRA: a trait via digits (paper §6.1).

The teacher moves towards answering questions with its trait. The student imitates it on lists of random numbers, and
only on the logits of digits, commas and spaces.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array

from sublim_jax import objectives, report, specs, theorem
from sublim_jax.data import dialogue
from sublim_jax.data.carriers import numbers as carrier
from sublim_jax.data.dialogue import Rows
from sublim_jax.distillation.losses import answer_features, cross_entropy
from sublim_jax.distillation.targets import support_of
from sublim_jax.distillation.teachers import spelled
from sublim_jax.errors import UserError
from sublim_jax.evaluation import preference
from sublim_jax.experiments.alignment import measure
from sublim_jax.experiments.alignment.settings import Setting, double, mean
from sublim_jax.experiments.alignment.spec import About, LanguageSpec
from sublim_jax.experiments.alignment.verdicts import (
    LOG,
    SLOPES,
    STEP,
    Scale,
    arm_of,
    control_verdict,
    inner_fit,
    judge,
    numbers,
)
from sublim_jax.figures import Entry, Line, Panel, panels_figure
from sublim_jax.keys import named_key
from sublim_jax.measurements import Measurement, Measurements
from sublim_jax.models import lora
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.progress import Track
from sublim_jax.sharding import make_mesh, one_device, shared_out
from sublim_jax.workdir import claim

ALL, ADAPTERS = "all parameters", "LoRA, B = 0"
ROUNDING = 1000.0  # of D_S·D_T, in units of float64's resolution over the step: 30 layers of sums
GREEDY, ELSEWHERE = "greedy tokens", "another start"
# Of what is measured. A change of it gets another number, and a workdir of before is measured again, not mixed.
DEFINITION = 2


read = partial(specs.read, LanguageSpec)


def run(spec: LanguageSpec, folder: epath.Path, *, update: bool = False) -> None:
    """Runs the check and leaves measurements, results.json, report.md and figures in the folder."""
    make_mesh(spec.mesh.sizes)  # only to check the mesh: each process computes on its first device
    model = spec.model.load(one_device())
    seen, questions = inputs_of(spec, model)
    store = claim(folder, spec.values, update=update)
    about = [About(name, f"says {spec.trait}", "random numbers") for name in (ALL, ADAPTERS)]
    with jax.enable_x64(True):
        answers = jnp.asarray(seen.weights, jnp.float64)
        losses = covered(answers)

        @cache  # lazy: not built if all of its measurements are in the store
        def base() -> Setting:
            return all_parameters(about[0], model, seen, questions)

        def from_another_start() -> list[Measurement]:
            start = double(model.noisy(spec.noise, named_key(spec.seed, "another start")).params)
            return measure.measure(f"control: {ELSEWHERE}", base(), {ELSEWHERE: losses["kl"]}, spec, start)

        def with_adapters() -> list[Measurement]:
            return measure.measure(about[1].name, adapters(about[1], spec, base(), model), losses, spec)

        parts: dict[str, Callable[[], list[Measurement]]] = {
            ALL: lambda: measure.measure(about[0].name, base(), losses, spec),
            GREEDY: lambda: measure.measure(f"control: {GREEDY}", base(), {GREEDY: greedy(answers)}, spec),
            ELSEWHERE: from_another_start,
            ADAPTERS: with_adapters,
        }
        inputs = (replace(spec, preset=""), model, DEFINITION)
        kept = {name: store.known("theorem", *inputs, name) for name in parts}
        missing = [name for name, rows in kept.items() if rows is None]
        with Track("the theorem in a language model", len(missing)) as track:
            # Each part takes minutes and is stored; one part per process at a time.
            for start in range(0, len(missing), jax.process_count()):
                names = missing[start : start + jax.process_count()]
                for name, arm_rows in zip(names, shared_out([parts[name] for name in names])):
                    kept[name] = store.json("theorem", lambda *_, arm_rows=arm_rows: arm_rows, *inputs, name)
                track.update(start + len(names), names[-1])
    rows = [Measurement(*row) for arm_rows in kept.values() for row in arm_rows]
    notes = {"settings": [setting._asdict() for setting in about], "tokens": int(seen.weights.sum())}
    report.finish(store.folder, spec, rows, document, models=[model.source], notes=notes)


def inputs_of(spec: LanguageSpec, model: Model) -> tuple[Rows, Rows]:
    """The student's rows and the teacher's questions. Raises UserError for a trait that is not a word of the model."""
    more, digits = carrier.prompt_limits(spec.num_integers)
    prompts = carrier.prompts(spec.num_rows, spec.seed, more=more, digits=digits)
    answers = carrier.random_answers(spec.num_rows, spec.seed, spec.num_integers)
    questions = preference.questions("", spec.kind)["teaching"]
    if spec.num_questions > len(questions):
        raise UserError(f"num_questions={spec.num_questions}: there are {len(questions)}")
    questions = questions[: spec.num_questions]
    pairs = [(question, spelled(model, spec.trait)) for question in questions]
    return dialogue.rows(model, list(zip(prompts, answers))), dialogue.rows(model, pairs)


def all_parameters(about: About, model: Model, seen: Rows, questions: Rows) -> Setting:
    """The model with all of its parameters, compared on digits, commas and spaces."""
    support = np.asarray(support_of(model))

    def logits(params: Params, rows: Rows) -> Array:
        module = model.network.bind(params)
        return module.unembed(answer_features(model, module, rows, remat=False, forward_mode=True))[..., support]

    def loss(params: Params) -> Array:
        module = model.network.bind(params)
        features = answer_features(model, module, questions, remat=False, forward_mode=True)
        return mean(cross_entropy(module, features, questions, remat=False))

    answers = np.asarray(seen.weights, bool)[..., np.newaxis]  # without padding
    return Setting.of(about, logits, model.params, loss, seen, answers.repeat(len(support), -1))


def adapters(about: About, spec: LanguageSpec, base: Setting, model: Model) -> Setting:
    """The same model with LoRA adapters, A random and B = 0.

    The base is passed as frozen parameters, because arrays that a jitted function closes over become constants in it.
    """
    adapted = lora.Lora(spec.rank, 2.0 * spec.rank)
    fresh = lora.init(named_key(spec.seed, "A"), model.params, adapted)

    def merged(theta: Params) -> Params:
        return lora.merge(jax.lax.stop_gradient(theta["base"]), theta["adapters"], adapted.scale)

    return Setting.of(
        about,
        lambda theta, rows: base.apply(merged(theta), rows),
        {"base": base.params, "adapters": fresh},
        lambda theta: base.teacher_loss(merged(theta)),
        base.inputs,
        base.support,
    )


def covered(answers: Array) -> dict[str, theorem.Objective]:
    """Losses that the theorem covers, weighted by the mask `answers`: 1 for the answers' tokens, 0 for padding."""

    def on_answers(loss: theorem.Objective) -> theorem.Objective:
        return lambda z, y, weights=None: loss(z, y, weights=answers)

    return {"kl": on_answers(objectives.kl), "squared error": on_answers(objectives.squared_error)}


def greedy(answers: Array) -> theorem.Objective:
    """Cross-entropy on the teacher's most likely tokens, which do not change with small moves of the teacher."""
    return lambda z, y, weights=None: objectives.cross_entropy(z, jnp.argmax(y, -1), weights=answers)


# ---------------------------------------------------------------------------------------------------------- report


def scale_of(spec: LanguageSpec) -> Scale:
    """The range in which a language model's rows and controls are judged."""
    return Scale(spec.steps.small, spec.steps.decades, ROUNDING)


def document(spec: LanguageSpec, rows: Measurements, notes: report.Notes) -> report.Document:
    """The arms of results.json, and the report's sections."""
    scale, rate = scale_of(spec), spec.learning_rate
    table = [["parameters", "loss", "A", "slope", "decades", "A: two ways differ", "slope of L_T's change", "verdict"]]
    arms, errors, changes = [], [], []
    for about in (About(**setting) for setting in notes["settings"]):
        for objective, m in numbers(rows, about.name).items():
            row, name = judge(m, rate, True, scale), f"{about.network}; {objective}"
            arms.append(arm_of(name, "slope", row.fit.slope, 1.0, row.error, row.verdict))
            cells = [f"{m.predicted:+.3g}", f"{row.fit.slope:z.3f}", f"{row.fit.decades:.1f}", f"{row.differ:.0e}"]
            table.append([about.network, objective, *cells, f"{row.step.slope:z.3f}", row.verdict])
            errors.append(Line(name, m.moved, row.error))
            changes.append(Line(name, m.moved, m.step_error(rate)))
    text = (
        f"A teacher moves towards saying {spec.trait!r} to {spec.num_questions} questions; the student takes one step "
        f"of imitating it on {notes['tokens']} tokens of {spec.num_rows} lists of random numbers, on the logits of "
        "digits, commas and spaces alone. Float64. As predicted: |D_S·D_T / (ε A) − 1| has slope 1 ± .05 over at least "
        f"{scale.decades:g} decades below a step of {scale.small:g}, D_S·D_T > 0, and the teacher's own loss, "
        "cross-entropy of the trait, falls by ε α A."
    )
    panels = [
        Panel(STEP, "|D_S·D_T / (ε A) − 1|", errors, LOG, "the lemma"),
        Panel(STEP, "|ΔL_T / (−ε α A) − 1|", changes, LOG, f"the loss of saying {spec.trait!r}"),
    ]
    main = report.Section("The theorem in a language model", text, table, {"lemma": partial(panels_figure, panels)})
    control_arms, section = _controls(spec, rows, scale)
    return arms + control_arms, [main, section]


def _controls(spec: LanguageSpec, rows: Measurements, scale: Scale) -> tuple[list[Entry], report.Section]:
    expected = "constant"
    table = [["control", "expected of |D_S·D_T|", "slope", "decades", "at the smallest step", "verdict"]]
    arms, lines = [], []
    for name in (GREEDY, ELSEWHERE):
        (m,) = numbers(rows, f"control: {name}").values()
        m = m.up_to(float(np.max(m.epsilons, where=m.moved <= spec.steps.narrowest, initial=0.0)))
        fit, verdict = inner_fit(m, scale), control_verdict(m, expected, True, spec.learning_rate, scale)
        shown = [f"{fit.slope:z.3f}", f"{fit.decades:.1f}", f"{m.inner[0]:+.2e}"]
        table.append([name, expected, *shown, verdict])
        arms.append(arm_of(f"control: {name}", "slope of |D_S·D_T|", fit.slope, SLOPES[expected], m.inner, verdict))
        lines.append(Line(name, m.moved, np.abs(m.inner)))
    text = (
        f"The student trains on its teacher's likeliest tokens, or starts at the base with noise of {spec.noise:g} of "
        "its weights' spread. Neither force vanishes with the teacher's step, and neither has a sign of its own. "
        f"Slopes are fitted up to a step of {spec.steps.narrowest:g}, above which what grows with the step outweighs "
        "the constant."
    )
    panel = Panel(STEP, "|D_S·D_T|", lines, LOG, "controls")
    return arms, report.Section("Controls", text, table, {"controls": partial(panels_figure, [panel])})
