"""What a model is fed: reading prompts, batching them, counting steps, splitting results."""
