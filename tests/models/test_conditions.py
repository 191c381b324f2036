"""What decides a training is compared with a checkpoint's: refused by name, allowed by name, or announced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ibp_deepspeed.commands.training.arguments import parse_arguments
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.runs.conditions import EFFECTS, Changes, Conditions, changes_since
from ibp_deepspeed.models.runs.description import Description

PATH = Path("run/checkpoint/global_step4")
SETTINGS: dict[str, Any] = {
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "betas": [0.9, 0.95]}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
    "train_micro_batch_size_per_gpu": 2,
    "tensorboard": {"enabled": True},
}


def described(settings: dict[str, Any] | None = None, length: int = 32, **conditions: Any) -> Description:
    digits = {name: 64 * digit for name, digit in (("data", "a"), ("held_out", "b"), ("tokenizer", "c"))}
    sizes = {"micro_batch_size": 2, "micro_batches": 4, "replicas": 2}
    values = {"seed": 0, **digits, **sizes, **conditions}
    return Description(
        model={"model_type": "llama"},
        bounds=[0, 2],
        interlocking={"strategy": "pairwise"},
        sequence_length=length,
        settings=SETTINGS if settings is None else settings,
        conditions=Conditions(**values),
    )


def changes(planned: Description, *allowed: str) -> Changes:
    return changes_since(PATH, described(), planned, allowed)


@pytest.mark.parametrize(
    ("name", "planned", "seen", "restarts"),
    [
        ("seed", described(seed=3), "seed 0, not 3", False),
        ("data", described(data=64 * "d"), f"data of checksum {12 * 'a'}, not {12 * 'd'}", True),
        ("tokenizer", described(tokenizer=64 * "d"), f"tokenizer of checksum {12 * 'c'}, not {12 * 'd'}", False),
        ("sequence-length", described(length=64), "sequence-length 32, not 64", True),
        (
            "document-masks",
            described(documents=64 * "d"),
            f"document-masks off, not on (bounds of checksum {12 * 'd'})",
            True,
        ),
        (
            "batch-size",
            described(replicas=1),
            "batch-size 16 (4 micro-batches of 2 samples × 2 replicas), not 8 (",
            False,
        ),
    ],
)
def test_each_difference_is_refused_or_allowed_by_its_name(
    name: str, planned: Description, seen: str, restarts: bool
) -> None:
    with pytest.raises(ModelError) as caught:
        changes(planned, *(other for other in EFFECTS if other != name))
    said = str(caught.value)
    assert f"global_step4 was trained with {seen}" in said and f"--allow-changed {name} (" in said and "\n" not in said
    allowed = changes(planned, name)
    assert len(allowed.lines) == 1 and allowed.lines[0].endswith(EFFECTS[name]) and allowed.restarts_epoch == restarts


def test_all_differences_are_named_at_once() -> None:
    with pytest.raises(ModelError, match=r"seed 0, not 1, data of .* or allow it with --allow-changed seed data \("):
        changes(described(seed=1, data=64 * "d"))


def test_the_same_is_the_same_and_other_shapes_of_a_batch_are_announced() -> None:
    assert changes(described()) == Changes()
    assert changes(described({**SETTINGS, "tensorboard": {}, "steps_per_print": 3})) == Changes()
    (line,) = changes(described(micro_batches=8, replicas=1)).lines
    assert "8 micro-batches of 2 samples × 1 replicas, was 4 micro-batches of 2 samples × 2" in line
    (line,) = changes(described(held_out=64 * "d")).lines
    assert "held-out losses can't be compared" in line


def test_other_settings_are_announced_and_told_apart() -> None:
    params = {"optimizer": {"type": "AdamW", "params": {"lr": 0.2, "betas": [0.8, 0.95], "eps": 1e-6}}}
    found = changes(described({**SETTINGS, **params, "gradient_clipping": 2.0}))
    assert found.lines == [
        'since global_step4: "optimizer.params.lr" is 0.2, was 0.1',
        'since global_step4: "optimizer.params.betas" is [0.8, 0.95], was [0.9, 0.95]',
        'since global_step4: "optimizer.params.eps" is 1e-06, was not given',
        'since global_step4: "gradient_clipping" is 2.0, was not given',
    ]
    assert found.optimizer == {"lr", "betas", "eps"} and found.schedule
    without = changes(described({key: value for key, value in SETTINGS.items() if key != "scheduler"}))
    assert without.optimizer == set() and without.schedule


def test_what_an_earlier_version_wrote_is_said_not_to_be_comparable() -> None:
    earlier = described().model_copy(update={"conditions": None, "settings": {}})
    found = changes_since(PATH, earlier, described(seed=5), ())
    assert len(found.lines) == 1 and "global_step4 was written by an earlier version" in found.lines[0]
    with pytest.raises(ModelError, match="sequence-length 32, not 64"):
        changes_since(PATH, earlier, described(length=64), ())


def test_the_option_has_the_same_names() -> None:
    words = ["--deepspeed_config", "x", "--data", "y", "--model", "z", "--resume", "--allow-changed", *EFFECTS]
    assert parse_arguments(None, words).allow_changed == list(EFFECTS)


def test_sizes_of_a_batch_are_filled_as_deepspeed_does(prepared_conditions: Any) -> None:
    for settings in (
        {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4},
        {"train_batch_size": 24, "gradient_accumulation_steps": 3},
        {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3},
    ):
        found = prepared_conditions(settings)
        assert (found.micro_batch_size, found.micro_batches, found.batch_size) == (4, 3, 24), settings
    assert len(found.data) == len(found.tokenizer) == len(found.held_out) == 64


@pytest.fixture
def prepared_conditions() -> Any:
    """Conditions of two replicas on prepared data, by the configuration."""
    from ibp_deepspeed.data import open_tokens

    data = Path(__file__).parents[1] / "checkpoint" / "earlier_run" / "data"
    train = open_tokens(data, "train")
    return lambda ds_config: Conditions.of(train, 0, ds_config, 2)
