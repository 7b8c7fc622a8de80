"""What a trained model does, and what may be said of it."""
