"""The Inception network of FID and KID, with the weights of the published file (pt_inception-2015-12-05).

It is torchvision's layout with the changes that reproduce the TensorFlow graph behind every published FID: average
pooling does not count padding, the last block pools by maximum, pictures are resized by TensorFlow 1's bilinear
rule (corners at the first pixel, no half-pixel shift) and mapped to (x - 128) / 128. Without that file there is no
FID: random weights, or the weights of an ImageNet classifier, give other numbers and are refused.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoints import load_reference
from models.errors import WeightsError
from models.metrics.weights import read_tensors

SIDE = 299
WIDTH = 2048


def _conv(inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1) -> nn.Module:
    """Convolution, batch norm, ReLU; odd kernels keep the size at stride 1, larger strides do not pad."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (kernel[0] // 2, kernel[1] // 2) if stride == 1 else (0, 0)
    return ConvNorm(inputs, outputs, kernel, stride, padding)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm (eps 1e-3), ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return F.relu(self.bn(self.conv(x)))


def _mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class InceptionA(nn.Module):
    """Branches 1x1, 5x5, two 3x3, pooled."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _conv(inputs, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = _conv(inputs, 48, 1), _conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _conv(inputs, 64, 1), _conv(64, 96, 3)
        self.branch3x3dbl_3 = _conv(96, 96, 3)
        self.branch_pool = _conv(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 224 + pooled, H, W)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_mean_pool(x))], 1)


class InceptionB(nn.Module):
    """Halves the grid: 3x3, two 3x3, pooled."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _conv(inputs, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _conv(inputs, 64, 1), _conv(64, 96, 3)
        self.branch3x3dbl_3 = _conv(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + 480, H/2, W/2)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    """Branches 1x1, 7x7 as 1x7 and 7x1, two of these, pooled."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        across, down = (1, 7), (7, 1)
        self.branch1x1 = _conv(inputs, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = _conv(inputs, width, 1), _conv(width, width, across)
        self.branch7x7_3 = _conv(width, 192, down)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _conv(inputs, width, 1), _conv(width, width, down)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _conv(width, width, across), _conv(width, width, down)
        self.branch7x7dbl_5 = _conv(width, 192, across)
        self.branch_pool = _conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 768, H, W)."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_mean_pool(x))], 1)


class InceptionD(nn.Module):
    """Halves the grid: 3x3, 7x7 then 3x3, pooled."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _conv(inputs, 192, 1), _conv(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = _conv(inputs, 192, 1), _conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = _conv(192, 192, (7, 1)), _conv(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + 512, H/2, W/2)."""
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionE(nn.Module):
    """Branches 1x1, 3x3 split in two, two 3x3 split in two, pooled by mean or (the last block) by maximum."""

    def __init__(self, inputs: int, *, maximum: bool) -> None:
        super().__init__()
        across, down = (1, 3), (3, 1)
        self.maximum = maximum
        self.branch1x1 = _conv(inputs, 320, 1)
        self.branch3x3_1 = _conv(inputs, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = _conv(384, 384, across), _conv(384, 384, down)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _conv(inputs, 448, 1), _conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _conv(384, 384, across), _conv(384, 384, down)
        self.branch_pool = _conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2048, H, W)."""
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = self.branch_pool(_max_pool(x) if self.maximum else _mean_pool(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        return torch.cat([*parts, self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), pooled], 1)


class FidInception(nn.Module):
    """Inception v3 up to its 2048 pooled features, with the classifier's tensors so that the file loads whole."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, (3, 3), 2, (0, 0))
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, (3, 3), 1, (0, 0))
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, (3, 3), 1, (1, 1))
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, (1, 1), 1, (0, 0))
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, (3, 3), 1, (0, 0))
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = InceptionA(192, 32), InceptionA(256, 64), InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b, self.Mixed_6c = InceptionC(768, 128), InceptionC(768, 160)
        self.Mixed_6d, self.Mixed_6e = InceptionC(768, 160), InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b, self.Mixed_7c = InceptionE(1280, maximum=False), InceptionE(2048, maximum=True)
        self.fc = nn.Linear(WIDTH, 1008)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 pictures (B, 3, H, W) of any size -> pooled features (B, 2048).

        ValueError for another dtype: a picture in [0, 1] would be a black one here.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"FID takes uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        x = resize_like_tensorflow1(images.to(self.fc.weight.dtype), SIDE, SIDE)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


def resize_like_tensorflow1(images: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize of (B, C, H, W) by TensorFlow 1's rule: output pixel i reads the source at i * H / height."""

    def taps(old: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
        place = torch.arange(new, dtype=images.dtype, device=images.device) * (old / new)
        low = place.floor()
        return low.long(), (low.long() + 1).clamp_max(old - 1), place - low

    top, bottom, down = taps(images.shape[2], height)
    left, right, across = taps(images.shape[3], width)
    rows = images[:, :, top] + (images[:, :, bottom] - images[:, :, top]) * down[:, None]
    return rows[:, :, :, left] + (rows[:, :, :, right] - rows[:, :, :, left]) * across


def load_inception(path: str | Path) -> FidInception:
    """The network with the published weights, frozen.

    Reads safetensors, or a state dict of torch (without unpickling anything else). WeightsError when the file is
    missing, or its tensors are not those of pt_inception-2015-12-05 (then the score would not be FID).
    """
    tensors = read_tensors(path, "Inception weights of FID (pt_inception-2015-12-05)")
    model = FidInception()
    try:
        load_reference(model, tensors, skip=["*.num_batches_tracked"])
    except WeightsError as error:
        raise WeightsError(f"{path} does not hold the Inception weights of FID: {error}") from error
    return model.eval().requires_grad_(False)
