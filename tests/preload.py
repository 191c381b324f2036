"""What the fork server imports, so that none of its children has to.

Nothing here may compute with torch: a fork copies one thread alone, and a computation starts others.
"""

from __future__ import annotations

import gc
import importlib

_MODULES = (
    "torch.distributed",
    "torch.utils.tensorboard",
    "deepspeed.pipe",
    "deepspeed.runtime.zero.stage_1_and_2",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "matplotlib.pyplot",
    "ibp_deepspeed.data",
    "ibp_deepspeed.models.build",
    "tests.toys",
)

for _name in _MODULES:
    importlib.import_module(_name)
gc.freeze()  # a child's collections leave these objects alone, and their pages shared
