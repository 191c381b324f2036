"""What rank 0 reads of the losses that stages tell."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ibp_deepspeed.comm.loss_board import LossBoard


def test_all_losses_of_each_batch_are_found_while_they_are_remembered() -> None:
    store = dist.HashStore()
    stages = [LossBoard(store, 2, window=4) for _ in range(2)]
    reader = LossBoard(store, 2, window=4)
    assert reader.after(0) == [] and reader.latest() is None
    for batch in range(1, 8):
        for stage, board in enumerate(stages):
            if batch <= 6 + stage:  # the second stage is ahead
                board._remember(batch, {stage: torch.tensor(10.0 * batch + stage)})
    for board in stages:
        board.close()
        board._write()
    assert [(losses.tolist(), batch) for losses, batch in reader.after(4)] == [([50.0, 51.0], 5), ([60.0, 61.0], 6)]
    assert [batch for _, batch in reader.after(0)] == [4, 5, 6], "four are remembered, the last of one stage alone"
    newest = reader.latest()
    assert newest is not None and newest[1] == 6 and reader.after(6) == []
