"""One model, or runs of it as adapters, and what may be said of them (`configs/evaluate.py` explains the values)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from sublim_jax import assets, report, weights
from sublim_jax.errors import UserError
from sublim_jax.experiments import measures
from sublim_jax.experiments.door import check_numbers, check_some_of, check_texts
from sublim_jax.experiments.measures import EVALUATIONS, Subject
from sublim_jax.figures import Arm, arms_figure
from sublim_jax.models.decoder import on_mesh
from sublim_jax.overrides import check_distinct
from sublim_jax.sharding import make_mesh
from sublim_jax.weights import Model, peft
from sublim_jax.workdir import Workdir


def run(config: ConfigDict, workdir: Workdir, *, update: bool = False) -> None:
    """Asks every run every question, and leaves results.json, report.md, figures and the answers in `workdir`."""
    check(config)
    mesh = make_mesh(config.mesh.to_dict())
    asking = measures.asking(config, config.kind, config.words, config.packs)
    base = weights.load(config.model.name, mesh, weights.float_type(config.model.dtype))
    on_mesh(base.settings, mesh)  # heads
    measures.check_model(asking, base)
    folders = folders_of(config)
    models = [adapted(base, folder) for folder in folders]
    workdir.open(config, update=update)
    judge = None
    if "misalignment" in config.evaluations:
        judge = measures.judge_of(config, base, None, [base.source.digest, config.model.dtype], workdir, mesh)
    found = []
    for number, (folder, model) in enumerate(zip(folders, models)):
        depends = [base.source.digest, config.model.dtype, peft.digest(folder)]
        subject = Subject(model, None, mesh, workdir, str(number), depends, config.seed + number, {})
        found.append(measures.ask(asking, subject, judge))
    arms = [
        report.arm(measure, name, [run[name][measure][0] for run in found])
        for name in config.evaluations
        for measure in found[0][name]
    ]
    sections = [section(config, name, arms) for name in config.evaluations]
    report.write(workdir, config, arms, [*sections, *measures.cost_of(judge)], [base.source])


def check(config: ConfigDict) -> None:
    """Raises UserError for the first value or file that makes no sense."""
    check_numbers(config)
    check_texts(config, ("kind", "model.name"))
    weights.float_type(config.model.dtype)
    check_some_of("evaluations", config.evaluations, EVALUATIONS)
    check_distinct("words", config.words)
    check_distinct("model.adapters", folders_of(config))
    for folder in filter(None, folders_of(config)):
        if not assets.is_folder(folder):
            raise UserError(f"model.adapters: {folder} is no PEFT adapter, there is no such folder")
    measures.check_packs(config.packs, config.kind)
    measures.asking(config, config.kind, config.words, config.packs)


def folders_of(config: ConfigDict) -> list[str]:
    """The adapters' folders; "" alone is the model itself."""
    return list(map(str, config.model.adapters)) or [""]


def adapted(base: Model, folder: str) -> Model:
    if not folder:
        return base
    spec, adapters = peft.load(Path(folder).expanduser(), base.settings, base.config, base.params)
    return base.merged(adapters, spec)


def section(config: ConfigDict, evaluation: str, arms: Sequence[Arm]) -> report.Section:
    mine = [one for one in arms if one["metric"] == evaluation]
    table = [["measure", "value"], *([one["name"], report.plus_minus(one["mean"], one["ci95"])] for one in mine)]
    text = f"{config.model.name}, {len(mine[0]['runs'])} run(s); ± is the 95 % t-interval over runs."
    drawn = [one for one in mine if np.isfinite(one["mean"])]
    figure = partial(arms_figure, drawn, xlabel=evaluation, chance=None)
    return report.Section(evaluation, text, table, {evaluation: figure} if drawn else {})
