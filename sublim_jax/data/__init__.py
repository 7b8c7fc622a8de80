"""What models are trained on: MNIST, noise, and the order in which rows are read."""
