"""VGGT (Wang et al. 2025, arXiv 2503.11651): views to features, poses, depth and points, in one pass.

With ``targets`` the aggregator is the asymmetric one of Spa3R (arXiv 2602.21186, section 3.1): context views see each
other only, target views see all.
"""

from __future__ import annotations

from models.encoders.vggt.aggregator import Aggregator
from models.encoders.vggt.camera import CameraHead
from models.encoders.vggt.dense import DenseHead
from models.encoders.vggt.model import Vggt, VggtOutput, qk_norm_of
from models.encoders.vggt.poses import extrinsics_intrinsics, pose_encoding

__all__ = [
    "Aggregator",
    "CameraHead",
    "DenseHead",
    "Vggt",
    "VggtOutput",
    "extrinsics_intrinsics",
    "pose_encoding",
    "qk_norm_of",
]
