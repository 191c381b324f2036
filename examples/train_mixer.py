"""Your own modules, heads, loss, DataLoader of dictionaries and optimizer: an MLP-mixer that reads digits, two stages.

deepspeed --quiet --num_accelerators 2 examples/train_mixer.py      # on a machine without a GPU with DS_ACCELERATOR=cpu
"""

from typing import Any

import torch
from deepspeed.runtime.dataloader import RepeatingLoader
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ibp_deepspeed import InterlockedPipelineModule, init_distributed, initialize


class Patches(nn.Conv2d):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["pixels"]).flatten(2).transpose(1, 2)  # of a dictionary, without its labels


class Mixer(nn.ModuleList):
    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self[0](hidden.transpose(1, 2)).transpose(1, 2)
        return hidden + self[1](hidden)


init_distributed()
mixers = [Mixer(nn.Sequential(nn.LayerNorm(n), nn.Linear(n, n), nn.GELU()) for n in (16, 32)) for _ in range(6)]
layers = [Patches(1, 32, 2, stride=2), *mixers, nn.Flatten(), nn.Linear(512, 10)]
loss_fn, head = nn.CrossEntropyLoss(label_smoothing=0.1), lambda stage: nn.Sequential(nn.Flatten(), nn.Linear(512, 10))
module = InterlockedPipelineModule(layers, num_stages=2, loss_fn=loss_fn, aux_head=head)
config = {"train_micro_batch_size_per_gpu": 30, "interlocking": {"strategy": "pairwise", "mode": "window"}}
engine, *_ = initialize(model=module, config=config, optimizer=lambda own: torch.optim.NAdam(own, lr=0.002))
images, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
rows: Any = [{"pixels": x.float().view(1, 8, 8) / 16, "labels": y} for x, y in zip(images, labels, strict=True)]
train = iter(RepeatingLoader(DataLoader(rows[:1500], 30)))  # in the same order on every stage
losses = [engine.train_batch(train) for _ in range(300)]
found = engine.eval_batch(iter(DataLoader(rows[1500:], 27)), 11, lambda out, y: (out.argmax(-1) == y).float().mean())
print(f"stage {engine.stage_id}: loss {losses[-1]:.2f}, held-out accuracy of the exits {found.tolist()}", flush=True)
