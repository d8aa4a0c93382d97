"""torch_attn inside other libraries, one module each; none is imported by ``import torch_attn``."""
