"""A profile survives its file, is refused when it is damaged or of something else, and decides costs and stages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from ibp_deepspeed.commands.planning.arguments import parse_arguments
from ibp_deepspeed.commands.planning.job import make_job
from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.errors import PlanError
from ibp_deepspeed.models import CausalLM, load_config
from ibp_deepspeed.models.profiling.subject import subject_of
from ibp_deepspeed.planner.hardware import Cluster, Link
from ibp_deepspeed.planner.learned_heads import Sizes
from ibp_deepspeed.planner.plan import Candidate, Job, evaluate
from ibp_deepspeed.planner.profile import Profile, check_profile, read_profile, write_profile
from ibp_deepspeed.planner.workload import balanced, over_mean
from tests.models.test_costs import llama
from tests.planner.profiles import alike, piece, profile

Damage = Callable[[dict[str, Any]], None]


def written(folder: Path, of: Profile) -> Path:
    write_profile(of, folder / "profile.json")
    return folder / "profile.json"


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    made = alike(llama(), ends=0.3, head=0.2)
    assert read_profile(written(tmp_path, made)) == made
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def set_to(*where: str | int, value: object) -> Damage:
    def change(values: dict[str, Any]) -> None:
        target: Any = values
        for key in where[:-1]:
            target = target[key]
        target[where[-1]] = value

    return change


def without_a_layer(values: dict[str, Any]) -> None:
    values["pieces"][1]["layers"].remove(3)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (set_to("version", value=2), "has version 2, this program reads 1"),
        (set_to("pieces", 1, "forward", "median", value=-1.0), "pieces.1.forward.median: input should be greater"),
        (set_to("head", "backward", "low", value=math.nan), "head.backward.low: input should be a finite number"),
        (set_to("pieces", 2, "input_gradient", "median", value=math.inf), "a finite number, got inf"),
        (set_to("pieces", 0, "forward", "median", value="fast"), "pieces.0.forward.median: input should be a valid"),
        (set_to("pieces", 0, "parameters", value=-3), "pieces.0.parameters"),
        (without_a_layer, "layer 3 of 6 is missing"),
        (lambda values: values["pieces"].pop(), "layer 5 of 6 is missing"),
        (set_to("pieces", 2, "layers", value=[4, 5]), "its pieces have 7 layers, the model 6"),
        (lambda values: values.pop("head"), "head: field required"),
        (set_to("speed", value=3), "speed: extra inputs are not permitted, got 3"),
        (set_to("subject", "config", "hidden_size", value=64), "its config_checksum is not that of its config"),
    ],
)
def test_a_damaged_profile_is_one_sentence(damage: Damage, sentence: str, tmp_path: Path) -> None:
    path = written(tmp_path, alike(llama()))
    values = json.loads(path.read_text())
    damage(values)
    path.write_text(json.dumps(values))
    said = refusal(path)
    assert sentence in said and str(path) in said and said.endswith("measure it with scripts/profile_stage.py.")


def test_files_that_are_no_profile(tmp_path: Path) -> None:
    path = written(tmp_path, alike(llama()))
    text = path.read_text()
    for cut in (len(text) // 2, 0):
        path.write_text(text[:cut])
        assert f"{path} is no JSON" in refusal(path)
    path.write_bytes(b"\xff\xfe\x00")
    assert f"{path} is no JSON" in refusal(path)
    for other in ("[]", "{}", "3"):
        path.write_text(other)
        assert "has version None, this program reads 1" in refusal(path)
    assert "can't be read (No such file or directory)" in refusal(tmp_path / "nowhere.json")
    assert "can't be read (Is a directory)" in refusal(tmp_path)


def refusal(path: Path) -> str:
    with pytest.raises(PlanError) as caught:
        read_profile(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence", "command"),
    [
        ({"model": llama(vocab_size=97)}, "with vocab_size 96, here it is 97", "--sequence-length 16"),
        ({"model": llama(kind="mistral")}, "with model_type llama, here it is mistral", "--model m.json --set a=1"),
        ({"model": llama(num_hidden_layers=5)}, "with num_hidden_layers 4, here it is 5", "--out "),
        ({"sequence_length": 32}, "with sequence length 16, here it is 32", "--sequence-length 32"),
        ({"samples": 2}, "with micro-batch size 1, here it is 2", "--micro-batch-size 2"),
        ({"dtype": "bfloat16"}, "with dtype float32, here it is bfloat16", "--micro-batch-size 1 --out"),
        ({"options": AuxHeadConfig(rank=8)}, "with the head's rank None, here it is 8", "--head rank=8"),
        ({"options": AuxHeadConfig(readout="shared")}, "the head's readout private", "--head readout=shared"),
        ({"compiled": True}, "with compile False, here it is True", "--compile"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_profile_of_something_else_says_what_differs(changes: dict[str, Any], sentence: str, command: str) -> None:
    values: dict[str, Any] = {"model": llama(), "options": AuxHeadConfig(), "dtype": "float32", "compiled": False}
    values |= {"sequence_length": 16, "samples": 1, **changes}
    with pytest.raises(PlanError) as caught:
        check_profile(alike(llama()), Path("p.json"), subject_of(**values), ["--model", "m.json", "--set", "a=1"])
    said = str(caught.value)
    assert sentence in said and "\n" not in said
    assert command in said.partition("measure again with python scripts/profile_stage.py ")[2], said


def test_without_heads_any_head_will_do_and_compiled_or_not() -> None:
    about: dict[str, Any] = {"dtype": "float32", "sequence_length": 16, "samples": 1}
    asked = subject_of(llama(), None, compiled="either", **about)
    check_profile(alike(llama()), Path("p.json"), asked, [])
    refreshed = AuxHeadConfig(readout="private", aux_tokens_seed=3)
    check_profile(alike(llama()), Path("p.json"), subject_of(llama(), refreshed, compiled=False, **about), [])


def test_costs_are_the_measured_seconds() -> None:
    """Of a stage the sum of its layers; a head goes there and back at once; 1F1B's backward pass is in one piece."""
    last = piece("last layer and loss", [5], 0.5, 0.25, 0.0)
    layer = piece("decoder layer 1", [1, 2, 3, 4], 1.0, 1.5, 0.75, at_once=2.0)
    head = piece("auxiliary head", [], 0.4, 0.3, 0.2, at_once=0.4)
    made = profile(llama(), [piece("embedding", [0], 0.125, 0.25, 0.0), layer, last], head)
    work, device = made.workload(), made.machine(Path("p.json"))
    first, second = work.costs([0, 3, 6], device.flops)
    assert (first.forward, first.input_gradient, first.weight_gradient) == (2.125, 3.25, 1.5)
    assert (second.forward, second.input_gradient, second.weight_gradient) == (2.5, 3.25, 1.5)
    assert first.head == pytest.approx(0.8) and first.at_once == second.at_once == -0.5
    assert work.stage([0, 3, 6], 0).kept == 3 * 64 and work.message == 1000 and work.tokens == 16
    assert device.memory == 2**34 and made.machine(Path("p.json"), memory=5.0).memory == 5
    assert device.source == "measured, p.json (float32, torch 2.13.0)"
    job = Job(work, [0, 3, 6], 1, 1, Cluster(device, Link(math.inf, 0.0), Link(math.inf, 0.0)))
    whole = evaluate(job, Candidate("1F1B"))
    apart = evaluate(job, Candidate("B-W", {"strategy": "global", "exits": 2}))
    assert whole.batch_time == pytest.approx(2.125 + 2.5 + 2 * 4.25) and whole.work == 1
    # the last stage sends its input gradient first and computes W while the first goes back, at once
    assert apart.batch_time == pytest.approx(2.125 + 2.5 + 3.25 + 4.25)
    assert apart.work == pytest.approx((2.125 + 2.5 + 4.25 + 4.75) / (2.125 + 2.5 + 2 * 4.25))


def test_a_link_takes_what_the_message_took() -> None:
    message = alike(llama()).message
    assert message is not None
    link = message.link()
    assert link.latency == 1e-3 and link.boundary(1000).sending == pytest.approx(2e-3)
    tiny = message.model_copy(update={"seconds": message.latency})
    assert tiny.link() == Link(math.inf, 1e-3) and tiny.link().boundary(1000).sending == 0


@pytest.mark.parametrize("stages", [2, 3, 4, 6, 12])
def test_gpt_with_a_real_vocabulary_is_shared_evenly_by_what_was_measured(stages: int) -> None:
    """Twelve layers, 32k tokens: an LM head of 3.4 layers; the slowest stage is at most 10% over the mean."""
    model = CausalLM(AutoConfig.for_model("gpt2", n_layer=12, vocab_size=32_000))
    work = alike(model, layer=1.0, ends=3.4 * 3 / 1.1, head=3.2 * 3 / 1.1).workload()
    trained = model.partition(stages, measured=work)
    assert over_mean(work.layers, trained, work.head, range(stages)) <= 0.10
    planned = balanced(work.layers, stages, work.head, range(stages))
    assert max_load(work, planned) == pytest.approx(max_load(work, trained))


def max_load(work: Any, bounds: list[int]) -> float:
    last = len(bounds) - 2
    loads = [sum(layer.total for layer in work.layers[low:high]) for low, high in pairwise(bounds)]
    return max(load + (work.head.total if k < last else 0.0) for k, load in enumerate(loads))


def test_numbers_of_heads_are_parts_of_the_model_that_was_measured(tmp_path: Path) -> None:
    """A profile has no vocabulary and no width: the command takes them from the model that it is of."""
    where = written(tmp_path, alike(CausalLM(load_config("llama-tiny"))))
    words = f"--model llama-tiny --stages 2 --sequence-length 16 --fp32 --profile {where}".split()
    assert make_job(parse_arguments(None, words)).workload.sizes == Sizes(vocabulary=4096, width=128)
    work = make_job(parse_arguments(None, [*words, "--optimizer", "Muon"])).workload
    inside = [layer.matrices for layer in work.layers]
    assert work.optimizer == "Muon" and inside[0] == inside[-1] == 0 < min(inside[1:-1])


def test_a_slow_layer_makes_its_stage_shorter() -> None:
    """The first of eight like layers takes three times as long: by operations four and four, by the profile three and
    five."""
    model = llama(num_hidden_layers=8, vocab_size=2)
    slow, rest = piece("slow", [1], 3.0, 3.0, 3.0), piece("fast", list(range(2, 9)), 1.0, 1.0, 1.0)
    ends = [piece(name, [layer], 0.01, 0.01, 0.0) for name, layer in (("embedding", 0), ("last layer", 9))]
    made = profile(model, [ends[0], slow, rest, ends[1]], piece("auxiliary head", [], 0.01, 0.01, 0.0))
    assert model.partition(2) == [0, 5, 10]
    assert model.partition(2, measured=made.workload()) == [0, 4, 10]
    assert model.partition(2, measured=made.workload(), manual=[5, 3]) == [0, 6, 10]


def test_exits_and_heads_count_as_they_stand() -> None:
    """A head takes as long as two layers; without one on the first stages these have more layers."""
    model = llama(num_hidden_layers=8)
    work = alike(model, layer=1.0, ends=6 / 1.1, head=6 / 1.1).workload()
    assert model.partition(2, measured=work) == [0, 5, 10]
    assert (
        model.partition(2, measured=work, exits=[1]) == model.partition(2, measured=work, aux_heads=None) == [0, 6, 10]
    )
    behind = model.partition(2, measured=work, aux_heads=AuxHeadConfig(borrow=1))
    assert behind == [0, 7, 10], "the head stands on the second stage"
