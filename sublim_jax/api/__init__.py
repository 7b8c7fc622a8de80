"""Short ways to what a notebook needs, as `sublim_jax` shows them: teachers, carriers, students, evaluations."""
