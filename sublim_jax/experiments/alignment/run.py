"""Runs the check of the theorem."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count

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

Part = Callable[[], list[Measurement]]

read = partial(specs.read, AlignmentSpec)


def run(spec: AlignmentSpec, folder: epath.Path, *, update: bool = False) -> None:
    """Runs the check and leaves measurements, results.json, report.md and figures in the folder."""
    make_mesh(spec.mesh.sizes)  # only to check the mesh: each process computes on its first device
    data = mnist.load(assets.fetch(assets.MNIST, spec.data.path))
    store = claim(folder, spec.values, update=update)
    with _exactly():
        settings = make_settings(spec.seed, spec.examples, data, spec.support_mask())
        controls, of_controls = measure.controls_of(spec, settings[0])
    parts: list[Part] = [
        partial(measure.measure_signs, spec, data),  # the longest
        *(partial(_of_setting, spec, setting) for setting in settings),
        *of_controls,
        partial(measure.measure_single, spec, settings[0]),
        partial(measure.measure_labels, spec, settings[0]),
        partial(measure.measure_optimizers, settings[0]),
    ]
    finished = count(1)
    with Track("parts of the check", len(parts)) as track, ThreadPoolExecutor(2) as pool:

        def measured(part: Part) -> list[Measurement]:
            with _exactly():  # of this thread
                rows = part()
            track.update(next(finished))
            return rows

        # Compiling a part, and computing it on a CPU, keep one core busy.
        several = jax.process_count() > 1
        by_part = shared_out([partial(measured, part) for part in parts]) if several else pool.map(measured, parts)
        rows = [Measurement(*row) for part in by_part for row in part]
        track.update(len(parts))
    notes = {"settings": [setting.about._asdict() for setting in settings], "controls": controls}
    report.finish(store.folder, spec, rows, document, notes=notes)


def _of_setting(spec: AlignmentSpec, setting: Setting) -> list[Measurement]:
    return measure.measure(setting.about.name, setting, qualifying(setting.support), spec)


@contextmanager
def _exactly() -> Iterator[None]:
    """In float64; and what is in float32 is not multiplied with fewer bits, as accelerators would."""
    with jax.default_matmul_precision("float32"), jax.enable_x64(True):
        yield
