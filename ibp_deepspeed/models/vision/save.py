"""An image classifier as a folder for ``from_pretrained``: written beside its place, compared, then renamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification

from ibp_deepspeed.atomic_files import new_folder
from ibp_deepspeed.checkpoint.finite import not_finite
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.vision.cifar_resnet import MODEL_TYPE
from ibp_deepspeed.models.vision.exits import ImageExits

_TOLERANCE = 1e-5  # of the largest logit


def write(exits: ImageExits, out: Path) -> int:
    """Write the model as a Hugging Face folder, with what turns pictures into its inputs.

    Args:
        exits: of a checkpoint.
        out: the folder, which must not exist.

    Returns:
        the model's parameters.

    Raises:
        OutputError: the folder exists or can't be written.
        ModelError: weights are not finite, or what was written does not load as it was saved. Nothing is left.
    """
    model = exits.to_hugging_face()
    broken = not_finite(model.named_parameters())
    if broken:
        raise ModelError(f"{exits.folder} has weights that are not finite, {broken[0]} among them: export another one.")
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(_processor(exits), indent=1) + "\n")
        (folder / "README.md").write_text(_card(exits), encoding="utf-8")
        _check(exits, folder)
    return int(model.num_parameters())


def _check(exits: ImageExits, folder: Path) -> None:
    loaded, info = AutoModelForImageClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    problems = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if problems:
        raise ModelError(f"the export does not load as it was saved: {problems}.")
    size, channels = exits.model.image_size, exits.model.hf_config.num_channels
    images = torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(0))
    want = exits.logits(images)[len(exits)].cpu()
    with torch.no_grad():
        difference = (loaded.eval()(pixel_values=images).logits - want).abs().max() / want.abs().max().clamp(min=1e-6)
    if not difference <= _TOLERANCE:
        raise ModelError(f"the export's logits differ by {float(difference):.1e} of the largest from the checkpoint's.")


def _processor(exits: ImageExits) -> dict[str, Any]:
    """What transformers' image processor does with a picture, which is square or becomes so."""
    reads = exits.description.images
    assert reads is not None
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": exits.model.hf_config.num_channels == 3,
        "do_resize": True,
        "size": {"height": reads.size, "width": reads.size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": reads.mean,
        "image_std": reads.deviation,
    }


def _card(exits: ImageExits) -> str:
    kind, size = exits.model.hf_config.model_type, exits.model.image_size
    first = "from ibp_deepspeed.models.vision.cifar_resnet import register\n\nregister()\n" * (kind == MODEL_TYPE)
    return f"""# A {kind} image classifier

Trained on {exits.description.source} with interlocking backpropagation in {len(exits)} pipeline stages, strategy
{exits.interlocking.strategy}; checkpoint {exits.folder.name}. Images are {size} × {size}.

```python
from transformers import AutoModelForImageClassification
{first}
model = AutoModelForImageClassification.from_pretrained("path/to/this/folder")
```
"""
