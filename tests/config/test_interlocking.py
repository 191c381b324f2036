"""Configurations: what is accepted, and the one sentence for what is not."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from ibp_deepspeed import ConfigError, InterlockingConfig, Strategy
from ibp_deepspeed.comm import distributed
from ibp_deepspeed.comm.distributed import check_compiler, check_connections
from ibp_deepspeed.config.deepspeed import check_ds_config, load_ds_config
from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.strategy.timeline import Timeline


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ({"startegy": "local"}, 'unknown key "interlocking.startegy" \\(did you mean "strategy"\\?\\)'),
        (
            {"aux_head": {"chunk_token": 3}},
            'unknown key "interlocking.aux_head.chunk_token" \\(did you mean "chunk_tokens"',
        ),
        ({"strategy": "nwise", "width": 0}, '"interlocking.width".*greater than or equal to 1, got 0'),
        ({"strategy": "nwise", "width": -2}, "got -2"),
        ({"strategy": "nwise"}, "needs a width"),
        ({"strategy": "pairwise", "width": 3}, "has width 2, not 3"),
        ({"strategy": "global", "width": 3}, "takes no width"),
        ({"strategy": "sideways"}, "'local', 'pairwise', 'nwise' or 'global', got 'sideways'"),
        ({"hop_slack": -1}, "got -1"),
        ({"window_weights": [1, 1]}, "are for mode"),
        ({"mode": "window", "window_weights": [1.0]}, "has 1 values, the width is 2"),
        ({"mode": "window", "window_weights": [0.0, 1.0]}, "the first above 0"),
        ({"mode": "window", "window_weights": [1.0, float("nan")]}, "finite"),
        ({"schedule": [{"from_step": 5, "width": 2}, {"from_step": 5, "width": 3}]}, r"must rise, they are \[5, 5\]"),
        ({"schedule": [{"from_step": 0, "width": 2}], "strategy": "local"}, "strategy and width are never used"),
        ({"schedule": [{"from_step": 3, "widht": 2}]}, 'unknown key "interlocking.schedule.0.widht" .* "width"'),
        ({"schedule": [{"from_step": -1, "width": 2}]}, '"interlocking.schedule.0.from_step".*got -1'),
        ({"schedule": [{"from_step": 1}]}, '"interlocking.schedule.0.width": field required'),
        ({"global_interval": 1}, '"interlocking.global_interval".*greater than or equal to 2, got 1'),
        ({"mixed": {"width": 3, "fraction": 1.5}}, '"interlocking.mixed.fraction".*less than or equal to 1, got 1.5'),
        ({"mixed": {"width": 3, "fraction": 0}}, "greater than 0, got 0"),
        ({"mixed": {"width": 3, "part": 0.5}}, 'unknown key "interlocking.mixed.part"'),
        (
            {"mode": "window", "window_weights": [1, 1], "mixed": {"width": 3, "fraction": 0.5}},
            "window_weights are for one width",
        ),
        (
            {"mode": "window", "window_weights": [1, 1], "schedule": [{"from_step": 1, "width": 3}]},
            "window_weights are for one width",
        ),
        ({"aux_head": {"average": 0.5}}, 'average is for readout "shared", the readout is "private"'),
        ({"aux_head": {"readout": "frozen", "refresh_interval": 2}}, 'refresh_interval is for readout "shared"'),
        ({"aux_head": {"readout": "shared", "average": 1.0}}, '"interlocking.aux_head.average".*less than 1, got 1'),
        ({"aux_head": {"readout": "own"}}, "'private', 'shared' or 'frozen', got 'own'"),
        ({"aux_head": {"blocks": -1}}, '"interlocking.aux_head.blocks".*got -1'),
        (
            {"mode": "window", "window_weights": [1, 1], "aux_head": {"borrow": 1}},
            "window_weights don't go together with aux_head.borrow",
        ),
        *[
            ({"exits": wrong}, '"interlocking.exits": exits are "every", a number of stages from 1 on, or different')
            for wrong in (0, -1, [], [1, 1], [-1], True, 1.5, "all", None)
        ],
        ({"mode": "sum"}, 'mode "sum" is for strategy "global", the strategy is "pairwise"'),
        ({"strategy": "local", "mode": "sum"}, 'the strategy is "local"'),
        ({"exit_weights": [1, 1]}, 'exit_weights are for mode "sum", the mode is "furthest"'),
        ({"strategy": "global", "mode": "sum", "exit_weights": [1, 0]}, "not negative, the last above 0"),
        ({"strategy": "global", "mode": "sum", "exit_weights": []}, r'"interlocking\.exit_weights|the last above 0'),
        ({"strategy": "global", "mode": "sum", "aux_head": {"borrow": 1}}, "does not go together with aux_head.borrow"),
        ({"backward": "split", "compile": True}, 'backward "split" does not go together with compile'),
        ("local", "must be an object"),
    ],
)
def test_wrong_blocks_get_one_sentence(block: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        InterlockingConfig.parse(block)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ({"exits": [1, 7]}, '"interlocking.exits" names stage 7, the 4 stages are 0 … 3'),
        ({"exits": [4]}, "names stage 4"),
        ({"strategy": "nwise", "width": 3, "mode": "sum"}, 'mode "sum" is for width 4 or more on 4 stages, not 3'),
        ({"strategy": "global", "mode": "sum", "exits": 2, "exit_weights": [1, 1, 1]}, "3 values for the 2 exits on 4"),
        ({"schedule": [{"from_step": 1, "width": 2, "mode": "sum"}]}, "on 4 stages, not 2"),
    ],
)
def test_what_only_the_number_of_stages_shows(block: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        Timeline(InterlockingConfig.parse(block), stages=4, micro_batches=2)
    assert "\n" not in str(caught.value)


def test_defaults_and_widths() -> None:
    config = InterlockingConfig.parse(None)
    assert (config.mode, config.streaming, config.hop_slack, config.clip_scope) == ("furthest", True, 0, "stage")
    assert [InterlockingConfig(strategy=s).width_for(5) for s in ("local", "pairwise", "global")] == [1, 2, 5]
    assert InterlockingConfig(strategy="nwise", width=3).width_for(2) == 2


def test_weights_near_the_last_stage_keep_their_sum() -> None:
    strategy = Strategy(4, 3, "window", window_weights=(2.0, 1.0, 1.0))
    assert strategy.weights(0) == {0: 2.0, 1: 1.0, 2: 1.0}
    assert strategy.weights(2) == pytest.approx({2: 8 / 3, 3: 4 / 3})
    assert strategy.weights(3) == {3: 4.0}
    assert Strategy(4, 3, "window").weights(2) == {2: 0.5, 3: 0.5}


def test_channel_depth() -> None:
    assert Strategy(4, 2).channel_depth(4) == 8
    assert Strategy(4, 4, hop_slack=2).channel_depth(1) == 10
    with pytest.raises(ConfigError, match="channel_depth.* is 1, the least .* is 3"):
        Strategy(4, 3).channel_depth(4, 1)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"fp16": {"enabled": True}}, "fp16 is not supported.*bf16"),
        ({"zero_optimization": {"stage": 2}}, "ZeRO stage 2 does not work with pipelines: use stage 0 or 1"),
        ({"zero_optimization": {"stage": 3}}, "ZeRO stage 3"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile is not for pipelines"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
    ],
)
def test_what_does_not_combine_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_ds_config(settings)


def test_unreadable_configurations(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="no DeepSpeed configuration"):
        load_ds_config(None)
    with pytest.raises(ConfigError, match="can't read"):
        load_ds_config(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"a": 1,\n}')
    with pytest.raises(ConfigError, match="no JSON.*line 2"):
        load_ds_config(broken)


def test_an_optimizer_that_needs_a_compiler_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no C.. compiler was found: install g.., or use .*torch_adam"):
        check_compiler({"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}})
    check_compiler({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}})
    check_compiler({"optimizer": {"type": "SGD"}})


def test_a_first_start_that_compiles_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(distributed, "has_compiler", lambda: True)
    check_compiler({"optimizer": {"type": "Adam"}})
    assert "DeepSpeed compiles its Adam now, at the first start on this machine" in capsys.readouterr().err
    made = tmp_path / "py311_cpu" / "fused_adam" / "fused_adam.so"
    made.parent.mkdir(parents=True)
    made.touch()
    check_compiler({"optimizer": {"type": "AdamW"}})
    assert not capsys.readouterr().err


@pytest.mark.parametrize("minutes", [1, 90])
def test_the_lock_of_a_start_that_was_killed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, minutes: int
) -> None:
    """A young one may be that of a process that compiles now."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(distributed, "has_compiler", lambda: True)
    monkeypatch.delenv("RANK", raising=False)
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    then = time.time() - 60 * minutes
    os.utime(lock, (then, then))
    check_compiler({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}})
    assert not capsys.readouterr().err
    if minutes > 20:
        with pytest.raises(ConfigError, match=f"{minutes} minutes ago has left {lock}"):
            check_compiler({"optimizer": {"type": "Adam"}})
    else:
        check_compiler({"optimizer": {"type": "Adam"}})
        assert str(lock) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stages", "micro_batches", "options", "delay"),
    [(4, 1, {}, 10), (32, 1, {}, 33), (4, 2, {"refresh_interval": 1}, 3), (4, 2, {"refresh_delay": 0}, 0)],
)
def test_default_delay_of_a_readout(stages: int, micro_batches: int, options: dict[str, int], delay: int) -> None:
    """max(R, ⌈K/M⌉ + 1)."""
    assert AuxHeadConfig(readout="shared", **options).delay(stages, micro_batches) == delay  # type: ignore[arg-type]


def test_one_launch_queue_is_refused_with_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    check_connections("gloo")
    with pytest.raises(ConfigError, match="CUDA_DEVICE_MAX_CONNECTIONS is 1"):
        check_connections("nccl")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    check_connections("nccl")
