"""The notebook API that `sublim_jax` exports: teachers, carriers, students, evaluations."""
