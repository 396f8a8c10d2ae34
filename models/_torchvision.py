"""Lets ``import torchvision`` work beside a CPU build of torch.

The torchvision wheel of the package index is linked against CUDA builds of torch. Beside a CPU build its compiled
operators do not load, and its Python code then fails because it registers fake kernels for operators nobody
declared. Declaring their schemas is enough for the pure Python parts (transforms, models), which is all that
lpips and transformers use. Where torch is a CUDA build, nothing is done.
"""

from __future__ import annotations

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
    _library = torch.library.Library("torchvision", "FRAGMENT")  # must live as long as the process
    for _schema in _SCHEMAS:
        _library.define(_schema)
