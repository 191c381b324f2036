"""What a training needs is what its matrix products do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.models import CausalLM
from ibp_deepspeed.models.build import virtual_pipeline
from ibp_deepspeed.models.costs import training_flops
from ibp_deepspeed.models.devices import peak_flops
from ibp_deepspeed.models.layers import copied_layers
from ibp_deepspeed.models.workload import units

LAYERS, WIDTH, VOCABULARY, TOKENS = 4, 32, 96, 16


class Products(TorchDispatchMode):
    """Counts the operations of products of two matrices."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.operations += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def llama(**changes: Any) -> CausalLM:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    kind = changes.pop("kind", "llama")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return CausalLM(AutoConfig.for_model(kind, **{**sizes, **heads, **changes}))


@pytest.mark.parametrize(
    "options",
    [
        None,
        {},
        {"rank": 8},
        {"blocks": 1},
        {"readout": "shared"},
        {"aux_tokens": 0.5},
        {"negatives": 7, "negatives_by": "uniform"},
        {"objective": "label_smoothing"},
        {"objective": "reconstruction"},
        {"objective": "distillation"},
        {"objective": "distillation", "readout": "shared"},
        {"objective": "local_critic"},
        {"objective": "momentum"},
        {"objective": {"name": "momentum", "layers": 2}, "readout": "shared"},
    ],
    ids=lambda options: str(options),
)
def test_operations_of_a_training_are_those_of_its_matrix_products(options: dict[str, Any] | None) -> None:
    """Counted while all stages train; attention's own products are left out on both sides."""
    stages, model = 2, llama()
    interlocking = {"strategy": "global" if options is None else "local", "aux_head": options}
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "interlocking": interlocking,
    }
    pipeline = virtual_pipeline(model, config, stages)
    tokens = torch.randint(VOCABULARY, (3, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    rows = [(tokens[:, :-1], tokens[:, 1:], torch.arange(3))]
    for _ in range(4):  # a head tries once whether it is linear, late targets come in the fourth batch
        pipeline.train_batch(iter(rows))
    with Products() as products:
        pipeline.train_batch(iter(rows))
    given = None if options is None else AuxHeadConfig(**options)
    attention_layers = LAYERS + (0 if given is None else given.blocks + copied_layers(given))
    expected = training_flops(model, given, stages - 1, TOKENS) - 6 * TOKENS * WIDTH * attention_layers
    assert products.operations == expected * 3 * TOKENS


def test_units_of_a_stage_count_both_kinds_of_lm_heads() -> None:
    """Two layers a stage: 2 · (matrices + attention) forward; the model's own LM head makes the last stage longer."""
    model, options = llama(), AuxHeadConfig()
    first, last = units(model, options, [0, 3, 6], TOKENS)
    layer, read = model.matrix_parameters()[1] + TOKENS * WIDTH, WIDTH * VOCABULARY
    assert first.forward == 1 and last.forward == pytest.approx(1 + read / (2 * layer))
    assert first.head == pytest.approx(3 * read / (2 * layer))
    assert last.input_gradient + last.weight_gradient == pytest.approx(2 * last.forward)
    assert units(model, AuxHeadConfig(borrow=1), [0, 3, 6], TOKENS)[1].borrowed_gradient > 0.5


def test_a_token_passes_the_experts_that_it_is_sent_to() -> None:
    few, all_ = (llama(kind="mixtral", num_local_experts=4, num_experts_per_tok=n).matrix_parameters() for n in (1, 4))
    assert few[0] == all_[0] == 0 and few[-1] == all_[-1] == WIDTH * VOCABULARY
    assert [b - a for a, b in zip(few[1:-1], all_[1:-1], strict=True)] == [3 * 3 * WIDTH * 48] * LAYERS


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 2080", None),
    ],
)
def test_peaks_are_of_the_very_card(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
