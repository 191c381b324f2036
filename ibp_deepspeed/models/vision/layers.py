"""The pipeline layers of an image classifier: stem, blocks, classifier."""

from __future__ import annotations

from torch import Tensor, nn

from ibp_deepspeed.models.vision.shell import ImageShell


class StemLayer(nn.Module):
    """Images [B, C, S, S], normalised → the first hidden states, by the model's own stem."""

    def __init__(self, shell: ImageShell) -> None:
        super().__init__()
        self.stem = shell.copy_of(shell.stem.module)

    def forward(self, images: Tensor) -> Tensor:
        return self.stem(images.to(next(self.parameters()).dtype))


class BlockLayer(nn.Module):
    """Hidden states → hidden states; ``index`` counts blocks from 0."""

    def __init__(self, shell: ImageShell, index: int) -> None:
        super().__init__()
        self.block = shell.copy_of(shell.blocks[index].module)

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.block(hidden)
        return output[0] if isinstance(output, tuple) else output


class ClassifierLayer(nn.Module):
    """Hidden states → logits [B, C]: global pooling, or the final norm of the class token; and the classifier."""

    def __init__(self, shell: ImageShell) -> None:
        super().__init__()
        self.before = shell.copy_of(shell.before.module)
        self.classifier = shell.copy_of(shell.classifier.module)
        self._reads_token = not shell.is_convolutional

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.before(hidden)
        return self.classifier(hidden[:, 0] if self._reads_token else hidden)
