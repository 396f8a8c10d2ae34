"""RADIO in the layout that its authors publish: what transformers' class must be told, which its config.json lacks.

That file describes how the network was trained (``args``: the name of a timm ViT, the teachers) and not its form. The
form is in the stored tensors, except for the number of attention heads, which the name of the ViT decides. Files are
read, nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.encoders.weights import stored_shapes, weight_files
from models.errors import ModelError, WeightsError

PREFIX = "radio_model."
LAYER_SCALE = (".layer_scale1.lambda1", ".layer_scale2.lambda1")
"""Parameters of transformers' class that no RADIO has; 1 where they are not stored, so without effect."""

#: ViT of timm -> attention heads.
HEADS: Mapping[str, int] = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12, "vit_large": 16, "vit_huge": 16}


def is_published(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of the authors' rather than of transformers."""
    return isinstance(values.get("args"), Mapping) and "hidden_size" not in values


def form_of(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' RadioConfig for the folder of a published RADIO, whose config.json holds ``values``.

    WeightsError when a tensor that says the form is missing; ModelError for a network that is no plain ViT.
    """
    shapes = stored_shapes(folder)

    def shape(name: str) -> list[int]:
        try:
            return shapes[PREFIX + name]
        except KeyError:
            raise WeightsError(f"{folder} has no tensor {PREFIX}{name}; it holds no RADIO ViT as published") from None

    width, pixels = shape("model.patch_generator.embedder.weight")
    patch, side = round((pixels / 3) ** 0.5), round(shape("model.patch_generator.pos_embed")[1] ** 0.5)
    prefix, summaries = shape("model.patch_generator.cls_token.token")[0], _summaries(folder)
    classes = min(prefix, max(summaries) + 1)
    blocks = {name.removeprefix(f"{PREFIX}model.blocks.").partition(".")[0] for name in shapes if ".blocks." in name}
    return {
        "hidden_size": width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": _heads(folder, str(values["args"].get("model", ""))),
        "mlp_ratio": shape("model.blocks.0.mlp.fc1.weight")[0] / width,
        "patch_size": patch,
        "max_img_size": side * patch,
        # Only their sum and the summaries' places decide what the network computes.
        "num_cls_tokens": classes,
        "num_registers": prefix - classes,
        "summary_idxs": summaries,
    }


def _heads(folder: Path, vit: str) -> int:
    for name, heads in HEADS.items():
        if vit.startswith(f"{name}_"):
            return heads
    raise ModelError(
        f"{folder}/config.json: args.model={vit!r} is no ViT that is known here ({', '.join(HEADS)}); convert the "
        "weights to transformers' layout, or take another RADIO"
    )


def _summaries(folder: Path) -> list[int]:
    """Which class tokens are summaries."""
    from safetensors import safe_open

    for file in weight_files(folder):
        with safe_open(file, framework="pt") as stored:
            if f"{PREFIX}summary_idxs" in stored.keys():  # noqa: SIM118 - not a mapping
                return [int(place) for place in stored.get_tensor(f"{PREFIX}summary_idxs")]
    raise WeightsError(f"{folder} has no tensor {PREFIX}summary_idxs; it holds no RADIO ViT as published")
