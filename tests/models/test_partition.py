"""Partitions are the best there are, by comparison with all of them."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from ibp_deepspeed.config.interlocking import AuxHeadConfig, InterlockingConfig
from ibp_deepspeed.models import CausalLM, ModelError
from ibp_deepspeed.models.costs import head_operations, layer_operations
from ibp_deepspeed.models.partition import balanced_sizes, sizes_to_bounds
from ibp_deepspeed.models.workload import workload
from ibp_deepspeed.planner.workload import balanced, over_mean


def all_sizes(units: int, stages: int) -> list[list[int]]:
    cuts = combinations(range(1, units), stages - 1)
    return [[high - low for low, high in pairwise((0, *cut, units))] for cut in cuts]


def stage_costs(costs: list[int], extra: list[int], sizes: list[int]) -> list[int]:
    ends = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    return [sum(costs[low:high]) + more for (low, high), more in zip(pairwise(ends), extra, strict=True)]


@given(st.data())
def test_balanced_sizes_are_best(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=7))
    extra = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=len(costs)))

    def badness(sizes: list[int]) -> tuple[int, int]:
        stages = stage_costs(costs, extra, sizes)
        return max(stages), sum(cost * cost for cost in stages)

    sizes = balanced_sizes(costs, extra)
    assert sum(sizes) == len(costs) and len(sizes) == len(extra) and min(sizes) >= 1
    assert badness(sizes) == min(map(badness, all_sizes(len(costs), len(extra))))


def test_equal_layers_are_shared_evenly() -> None:
    assert balanced_sizes([5] * 8, [0] * 4) == [2, 2, 2, 2]
    assert sorted(balanced_sizes([5] * 10, [0] * 4)) == [2, 2, 3, 3]
    assert balanced_sizes([9, 1, 1, 1, 1, 1], [0] * 3) == [1, 2, 3]  # the largest is 9 whatever is done


def test_bounds_give_the_ends_to_the_outer_stages() -> None:
    assert sizes_to_bounds([2, 1, 3]) == [0, 3, 4, 8]
    assert sizes_to_bounds([2]) == [0, 4]


def cut(layers: int = 8, vocab: int = 4096) -> CausalLM:
    sizes = {"vocab_size": vocab, "n_embd": 64, "n_head": 4, "n_positions": 64}
    return CausalLM(AutoConfig.for_model("gpt2", n_layer=layers, **sizes))


@pytest.mark.parametrize(
    "options", [AuxHeadConfig(), AuxHeadConfig(readout="shared", blocks=2), AuxHeadConfig(borrow=1), None]
)
@pytest.mark.parametrize("stages", [1, 3, 4, 7, 8])
def test_every_stage_of_a_model_has_a_decoder_layer_and_the_largest_is_smallest(
    stages: int, options: AuxHeadConfig | None
) -> None:
    model = cut()
    counts = [layer.total for layer in layer_operations(model, 64)]
    aux = head_operations(model, options, 64).total if options else 0

    def largest(bounds: list[int]) -> float:
        sums = [sum(counts[low:high]) for low, high in pairwise(bounds)]
        headless = 0 if options and options.borrow else stages - 1
        return max(total + (aux if k != headless else 0) for k, total in enumerate(sums))

    bounds = model.partition(stages, aux_heads=options, sequence_length=64)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, model.num_layers, stages + 1)
    assert all(min(high, 9) > max(low, 1) for low, high in pairwise(bounds))
    assert largest(bounds) == min(largest(sizes_to_bounds(sizes)) for sizes in all_sizes(8, stages))


def test_auxiliary_heads_count() -> None:
    """With heads every stage has one, the last the model's own; without, the last one alone, and so fewer layers."""
    model = cut(vocab=1024)
    assert model.partition(2, aux_heads=AuxHeadConfig()) == [0, 5, 10]
    assert model.partition(2, aux_heads=None) == [0, 6, 10]


def test_a_large_embedding_takes_no_time() -> None:
    """Heads that read a sample cost little, so that the model's own LM head alone makes the last stage short."""
    assert cut(vocab=4096).partition(2, aux_heads=AuxHeadConfig(negatives=64)) == [0, 8, 10]


def test_attention_makes_long_sequences_of_many_layers_the_slow_part() -> None:
    short, long = (cut(vocab=4096).partition(2, aux_heads=None, sequence_length=s) for s in (0, 8192))
    assert short == [0, 8, 10] and long == [0, 5, 10]


@pytest.mark.parametrize("stages", [2, 3, 4, 6, 12])
@pytest.mark.parametrize("exits", ["every", 2])
def test_gpt_with_a_real_vocabulary_is_shared_evenly_in_time(stages: int, exits: Literal["every"] | int) -> None:
    """The slowest stage is at most 10% over the mean, where every stage has a loss; by parameters it is slower."""
    model = CausalLM(AutoConfig.for_model("gpt2", n_layer=12, vocab_size=32_000))
    where = InterlockingConfig(strategy="local", exits=exits).exits_for(stages)
    work = workload(model, AuxHeadConfig(), samples=1, sequence_length=1024, weight_bytes=4)

    def uneven(bounds: list[int]) -> float:
        return over_mean(work.layers, bounds, work.head, where)

    trained = uneven(model.partition(stages, exits=where, sequence_length=1024))
    assert trained == pytest.approx(uneven(balanced(work.layers, stages, work.head, where)), abs=1e-6)
    if exits == "every":
        by_parameters = balanced(work.layers, stages, work.head, where, size=lambda layer: layer.parameters)
        assert trained <= 0.10
        if stages < 12:  # where there is more than one partition
            assert uneven(by_parameters) > trained


def test_manual_partitions() -> None:
    model = cut()
    assert model.partition(4, manual=[2, 2, 2, 2]) == [0, 3, 5, 7, 10]
    assert model.partition(2, manual=[1, 7]) == [0, 2, 10]
    assert model.partition(2, manual=[0, 4, 10]) == [0, 4, 10]
    for wrong in ([2, 2, 2], [2, 2, 2, 1], [2, 0, 3, 3], [0, 3, 5, 5, 10], [0, 3, 5, 7, 9], [], [-1, 3, 3, 3]):
        with pytest.raises(ModelError) as refusal:
            model.partition(4, manual=wrong)
        assert str(wrong) in str(refusal.value) and "sum 8" in str(refusal.value)


@pytest.mark.parametrize("stages", [0, 4, 9])
def test_more_stages_than_decoder_layers_are_refused(stages: int) -> None:
    with pytest.raises(ModelError, match=f"{stages} stages do not fit a model with 3 decoder layers"):
        cut(layers=3).partition(stages)
    with pytest.raises(ModelError, match="4 stages cannot share 3 layers"):
        balanced_sizes([1, 1, 1], [0] * 4)
