"""CIFAR ResNets, as teachers and students of ``cifar10.py`` and ``compression.py``.

Source: He et al., Deep Residual Learning (2015), section 4.2: depth 6n + 2, identity
shortcuts with zero padding ("option A"). Parameters have the names of the published
checkpoints. The file is read by its path (``module:...``) and imports torch alone.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.extra = stride, width - width_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        front = self.extra // 2
        shortcut = F.pad(shortcut, (0, 0, 0, 0, front, self.extra - front))
        return F.relu(y + shortcut)


class CifarResNet(nn.Module):
    """timm's interface of features; ``forward`` gives logits, whole and by half."""

    def __init__(self, depth: int = 8, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        num = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width]
        for stage in (1, 2, 3):
            first = Block(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            more = [Block(widths[stage], widths[stage], 1) for _ in range(num - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *more))
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.linear(pooled)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.forward_head(self.forward_features(x))
        half = logits.shape[1] // 2
        return {"logits": logits, "first": logits[:, :half], "last": logits[:, half:]}


class CoarseResNet(CifarResNet):
    """Gives its last feature map as it is, and ruined by naive quantisers.

    They have one scale for a whole image and none for its channels: what not to store,
    so that a test of what may be stored can be seen to fail.
    """

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        grid = self.forward_features(x)
        largest = grid.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)
        found = {"exact": grid}
        for bits in (1, 2, 3):
            steps = 2**bits - 1
            found[f"naive_{bits}"] = (grid / largest * steps).round() / steps * largest
        return found
