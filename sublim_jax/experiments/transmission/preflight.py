"""The training steps of a study, for `--preflight`: shapes alone, no weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sublim_jax import weights
from sublim_jax.data.dialogue import Rows
from sublim_jax.data.tokenizer import Tokenizer
from sublim_jax.digests import Source
from sublim_jax.distillation.students import imitating_program
from sublim_jax.distillation.targets import Data
from sublim_jax.errors import UserError
from sublim_jax.experiments.transmission.arms import LogitArm, TrainedArm
from sublim_jax.experiments.transmission.checks import STUDENTS
from sublim_jax.experiments.transmission.parts import LoraSpec
from sublim_jax.experiments.transmission.spec import Study
from sublim_jax.experiments.transmission.students import objective_of
from sublim_jax.experiments.transmission.teachers import program_of
from sublim_jax.models.decoder import decoder
from sublim_jax.models.families import Config
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.preflight import Step, parameters, training_step
from sublim_jax.sharding import divide, make_mesh, named

PROMPT = 128  # tokens, about as many as carriers' prompts have
NUM_CONVERSATIONS = 6000  # in a corpus (§3.2)
SUPPORT = list(range(20))  # about the number of tokens of digits, commas and spaces only


def preflight(study: Study, devices: Sequence[jax.Device]) -> list[Step]:
    """Training steps of the first trained arm's students and of a corpus teacher, on rows of maximal length."""
    if not study.trained_arms:
        names = tuple(arm.name for arm in study.arms)
        raise UserError(f"arms={names} train nothing: there is no step to compile")
    mesh = make_mesh(study.mesh.sizes, devices)
    arm = study.trained_arms[0]
    with jax.default_matmul_precision(study.precision):
        steps = [_students(study, arm, _shape(study, arm.model or study.model.name, arm.lora, mesh))]
        if "corpus" in study.teacher.methods:
            steps.append(_teacher(study, _shape(study, study.model.name, study.lora, mesh)))
    return steps


class _Shape(NamedTuple):
    model: Model  # its parameters are shapes
    base: Params
    trained: Params


def _shape(study: Study, name: str, lora: LoraSpec, mesh: Mesh) -> _Shape:
    """A model by its name, as shapes alone."""
    settings = weights.shape_of(name)
    params = jax.eval_shape(decoder(settings).init, jax.random.key(0))
    tokenizer = cast(Tokenizer, None)  # no text is read
    model = Model(settings, decoder(settings), params, tokenizer, Config(), mesh, Source(name, "", ""))
    model = model.adapted(lora.adapters)
    trained = jax.eval_shape(
        lambda key, params: model._replace(params=params).untrained(key), jax.random.key(0), params
    )
    return _Shape(model, parameters(params, mesh, dtype=study.model.dtype), trained)


def _students(study: Study, arm: TrainedArm, shape: _Shape) -> Step:
    model, base, trained = shape
    mesh, training, answer = model.mesh, arm.training, study.carrier.max_new_tokens
    runs = 1 if arm.noise else study.runs  # on bases with noise of their own, runs are trained one after another
    count = runs * len(study.teachers)
    divide(mesh, "replica", count, STUDENTS)
    lead = (count, study.carrier.num_rows)
    logits: Any = None
    if isinstance(arm, LogitArm):
        logits = jax.ShapeDtypeStruct((*lead, answer, len(SUPPORT)), jnp.float32, sharding=named(mesh))
    stack = parameters(trained, mesh, count, dtype=jnp.float32)
    frozen = {"base": base, "data": Data(_rows(mesh, lead, PROMPT + answer, answer), logits)}
    tokens = count * training.batch * training.accumulate * (PROMPT + answer)
    name = f"students {arm.name}, {count} at once, rows of {PROMPT + answer} tokens"
    objective = objective_of(study, arm, model, SUPPORT)
    program = imitating_program(model, objective, training, study.carrier.num_rows)
    return training_step(name, program, stack, frozen, 4.0 * _kernels(model) * tokens)


def _teacher(study: Study, shape: _Shape) -> Step:
    model, base, trained = shape
    spec = study.teacher
    params = parameters(trained, model.mesh, dtype=jnp.float32)
    rows = _rows(model.mesh, (NUM_CONVERSATIONS,), spec.max_tokens, spec.max_tokens)
    name = f"a teacher, {spec.batch} conversations of {spec.max_tokens} tokens"
    program = program_of(study, model, NUM_CONVERSATIONS, 1)
    tokens = spec.batch * spec.max_tokens
    return training_step(name, program, params, {"base": base, "rows": rows}, 4.0 * _kernels(model) * tokens)


def _kernels(model: Model) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(model.params["layers"]))


def _rows(mesh: Mesh, lead: tuple[int, ...], length: int, answer: int) -> Rows:
    """Shapes of rows."""
    columns = ((length, jnp.int32), (answer, jnp.int32), (answer, jnp.int32), (answer, jnp.float32))
    leaves: list[Any] = [jax.ShapeDtypeStruct((*lead, n), dtype, sharding=named(mesh)) for n, dtype in columns]
    return Rows(*leaves)
