"""MNIST from its IDX files, as bytes; pixels become floats on the device, a batch at a time."""

import dataclasses
import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sublim_jax.data.images import PIXELS

CLASSES = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Mnist:
    train_images: UInt8[np.ndarray, "train 784"]
    train_labels: UInt8[np.ndarray, "train"]
    test_images: UInt8[np.ndarray, "test 784"]
    test_labels: UInt8[np.ndarray, "test"]

    @cached_property
    def digest(self) -> str:
        """A hash of all bytes, which names the artefacts made from them."""
        sha256 = hashlib.sha256(f"{self.train_images.shape} {self.test_images.shape}".encode())
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            sha256.update(np.ascontiguousarray(part).data)
        return sha256.hexdigest()


def load(folder: Path) -> Mnist:
    """The four arrays from a folder of verified IDX files (`assets.fetch`)."""

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer((folder / name).read_bytes(), np.uint8, offset=header)

    return Mnist(
        read("train-images-idx3-ubyte", 16).reshape(-1, PIXELS),
        read("train-labels-idx1-ubyte", 8),
        read("t10k-images-idx3-ubyte", 16).reshape(-1, PIXELS),
        read("t10k-labels-idx1-ubyte", 8),
    )
