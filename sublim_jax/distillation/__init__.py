"""Teachers and students over one language model: what makes a teacher, what a student imitates, and its training."""
