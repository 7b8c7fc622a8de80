"""The theorem's inner product along MNIST distillation: `trajectory`, `forecast`, `examples`, and what they share.

`configs/theorem.py` explains the values.
"""
