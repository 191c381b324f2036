"""Every preset is understood, key by key."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from ibp_deepspeed.commands.training.arguments import default_hyperparameters, parse_arguments
from ibp_deepspeed.config.auto import FILLED, fill_auto
from ibp_deepspeed.config.deepspeed import check_ds_config, load_ds_config, resolve_interlocking
from ibp_deepspeed.config.known_keys import TOP_LEVEL, unknown_keys
from ibp_deepspeed.engine import initialize
from ibp_deepspeed.errors import ConfigError
from ibp_deepspeed.optimizer.learning_rate import check_schedule
from ibp_deepspeed.schedule.validate import validated_timeline
from ibp_deepspeed.strategy.timeline import Timeline

DEFAULTS: dict[str, Any] = {option: 1e-3 if option == "--learning-rate" else 4 for option in FILLED.values()}
STRATEGIES = ("local", "solo", "modules", "large_vocabulary", "pairwise", "3wise", "global", "finetune")
EVERY = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))
PRESETS = [path for path in EVERY if not path.stem.startswith("vision_")]
VISION = [path for path in EVERY if path not in PRESETS]


class Listening(dict[str, Any]):
    """A dictionary that remembers which keys it was asked for."""

    asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return _Keys(self)

    def __copy__(self) -> Listening:
        return Listening(self)


class _Keys:
    def __init__(self, owner: Listening) -> None:
        self.owner = owner

    def __contains__(self, key: object) -> bool:
        return key in self.owner

    def __iter__(self) -> Any:
        return iter(self.owner)


def test_known_keys_are_those_that_deepspeed_asks_for() -> None:
    DeepSpeedConfig(Listening(train_batch_size=1))
    assert Listening.asked == set(TOP_LEVEL)


def test_there_is_a_cpu_and_a_gpu_preset_of_each_strategy() -> None:
    names = {f"{strategy}_{kind}.json" for strategy in STRATEGIES for kind in ("cpu", "gpu")}
    assert {path.name for path in PRESETS} == names


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset(path: Path) -> None:
    settings = fill_auto(load_ds_config(path), {}, DEFAULTS, replicas=1)
    assert unknown_keys(settings) == []
    check_ds_config(settings)
    config = resolve_interlocking(settings)
    parsed = DeepSpeedConfig({k: v for k, v in settings.items() if k != "interlocking"})
    timeline = Timeline(config, 4, parsed.gradient_accumulation_steps, aux_heads=config.aux_head is not None)
    name = path.stem.rsplit("_", 1)[0]
    width = {
        "local": 1,
        "solo": 1,
        "modules": 1,
        "large_vocabulary": 1,
        "pairwise": 2,
        "3wise": 3,
        "global": 4,
        "finetune": 2,
    }[name]
    assert [strategy.width for strategy in timeline.strategies()] == [width]
    validated_timeline(timeline)
    assert all(strategy.is_backpropagation == (name == "global") for strategy in timeline.strategies())
    assert parsed.bfloat16_config.enabled == path.stem.endswith("gpu")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_rate_warm_up_and_length_follow_the_command_line(path: Path) -> None:
    """So that a short run warms up shortly, and weights that are trained already get their own rate."""
    settings = load_ds_config(path)
    assert settings["scheduler"]["params"] == {"warmup_num_steps": "auto", "total_num_steps": "auto"}
    assert settings["optimizer"]["params"]["lr"] == "auto"
    for steps, warmup in ((40, 2), (20_000, 500)):
        args = parse_arguments(None, ["--deepspeed_config", "x", "--data", "y", "--model", "z", "--steps", str(steps)])
        filled = fill_auto(settings, {}, default_hyperparameters(args, 128), replicas=1)
        assert filled["scheduler"]["params"] == {"warmup_num_steps": warmup, "total_num_steps": steps}


def test_modules_are_two_stages() -> None:
    config = resolve_interlocking(load_ds_config(PRESETS[0].with_name("modules_cpu.json")))
    assert [config.exits_for(stages) for stages in (2, 3, 4, 8)] == [(1,), (0, 2), (1, 3), (1, 3, 5, 7)]


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_large_vocabulary_changes_the_head_alone(kind: str) -> None:
    plain, large = (
        load_ds_config(PRESETS[0].with_name(f"{name}_{kind}.json")) for name in ("modules", "large_vocabulary")
    )
    head = large["interlocking"].pop("aux_head")
    assert head == {"readout": "shared", "refresh_interval": 10, "negatives": 4096} and large == plain


def test_an_unknown_key_is_named_with_its_neighbour() -> None:
    settings = {"gradient_cliping": 1.0, "optimizer": {"typ": "SGD"}, "interlocking": {}}
    assert unknown_keys(settings) == [
        '"gradient_cliping" (did you mean "gradient_clipping"?)',
        '"optimizer.typ" (did you mean "type"?)',
    ]
    assert json.loads(PRESETS[0].read_text())


@pytest.mark.parametrize("has_nvcc", [True, False])
@pytest.mark.parametrize("path", [path for path in PRESETS if path.stem.endswith("gpu")], ids=lambda path: path.stem)
def test_gpu_presets_need_no_nvcc_and_what_needs_it_is_refused(
    path: Path, has_nvcc: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialize, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
    monkeypatch.setattr(initialize.cpp_extension, "CUDA_HOME", "/usr/local/cuda" if has_nvcc else None)
    monkeypatch.setattr(initialize, "installed_ops", {"fused_adam": False})
    settings = load_ds_config(path)
    initialize._check_fused_adam(settings)
    del settings["optimizer"]["params"]["torch_adam"]
    if has_nvcc:
        initialize._check_fused_adam(settings)
        return
    with pytest.raises(ConfigError, match='"torch_adam": true with "fused": true'):
        initialize._check_fused_adam(settings)


def test_presets_for_images_have_the_papers_optimizer_and_schedule() -> None:
    """Its released code's: SGD 0.1 with momentum, every parameter decays, a tenth at 91, 136 and 182 of 200 epochs."""
    assert [path.stem for path in VISION] == [f"vision_{name}" for name in ("3wise", "global", "local", "pairwise")]
    for path, width in zip(VISION, (3, 4, 1, 2), strict=True):
        settings = fill_auto(load_ds_config(path), {}, DEFAULTS | {"--learning-rate": 0.1, "--steps": 200}, replicas=1)
        assert unknown_keys(settings) == []
        check_ds_config(settings)
        check_schedule(settings)
        config = resolve_interlocking(settings)
        assert config.width_for(4) == width and config.decay == "all" and settings["gradient_clipping"] == 0.0
        assert settings["optimizer"] == {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 2e-4}}
        assert [200 * part for part in settings["scheduler"]["params"]["milestones"]] == [91, 136, 182]
