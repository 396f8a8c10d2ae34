"""LPIPS (Zhang et al. 2018) through the lpips package, with the weights of its trunk from a path.

The package carries its own linear layers. Its trunk it would download; here the trunk's tensors are given
(torchvision's AlexNet, names ``features.{0,3,6,8,10}.{weight,bias}``), and a random trunk is refused: it gives
numbers that look right.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoints import load_reference
from models.encoders.weights import seeded
from models.errors import ModelError, WeightsError
from models.metrics.images import check_pictures
from models.metrics.weights import read_tensors

TRUNKS = ("alex", "vgg")


class Lpips(nn.Module):
    """The distance as a frozen module; gradients flow to the pictures. Made by :func:`load_lpips`."""

    def __init__(self, network: nn.Module, trunk: str) -> None:
        super().__init__()
        self.network = network
        self.trunk = trunk
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> Lpips:  # noqa: ARG002 - whatever the module around it is told
        """Stays in eval mode: the package has dropout before its linear layers."""
        super().train(False)
        return self

    def forward(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> distance (B,) float32; they are mapped to [-1, 1] here.

        Computes in float32 whatever autocast says. ValueError for another range, which is the common mistake.
        """
        check_pictures(predicted, true)
        with torch.autocast(predicted.device.type, enabled=False):
            return self.network(predicted.float() * 2 - 1, true.float() * 2 - 1).flatten()


def load_lpips(weights: str | Path, *, trunk: str = "alex") -> Lpips:
    """LPIPS 0.1 with the trunk's tensors from a file, or a folder with one safetensors file.

    A whole classifier's state dict does as well: what is not ``features.*`` is left out. ModelError for an unknown
    trunk, WeightsError when the tensors are missing or do not fit. The global generator is not touched.
    """
    if trunk not in TRUNKS:
        raise ModelError(f"unknown trunk of LPIPS {trunk!r}; there are {', '.join(TRUNKS)}")
    tensors = read_tensors(weights, f"trunk of LPIPS ({trunk})")
    import lpips

    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, about arguments that the package uses
            return lpips.LPIPS(pretrained=False, pnet_rand=True, net=trunk, version="0.1", verbose=False)

    network = seeded(build, 0)
    network_trunk = network.get_submodule("net")
    names = {name: "features." + name.partition(".")[2] for name in network_trunk.state_dict()}
    trunk_tensors = {ours: tensors[theirs] for ours, theirs in names.items() if theirs in tensors}
    try:
        load_reference(network_trunk, trunk_tensors)
    except WeightsError as error:
        raise WeightsError(
            f"{weights} does not hold the trunk of LPIPS ({trunk}: {', '.join(sorted(set(names.values())))}): {error}"
        ) from error
    _load_heads(network, Path(lpips.__file__).parent / "weights" / "v0.1" / f"{trunk}.pth")
    return Lpips(network, trunk)


def _load_heads(network: nn.Module, path: Path) -> None:
    heads = torch.load(path, map_location="cpu", weights_only=True)
    expected = {name for name in network.state_dict() if name.startswith("lin") and not name.startswith("lins")}
    if set(heads) != expected:
        raise WeightsError(f"{path} of the installed lpips holds {sorted(heads)}, not {sorted(expected)}")
    # `lins` lists the same layers a second time, so they are loaded through either name.
    network.load_state_dict(heads, strict=False)
