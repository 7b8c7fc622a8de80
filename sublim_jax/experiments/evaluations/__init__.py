"""Evaluations of models and of adapters over them, for studies and by themselves."""
