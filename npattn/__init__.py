"""npattn: the reference for attention."""

__version__ = "0.1.0"

from npattn.attention import attention, attention_backward, attention_forward
from npattn.biases import *
from npattn.masks import *
from npattn.softmax import *
