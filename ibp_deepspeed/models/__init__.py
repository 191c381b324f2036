"""How real models are cut into pipeline stages."""

from ibp_deepspeed.models.causal_lm import CausalLM
from ibp_deepspeed.models.config import load_config
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.hf.assemble import assemble

__all__ = ["CausalLM", "ModelError", "assemble", "load_config"]
