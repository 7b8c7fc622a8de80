"""MNIST noise distillation (paper §6.2).

`spec` defines an experiment, `train` its networks and losses, `run` the pipeline, `report` its results.
`configs/mnist.py` explains the values.
"""
