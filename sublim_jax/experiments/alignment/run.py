"""Runs the check of the theorem."""

from collections.abc import Callable
from functools import partial

import jax
from etils import epath

from sublim_jax import assets, report, specs
from sublim_jax.data import mnist
from sublim_jax.experiments.alignment import measure
from sublim_jax.experiments.alignment.report import document as document
from sublim_jax.experiments.alignment.settings import Setting, make_settings, qualifying
from sublim_jax.experiments.alignment.spec import AlignmentSpec
from sublim_jax.measurements import Measurement
from sublim_jax.progress import Track
from sublim_jax.sharding import make_mesh, shared_out
from sublim_jax.workdir import claim

read = partial(specs.read, AlignmentSpec)


def run(spec: AlignmentSpec, folder: epath.Path, *, update: bool = False) -> None:
    """Runs the check and leaves measurements, results.json, report.md and figures in the folder."""
    make_mesh(spec.mesh.sizes)  # only to check the mesh: each process computes on its first device
    data = mnist.load(assets.fetch(assets.MNIST, spec.data.path))
    store = claim(folder, spec.values, update=update)
    # Part of the check is in float32, which accelerators would multiply with fewer bits.
    exact = jax.default_matmul_precision("float32")
    with exact, jax.enable_x64(True):
        settings = make_settings(spec.seed, spec.examples, data, spec.support_mask())
    with exact, jax.enable_x64(True), Track("settings of the theorem", len(settings) + 1) as track:

        def of_setting(number: int, setting: Setting) -> list[Measurement]:
            network, teacher, inputs, _ = setting.about
            measurements = measure.measure(setting.about.name, setting, qualifying(setting.support), spec)
            track.update(number, f"{network}, {teacher}, {inputs}")
            return measurements

        controls, of_controls = measure.controls_of(spec, settings[0])
        parts: list[Callable[[], list[Measurement]]] = [
            *(partial(of_setting, number, setting) for number, setting in enumerate(settings, 1)),
            *of_controls,
            partial(measure.measure_single, spec, settings[0]),
            partial(measure.measure_signs, spec, data),
            partial(measure.measure_labels, spec, settings[0]),
            partial(measure.measure_optimizers, settings[0]),
        ]
        rows = [Measurement(*row) for part in shared_out(parts) for row in part]
        track.update(len(settings) + 1)
    notes = {"settings": [setting.about._asdict() for setting in settings], "controls": controls}
    report.finish(store.folder, spec, rows, document, notes=notes)
