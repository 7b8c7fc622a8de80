"""What a network computes. Models know nothing of training."""
