"""Training: the model, Hugging Face Trainer with what an adapter run adds, evaluation."""
