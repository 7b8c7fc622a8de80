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
        settings = make_settings(spec.seed, spec.examples, data, spec.support_mask())
        base, rows = settings[0], []
        for number, setting in enumerate(settings, 1):
            network, teacher, inputs, _ = setting.about
            rows += measure.measure(setting.about.name, setting, qualifying(setting.support), spec)
            track.update(number, f"{network}, {teacher}, {inputs}")
        of_controls, controls = measure.measure_controls(spec, base)
        rows += of_controls + measure.measure_single(spec, base) + measure.measure_signs(spec, data)
        rows += measure.measure_labels(spec, base) + measure.measure_optimizers(base)
        track.update(len(settings) + 1)
    notes = {"settings": [setting.about._asdict() for setting in settings], "controls": controls}
    report.finish(claimed.folder, spec, rows, document, notes=notes)
