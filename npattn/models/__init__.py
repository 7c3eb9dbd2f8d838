"""Blocks and stacks of a Transformer, made of the ops: read config, then blocks, then transformer."""
