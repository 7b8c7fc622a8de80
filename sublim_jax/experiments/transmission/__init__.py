"""A trait through data that says nothing about it, in a language model: teachers, carriers, students, evaluations."""
