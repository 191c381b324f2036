"""Batches of every form and stages that are not all trained, with the engine and with the reference, side by side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ibp_deepspeed import InterlockedPipelineModule, InterlockedReference, initialize
from ibp_deepspeed.batches import unpack
from ibp_deepspeed.errors import BatchError, DataError
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss
from tests.toys import WIDTH, Head, Layer, loss_fn

STAGES, COUNT, BATCHES, SAMPLES = 2, 2, 3, 4
CLIP = 0.05
INTERLOCKING = {"strategy": "pairwise", "mode": "window"}
REFUSED = "refused"


class Pair(NamedTuple):
    """Inputs."""

    left: Tensor
    right: Tensor


class Sample(NamedTuple):
    """A sample, and collated a micro-batch."""

    inputs: Pair
    labels: Tensor
    ids: Tensor


class Joining(Layer):
    """A first layer that takes two parts by their names, from a dictionary or a named tuple."""

    def forward(self, hidden: Any) -> Tensor:
        parts = hidden["x"] if isinstance(hidden, dict) else hidden._asdict()
        return super().forward(torch.cat([parts["left"], parts["right"]], dim=-1))


class Normed(Layer):
    """With batch normalisation behind it."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(super().forward(hidden))


class Frozen(Layer):
    """Trains nothing; with a spare parameter it has one that nothing uses."""

    def __init__(self, seed: int, spare: bool = False) -> None:
        super().__init__(seed)
        self.requires_grad_(False)
        self.spare = nn.Parameter(torch.ones(2, 2)) if spare else None


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    """Samples without a number."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for seed in itertools.count():
            yield sample(seed)


@dataclass(frozen=True)
class Case:
    """What a training consists of.

    Attributes:
        data: a new iterator of micro-batches.
        layers: four makers, two a stage.
        loss: of all exits.
        clip: the norm of a stage's gradients.
        recompute: stages run again before their update.
    """

    data: Callable[[], Iterator[Any]]
    layers: list[LayerSpec] = field(default_factory=list)
    loss: Callable[[Any, Any], Tensor] = loss_fn
    clip: float = 0.0
    recompute: bool = False


def layers(**others: LayerSpec) -> list[LayerSpec]:
    """Two plain layers a stage, but for those given by their places ("at_0")."""
    plain = [LayerSpec(Layer, 0), LayerSpec(Layer, 1), LayerSpec(Layer, 2), LayerSpec(Head, 3)]
    return [others.get(f"at_{place}", spec) for place, spec in enumerate(plain)]


def sample(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)


def loader(samples: Any, **more: Any) -> DataLoader[Any]:
    """In an order that is the same on all stages."""
    if not isinstance(samples, IterableDataset):
        more |= {"shuffle": True, "generator": torch.Generator().manual_seed(7)}
    return DataLoader(samples, batch_size=SAMPLES, **more)


def plain() -> Iterator[Any]:
    return iter(loader([sample(seed) for seed in range(24)]))


def dictionaries() -> Iterator[Any]:
    rows = [sample(seed) for seed in range(24)]
    halves = [{"left": x[: WIDTH // 2], "right": x[WIDTH // 2 :]} for x, _ in rows]
    labels = [{"y": y, "weight": 1.0 + seed % 3} for seed, (_, y) in enumerate(rows)]
    return iter(loader([{"x": x, "labels": y} for x, y in zip(halves, labels, strict=True)]))


def named_tuples() -> Iterator[Any]:
    rows = [sample(seed) for seed in range(24)]
    pairs = [Pair(x[: WIDTH // 2], x[WIDTH // 2 :]) for x, _ in rows]
    return iter(
        loader([Sample(pair, y, torch.tensor(i)) for i, (pair, (_, y)) in enumerate(zip(pairs, rows, strict=True))])
    )


def classes() -> Iterator[Any]:
    """No label counts in the second micro-batch, and only some in the others."""
    for number in itertools.count():
        x, y = torch.stack([sample(4 * number + i)[0] for i in range(SAMPLES)]), torch.arange(SAMPLES)
        y[number % SAMPLES] = -100
        yield x, torch.full_like(y, -100) if number == 1 else y


def weighted(outputs: Tensor, labels: dict[str, Tensor]) -> Tensor:
    return (labels["weight"].float().unsqueeze(-1) * (outputs - labels["y"]).square()).mean()


CASES: dict[str, Callable[[], Case]] = {
    "dictionaries": lambda: Case(dictionaries, layers(at_0=LayerSpec(Joining, 0)), weighted),
    "named tuples": lambda: Case(named_tuples, layers(at_0=LayerSpec(Joining, 0))),
    "iterable": lambda: Case(lambda: iter(loader(Endless()))),
    "no label counts": lambda: Case(classes, loss=CausalLMLoss()),
    "frozen first trunk": lambda: Case(plain, layers(at_0=LayerSpec(Frozen, 0), at_1=LayerSpec(Frozen, 1)), clip=CLIP),
    "frozen in the last": lambda: Case(plain, layers(at_2=LayerSpec(Frozen, 2)), clip=CLIP),
    "no gradient": lambda: Case(plain, layers(at_2=LayerSpec(Frozen, 2, True), at_3=LayerSpec(Frozen, 3)), clip=CLIP),
    "batch norm": lambda: Case(plain, layers(at_1=LayerSpec(Normed, 1))),
    "batch norm, recomputed": lambda: Case(plain, layers(at_1=LayerSpec(Normed, 1)), recompute=True),
}


def run_case(name: str) -> dict[str, Any]:
    if name == REFUSED:
        return {"said": refused()}
    case = CASES[name]()
    specs = case.layers or layers()
    config = {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_accumulation_steps": COUNT,
        "gradient_clipping": case.clip,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "pipeline": {"activation_checkpoint_interval": int(case.recompute)},
    }
    engine = initialize(model=module_of(specs, case.loss), config=config)[0]
    built = [spec.build() for spec in specs]
    stages = [nn.Sequential(*built[:2]), nn.Sequential(*built[2:])]
    reference = InterlockedReference(stages, [Head(100)], case.loss, INTERLOCKING)
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    ours, theirs = case.data(), case.data()
    losses = [[float(engine.train_batch(ours)) for _ in range(BATCHES)], train(reference, theirs, case.clip)]
    mine = engine.stage_id
    wanted = [p for part in reference.modules(mine) for p in part.parameters()]
    pairs = list(zip(engine.module.parameters(), wanted, strict=True))
    buffers = [dict(each.named_buffers()) for each in (engine.module, nn.ModuleList(reference.modules(mine)))]
    engine.close()
    return {
        "error": max(float((a - b).norm() / b.norm()) for a, b in pairs),
        "loss": max(abs(a - b[mine]) for a, b in zip(*losses, strict=True)),
        "finite": all(bool(p.isfinite().all()) for p in engine.module.parameters()),
        "moved": [not torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True)],
        "trained": [p.requires_grad for p in engine.module.parameters()],
        "counted": [int(b) for each in buffers for name, b in each.items() if name.endswith("num_batches_tracked")],
        "statistics": [b.tolist() for each in buffers for name, b in each.items() if name.endswith("running_mean")],
    }


def module_of(specs: list[LayerSpec], loss: Callable[[Any, Any], Tensor]) -> InterlockedPipelineModule:
    return InterlockedPipelineModule(
        specs,
        num_stages=STAGES,
        loss_fn=loss,
        aux_head=lambda stage: Head(100 + stage),
        interlocking=INTERLOCKING,
        partition_method=[0, 2, 4],
    )


def refused() -> list[str]:
    """What is said of data that can't be taken, before anything is sent."""
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    said = []
    try:
        initialize(model=module_of(layers(), loss_fn), config=config, training_data=Endless())
    except DataError as error:
        said.append(str(error))
    engine = initialize(model=module_of(layers(), loss_fn), config=config)[0]
    for call in (engine.train_batch, engine.eval_batch):
        try:
            call(loader([sample(seed) for seed in range(24)]))
        except BatchError as error:
            said.append(str(error))
    engine.close()
    return said


def train(reference: InterlockedReference, data: Iterator[Any], clip: float) -> list[list[float]]:
    """The K losses of each batch."""
    scopes = [reference.parameters(k) for k in range(STAGES)]
    optimizers = [torch.optim.SGD(scope, lr=0.1, momentum=0.9) for scope in scopes]
    losses = []
    for _ in range(BATCHES):
        rows = [unpack(row)[:2] for row in itertools.islice(data, COUNT)]
        losses.append(reference.accumulate(rows).tolist())
        for scope, optimizer in zip(scopes, optimizers, strict=True):
            if clip:
                nn.utils.clip_grad_norm_(scope, clip)
            optimizer.step()
            optimizer.zero_grad()
    return losses
