"""Subliminal learning in JAX: teachers, filtered data, students, and the theorem that joins them."""

__version__ = "0.1.0"
