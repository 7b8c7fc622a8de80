"""Evaluations of trained models, and the statistics of their results."""
