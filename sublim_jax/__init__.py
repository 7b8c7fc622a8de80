"""Subliminal learning in JAX: teachers, filtered data, students, and the theorem that joins them."""
