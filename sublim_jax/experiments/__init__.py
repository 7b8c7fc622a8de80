"""Recipes that read like the paper's method section. An experiment is a module with `run(config, workdir)`."""
