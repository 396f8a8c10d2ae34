"""VGGT as two frozen encoders, so that what belongs to a picture is computed once for all the sets that it is in.

``vggt_patches`` (pictures): ``tokens`` (1, h, w, C), the patch tokens of the ViT, and their mean as ``summary`` (1, C).
``vggt`` (ordered view sets with roles, behind ``vggt_patches``): ``tokens`` (V, 1, h, w, 2 C) of the last layer in the
    compute dtype, ``pose`` float32 (V, 9), the last pose encoding, and ``depth`` float32 (V, h, w), the depth head's
    map at the first pixel of every patch. Views whose role is target are hidden from the others; the poses come from
    the camera head, which sees all views. ``arch={"depth_map": false}`` leaves the depth head and its output out.

Weights are random, a folder of :mod:`models.pretrained`, or one in the published layout: ``model.safetensors`` (or its
shards), else ``model.pt``, read without unpickling. The norm of queries and keys follows the checkpoint;
``arch={"qk_norm": "rmsnorm"}`` refuses one that has another.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoints import load_reference
from models.encoders.base import FrozenEncoder, InputKind
from models.encoders.uniugg import PartViT, TrainedPart
from models.encoders.vggt.blocks import IMAGENET_MEAN, IMAGENET_STD
from models.encoders.vggt.model import Vggt, qk_norm_of
from models.encoders.vggt.poses import ENCODING
from models.encoders.weights import (
    RANDOM,
    read_json,
    read_tensors,
    resolve_folder,
    stored_digest,
    tensor_digest,
    torch_dtype,
)
from models.errors import ModelError, WeightsError
from models.pretrained import CONFIG, WEIGHTS, describe_pretrained, load_part
from models.spec import TensorSpec

PUBLISHED = "vggt-1b"
"""What a folder in the published layout holds."""

PICKLED = "model.pt"
TARGET = "target"
"""Role of a view that the others must not see."""
DEPTH_MAP, QK_NORM = "depth_map", "qk_norm"
OPTIONS = frozenset({DEPTH_MAP, QK_NORM})
"""Keys of ``arch`` that hold with stored weights too; all others are sizes of random ones."""


class VggtPart(TrainedPart):
    """A whole VGGT by its folder, or at random.

    WeightsError when ``arch`` has a ``qk_norm`` and the stored weights have another. The depth map is none of its
    business: which heads are kept, the stages decide.
    """

    def __init__(self, family: str, weights: str, arch: Mapping[str, Any], seed: int) -> None:
        sizes = {key: value for key, value in arch.items() if key != DEPTH_MAP}
        wanted = sizes.pop(QK_NORM, None) if weights != RANDOM else None
        super().__init__(family, weights, sizes, seed)
        found = self.settings[QK_NORM]
        if wanted not in (None, found):
            raise WeightsError(
                f"encoder arch {QK_NORM}={wanted}, but {weights} has {found} in its global blocks; leave it out "
                "(recipe.spa3r.qk_norm_global=auto), or give the weights that it was meant for"
            )

    def locate(self, weights: str) -> Path:
        """A folder, or a hub name. WeightsError when it is neither."""
        return resolve_folder(weights)

    def _is_ours(self, folder: Path) -> bool:
        return (folder / CONFIG).is_file() and "model" in read_json(folder / CONFIG)

    def describe(self, folder: Path) -> Mapping[str, Any]:
        """Sizes of the published network, with the norm that the names of its tensors tell of."""
        if self._is_ours(folder):
            return describe_pretrained(folder)
        found = qk_norm_of(stored_names(folder))
        return {"model": PUBLISHED, "settings": {"qk_norm": found} if found else {}}

    def fill(self, module: nn.Module, folder: Path) -> None:
        """Load either layout, strictly."""
        if self._is_ours(folder):
            load_part(module, folder)
        else:
            load_reference(module, stored_tensors(folder))

    def stored(self, folder: Path) -> str:
        """Digest of the stored tensors, in whichever of the two kinds of file they are."""
        if _is_pickled(folder):
            return tensor_digest(stored_tensors(folder))
        return stored_digest(folder)


def _is_pickled(folder: Path) -> bool:
    return not any(folder.glob(f"{WEIGHTS}*")) and (folder / PICKLED).is_file()


def stored_names(folder: Path) -> list[str]:
    """Names of the tensors of a weights folder. WeightsError when it cannot be read."""
    from safetensors import SafetensorError, safe_open

    from models.encoders.weights import weight_files

    if _is_pickled(folder):
        return list(stored_tensors(folder))
    names: list[str] = []
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as stored:
                names += stored.keys()
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{file} cannot be read as safetensors: {error}") from error
    return names


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Tensors of a weights folder by name; a pickled file is mapped, and nothing but tensors is read from it."""
    if not _is_pickled(folder):
        return read_tensors(folder)
    path = folder / PICKLED
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} cannot be read as a file of tensors alone: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise WeightsError(f"{path} holds a {type(found).__name__} that is no table of tensors by name")
    return found


class VggtPatches(PartViT):
    """The stage of VGGT that sees one picture: DINOv2's ViT."""

    family = "vggt_patches"
    normalisation = IMAGENET_MEAN, IMAGENET_STD

    def find(self, weights: str, arch: Mapping[str, Any], seed: int) -> TrainedPart:  # noqa: D102
        return VggtPart(self.family, weights, arch, seed)

    def network(self, part: nn.Module | None = None) -> nn.Module:  # noqa: D102
        return super().network(part).get_submodule("aggregator.patch_embed")

    def run(self, model: Any, pixels: Tensor) -> dict[str, Tensor]:  # noqa: D102
        flat = model.tokens(pixels)
        grid = model.grid(pixels.shape[-2], pixels.shape[-1])
        return {"tokens": flat.unflatten(1, grid)[:, None], "summary": flat.mean(1, keepdim=True)}


class VggtViews(FrozenEncoder):
    """The rest of VGGT, over sets of views. Heads and poses are float32 whatever the compute dtype is.

    Args:
        upstream: the ``vggt_patches`` encoder, of the same weights.
        upstream_codec: codec that its records were stored with.
        weights: as of :class:`VggtPatches`.
        arch: with random weights ``model`` (a registry name) and its settings; with any ``depth_map`` (default true)
            and ``qk_norm`` (that the weights must have).
        seed: of random weights.
        dtype: compute dtype of the aggregator.
    """

    input_kind = InputKind.VIEWS
    family = "vggt"

    def __init__(
        self,
        upstream: FrozenEncoder,
        upstream_codec: str,
        *,
        weights: str = RANDOM,
        arch: Mapping[str, Any] | None = None,
        seed: int = 0,
        dtype: str = "bfloat16",
    ) -> None:
        super().__init__()
        arch = arch or {}
        self.depth_map = arch.get(DEPTH_MAP, True)
        if not isinstance(self.depth_map, bool):
            raise ModelError(f"encoder arch {DEPTH_MAP}={self.depth_map!r} must be true or false")
        self.part = VggtPart(self.family, weights, arch, seed)
        self.dtype_name, self.dtype = dtype, torch_dtype(dtype)
        tokens = upstream.outputs()["tokens"].shape if "tokens" in upstream.outputs() else ()
        width = self.part.settings["width"]
        if len(tokens) != 4 or tokens[0] != 1 or tokens[3] != width:
            raise ModelError(
                f"the aggregator of {self.part.name} reads tokens (1, h, w, {width}) of each view, the encoder before "
                f"it gives {tokens}; `upstream` must name a vggt_patches encoder of the same weights"
            )
        self.shape = tuple(int(axis or 0) for axis in tokens)
        self.grid = (self.shape[1], self.shape[2])
        self.upstream_codec = upstream_codec
        # Asked for when it is needed: it may read all the weights. Not the encoder itself, which would be our child.
        self._upstream = upstream.identity
        self.model: Vggt | None = None

    def load(self) -> VggtViews:
        """Build the network now, without what no output needs; WeightsError when the weights do not fit."""
        if self.model is None:
            self.identity()
            whole = self._stripped(self.part.load())
            self.model = whole.cast(self.dtype)
            self.freeze()
        return self

    def _stripped(self, whole: nn.Module) -> Vggt:
        assert isinstance(whole, Vggt), f"{self.part.name} is a Vggt"
        del whole.aggregator.patch_embed, whole.point_head
        if not self.depth_map:
            del whole.depth_head
        return whole

    def identity(self) -> Mapping[str, Any]:
        """WeightsError when the encoder before this one has other weights: its tokens would mean nothing here."""
        own, upstream = self.part.identity(), dict(self._upstream())
        if upstream.get("weights") != own["weights"]:
            raise WeightsError(
                f"VGGT's two stages have different weights: sha256 {str(upstream.get('weights'))[:16]}... of the "
                f"single pictures, {own['weights'][:16]}... of the views; give both encoders the same weights, arch "
                "and seed"
            )
        return {
            "kind": "views",
            "model": type(self).__name__,
            **own,
            "depth": self.depth_map,
            "dtype": self.dtype_name,
            "libraries": {"torch": torch.__version__.split("+")[0]},
            "upstream": upstream,
            "upstream_codec": self.upstream_codec,
            "layout": self.layout_version,
        }

    def outputs(self) -> Mapping[str, TensorSpec]:
        """Shapes of a set; None stands for the number of views."""
        return self.outputs_of(None)

    def outputs_of(self, views: int | None) -> Mapping[str, TensorSpec]:
        """The same for sets of so many views."""
        _, rows, columns, width = self.shape
        found = {
            "tokens": TensorSpec(shape=(views, 1, rows, columns, 2 * width), dtype=self.dtype_name),
            "pose": TensorSpec(shape=(views, ENCODING), dtype="float32", exact=True),
        }
        if self.depth_map:
            found["depth"] = TensorSpec(shape=(views, rows, columns), dtype="float32", exact=True)
        return found

    def prepare(
        self,
        value: Sequence[tuple[Mapping[str, Tensor], str]],
        transform: Mapping[str, Any],  # noqa: ARG002
    ) -> Mapping[str, Tensor]:
        """(record of ``vggt_patches``, role) of each view in order -> ``patches`` (V, h, w, C), ``targets`` int64 (T,).

        ``targets`` are the places of the views to be hidden; their number is part of the shape, since sets of one batch
        must have equally many. ``transform`` was applied to the pictures before. ModelError for no view at all, a first
        view that is a target, or views of different grids (pictures of different aspect).
        """
        if not value:
            raise ModelError("a set of views needs at least one view, got none")
        shapes = [tuple(record["tokens"].shape) for record, _ in value]
        if any(shape != self.shape for shape in shapes):
            raise ModelError(f"the views of a set must all have tokens {self.shape}, got {shapes}: one size for all")
        targets = [place for place, (_, role) in enumerate(value) if str(role) == TARGET]
        if 0 in targets:
            raise ModelError("view 0 of a set is a target; it must be context, since its camera is the world's frame")
        patches = torch.stack([record["tokens"][0] for record, _ in value])
        return {"patches": patches, "targets": torch.tensor(targets, dtype=torch.int64)}

    def encode(self, inputs: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:  # noqa: D102
        model = self.load().model
        assert model is not None
        patches = torch.stack([one["patches"] for one in inputs]).flatten(2, 3)
        hidden = torch.zeros(patches.shape[:2], dtype=torch.bool)
        hidden.scatter_(1, torch.stack([one["targets"] for one in inputs]).cpu(), True)
        return self._run(model, patches.to(model.aggregator.camera_token.device), hidden)

    def _run(self, model: Vggt, patches: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        out = model.from_patches(patches, self.grid, hidden, depth=self.depth_map)
        found = {"tokens": out.features.unflatten(2, self.grid)[:, :, None], "pose": out.poses[-1]}
        if out.depth is not None:
            found["depth"] = F.interpolate(out.depth, size=self.grid, mode="nearest")
        return found

    def flops(self, views: int, targets: int = 0) -> int:
        """Floating-point operations of one set with so many views, counted on the meta device."""
        from torch.utils.flop_counter import FlopCounterMode

        hidden = torch.arange(views, device="cpu")[None] >= views - targets
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = self._stripped(self.part.make().requires_grad_(False))
            self._run(model, torch.empty(1, views, self.grid[0] * self.grid[1], self.shape[3]), hidden)
        return int(counter.get_total_flops())

    def parameter_count(self) -> int:
        """Parameters of the network, counted on the meta device."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self._stripped(self.part.make()).parameters())
