"""``"auto"`` is filled from the command line, or refused; nothing is left to do by accident."""

from __future__ import annotations

from typing import Any

import pytest

from ibp_deepspeed.commands.training.arguments import default_hyperparameters, given_hyperparameters, parse_arguments
from ibp_deepspeed.config.auto import fill_auto, refuse_auto
from ibp_deepspeed.config.deepspeed import check_ds_config
from ibp_deepspeed.errors import ConfigError

AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"}},
}
REQUIRED = ["--deepspeed_config", "x", "--data", "y"]


def filled(*words: str, ds_config: dict[str, Any] = AUTO, replicas: int = 1, width: int = 128) -> dict[str, Any]:
    start = [] if "--init-from" in words else ["--model", "z"]
    args = parse_arguments(None, [*REQUIRED, *start, *words])
    return fill_auto(ds_config, given_hyperparameters(args), default_hyperparameters(args, width), replicas)


def test_options_fill_it_in() -> None:
    words = ["--micro-batch-size", "2", "--gradient-accumulation-steps", "3", "--learning-rate", "0.01"]
    got = filled(*words, "--warmup-steps", "7", "--steps", "50", replicas=2)
    assert got["train_micro_batch_size_per_gpu"] == 2 and got["gradient_accumulation_steps"] == 3
    assert got["train_batch_size"] == 12
    assert got["optimizer"]["params"] == {"lr": 0.01, "weight_decay": 0.1}
    assert got["scheduler"]["params"] == {"warmup_num_steps": 7, "total_num_steps": 50}
    assert AUTO["optimizer"]["params"]["lr"] == "auto", "the given one is left alone"


def test_defaults_follow_the_length_the_width_and_the_start() -> None:
    got = filled("--steps", "400")
    assert got["train_micro_batch_size_per_gpu"] == 8 and got["gradient_accumulation_steps"] == 4
    assert got["scheduler"]["params"] == {"warmup_num_steps": 20, "total_num_steps": 400}
    assert got["optimizer"]["params"]["lr"] == 0.00195
    assert filled("--steps", "100000")["scheduler"]["params"]["warmup_num_steps"] == 500
    assert filled(width=2048)["optimizer"]["params"]["lr"] == 0.000122
    assert filled("--init-from", "dir")["optimizer"]["params"]["lr"] == 0.000195


def test_a_number_in_the_configuration_is_kept() -> None:
    numbers = {**AUTO, "optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}
    assert filled(ds_config=numbers)["optimizer"]["params"]["lr"] == 0.5
    assert filled("--learning-rate", "0.5", ds_config=numbers)["optimizer"]["params"]["lr"] == 0.5
    fixed = {**AUTO, "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 9}}}
    assert filled("--steps", "50", ds_config=fixed)["scheduler"]["params"] == {"total_num_steps": 9}


@pytest.mark.parametrize(
    ("words", "ds_config", "sentence"),
    [
        (
            ["--learning-rate", "0.1"],
            {**AUTO, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}},
            '--learning-rate is 0.1, the configuration\'s "optimizer.params.lr" 0.5: write "auto" there',
        ),
        (
            ["--warmup-steps", "3"],
            {key: value for key, value in AUTO.items() if key != "scheduler"},
            '--warmup-steps was given, but the configuration has no "scheduler.params.warmup_num_steps"',
        ),
        (
            [],
            {**AUTO, "gradient_clipping": "auto"},
            '"gradient_clipping" is "auto", which nothing fills in here: you',
        ),
    ],
)
def test_contradictions_are_named(words: list[str], ds_config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        filled(*words, ds_config=ds_config)
    assert sentence in str(caught.value)


HUGGING_FACES = [
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "fp16.enabled", "bf16.enabled", "optimizer.params.lr", "optimizer.params.betas", "optimizer.params.eps",
    "optimizer.params.weight_decay", "scheduler.params.warmup_min_lr", "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_num_steps", "scheduler.params.total_num_steps", "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size", "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
]  # fmt: skip
"""Where the documentation of Hugging Face's Trainer writes it."""


@pytest.mark.parametrize("place", HUGGING_FACES)
def test_every_auto_of_hugging_face_is_filled_in_or_refused(place: str) -> None:
    ds_config: dict[str, Any] = {**AUTO}
    *blocks, key = place.split(".")
    block = ds_config
    for name in blocks:
        block[name] = dict(block.get(name) or {})
        block = block[name]
    block[key] = "auto"
    try:
        got = filled(ds_config=ds_config)
    except ConfigError as refused:
        assert f'"{place}" is "auto", which nothing fills in here' in str(refused)
    else:
        refuse_auto(got)
        for name in blocks:
            got = got[name]
        assert isinstance(got[key], int | float)


def test_a_program_of_ones_own_is_told_to_fill_it_in() -> None:
    with pytest.raises(ConfigError, match=r"train_lm.py fills it in \(--micro-batch-size\), a program of your own"):
        check_ds_config({"train_micro_batch_size_per_gpu": "auto"})
    refuse_auto(filled())
