"""How real models are cut into pipeline stages."""

from models.causal_lm import CausalLM
from models.config import load_config
from models.errors import ModelError
from models.hf.assemble import assemble

__all__ = ["CausalLM", "ModelError", "assemble", "load_config"]
