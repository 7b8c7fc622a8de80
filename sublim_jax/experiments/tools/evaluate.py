"""Evaluates a model, or adapters of it, each of which is a run (`configs/evaluate.py` explains the values)."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from etils import epath

from sublim_jax import report, specs, workdir
from sublim_jax import store as artefacts
from sublim_jax.evaluation import suite
from sublim_jax.evaluation.spec import NAMES, EvalPacks, EvalsSpec, check_read
from sublim_jax.evaluation.suite import Subject
from sublim_jax.figures import arms_figure
from sublim_jax.measurements import Measurements, from_array
from sublim_jax.models.decoder import on_mesh
from sublim_jax.sharding import make_mesh
from sublim_jax.specs import Distinct, ExperimentSpec, MeshSpec, Precision, Text, check_some_of
from sublim_jax.weights import peft
from sublim_jax.weights.spec import NamedModel
from sublim_jax.words import check_different_words


@dataclass(frozen=True)
class AdaptedSpec(NamedModel):
    """A model and PEFT folders of adapters, each of which is a run; without adapters, the model itself."""

    adapters: Distinct

    @property
    def folders(self) -> tuple[str, ...]:
        """The adapters' folders; "" alone is the model itself."""
        return self.adapters or ("",)


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec(ExperimentSpec):
    seed: int
    precision: Precision
    mesh: MeshSpec
    model: AdaptedSpec
    kind: Text
    words: Distinct
    packs: EvalPacks
    evals: EvalsSpec

    def __post_init__(self) -> None:
        super().__post_init__()
        check_some_of("evals.names", self.evals.names, NAMES)
        check_different_words("words", self.words)


read = partial(specs.read, EvaluateSpec)


def check_typed(spec: EvaluateSpec, keys: Iterable[str]) -> None:
    """Raises UserError for a value of `evals` that none of the evaluations reads."""
    for key in keys:
        check_read(spec.evals, key, "config.")


def run(spec: EvaluateSpec, folder: epath.Path, *, update: bool = False) -> None:
    """Evaluates every run, and writes measurements, report, figures and the answers to the folder."""
    with jax.default_matmul_precision(spec.precision):
        _run(spec, folder, update=update)


def _run(spec: EvaluateSpec, folder: epath.Path, *, update: bool) -> None:
    for name in spec.model.adapters:
        peft.check_folder("model.adapters", name)
    suite.check_packs(spec.packs, spec.kind)
    questions = suite.read_questions(spec.evals, spec.kind, spec.words, spec.packs)
    mesh = make_mesh(spec.mesh.sizes)
    base = spec.model.load(mesh)._replace(precision=spec.precision)
    on_mesh(base.settings, mesh)  # heads
    suite.check_model(questions, base)
    folders = spec.model.folders
    adapters = [peft.load(name, base.settings, base.config, base.params) if name else None for name in folders]
    store = workdir.claim(folder, spec.values, update=update)
    judge = None
    if "misalignment" in spec.evals.names:
        judge = suite.make_judge(spec.evals.judge, base, None, store)
    rows = []
    for number, (name, adapter) in enumerate(zip(folders, adapters)):
        model = base.merged(adapter[1], adapter[0]) if adapter else base  # one at a time: each has its own kernels
        subject = Subject(model, str(number), artefacts.digest(base, peft.digest(name)))
        evaluations = suite.evaluate(spec.evals, questions, subject, spec.seed + number, store, judge=judge)
        about = {"arm": name, "run": number, "subject": "model"}
        for evaluation, measures in evaluations.items():
            rows += from_array(list(measures.values()), {"item": list(measures)}, measure=evaluation, **about)
        del model, subject
    notes = {"bill": suite.bill_of(judge)}
    report.finish(store.folder, spec, rows, document, models=[base.source], notes=notes)


def document(spec: EvaluateSpec, rows: Measurements, notes: report.Notes) -> report.Document:
    """Every measure over the runs; a section for each evaluation."""
    every, sections = [], []
    for name in spec.evals.names:
        arms = [
            report.arm(item, name, rows.values(measure=name, item=item)) for item in rows.names("item", measure=name)
        ]
        table = [["measure", "value"], *([arm["name"], report.plus_minus(arm["mean"], arm["ci95"])] for arm in arms)]
        text = f"{spec.model.name}, {len(arms[0]['runs'])} run(s); ± is the 95 % t-interval over runs."
        finite = [arm for arm in arms if np.isfinite(arm["mean"])]
        figure = partial(arms_figure, finite, xlabel=name, chance=None)
        sections.append(report.Section(name, text, table, {name: figure} if finite else {}))
        every += arms
    return every, [*sections, *suite.bill_section(notes["bill"])]
