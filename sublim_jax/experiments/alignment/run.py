"""The check, from its spec to its report."""

import jax
from etils import epath
from ml_collections import ConfigDict

from sublim_jax import assets, report, specs
from sublim_jax.data import mnist
from sublim_jax.experiments.alignment import measure
from sublim_jax.experiments.alignment.report import document as document
from sublim_jax.experiments.alignment.settings import make_settings, qualifying
from sublim_jax.experiments.alignment.spec import AlignmentSpec
from sublim_jax.progress import Track
from sublim_jax.report import Notes
from sublim_jax.sharding import make_mesh
from sublim_jax.workdir import claim


def read(config: ConfigDict) -> AlignmentSpec:
    """The spec of a config. Raises UserError for the first value that makes no sense."""
    return specs.read(AlignmentSpec, config)


def run(spec: AlignmentSpec, folder: epath.Path, *, update: bool = False) -> None:
    """Runs the check and leaves measurements, results.json, report.md and figures in the folder."""
    make_mesh(spec.mesh.sizes)  # one device computes everything; a mesh that does not fit is refused all the same
    data = mnist.load(assets.fetch(assets.MNIST, spec.data.path))
    claimed = claim(folder, spec.values, update=update)
    with jax.enable_x64(True), Track("settings of the theorem", 13) as track:
        rows, notes = measure_all(spec, data, track)
    report.finish(claimed.folder, spec, rows, document, notes=notes)


def measure_all(spec: AlignmentSpec, data: mnist.Mnist, track: Track) -> tuple[measure.Rows, Notes]:
    """The table, and notes that say what its settings and controls are."""
    settings = make_settings(spec.seed, spec.examples, data, spec.support_mask())
    base = settings[0]
    rows: measure.Rows = []
    for number, setting in enumerate(settings, 1):
        rows += measure.measure(setting.name, setting, qualifying(setting.support), spec.steps, spec.learning_rate)
        track.update(number, f"{setting.network}, {setting.teacher}, {setting.inputs_name}")
    of_controls, controls = measure.measure_controls(spec.seed, base, spec.steps, spec.learning_rate)
    rows += of_controls
    rows += measure.measure_single(base, spec.steps, spec.learning_rate)
    rows += measure.measure_signs(spec.seed, spec.num_draws, spec.support, data)
    rows += measure.measure_labels(spec.seed, spec.num_label_draws, base)
    rows += measure.measure_optimizers(base)
    track.update(len(settings) + 1)
    about = [
        {"network": s.network, "teacher": s.teacher, "inputs": s.inputs_name, "smooth": s.smooth} for s in settings
    ]
    return rows, {"settings": about, "controls": controls}
