"""In context: an untrained model behind rows that the teacher wrote (§5.2)."""

from collections.abc import Sequence

from sublim_jax.distillation.context import measure_in_context
from sublim_jax.experiments.transmission.arms import ContextArm
from sublim_jax.experiments.transmission.spec import Study
from sublim_jax.experiments.transmission.students import Students
from sublim_jax.experiments.transmission.targets import Replicate, pairs_of
from sublim_jax.experiments.transmission.teachers import phrasings
from sublim_jax.models.language import Model
from sublim_jax.store import Store


def read_in_context(
    study: Study, arm: ContextArm, replicates: Sequence[Replicate], model: Model, store: Store
) -> Students:
    """What the model prefers behind some of each teacher's rows: no training at all."""
    read = [pairs[: arm.num_examples] for one in replicates for pairs in pairs_of(study, arm, one).values()]
    inputs = (model, study.seed, read, phrasings(study), study.alternatives)
    point = store.json(f"preference-{arm.name}", measure_in_context, *inputs)
    return Students(None, "", [point])
