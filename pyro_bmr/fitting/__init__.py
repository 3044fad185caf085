"""The one training loop and what it is made of: objective, steps, processes, checkpoints."""
