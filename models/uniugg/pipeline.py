"""UniUGG in use (arXiv 2508.11952, figure 1): from one picture and a camera pose to the view from there, as tokens,
points, colours and depth.

The trained parts come as modules or from the folders that runs wrote; everything runs in eval mode without gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.encoders.base import FrozenEncoder
from models.encoders.preprocess import crop_box
from models.errors import ModelError, WeightsError
from models.geometry.poses import inverse
from models.geometry.projection import transform
from models.pretrained import load_pretrained
from models.uniugg.answers import generate_text
from models.uniugg.diffusion import ConditionedUNet, sample
from models.uniugg.direct import DirectLLM
from models.uniugg.encoder import StudentViT, normalise
from models.uniugg.llm import GENERATION, UniuggLLM
from models.uniugg.scenes import PointCloud, Rendered, render, select_points
from models.uniugg.spatial import SpatialDecoder
from models.uniugg.vae import SpatialVae

#: Name of a part -> what it must be. The last two may be missing: the direct variant has neither. The encoder may be
#: one that no recipe trained, such as RADIO, where the other parts learned to read its tokens.
PARTS: Mapping[str, tuple[type[nn.Module], ...]] = {
    "encoder": (StudentViT, FrozenEncoder),
    "spatial_decoder": (SpatialDecoder,),
    "llm": (UniuggLLM,),
    "vae": (SpatialVae,),
    "diffusion": (ConditionedUNet,),
}


def check_kinds(parts: Mapping[str, nn.Module], places: Mapping[str, Path] | None = None) -> None:
    """WeightsError unless each part is of the kind that its name asks for; ``places`` says where one was read."""
    for name, kinds in PARTS.items():
        if name in parts and not isinstance(parts[name], kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            where = f" ({places[name]})" if places and name in places else ""
            raise WeightsError(
                f"part {name!r}{where} must be a {wanted}, this is a {type(parts[name]).__name__}; give the folder of "
                f"the part that is called {name!r} where it was trained"
            )


@dataclass(frozen=True, kw_only=True)
class Imagined:
    """Views from N poses. Points are metres in the reference camera's frame; maps have the size of the pictures."""

    tokens: Tensor
    """(N, h, w, C) of the imagined view."""
    K: Tensor
    """(N, 3, 3) of the imagined picture."""
    pose: Tensor
    """(N, 4, 4): imagined camera -> reference camera."""
    reference_points: Tensor
    """(N, H, W, 3), like ``target_points``; both depend on the pair."""
    target_points: Tensor
    reference_confidence: Tensor
    """(N, H, W), like ``target_confidence``, from 1 on."""
    target_confidence: Tensor
    reference_colours: Tensor
    """(N, H, W, 3) in [0, 1], like ``target_colours``: the picture that the colour head draws."""
    target_colours: Tensor
    depth: Tensor
    """(N, H, W) metres along the axis of the imagined camera; not positive where a point lies behind it."""

    def __len__(self) -> int:
        return len(self.tokens)


class Pipeline:
    """The trained parts together.

    Args:
        parts: modules by the names of :data:`PARTS`.
        prompt: token ids of a generation sample, with placeholders for one view and its queries.
        size: height and width of the pictures, multiples of the patch.
        translation_scale: as the LLM was trained: metres | depth.
        imagines: views will be imagined; without, the encoder and the LLM are enough to be asked about pictures.
        sees: pictures will be looked at; without, no encoder is needed, and all is done from tokens.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        *,
        prompt: Sequence[int],
        size: tuple[int, int],
        translation_scale: str = "metres",
        imagines: bool = True,
        sees: bool = True,
    ) -> None:
        check_kinds(parts)
        wanted = needed(parts.get("llm"), imagines)
        missing = [name for name in wanted if name not in parts and (sees or name != "encoder")]
        if missing:
            wish = "imagine views" if imagines else "answer questions"
            raise WeightsError(f"to {wish}, the parts {missing} are missing; train them, or give their folders")
        modules: dict[str, Any] = {name: module.eval() for name, module in parts.items()}
        self.encoder: StudentViT | FrozenEncoder | None = modules.get("encoder")
        self.spatial_decoder: SpatialDecoder | None = modules.get("spatial_decoder")
        self.llm: UniuggLLM = modules["llm"]
        self.vae: SpatialVae | None = modules.get("vae")
        self.diffusion: ConditionedUNet | None = modules.get("diffusion")
        if size[0] % self.llm.patch or size[1] % self.llm.patch:
            raise ModelError(f"size={size} must be multiples of the patch, {self.llm.patch}")
        self.prompt, self.size, self.translation_scale = list(prompt), size, translation_scale
        self.device = next(self.llm.parameters()).device

    @classmethod
    def load(
        cls,
        folders: Mapping[str, str | Path],
        *,
        prompt: Sequence[int],
        size: tuple[int, int],
        translation_scale: str = "metres",
        device: str | torch.device = "cpu",
    ) -> Pipeline:
        """The parts from the folders that runs wrote (``<run>/weights/<part>``), on ``device``."""
        unknown = sorted(set(folders) - set(PARTS))
        if unknown:
            raise ModelError(f"there are no parts {unknown}; a pipeline has {list(PARTS)}")
        parts = {name: load_pretrained(folder).to(device) for name, folder in folders.items()}
        return cls(parts, prompt=prompt, size=size, translation_scale=translation_scale)

    # -- seeing ----------------------------------------------------------------------------------------------

    def cut(self, image: np.ndarray, K: Tensor) -> tuple[np.ndarray, Tensor]:
        """A picture uint8 (H, W, 3) of any size, and its K (3, 3), cut and resized to ``size`` as in training."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ModelError(f"a picture is uint8 (H, W, 3), got {image.dtype} {image.shape}")
        height, width = self.size
        left, top, right, bottom = crop_box(image.shape[:2], height, width)
        resized = Image.fromarray(image).resize(
            (width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom)
        )
        sx, sy = width / (right - left), height / (bottom - top)
        # Pixel centres lie at integers, the window in continuous coordinates: hence the halves.
        onto = torch.tensor(
            [[sx, 0.0, (0.5 - left) * sx - 0.5], [0.0, sy, (0.5 - top) * sy - 0.5], [0.0, 0.0, 1.0]], dtype=K.dtype
        )
        return np.array(resized), onto @ K.cpu()

    @torch.no_grad()
    def see(self, images: np.ndarray | Tensor) -> Tensor:
        """Pictures uint8 (B, H, W, 3) of ``size`` -> patch tokens (B, h, w, C)."""
        if self.encoder is None:
            raise WeightsError("this pipeline was opened without an encoder, for tokens; it sees no pictures")
        if isinstance(self.encoder, FrozenEncoder):  # one that prepares pictures in its own way
            prepared = [self.encoder.prepare(image, {}) for image in torch.as_tensor(images).cpu().numpy()]
            return self.encoder.encode(prepared)["tokens"][:, -1].float()
        return self.encoder(normalise(torch.as_tensor(images).to(self.device))).tokens

    # -- imagining -------------------------------------------------------------------------------------------

    def imagine(
        self,
        image: np.ndarray,
        K: Tensor,
        poses: Tensor,
        *,
        steps: int,
        guidance: float,
        eta: float = 0.0,
        seed: int = 0,
        target_K: Tensor | None = None,
        batch_size: int = 8,
    ) -> Imagined:
        """The views of cameras at ``poses`` (N, 4, 4), camera -> reference camera, in metres.

        Args:
            image: the reference, uint8 (H, W, 3) of any size.
            K: (3, 3) of it, pixel centres at integers.
            poses: of the imagined cameras.
            steps: of the sampler.
            guidance: classifier-free guidance; 1 is none.
            eta: of DDIM.
            seed: of the draw; all poses share it, so that the frames of a trajectory belong together.
            target_K: (3, 3) or (N, 3, 3) for pictures of ``size``; by default that of the reference as it was cut.
            batch_size: poses at once.
        """
        cut, cut_K = self.cut(image, K)
        tokens = self.see(cut[None])
        cameras = (cut_K if target_K is None else target_K).float().expand(len(poses), 3, 3).to(self.device)
        keys = torch.full((len(poses),), seed, dtype=torch.int64, device=self.device)
        found = []
        for start in range(0, len(poses), batch_size):
            part = slice(start, start + batch_size)
            reference = tokens.expand(len(poses[part]), -1, -1, -1)
            found.append(
                self.imagine_tokens(
                    reference,
                    cameras[part],
                    poses[part].to(self.device),
                    draw=keys[part],
                    steps=steps,
                    guidance=guidance,
                    eta=eta,
                )
            )
        return _join(found)

    @torch.no_grad()
    def imagine_tokens(
        self, tokens: Tensor, K: Tensor, pose: Tensor, *, draw: Tensor, steps: int, guidance: float, eta: float = 0.0
    ) -> Imagined:
        """Imagine from patch tokens: a batch of references (B, h, w, C) with one camera each.

        Args:
            tokens: of the references.
            K: (B, 3, 3) of the imagined pictures.
            pose: (B, 4, 4) imagined camera -> reference camera.
            draw: (B,) int64 keys of the draws.
            steps: see :meth:`imagine`, like ``guidance`` and ``eta``.
            guidance: see there.
            eta: see there.
        """
        tokens = tokens.float()
        self._spatial_decoder()  # said before the work, not after it
        out = self.llm(self._batch(tokens, K, pose), translation_scale=self.translation_scale)
        if "tokens" in out:
            imagined = out["tokens"]
        else:
            assert self.vae is not None
            assert self.diffusion is not None
            size = (2 * tokens.shape[1], 2 * tokens.shape[2])
            z = sample(self.diffusion, out["condition"], size=size, draw=draw, steps=steps, guidance=guidance, eta=eta)
            imagined = self.vae.decode(z)
        return self.decode(tokens, imagined, K, pose)

    @torch.no_grad()
    def decode(self, reference: Tensor, target: Tensor, K: Tensor, pose: Tensor) -> Imagined:
        """Tokens (B, h, w, C) of both views -> maps; ``pose`` (B, 4, 4) target camera -> reference camera."""
        first, second = self._spatial_decoder()(reference, target)
        if "rgb" not in first:
            raise WeightsError("the spatial decoder has no colour head (rgb_hidden=0); train one with colours")
        camera = transform(second["pts3d"], inverse(pose.float()))
        return Imagined(
            tokens=target,
            K=K,
            pose=pose.float(),
            reference_points=first["pts3d"],
            target_points=second["pts3d"],
            reference_confidence=first["conf"],
            target_confidence=second["conf"],
            reference_colours=first["rgb"],
            target_colours=second["rgb"],
            depth=camera[..., 2],
        )

    def _batch(self, tokens: Tensor, K: Tensor, pose: Tensor) -> dict[str, Any]:
        """A generation micro-batch, as the LLM saw them in training; the reference's K is not read."""
        number, device = len(tokens), tokens.device
        ids = torch.tensor(self.prompt, device=device).expand(number, -1)
        batch: dict[str, Any] = {
            "kind": GENERATION,
            "weight": torch.ones(number, device=device),
            "tokens": tokens[:, None],
            "K": K[:, None].expand(-1, 2, -1, -1),
            "pose": torch.stack([torch.eye(4, device=device, dtype=pose.dtype).expand_as(pose), pose], dim=1),
            "input_ids": ids,
            "supervised": torch.zeros_like(ids, dtype=torch.bool),
        }
        if self.translation_scale == "depth":
            # Of a picture alone: the reference read out as a pair with itself.
            batch["depth"] = self._spatial_decoder()(tokens, tokens)[0]["pts3d"][:, None, ..., 2]
        return batch

    def _spatial_decoder(self) -> SpatialDecoder:
        if self.spatial_decoder is None:
            raise WeightsError("this pipeline was opened without a spatial decoder, to be asked; it imagines no views")
        return self.spatial_decoder

    # -- using what was imagined -----------------------------------------------------------------------------

    def point_cloud(
        self, imagined: Imagined, index: int, *, confidence: float, points: str, reference: np.ndarray | None = None
    ) -> PointCloud:
        """The points of view ``index`` (``points``: target), or with those of the reference (union).

        Points below ``confidence`` are left out. ``reference`` uint8 (H, W, 3) of ``size`` gives its points their
        true colours.
        """
        if points not in ("target", "union"):
            raise ModelError(f"generate.points={points!r} must be target or union")
        cloud = select_points(
            imagined.target_points[index],
            imagined.target_colours[index],
            imagined.target_confidence[index],
            confidence,
        )
        if points == "target":
            return cloud
        colours = imagined.reference_colours[index]
        if reference is not None:
            colours = torch.as_tensor(reference).to(colours) / 255.0
        more = select_points(
            imagined.reference_points[index], colours, imagined.reference_confidence[index], confidence
        )
        return PointCloud(torch.cat([cloud.points, more.points]), torch.cat([cloud.colours, more.colours]))

    def render(self, imagined: Imagined, index: int, cloud: PointCloud, *, radius: float, fill: int) -> Rendered:
        """The point cloud as the camera of view ``index`` sees it."""
        height, width = self.size
        pose = imagined.pose[index]
        return render(cloud, imagined.K[index], pose, height=height, width=width, radius=radius, fill=fill)

    def generate_text(
        self,
        questions: Sequence[Sequence[int]],
        tokens: Tensor | None,
        *,
        max_new_tokens: int,
        stop: Collection[int],
        batch_size: int = 0,
    ) -> list[list[int]]:
        """Greedy answers (token ids) to questions (token ids) about views (V, h, w, C), seen or imagined."""
        return generate_text(
            self.llm, questions, tokens, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size
        )


def needed(llm: nn.Module | None, imagines: bool) -> tuple[str, ...]:
    """Names of the parts that a pipeline must have with this LLM; the direct variant regresses tokens by itself."""
    if not imagines:
        return ("encoder", "llm")
    decoding = ("encoder", "spatial_decoder", "llm")
    return decoding if llm is None or isinstance(llm, DirectLLM) else (*decoding, "vae", "diffusion")


def _join(parts: Sequence[Imagined]) -> Imagined:
    if not parts:
        raise ModelError("there is no pose to imagine a view from")
    names = [field.name for field in dataclasses.fields(Imagined)]
    return Imagined(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
