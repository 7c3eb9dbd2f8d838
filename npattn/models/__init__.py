"""Language models on real weights: `load` a folder of Hugging Face, run and train it, `save` it.

Below are the blocks and stacks of a Transformer, made of the ops: read config, then blocks, then transformer.
"""

from npattn.models.folder import load, save
from npattn.models.model import Model
from npattn.models.tokens import Encoded, Tokenizer, byte_tokenizer

__all__ = ["Encoded", "Model", "Tokenizer", "byte_tokenizer", "load", "save"]
