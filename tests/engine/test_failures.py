"""Bad input and failing stages: one sentence on one rank, exit code not 0, nobody hangs."""

from __future__ import annotations

import re

import pytest

from tests.launch import launch


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("two tensors", "rank 1: stage 1 passes a tuple to the next stage; a boundary carries exactly one floating"),
        ("integers", "rank 1: stage 1 passes a torch.int64 tensor"),
        ("other samples", "rank 2: stages 1 and 2 look at different samples in batch 1, micro-batch 0"),
        ("other samples in a dictionary", "rank 2: stages 1 and 2 look at different samples in batch 1, micro-batch 0"),
        ("smaller micro-batch", r"rank 0: activations from stage 0 to stage 1 changed .* \(drop_last=True of a DataLo"),
        ("nothing to train", "no stage has a parameter to train: leave some layers with requires_grad"),
        ("data ends", "rank 0: the data of stage 0 ended in batch 2: give a repeating iterator"),
        ("tied", "'embedding' is tied across stages, which width 2 of 4 stages can't train: untie it"),
        ("no heads", "width 2 of 4 stages in mode furthest needs a head for every exit"),
        ("stages", "4 processes can't be divided into pipelines of 3 stages"),
        ("layers", "4 stages are more than the model's 3 layers"),
        ("two configs", "differs from the configuration's"),
        ("infinite loss", r"rank 1: stage 1, batch 2: loss 1 is not finite; go on from the last checkpoint with"),
        ("another engine", "is trained with ibp_deepspeed.initialize: deepspeed.initialize would train plain backprop"),
        ("scalar parameter", r"of stage 1 has no dimension: make its shape \(1,\)"),
    ],
)
def test_one_sentence_on_one_rank(case: str, sentence: str) -> None:
    run = launch("failures", 4, case, timeout=90, end_with_first_failure=True)
    said = [line for output in run.output for line in output.splitlines() if line.startswith("error:")]
    assert any(re.search(sentence, line) for line in said), run.output
    assert len(said) == 1 and all("Traceback" not in output for output in run.output), run.output
    assert all(code != 0 for code in run.codes)


def test_a_stage_that_raises_in_the_middle_of_a_batch_ends_all_ranks() -> None:
    """Without a launcher's help: its neighbours see the connection break, theirs see theirs."""
    run = launch("failures", 4, "raises", timeout=100)
    assert all(code not in (0, None) for code in run.codes), (run.codes, run.output)
    assert run.seconds < 60, f"all ranks ended {run.seconds:.0f} s after the start"
    assert "a layer of this stage broke" in run.output[1] and "Traceback" in run.output[1]
    for rank in (0, 2, 3):
        assert "Traceback" not in run.output[rank] and "lost the connection" in run.output[rank], run.output[rank]


@pytest.mark.parametrize(("task", "what"), [("last stage dies", "readouts"), ("next exit dies", "late targets")])
def test_a_stage_that_dies_ends_those_that_wait_for_what_comes_late(task: str, what: str) -> None:
    """The others have trained two batches, or one, and nothing but that can wake them."""
    run = launch("failures", 4, task, timeout=100)
    assert all(code not in (0, None) for code in run.codes), (run.codes, run.output)
    assert run.seconds < 60, f"all ranks ended {run.seconds:.0f} s after the start"
    assert f"lost the connection for {what} from stage 3 to stage 2" in run.output[2], run.output[2]
    assert all("Traceback" not in output and "lost the connection" in output for output in run.output[:3]), run.output


def test_a_stage_that_dies_ends_those_that_wait_for_its_layers() -> None:
    """The head before it has trained two batches, and nothing but a copy can wake it; the first stage needs none of it
    to end well."""
    run = launch("failures", 4, "followed stage dies", timeout=100)
    assert run.codes[0] is not None and all(code not in (0, None) for code in run.codes[1:]), (run.codes, run.output)
    assert run.seconds < 60, f"all ranks ended {run.seconds:.0f} s after the start"
    assert "lost the connection for copies of layers from stage 3 to stage 2" in run.output[2], run.output[2]
    assert "lost the connection" in run.output[1] and all("Traceback" not in output for output in run.output[:3])
