"""Tests run on eight CPU devices in one process; meshes of one device come from `mesh_of(1)`."""

import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from sublim_jax import assets
from sublim_jax.data import mnist
from sublim_jax.errors import UserError
from sublim_jax.sharding import make_mesh


def pytest_addoption(parser):
    parser.addoption("--parity", help="Write the families' differences from transformers to this file.")


@pytest.fixture(scope="session")
def mesh_of():
    """A mesh of the first `devices` devices with the given axis sizes."""

    def make(devices: int, replica: int = -1, fsdp: int = 1, tensor: int = 1):
        return make_mesh({"replica": replica, "fsdp": fsdp, "tensor": tensor}, jax.devices()[:devices])

    return make


@pytest.fixture(scope="session")
def mnist_folder():
    try:
        return assets.fetch(assets.MNIST)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def mnist_data(mnist_folder):
    return mnist.load(mnist_folder)
