"""Runs the check of the theorem."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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

Part = Callable[[], list[Measurement]]

read = partial(specs.read, AlignmentSpec)


def run(spec: AlignmentSpec, folder: epath.Path, *, update: bool = False) -> None:
    """Runs the check and leaves measurements, results.json, report.md and figures in the folder."""
    make_mesh(spec.mesh.sizes)  # only to check the mesh: each process computes on its first device
    data = mnist.load(assets.fetch(assets.MNIST, spec.data.path))
    store = claim(folder, spec.values, update=update)
    several = jax.process_count() > 1
    begun: list[Part] = []
    # Compiling a part, and computing it on a CPU, keep one core busy.
    with ThreadPoolExecutor(2) as pool:

        def begin(*parts: Part) -> None:
            begun.extend([partial(_exact, part) if several else pool.submit(_exact, part).result for part in parts])

        begin(partial(measure.measure_signs, spec, data))
        with _exactly():
            settings = make_settings(spec.seed, spec.examples, data, spec.support_mask())
            begin(*(partial(_of_setting, spec, setting) for setting in settings))
            controls, of_controls = measure.controls_of(spec, settings[0])
        begin(
            *of_controls,
            partial(measure.measure_single, spec, settings[0]),
            partial(measure.measure_labels, spec, settings[0]),
            partial(measure.measure_optimizers, settings[0]),
        )
        by_part = shared_out(begun) if several else _results(begun, pool)
    rows = [Measurement(*row) for part in by_part for row in part]
    notes = {"settings": [setting.about._asdict() for setting in settings], "controls": controls}
    report.finish(store.folder, spec, rows, document, notes=notes)


def _of_setting(spec: AlignmentSpec, setting: Setting) -> list[Measurement]:
    return measure.measure(setting.about.name, setting, qualifying(setting.support), spec)


def _results(begun: Sequence[Part], pool: ThreadPoolExecutor) -> list[list[Measurement]]:
    """What the parts measure, in order; where one fails or Ctrl-C is pressed, those that wait are not begun."""
    try:
        with Track("parts of the check", len(begun)) as track:
            results = []
            for number, part in enumerate(begun, 1):
                results.append(part())
                track.update(number)
            return results
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _exact(part: Part) -> list[Measurement]:
    """A part with the settings of `_exactly`, which are a thread's own."""
    with _exactly():
        return part()


@contextmanager
def _exactly() -> Iterator[None]:
    """In float64; and what is in float32 is not multiplied with fewer bits, as accelerators would."""
    with jax.default_matmul_precision("float32"), jax.enable_x64(True):
        yield
