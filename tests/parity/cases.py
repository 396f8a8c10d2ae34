"""Reference cases: inputs, weights and outputs of the published implementations, at small random sizes.

A case's ``meta`` says what to build. The models are those that the recipes train, and so are the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from models.checkpoints import published_gradient

Meta = Mapping[str, Any]
Tensors = dict[str, Tensor]


class Kind(NamedTuple):
    """How the cases of one published model are built and run.

    A tuple, since a dataclass would look for this module by its name: it is loaded by its path.
    """

    build: Callable[[Meta], nn.Module]
    run: Callable[[Any, Meta, Mapping[str, Tensor]], Tensors]


def model_from_case(meta: Meta) -> nn.Module:
    """Our model for the configuration of a case. ValueError for a kind that there is no entry for."""
    return _kind(meta).build(meta)


def load_case(model: nn.Module, meta: Meta, state: Mapping[str, Tensor]) -> None:
    """Load the weights of a case by their published names. WeightsError when anything does not fit."""
    _kind(meta)
    models.load_reference(model, state)


def run_case(model: nn.Module, meta: Meta, inputs: Mapping[str, Tensor]) -> Tensors:
    """Outputs by their published names, attached to the graph, with the case's loss under ``loss``."""
    return _kind(meta).run(model, meta, inputs)


def gradient(model: nn.Module, published_name: str) -> Tensor:
    """Gradient in the published shape, after a backward. WeightsError for an unknown name."""
    return published_gradient(model, published_name)


def _kind(meta: Meta) -> Kind:
    name = meta["config"]["model"]
    if name not in KINDS:
        raise ValueError(f"config.model={name!r}: there is no such kind of case; there are {', '.join(KINDS)}")
    return KINDS[name]


# MASt3R ---------------------------------------------------------------------------------------------------------------

CONFIDENCE_ALPHA, MATCHING_BETA, TEMPERATURE, MATCHING_WEIGHT = 0.2, 10.0, 0.05, 0.075


def _mast3r(meta: Meta) -> nn.Module:
    """Channels that no configuration names are those of MASt3R's own code."""
    from models.encoders.mast3r import Activations, Mast3r

    config = meta["config"]
    if config.get("head_type", "catmlp+dpt") != "catmlp+dpt":
        raise ValueError(f"head_type={config['head_type']!r}: only catmlp+dpt is MASt3R's")
    rope, outputs = str(config.get("pos_embed", "RoPE100")), str(config.get("output_mode", "pts3d+desc24"))
    if not rope.startswith("RoPE") or not outputs.startswith("pts3d+desc"):
        raise ValueError(
            f"pos_embed={rope!r}, output_mode={outputs!r}: allowed are RoPE<base> and pts3d+desc<channels>"
        )
    modes = {
        ours: (str(config[key][0]), float(config[key][1]), float(config[key][2]))
        for ours, key in (
            ("depth", "depth_mode"), ("confidence", "conf_mode"), ("descriptor_confidence", "desc_conf_mode"),
        )
        if config.get(key) is not None
    }  # fmt: skip
    return Mast3r(
        encoder_width=config["enc_embed_dim"],
        encoder_depth=config["enc_depth"],
        encoder_heads=config["enc_num_heads"],
        width=config["dec_embed_dim"],
        depth=config["dec_depth"],
        heads=config["dec_num_heads"],
        patch=config.get("patch_size", 16),
        mlp_ratio=config.get("mlp_ratio", 4),
        rope_base=float(rope.removeprefix("RoPE")),
        descriptor=int(outputs.removeprefix("pts3d+desc")),
        dpt_levels=(96, 192, 384, 768),
        dpt_width=256,
        rgb_hidden=0,
        own_confidence=config.get("two_confs", True),
        modes=Activations(**modes),
    )


def _run_mast3r(model: nn.Module, meta: Meta, inputs: Mapping[str, Tensor]) -> Tensors:
    view1, view2 = _in_true_orientation(model, inputs)
    outputs = {
        f"pred{number}/{'pts3d_in_other_view' if (number, name) == (2, 'pts3d') else name}": tensor
        for number, view in ((1, view1), (2, view2))
        for name, tensor in view.items()
    }
    losses = _mast3r_losses(view1, view2, inputs) if "view1/pts3d" in inputs else {}
    return {**outputs, **losses}


def _in_true_orientation(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensors]:
    """Maps of both views as they are stored. Pictures stored on their side (``true_shape`` says so) are turned for
    the model, and their maps turned back; pairs of one orientation go through it together.
    """
    images = [inputs["view1/img"], inputs["view2/img"]]
    sideways = [_sideways(inputs.get(f"view{n}/true_shape"), image) for n, image in ((1, images[0]), (2, images[1]))]
    groups = sorted(set(zip(*sideways, strict=True)))
    found: list[list[Tensors]] = []
    order: list[int] = []
    for group in groups:
        members = [i for i, pair in enumerate(zip(*sideways, strict=True)) if pair == group]
        order += members
        turned = [image[members].mT if turn else image[members] for image, turn in zip(images, group, strict=True)]
        views = model(*turned)
        found.append(
            [
                {name: maps.transpose(1, 2) if turn else maps for name, maps in view.items()}
                for view, turn in zip(views, group, strict=True)
            ]
        )
    back = torch.tensor(order).argsort()
    return [
        {name: torch.cat([group[view][name] for group in found])[back] for name in found[0][view]} for view in (0, 1)
    ]


def _sideways(true_shape: Tensor | None, image: Tensor) -> list[bool]:
    height, width = image.shape[-2:]
    if true_shape is None or height == width:
        return [False] * len(image)
    return [shape == [width, height] for shape in true_shape.tolist()]


def _mast3r_losses(view1: Tensors, view2: Tensors, inputs: Mapping[str, Tensor]) -> Tensors:
    """The official losses: means over the pixels of each view, added; a mean over the matches."""
    from models.geometry.poses import inverse
    from models.geometry.projection import transform
    from models.uniugg.losses_matching import matching_terms
    from models.uniugg.losses_points import PairTargets, confidence_regression, point_errors

    both = {
        name: torch.stack([inputs[f"view1/{name}"], inputs[f"view2/{name}"]], dim=1)
        for name in ("pts3d", "valid_mask", "sky_mask")
    }
    points = transform(both["pts3d"], inverse(inputs["view1/camera_pose"]))
    targets = PairTargets(points=points, valid=both["valid_mask"], sky=both["sky_mask"] & ~both["valid_mask"])
    predicted = torch.stack([view1["pts3d"], view2["pts3d"]], dim=1)
    error = point_errors(predicted, targets, inputs["view1/is_metric_scale"].bool())
    counted = targets.valid | targets.sky
    confidence = torch.stack([view1["conf"], view2["conf"]], dim=1)
    pixels = counted.sum((0, 2, 3)).clamp_min(1)
    surface = torch.where(targets.valid, error, 0.0).sum((0, 2, 3)) / targets.valid.sum((0, 2, 3)).clamp_min(1)
    confident = confidence_regression(error, confidence, counted, CONFIDENCE_ALPHA).sum((0, 2, 3)) / pixels
    ends = [_at(view, inputs[f"view{number}/corres"]) for number, view in ((1, view1), (2, view2))]
    valid = inputs["view1/valid_corres"]
    terms = matching_terms(
        (ends[0][0], ends[1][0]), (ends[0][1], ends[1][1]), valid, temperature=TEMPERATURE, beta=MATCHING_BETA, block=97
    )
    matching = terms.sum() / valid.sum().clamp_min(1)
    total = confident.sum() + MATCHING_WEIGHT * matching
    return {
        "loss_conf_regr": confident.sum(),
        "loss_regr_mean": surface.sum(),
        "loss_conf_match": matching,
        "loss_total": total,
        "loss": total,
    }


def _at(view: Tensors, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Descriptors (B, M, D) and their confidences (B, M) at pixels (B, M, 2), each (column, row)."""
    flat = pixels[..., 1] * view["desc"].shape[2] + pixels[..., 0]
    index = flat[..., None].expand(-1, -1, view["desc"].shape[-1])
    return view["desc"].flatten(1, 2).gather(1, index), view["desc_conf"].flatten(1).gather(1, flat)


# VGGT -----------------------------------------------------------------------------------------------------------------


def _vggt(meta: Meta) -> nn.Module:
    return vggt_from_config(meta["config"])


def vggt_from_config(config: Mapping[str, Any]) -> nn.Module:
    """What no configuration names is as in VGGT's own code."""
    from models.encoders.vggt import Vggt

    camera, dpt = config.get("camera_head", {}), config.get("dpt", {})
    return Vggt(
        width=config["embed_dim"],
        heads=config["num_heads"],
        depth=config["depth"],
        vit_depth=config["vit_depth"],
        patch=config.get("patch_size", 14),
        image_size=config.get("image_size", 518),
        registers=config.get("num_register_tokens", 4),
        camera_depth=camera.get("trunk_depth", 4),
        camera_heads=camera.get("num_heads", config["num_heads"]),
        iterations=camera.get("iterations", 4),
        dpt_layers=dpt.get("layers", (4, 11, 17, 23)),
        dpt_levels=dpt.get("out_channels", (256, 512, 1024, 1024)),
        dpt_features=dpt.get("features", 256),
        mlp_ratio=config.get("mlp_ratio", 4),
        rope_base=config.get("rope_freq", 100),
        qk_norm=config.get("qk_norm_global", config.get("qk_norm", "layernorm")),
    )


def _run_vggt(model: Any, meta: Meta, inputs: Mapping[str, Tensor]) -> Tensors:
    from models.encoders.vggt import extrinsics_intrinsics, pose_encoding

    images = inputs["images"]
    size = (images.shape[-2], images.shape[-1])
    out = model(images, keep=range(model.depth), points=True)
    extrinsics, intrinsics = extrinsics_intrinsics(out.poses[-1], size)
    outputs = {
        **{f"agg{layer}": tokens for layer, tokens in out.kept.items()},
        **{f"pose{number}": pose for number, pose in enumerate(out.poses)},
        "vit_patchtokens": model.aggregator.patch_tokens(images.flatten(0, 1)),
        "patch_start": torch.tensor(model.aggregator.prefix),
        "extr": extrinsics,
        "intr": intrinsics,
        "depth": out.depth[..., None],
        "depth_conf": out.depth_conf,
        "points": out.points,
        "points_conf": out.points_conf,
        "loss": (out.kept[model.depth - 1].square().mean() + out.poses[-1].square().mean() + out.depth.mean()),
    }
    if "enc" in inputs:
        extrinsics, intrinsics = extrinsics_intrinsics(inputs["enc"], size)
        back = pose_encoding(extrinsics, intrinsics, size)
        outputs |= {"enc_extr": extrinsics, "enc_intr": intrinsics, "enc_back": back}
    return outputs


# Spa3-VLM -------------------------------------------------------------------------------------------------------------


def _spa3vlm(meta: Meta) -> nn.Module:
    """``adapter`` may set the switches of the adapter; without it, it is that of the published weights."""
    from models.spa3r.vlm.model import Spa3VLM
    from models.spa3r.vlm.reference import Spa3VlmReference

    config = meta["config"]
    text = dict(config["qwen2_5_vl"])
    vision, tied = text.pop("vision_config"), text.pop("tie_word_embeddings", False)
    tokens = {key: text.pop(key) for key in [*text] if key.endswith("_token_id")}
    vocabulary, sections = text.pop("vocab_size"), text.pop("mrope_section", [16, 24, 24])
    theta = text.pop("rope_theta", 1e6)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, "mrope_section": sections}
    vlm = Spa3VLM(
        language={"text_config": text, "vision_config": vision, "tie_word_embeddings": tied},
        vocab_size=vocabulary,
        image_token_id=tokens["image_token_id"],
        latent_channels=config["spa3r"]["embed_dim"],
        adapter=config.get("adapter", {}),
        vision=True,
        attention="sdpa",
    )
    return Spa3VlmReference(KINDS["spa3r"].build(_geometry(meta)), vlm)


def _geometry(meta: Meta) -> Meta:
    """The case of the frozen Spa3R inside: all views are context."""
    return {**meta, "config": meta["config"]["spa3r"], "mode": "predict"}


def _run_spa3vlm(model: Any, meta: Meta, inputs: Mapping[str, Tensor]) -> Tensors:
    from models.spa3r.vlm.reference import image_batch

    with torch.no_grad():
        latents = KINDS["spa3r"].run(model.geometry, _geometry(meta), {"images": inputs["frames"]})["latents"]
    vlm, ids = model.vlm, inputs["ids"]
    batch = image_batch(vlm, ids, inputs["pixel_values"], inputs["grid"], latents)
    order = torch.arange(batch["visual"].shape[1])
    valid = order < batch["visual_lengths"][:, None]
    parts = vlm.adapter.parts(batch["visual"], latents)
    logits = vlm.logits(vlm.hidden(batch))
    outputs = {
        "logits": logits,
        "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()),
        "latents": latents,
        "visual": batch["visual"][valid],
        "geometry_projector": parts["projected"],
        "cross": parts["attended"][valid][None],
        "ln": parts["normed"][valid],
        "adaptor": parts["residual"][valid],
        "fused": (batch["visual"] + parts["update"])[valid],
    }
    return {**outputs, "gate": parts["gate"][valid]} if "gate" in parts else outputs


# PRoPE and Spa3R ------------------------------------------------------------------------------------------------------


class _Prope(nn.Module):
    """PRoPE attention; a case does not say how wide a head is, its inputs do."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.grid = (config["patches_y"], config["patches_x"])
        self.patch = config.get("patch_size", 14)
        self.base = float(config.get("rope_base", config.get("freq_base", 100)))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        from models.layers.prope import Prope, projection_matrices, prope_attention

        q, extrinsics = inputs["q"], inputs["viewmats"]
        size = (self.grid[0] * self.patch, self.grid[1] * self.patch)
        K = inputs.get("Ks")
        if K is None:  # PRoPE without intrinsics is that of a camera whose projection is its pose
            K = torch.tensor([[size[1], 0, size[1] / 2], [0, size[0], size[0] / 2], [0, 0, 1.0]])
            K = K.expand(*extrinsics.shape[:-2], 3, 3)
        positions = Prope(q.shape[-1], self.base)(*projection_matrices(extrinsics, K, size), self.grid)
        mask = inputs.get("spatial_mask")
        if mask is None:
            mask = torch.ones(q.shape[-2])
        return prope_attention(q, inputs["k"], inputs["v"], positions, mask=mask)


class _StandIn(nn.Module):
    """One convolution in the place of DINOv3."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        patch = config.get("patch_size", 16)
        self.conv = nn.Conv2d(3, config["dim"], patch, stride=patch)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.conv(pictures).permute(0, 2, 3, 1)


def _spa3r(meta: Meta) -> nn.Module:
    """What no configuration names is as in Spa3R's own code."""
    from models.spa3r.model import Spa3R
    from models.spa3r.reference import Spa3rReference

    config = meta["config"]
    inner = dict(config["vggt"])
    if "qk_norm_global" in config:
        inner["qk_norm_global"] = config["qk_norm_global"]
    channels, semantic = 2 * inner["embed_dim"], config.get("semantic")
    spa3r = Spa3R(
        channels=channels,
        width=config["embed_dim"],
        heads=config["num_heads"],
        encoder_layers=config["encoder_layers"],
        decoder_layers=config["decoder_layers"],
        queries=config["num_queries"],
        registers=config.get("num_register_tokens", config.get("num_registers", 4)),
        mlp_ratio=config.get("mlp_ratio", 4),
        targets={"geo": channels, **({"sem": semantic["dim"]} if semantic else {})},
        camera="prope",
        depth_probe=config.get("depth_probe", True),
        rope_base=config.get("rope_base", 100.0),
    )
    return Spa3rReference(vggt_from_config(inner), spa3r, _StandIn(semantic) if semantic else None)


def _objective(config: Mapping[str, Any], model: Any) -> Any:
    """The losses by the words that a case has for them: ``smooth_l1 + cosine, all views``."""
    from models.spa3r.losses import FieldObjective

    words = str(config.get("loss", "smooth_l1, all views")).lower()
    return FieldObjective(
        loss="smooth_l1" if "smooth" in words else "l1",
        loss_views=config.get("loss_views", "targets" if "target" in words else "all"),
        targets=tuple(model.spa3r.heads),
        depth_probe=model.spa3r.depth_prob is not None,
    )


def _run_spa3r(model: Any, meta: Meta, inputs: Mapping[str, Tensor]) -> Tensors:
    config, parts = meta["config"], ("projection", "encoder", "pose_tokenizer", "decoder")
    seen_by: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, given, got: seen_by.__setitem__(name, (given[0], got))

    handles = [getattr(model.spa3r, name).register_forward_hook(note(name)) for name in parts]
    try:
        if meta.get("mode", config.get("mode", "loss")) == "predict":
            frozen = model.frozen(inputs["images"], None, asymmetric=True, probe=False)
            outputs = {"latents": model.predict(inputs["images"])}
        else:
            objective = _objective(config, model)
            asymmetric = bool(meta.get("asymmetric", config.get("asymmetric", True)))
            frozen, field, losses = model(
                inputs["images"], inputs["view_mask"].bool(), objective, asymmetric=asymmetric
            )
            named = {name.replace("_l1", "/l1").replace("_cosine", "/cos"): value for name, value in losses.items()}
            outputs = {f"loss/{name.replace('depth_probe', 'depth_prob')}": value for name, value in named.items()}
            total = torch.stack(list(losses.values())).sum()
            outputs |= {"loss/total": total, "loss": total, "latents": field.latents}
            outputs |= {f"pred_{name}": tensor for name, tensor in field.predicted.items()}
            outputs |= {"rays": seen_by["pose_tokenizer"][0], "ray_embed": seen_by["pose_tokenizer"][1]}
            outputs["decoder"] = seen_by["decoder"][1]
    finally:
        for handle in handles:
            handle.remove()
    outputs |= {"agg_last": frozen.last, "pose_enc": frozen.pose, "f_ctx": frozen.context}
    outputs |= {name: seen_by[name][1] for name in ("projection", "encoder")}
    if frozen.semantic is not None:
        outputs["dino_target"] = frozen.semantic
    return outputs


#: ``config.model`` of a case -> how to build and run it.
KINDS: dict[str, Kind] = {
    "mast3r": Kind(_mast3r, _run_mast3r),
    "vggt": Kind(_vggt, _run_vggt),
    "prope": Kind(lambda meta: _Prope(meta["config"]), lambda model, _, inputs: {"o": model(inputs)}),
    "spa3r": Kind(_spa3r, _run_spa3r),
    "spa3-vlm": Kind(_spa3vlm, _run_spa3vlm),
}
