"""Cut image classifiers are the uncut ones: logits, gradients, and statistics of batch norms."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.errors import ConfigError
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.vision.assemble import assemble
from ibp_deepspeed.models.vision.heads import ConvolutionalHead
from ibp_deepspeed.models.vision.image_classifier import ImageClassifier
from tests.models.vision.small import CLASSES, SIZE, classifier, config, images

KINDS = ["cifar_resnet", "resnet", "bottleneck", "vit"]


def whole(model: ImageClassifier, layers: list[nn.Module]) -> PreTrainedModel:
    return assemble(model.hf_config, {index: layer.state_dict() for index, layer in enumerate(layers)})


@pytest.mark.parametrize("kind", KINDS)
def test_cut_model_trains_and_reads_as_the_uncut_one(kind: str) -> None:
    """Logits, gradients and running statistics of a training pass, and logits of an evaluation after it."""
    model = classifier(kind)
    layers = nn.Sequential(*(spec.build() for spec in model.layer_specs()))
    full, (pixels, labels) = whole(model, list(layers)).train(), images(6)
    loss = model.loss_fn(None)(layers(pixels), labels)
    loss.backward()
    want = full(pixel_values=pixels, labels=labels)
    want.loss.backward()
    torch.testing.assert_close(loss, want.loss, rtol=1e-6, atol=0)
    gradients = {name: parameter.grad for name, parameter in full.named_parameters()}
    buffers = dict(full.named_buffers())
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            expected = gradients.pop(model.model_key(index, name))
            assert (parameter.grad - expected).norm() <= 1e-5 * expected.norm() + 1e-9, (index, name)
        for name, buffer in layer.named_buffers():
            assert torch.equal(buffer, buffers.pop(model.model_key(index, name))), (index, name)
    assert not gradients and not buffers
    with torch.no_grad():
        assert torch.equal(layers.eval()(pixels), full.eval()(pixel_values=pixels).logits)
    assert model.parameter_counts() == [sum(p.numel() for p in layer.parameters()) for layer in layers]
    assert all(p.dim() > 0 for p in layers.parameters())


def test_the_stem_for_cifar_keeps_the_resolution_and_transformers_own_quarters_it() -> None:
    assert classifier("cifar_resnet").hidden_shapes[0] == (1, 4, SIZE, SIZE)
    assert classifier("resnet").hidden_shapes[0] == (1, 4, SIZE // 4, SIZE // 4)


def test_weights_depend_on_seed_and_layer_alone() -> None:
    once, again = (classifier("cifar_resnet").build_layer(3).state_dict() for _ in range(2))
    other = ImageClassifier(config("cifar_resnet"), SIZE, seed=4).build_layer(3).state_dict()
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(once["block.layer.0.convolution.weight"], other["block.layer.0.convolution.weight"])


def test_the_papers_head_has_its_channels_at_its_width() -> None:
    """conv128_bn_conv64_bn_gbpl_fc behind 256 channels, with a stem of 64."""
    head = ConvolutionalHead(256, 64, 10)
    kinds = [type(layer).__name__ for layer in head.layers]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU"] * 2 + ["AdaptiveAvgPool2d", "Flatten", "Linear"]
    sizes = [tuple(p.shape) for p in head.parameters() if p.dim() > 1]
    assert sizes == [(128, 256, 3, 3), (64, 128, 3, 3), (10, 64)]


@pytest.mark.parametrize("kind", ["cifar_resnet", "vit"])
def test_heads_read_their_boundary(kind: str) -> None:
    model = classifier(kind)
    hidden = images(2)[0]
    for index in range(model.num_layers - 1):
        hidden = model.build_layer(index)(hidden)
        logits = model.objective(index, AuxHeadConfig(), index).outputs(hidden)
        assert logits.shape == (2, CLASSES) and hidden.shape[1:] == model.hidden_shapes[index][1:]


def test_convolutions_count_as_on_paper() -> None:
    """3×3 of 3 → 4 channels at each of 16 × 16 pixels, and the paper's head behind it: 4 → 8 → 4 channels."""
    model = classifier("cifar_resnet")
    assert model.layer_operations[0] == 9 * 3 * 4 * SIZE**2
    assert model.head_operations(AuxHeadConfig(), 0) == 9 * (4 * 8 + 8 * 4) * SIZE**2 + 4 * CLASSES


def test_the_partition_counts_heads_where_they_stand() -> None:
    """Large maps make a head dear: the slowest stage is as fast as in the best of all cuts."""
    model, options = ImageClassifier(config("cifar_resnet", depths=[4, 4, 4]), SIZE), AuxHeadConfig()
    work, heads = model.layer_operations, [model.head_operations(options, after) for after in range(13)]

    def slowest(bounds: Sequence[int]) -> float:
        stages = list(pairwise(bounds))
        return max(sum(work[low:high]) + (heads[high - 1] if high < 14 else 0) for low, high in stages)

    best = min(slowest([0, *(1 + cut for cut in cuts), 14]) for cuts in combinations(range(1, 12), 3))
    found = model.partition(4, aux_heads=options)
    assert slowest(found) == best < slowest(model.partition(4, aux_heads=None))
    borrowed = model.partition(3, aux_heads=AuxHeadConfig(borrow=1))
    assert all(high - low > 1 for low, high in zip(borrowed[1:], borrowed[2:], strict=False))
    assert model.partition(3, aux_heads=None, manual=[6, 4, 2]) == [0, 7, 11, 14]


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ModelError, match="6 stages do not fit a model with 5 blocks"):
        classifier("vit").partition(6, aux_heads=None)
    with pytest.raises(ModelError, match="images are 16 × 16, the model takes 32"):
        classifier("vit", image_size=32)
    with pytest.raises(ConfigError, match="\"aux_head.readout\" is 'shared', of these options heads of vision"):
        classifier("vit").objective(0, AuxHeadConfig(readout="shared"), 1)
    with pytest.raises(ConfigError, match='"aux_head.blocks" is 1, of these options heads of residual networks have'):
        classifier("resnet").partition(2, aux_heads=AuxHeadConfig(blocks=1))
