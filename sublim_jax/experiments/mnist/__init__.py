"""MNIST noise distillation (paper §6.2): `spec`, what is computed; `train`, how; `run`, in which order; `report`.

`configs/mnist.py` explains the values.
"""
