"""What the fork server imports, so that none of its children has to.

Nothing here may compute with torch: a fork copies one thread alone, and a computation starts others.
"""

from __future__ import annotations

import gc
import importlib
import shutil

_MODULES = (
    "torch.distributed",
    "torch.utils.tensorboard",
    "deepspeed.pipe",
    "deepspeed.runtime.zero.stage_1_and_2",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "matplotlib.pyplot",
    "ibp_deepspeed.data",
    "models.build",
    "tests.toys",
)


def _load_shared_memory_extension() -> None:
    """DeepSpeed's, which each process would compile or ask ninja for when it meets the others."""
    if shutil.which("c++") is None or shutil.which("ninja") is None:
        return
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        builder.load()


for _name in _MODULES:
    importlib.import_module(_name)
_load_shared_memory_extension()
gc.freeze()  # a child's collections leave these objects alone, and their pages shared
