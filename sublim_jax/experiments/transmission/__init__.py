"""Transmission of a trait through unrelated data in language models: teachers, carriers, students, evaluations."""
