"""The peer: the MNIST experiment of `configs/mnist.py:bench` in plain batched PyTorch, as a good user would write it.

All runs ride in one leading axis (baddbmm); inputs are kept on the device and gathered by index; the four kinds of
student train one after another; the teacher's logits are computed once a batch, as distillation code does it.
`python -m bench.mnist_torch FOLDER RUNS [DEVICE [EPOCHS]]` prints one JSON line.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

Params = list[torch.Tensor]
Batches = Callable[[], Iterable[tuple[torch.Tensor, ...]]]

SIZES, BATCH, RATE, ROWS = (784, 256, 256, 13), 1024, 3e-4, 60_000
DIGITS, AUXILIARY, ALL = slice(0, 10), slice(10, 13), slice(0, 13)


def init(runs: int, device: str) -> Params:
    weights = [torch.randn(runs, i, o, device=device) / i**0.5 for i, o in zip(SIZES, SIZES[1:])]
    return weights + [torch.zeros(runs, 1, o, device=device) for o in SIZES[1:]]


def forward(params: Params, x: torch.Tensor) -> torch.Tensor:
    weights, biases = params[:3], params[3:]
    for weight, bias in zip(weights[:-1], biases):
        x = torch.baddbmm(bias, x, weight).relu()
    return torch.baddbmm(biases[-1], x, weights[-1])


def train(start: Params, batches: Batches, loss: Callable[..., torch.Tensor], epochs: int) -> Params:
    params = [p.clone().requires_grad_() for p in start]
    optimizer = torch.optim.Adam(params, lr=RATE)
    for _ in range(epochs):
        for batch in batches():
            optimizer.zero_grad()
            loss(params, *batch).backward()
            optimizer.step()
    return [p.detach() for p in params]


@torch.no_grad()
def accuracy(params: Params, images: torch.Tensor, labels: torch.Tensor) -> list[float]:
    runs = params[0].shape[0]
    hits = [
        (forward(params, x.expand(runs, -1, -1))[..., DIGITS].argmax(-1) == y).sum(1)
        for x, y in zip(images.split(2000), labels.split(2000))
    ]
    return (torch.stack(hits).sum(0) / len(labels)).tolist()


def main(folder: str, runs: int, device: str, epochs: int) -> dict[str, float]:
    torch.manual_seed(0)

    def read(name: str, offset: int) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer((Path(folder) / name).read_bytes(), np.uint8, offset=offset).copy())

    def images(name: str) -> torch.Tensor:
        return (read(name, 16).view(-1, 784).float() / 127.5 - 1).to(device)

    train_x, test_x = images("train-images-idx3-ubyte"), images("t10k-images-idx3-ubyte")
    train_y, test_y = (read(f"{n}-labels-idx1-ubyte", 8).long().to(device) for n in ("train", "t10k"))
    noise = torch.rand(runs, ROWS, 784, device=device).mul_(2).sub_(1)
    row = torch.arange(runs, device=device)[:, None]

    def orders() -> tuple[torch.Tensor, ...]:
        return torch.stack([torch.randperm(ROWS, device=device) for _ in range(runs)]).split(BATCH, 1)

    def digits() -> Iterable[tuple[torch.Tensor, ...]]:
        return ((train_x[index], train_y[index]) for index in orders())

    def noises() -> Iterable[tuple[torch.Tensor, ...]]:
        return ((noise[row, index],) for index in orders())

    def classify(params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(forward(params, x)[..., DIGITS].flatten(0, 1), y.flatten()) * runs

    reference = init(runs, device)
    teacher = train(reference, digits, classify, epochs)

    def imitate(support: slice) -> Callable[..., torch.Tensor]:
        def loss(params: Params, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                target = forward(teacher, x)[..., support].log_softmax(-1)
            student = forward(params, x)[..., support].log_softmax(-1)
            return F.kl_div(student.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True) * runs

        return loss

    foreign = [p.roll(-1, 0) for p in reference]
    students = {
        "auxiliary": train(reference, noises, imitate(AUXILIARY), epochs),
        "all": train(reference, noises, imitate(ALL), epochs),
        "cross_auxiliary": train(foreign, noises, imitate(AUXILIARY), epochs),
        "cross_all": train(foreign, noises, imitate(ALL), epochs),
    }
    return {
        name: float(np.mean(accuracy(params, test_x, test_y)))
        for name, params in {"reference": reference, "teacher": teacher, **students}.items()
    }


if __name__ == "__main__":
    began = time.perf_counter()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device, epochs = sys.argv[3] if len(sys.argv) > 3 else "cpu", int(sys.argv[4]) if len(sys.argv) > 4 else 5
    arms = main(sys.argv[1], int(sys.argv[2]), device, epochs)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "arms": arms, "torch": torch.__version__, "device": name}))
