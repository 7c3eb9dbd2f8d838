"""Training: optimizers, schedules, the loop, and checkpoints."""
