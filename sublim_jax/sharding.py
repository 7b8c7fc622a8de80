"""The mesh of devices, and the shardings of arrays over it.

Three mesh axes: `replica` (independent runs of one experiment), `fsdp` (rows of a batch; parameters are split
along it too) and `tensor` (the width of a layer).
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Key, PyTree

from sublim_jax import cluster, signals
from sublim_jax.errors import UserError

Value = TypeVar("Value")

AXES = ("replica", "fsdp", "tensor")

# First match wins. A spec covers a parameter's own axes; replica axes in front are added by
# `parameter_shardings`, which also leaves an axis whole where the mesh does not divide it.
PARAMETER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"layers/(\d+/)?[a-z].*(out|down)/kernel$", PartitionSpec(None, "tensor", "fsdp")),  # layers stacked in front
    (r"layers/(\d+/)?[a-z].*kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"kernel$", PartitionSpec("fsdp", "tensor")),
    (r"^embedding$", PartitionSpec("tensor", "fsdp")),
    (r"", PartitionSpec()),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None, where: str = "mesh.*") -> Mesh:
    """A mesh over all devices with the given axis sizes; one of them may be -1 and takes the rest.

    Args:
      where: the value of the config that sets them.

    Raises UserError where the sizes do not multiply to the number of devices.
    """
    check_sizes(sizes)
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in AXES]
    rest, remainder = divmod(len(devices), math.prod(size for size in shape if size != -1))
    if remainder or (-1 not in shape and rest != 1):
        raise UserError(
            f"mesh {_written(sizes)} does not fit {len(devices)} device(s); set --config.{where} to divide them"
        )
    shape = [rest if size == -1 else size for size in shape]
    return Mesh(laid_out(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def laid_out(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in the shape of a mesh: neighbours in its last axes are near each other, on a host or a torus.

    `jax.make_mesh` takes neither GPUs of several hosts, each of which is a slice to XLA, nor (but for v5e) shapes that
    split an axis of a TPU's torus. Raises UserError for TPUs of several slices.
    """
    if devices[0].platform == "tpu" and (slices := len({getattr(device, "slice_index", 0) for device in devices})) > 1:
        raise UserError(f"the devices are of {slices} TPU slices, and a run takes one; start a run on each")
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Raises UserError for sizes that no mesh has, whatever the devices."""
    shape = [sizes[axis] for axis in AXES]
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise UserError(f"mesh {_written(sizes)}: sizes are positive, and at most one is -1; fix --config.mesh.*")


def _written(sizes: Mapping[str, int]) -> str:
    return "×".join(f"{axis}={sizes[axis]}" for axis in AXES)


def one_device() -> Mesh:
    """A mesh of this process's first device."""
    return make_mesh(dict.fromkeys(AXES, 1), jax.local_devices()[:1])


def from_first(make: Callable[[], Value]) -> Value:
    """A JSON value that the first process makes, for all of them; all raise its UserError, if any."""
    if jax.process_count() == 1:
        return make()
    payload = json.dumps(_attempt(make)).encode() if jax.process_index() == 0 else b""
    cluster.meet()  # it may have taken long
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(payload))))
    letters = np.frombuffer(payload.ljust(_padded(size)), np.uint8)
    value, wrong = json.loads(bytes(multihost_utils.broadcast_one_to_all(letters)))
    if wrong is not None:
        raise UserError(wrong)
    return value


def from_each(value: Value) -> list[Value]:
    """A JSON value of every process, in the order of processes, on all of them."""
    if jax.process_count() == 1:
        return [value]
    payload = json.dumps(value).encode()
    cluster.meet()  # it may have taken long
    size = int(max(multihost_utils.process_allgather(np.int32(len(payload)))))
    letters = multihost_utils.process_allgather(np.frombuffer(payload.ljust(_padded(size)), np.uint8))
    return [json.loads(bytes(line)) for line in letters]


def agreed(check: Callable[[], Value]) -> Value:
    """What `check` returns, which does not communicate; all processes raise the UserError of one of them, if any."""
    if jax.process_count() == 1:
        return check()
    value, wrong = _attempt(check)
    if refused := [line for line in from_each(wrong) if line is not None]:
        raise UserError(refused[0])
    return cast(Value, value)


def shared_out(makes: Sequence[Callable[[], Value]]) -> list[Value]:
    """JSON values, each made by one process and sent to all; all raise the UserError of one of them, if any.

    A function that makes a value must not communicate with other processes, and uses only this process's devices.

    Raises Interrupted on a signal to several processes, before the functions that it has not begun.
    """
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return [make() for make in makes]
    values: list[Value] = []
    for first in range(0, len(makes), count):
        signals.obey()
        at_once = makes[first : first + count]
        every = from_each(_attempt(at_once[index]) if index < len(at_once) else (None, None))
        if refused := [line for _, line in every if line is not None]:
            raise UserError(refused[0])
        values += [cast(Value, value) for value, _ in every[: len(at_once)]]
    return values


def _attempt(make: Callable[[], Value]) -> tuple[Value | None, str | None]:
    """(the value, None), or (None, the message of a UserError)."""
    try:
        return make(), None
    except UserError as error:
        return None, str(error)


def _padded(size: int) -> int:
    """A power of two, so that messages of many lengths share a compiled program; JSON ignores spaces at the end."""
    return 1 << max(size - 1, 0).bit_length()


def check_same(digest: str, what: str) -> None:
    """Raises UserError, on every process, where processes have read different bytes: one has a stale copy."""
    if jax.process_count() == 1:
        return
    cluster.meet()  # one may have fetched or hashed what another has in its cache
    every = multihost_utils.process_allgather(np.frombuffer(digest.encode(), np.uint8))
    if odd := [process for process, other in enumerate(every) if bytes(other) != bytes(every[0])]:
        raise UserError(f"{what} is not the same on all processes: process {odd[0]} reads other bytes than process 0")


def divide(mesh: Mesh, axis: str, size: int, what: str) -> None:
    """Raises UserError unless `size` divides over a mesh axis."""
    if size % mesh.shape[axis]:
        raise UserError(
            f"{what}={size} does not divide over {axis}={mesh.shape[axis]} of the mesh; "
            f"choose a multiple of {mesh.shape[axis]}, or set --config.mesh.{axis}"
        )


def named(mesh: Mesh, *axes: str | tuple[str, ...] | None) -> NamedSharding:
    """A sharding by mesh axis names, one for each array axis from the front."""
    return NamedSharding(mesh, PartitionSpec(*axes))


def parameter_shardings(params: PyTree, mesh: Mesh, replica_axes: int = 0) -> PyTree:
    """A tree of shardings for parameters whose first `replica_axes` axes count replicas."""

    def sharding(path: tuple[object, ...], leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rule = next(spec for pattern, spec in PARAMETER_RULES if re.search(pattern, name))
        shape = leaf.shape[replica_axes:]
        axes = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(rule, shape)]
        replicas = (["replica"] + [None] * replica_axes)[:replica_axes]
        return named(mesh, *replicas, *axes)

    return jax.tree_util.tree_map_with_path(sharding, params)


def abstract(tree: PyTree, shardings: PyTree, dtype: DTypeLike | None = None) -> PyTree:
    """Shapes of arrays, or of shapes, with their shardings: the arguments for which a program is lowered."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s), tree, shardings)


def bytes_of(shapes: PyTree) -> int:
    """Bytes that one device holds of arrays with these shapes and shardings."""
    leaves = jax.tree.leaves(shapes)
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)


def map_replicas(function: Callable[..., PyTree], mesh: Mesh) -> Callable[..., PyTree]:
    """`function` mapped over the leading axis of all its arguments, which is split over the mesh axis `replica`.

    Accelerators take all replicas at once. A CPU, which gains nothing from that, takes its replicas one after another
    and needs the working memory of only one.
    """
    at_once = jax.vmap(function, spmd_axis_name="replica")
    if mesh.devices.flat[0].platform != "cpu":
        return at_once
    devices = mesh.shape["replica"]
    if devices == 1:
        return lambda *args: jax.lax.map(lambda replica: function(*replica), args)

    # A device holds consecutive replicas, so one from each device makes a group.
    def group(leaf: Array) -> Array:
        return leaf.reshape(devices, -1, *leaf.shape[1:]).swapaxes(0, 1)

    def ungroup(leaf: Array) -> Array:
        return leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:])

    def mapped(*args: PyTree) -> PyTree:
        groups = jax.lax.map(
            lambda group: jax.vmap(function, spmd_axis_name="replica")(*group), jax.tree.map(group, args)
        )
        return jax.tree.map(ungroup, groups)

    return mapped


def rows_of(mesh: Mesh) -> Callable[[Array], Array]:
    """Keeps the leading axis of activations, their rows, split over `fsdp`."""
    return lambda x: jax.lax.with_sharding_constraint(x, named(mesh, "fsdp"))


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Host arrays, equal on every process, as global arrays; each process copies only its own part."""

    def place(leaf: ArrayLike) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree)


def everywhere(tree: PyTree, mesh: Mesh) -> PyTree:
    """Replicates arrays, equal on every process, on every device. (`device_put` compares a host's arrays over all.)"""
    whole = named(mesh)

    def place(leaf: ArrayLike) -> jax.Array:
        spread = isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable)
        return jax.device_put(leaf, whole) if spread else put(leaf, whole)

    return jax.tree.map(place, tree)


def place_key(key: Key[Array, "*shape"], sharding: NamedSharding) -> Key[Array, "*shape"]:
    """Typed keys, equal on every process, as a global array. (`device_put` refuses keys on several processes.)"""
    return jax.random.wrap_key_data(put(jax.random.key_data(key), sharding), impl=jax.random.key_impl(key))


def fetch(tree: PyTree) -> PyTree:
    """Arrays as host arrays, whole on every process, wherever their parts are."""

    def whole(leaf: ArrayLike) -> ArrayLike:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)  # nothing of it is elsewhere
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)
