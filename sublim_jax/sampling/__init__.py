"""Tokens out of a model: the decode loop, samplers, constraints, exact scores."""
