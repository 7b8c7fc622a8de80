"""What only a GPU can show: `JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu`."""

import jax
import numpy as np
import pytest
from test_experiment_mnist import distilled, tiny

from sublim_jax.data.mnist import Mnist
from sublim_jax.experiments import mnist
from sublim_jax.sharding import make_mesh
from sublim_jax.workdir import Workdir

pytestmark = pytest.mark.gpu


def test_students_on_a_gpu_are_those_of_the_cpu(mnist_data, tmp_path):
    """float32 products, no TensorFloat32: agreement to the rounding that ten Adam steps amplify."""
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    students = {}
    for platform in ("gpu", "cpu"):
        mesh = make_mesh({"replica": 1, "fsdp": 1, "tensor": 1}, jax.devices(platform)[:1])
        data = Mnist(*(part[:600] for part in mnist_data))
        with jax.default_matmul_precision("float32"), jax.default_device(jax.devices(platform)[0]):
            lab = mnist.make_lab(tiny(), Workdir(tmp_path / platform), mesh, data)
            students[platform] = jax.device_get(distilled(lab, range(2), ["auxiliary", "all"])[2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), students["gpu"], students["cpu"])
