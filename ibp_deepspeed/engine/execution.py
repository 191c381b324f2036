"""What a stage does at each instruction of its schedule."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from ibp_deepspeed.batches import position_ids, to_device, unpack
from ibp_deepspeed.comm.message import TensorSpec
from ibp_deepspeed.comm.stage_links import StageLinks
from ibp_deepspeed.documents import Documents, reading
from ibp_deepspeed.engine.checkpointing import CheckpointingEngine
from ibp_deepspeed.engine.moment import Hook, Moment
from ibp_deepspeed.engine.recorder import Recorder
from ibp_deepspeed.engine.reporting import Reporting
from ibp_deepspeed.engine.watchdog import Position
from ibp_deepspeed.errors import BatchError
from ibp_deepspeed.schedule import instructions
from ibp_deepspeed.schedule.generator import InterlockedTrainSchedule
from ibp_deepspeed.stage.losses import StageLosses
from ibp_deepspeed.stage.meters import StageMeters
from ibp_deepspeed.stage.micro_batch import MicroBatchInFlight
from ibp_deepspeed.stage.module import InterlockedPipelineModule
from ibp_deepspeed.stage.sample_ledger import SampleLedger
from ibp_deepspeed.stage.weight_gradients import WeightGradients
from ibp_deepspeed.strategy.strategy import StageStrategy
from ibp_deepspeed.trace.spans import CREDIT, WEIGHTS

_UNRECORDED = nullcontext()


class ExecutingEngine(CheckpointingEngine):
    """An engine with this package's instructions in the place of DeepSpeed's.

    Attributes:
        position: which instruction is executed.
        before_instruction: a debug hook, called on this rank before each instruction, to inject a fault or a pause.
        recomputations: how often the trunk was run again for activation checkpointing.
    """

    module: InterlockedPipelineModule
    position: Position
    before_instruction: Hook | None = None
    links: StageLinks
    recomputations: int
    _schedule: InterlockedTrainSchedule
    _losses: StageLosses
    _meters: StageMeters
    _reporting: Reporting
    _ledger: SampleLedger
    _recompute: bool
    _borrowed: int
    """Layers of this stage before a head."""
    _trunk_parameters: list[torch.nn.Parameter]
    _weight_gradients: WeightGradients
    _due: deque[MicroBatchInFlight]
    """Whose weight gradients are still to be computed."""
    _recorder: Recorder | None
    """Of the batch at hand, if it is recorded."""

    def _exec_schedule(self, pipe_schedule: InterlockedTrainSchedule) -> None:
        """Overrides PipelineEngine's, which makes all instructions in every batch again."""
        self._reserve_pipe_buffers(pipe_schedule.num_pipe_buffers())
        for command in pipe_schedule.program:
            self.position.at(command)
            if self.before_instruction is not None:
                replica = self.grid.get_data_parallel_rank()
                self.before_instruction(
                    Moment.of(command, self.position.batch, self.global_rank, self.stage_id, replica)
                )
            if self._recorder is None:
                self._INSTRUCTION_MAP[type(command)](self, **command.kwargs)
                continue
            with self._recorder.instruction(command):
                self._INSTRUCTION_MAP[type(command)](self, **command.kwargs)

    def _recording(self, kind: str, micro_batch: int) -> AbstractContextManager[None]:
        """Around what is recorded apart from the instruction in which it happens."""
        return _UNRECORDED if self._recorder is None else self._recorder.span(kind, micro_batch)

    def _exec_load_micro_batch(self, buffer_id: int, micro_batch: int) -> None:
        recompute = self._recompute and self._schedule.tables[micro_batch].waits
        again = self._statistics.kept
        if self._borrowed:
            layers, borrowed = self.module.remaining_layers, self.module.borrowed_layers
            micro = MicroBatchInFlight(layers, borrowed=borrowed, recompute=recompute, again=again)
        else:
            side = self.module.side_loss_of_layers if self.module.side_loss is not None else None
            about: dict[str, Any] = {"side_loss": side, "side_share": 1 / self.micro_batches}
            micro = MicroBatchInFlight(self.module.trunk, recompute=recompute, again=again, **about)
        micro.number = micro_batch
        micro.inputs, micro.labels, micro.sample_checksum, micro.documents = self.load_micro_batch()
        self.pipe_buffers["in_flight"][buffer_id] = micro
        self._meters.micro_batch_begins()

    def _exec_recv_activations(self, buffer_id: int, micro_batch: int) -> None:
        micro = self._in_flight(buffer_id)
        self._fill_the_gap(self.links.has_activation)
        hidden, header = self.links.receive_activation()
        self._ledger.add(header, self.global_steps, micro_batch, micro.sample_checksum)
        micro.inputs = hidden.requires_grad_(self._schedule.tables[micro_batch].sends_gradients)

    def _exec_forward_pass(self, buffer_id: int, micro_batch: int) -> None:
        micro = self._in_flight(buffer_id)
        if not self.is_last_stage():
            self.position.awaits_credit = True
            with self._recording(CREDIT, micro_batch):
                self.links.wait_for_credit()
            self.position.awaits_credit = False
        micro.forward(input_gradient_follows=self._schedule.tables[micro_batch].input_gradient_follows)
        if micro.side is not None:
            self._reporting.side_loss(micro.side)
        if self.is_last_stage():
            micro.outputs = self.module.objectives[self.stage_id].loss(micro.outputs, micro.labels)
            self._losses.add(self.stage_id, micro.outputs)
            micro.output_gradients[self.stage_id] = torch.full_like(micro.outputs, 1 / self.micro_batches)

    def _exec_send_activations(self, buffer_id: int, micro_batch: int) -> None:
        micro = self._in_flight(buffer_id)
        spec = TensorSpec.of(micro.outputs, self.stage_id)
        header = (self.global_steps, micro_batch, micro.sample_checksum)
        self.links.send_activation(spec, micro.outputs.detach(), header)
        if not self._schedule.tables[micro_batch].computes_losses:
            micro.drop_graph()

    def _exec_aux_loss(self, buffer_id: int, micro_batch: int, loss: int) -> None:
        micro = self._in_flight(buffer_id)
        table, objective = self._schedule.tables[micro_batch], self.module.objectives[loss]
        read, gradients = (
            (micro.cut, micro.borrowed_gradients) if self._borrowed else (micro.outputs, micro.output_gradients)
        )
        assert read is not None
        hidden = read.detach().requires_grad_(loss in table.used)
        with reading(micro.documents):
            outputs = objective.outputs(hidden)
        where = {"batch": self.global_steps, "micro_batch": micro_batch, "index": loss}
        value = objective.training_loss(outputs, micro.labels, **where)
        given = None if self._borrowed or self.is_first_stage() else micro.inputs.detach()
        value = value + objective.stage_loss(given, hidden, micro.labels, **where)
        self._losses.add(loss, value)
        if value.requires_grad:  # else neither the head is trained nor a trunk by it
            with self._accumulating():
                (value / self.micro_batches).backward()
        if hidden.grad is not None:
            gradients[loss] = hidden.grad
        if loss not in table.crosses:
            micro.drop_graph()

    def _exec_recv_grads(self, buffer_id: int, micro_batch: int, loss: int) -> None:
        micro = self._in_flight(buffer_id)
        self._fill_the_gap(self.links.has_gradient)
        gradient, header = self.links.receive_gradient()
        self._ledger.add(header, self.global_steps, micro_batch, loss)
        micro.output_gradients[loss] = gradient

    def _exec_backward_borrowed(self, buffer_id: int, micro_batch: int, loss: int) -> None:
        micro = self._in_flight(buffer_id)
        with self._weight_gradients.left_out():
            micro.backward_borrowed(loss)
        micro.drop_graph()

    def _exec_backward_input(self, buffer_id: int, micro_batch: int, loss: int) -> None:
        micro = self._in_flight(buffer_id)
        with self._weight_gradients.left_out():
            micro.backward_input(loss)
        if loss == self.stage_id:
            micro.drop_graph()

    def _exec_send_grads(self, buffer_id: int, micro_batch: int, loss: int) -> None:
        micro = self._in_flight(buffer_id)
        gradient = micro.input_gradients.pop(loss)
        self.links.send_gradient(gradient, (self.global_steps, micro_batch, loss))

    def _exec_backward_pass(self, buffer_id: int, micro_batch: int) -> None:
        self._update(self._in_flight(buffer_id), self._schedule.tables[micro_batch])
        self._meters.micro_batch_ends()

    def _exec_update_input(self, buffer_id: int, micro_batch: int) -> None:
        micro = self._in_flight(buffer_id)
        with self._weight_gradients.put_off(micro.weight_gradients):
            self._update(micro, self._schedule.tables[micro_batch])
        self._due.append(micro)

    def _exec_backward_weight(self, buffer_id: int, micro_batch: int) -> None:
        if self._in_flight(buffer_id) in self._due:  # else gaps were filled with it
            self._work_off(lambda: False)

    def _exec_backward_through(self, buffer_id: int, micro_batch: int) -> None:
        self._exec_backward_pass(buffer_id, micro_batch)  # autograd finds the input alone

    def _exec_release(self, buffer_id: int, micro_batch: int) -> None:
        self._in_flight(buffer_id).free()
        self._meters.micro_batch_ends()

    def _update(self, micro: MicroBatchInFlight, table: StageStrategy) -> None:
        both = table.update_gives_input_gradient
        if table.trains:
            self._reporting.before_update(micro, table.terms)
        with self._accumulating():
            own = None if both else self._trunk_parameters or None
            micro.update(table.terms, own, table.borrowed_share, table.side_weight)
        if both:
            micro.input_gradients[table.reach] = micro.input_gradient(table.input_weight)
        self.recomputations += micro.recomputations
        micro.free()

    def _fill_the_gap(self, has_come: Callable[[], bool]) -> None:
        """While a message has not come: weight gradients that are due, the oldest first, as the program has them."""
        while self._due and not has_come():
            self._work_off(has_come)

    def _work_off(self, until: Callable[[], bool]) -> None:
        # one micro-batch each: bf16 gradients of two would be summed in bf16
        with self._recording(WEIGHTS, self._due[0].number), self._accumulating():
            if self._due[0].update_weights(until):
                self._due.popleft()
                self._meters.micro_batch_ends()

    def _exec_reduce_grads(self) -> None:
        """Overrides SteppingEngine's: first the proof that all stages saw the same samples."""
        self._ledger.check()
        if self.module.tied_comms:
            self._exec_reduce_tied_grads()
        super()._exec_reduce_grads()

    def _in_flight(self, buffer_id: int) -> MicroBatchInFlight:
        micro: MicroBatchInFlight = self.pipe_buffers["in_flight"][buffer_id]
        return micro

    def load_micro_batch(self) -> tuple[Any, Any, int, Documents | None]:
        """The next micro-batch: inputs (first stage only), labels (stages with a loss only), sample checksum, and the
        documents of its rows (all stages)."""
        if self.data_iterator is None:
            raise BatchError(f"stage {self.stage_id} was given no data: every rank needs a data_iter.")
        if not hasattr(self.data_iterator, "__next__"):
            raise BatchError(
                f"stage {self.stage_id} was given a {type(self.data_iterator).__name__}, which would begin again with "
                "every batch: make iter(…) of it once, and give that every time."
            )
        try:
            row = self._next_batch()
        except StopIteration:
            raise BatchError(
                f"the data of stage {self.stage_id} ended in batch {self.global_steps + 1}: give a repeating iterator."
            ) from None
        inputs, labels, key = unpack(row)
        has_loss = bool(self.module.objectives)
        return (
            to_device(inputs, self.device) if self.is_first_stage() else None,
            to_device(labels, self.device) if has_loss else None,
            key,
            Documents.of(position_ids(row), self.device),
        )

    _INSTRUCTION_MAP = {
        instructions.LoadMicroBatch: _exec_load_micro_batch,
        instructions.RecvActivation: _exec_recv_activations,
        instructions.ForwardPass: _exec_forward_pass,
        instructions.SendActivation: _exec_send_activations,
        instructions.AuxLoss: _exec_aux_loss,
        instructions.RecvGrad: _exec_recv_grads,
        instructions.BackwardBorrowed: _exec_backward_borrowed,
        instructions.BackwardInput: _exec_backward_input,
        instructions.SendGrad: _exec_send_grads,
        instructions.BackwardPass: _exec_backward_pass,
        instructions.BackwardThrough: _exec_backward_through,
        instructions.Release: _exec_release,
        instructions.UpdateInput: _exec_update_input,
        instructions.BackwardWeight: _exec_backward_weight,
        instructions.ReduceGrads: _exec_reduce_grads,
        instructions.OptimizerStep: PipelineEngine._exec_optimizer_step,
    }
