"""VGGT and Spa3R once more, written out from published tensors: one dense mask, one matrix a token, no caches.

Slow and plain on purpose, and nothing of ``models`` in it, to compare the package with at sizes that nobody published
numbers for. Names of tensors are the published ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
Config = Mapping[str, Any]


def below(state: State, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix.``, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in state.items() if name.startswith(prefix + ".")}


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(x: Tensor, state: State, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def head_norm(x: Tensor, state: State, name: str) -> Tensor:
    """LayerNorm, RMSNorm where there is no bias, nothing where there is no norm."""
    if f"{name}.weight" not in state:
        return x
    if f"{name}.bias" in state:
        return norm(x, state, name, 1e-5)
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt() * state[f"{name}.weight"]


def mlp(x: Tensor, state: State, name: str) -> Tensor:
    hidden = linear(x, state, f"{name}.fc1")
    return linear(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))), state, f"{name}.fc2")


def rotated(x: Tensor, positions: Tensor, base: float = 100.0) -> Tensor:
    """(B, heads, N, d) turned by integer positions (N, 2) of row and column; rotate-half in each half of d."""
    parts = []
    for axis, part in enumerate(x.chunk(2, dim=-1)):
        width = part.shape[-1]
        angle = positions[:, axis, None].float() * base ** (-2 * torch.arange(width // 2) / width)
        angle = torch.cat([angle, angle], dim=-1)
        first, second = part.chunk(2, dim=-1)
        parts.append(part * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin())
    return torch.cat(parts, dim=-1)


def attended(
    x: Tensor, state: State, name: str, heads: int, positions: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Self-attention of tokens (B, N, C); ``mask`` (B, N, N), True where a query sees a key."""
    batch, length, width = x.shape
    qkv = linear(x, state, f"{name}.qkv").reshape(batch, length, 3, heads, width // heads)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    q, k = head_norm(q, state, f"{name}.q_norm"), head_norm(k, state, f"{name}.k_norm")
    if positions is not None:
        q, k = rotated(q, positions), rotated(k, positions)
    logits = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], -math.inf)
    out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
    return linear(out, state, f"{name}.proj")


def block(x: Tensor, state: State, name: str, heads: int, eps: float, **kwargs: Any) -> Tensor:
    """Pre-norm block with layer scale."""
    x = (
        x
        + attended(norm(x, state, f"{name}.norm1", eps), state, f"{name}.attn", heads, **kwargs)
        * (state[f"{name}.ls1.gamma"])
    )
    return x + mlp(norm(x, state, f"{name}.norm2", eps), state, f"{name}.mlp") * state[f"{name}.ls2.gamma"]


# VGGT -----------------------------------------------------------------------------------------------------------------


def patch_tokens(images: Tensor, state: State, config: Config) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> (N, h * w, C)."""
    inner, patch = below(state, "aggregator.patch_embed"), config["patch_size"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = F.conv2d((images - mean) / std, inner["patch_embed.proj.weight"], inner["patch_embed.proj.bias"], stride=patch)
    rows, columns = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)
    side = config["image_size"] // patch
    places = inner["pos_embed"][:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if (rows, columns) != (side, side):
        places = F.interpolate(places, size=(rows, columns), mode="bicubic", antialias=True)
    x = x + places.flatten(2).transpose(1, 2)
    first = inner["cls_token"] + inner["pos_embed"][:, :1]
    count, registers = len(x), inner["register_tokens"]
    x = torch.cat([first.expand(count, -1, -1), registers.expand(count, -1, -1), x], dim=1)
    for index in range(config["vit_depth"]):
        x = block(x, inner, f"blocks.{index}", config["num_heads"], 1e-6)
    return norm(x, inner, "norm", 1e-6)[:, 1 + registers.shape[1] :]


def aggregated(images: Tensor, targets: Tensor | None, state: State, config: Config) -> list[Tensor]:
    """Every layer's output (B, V, P, 2C); ``targets`` bool (B, V): context sees context alone, by one dense mask."""
    batch, views = images.shape[:2]
    inner, heads = below(state, "aggregator"), config["num_heads"]
    rows, columns = (side // config["patch_size"] for side in images.shape[-2:])
    tokens = patch_tokens(images.flatten(0, 1), state, config).unflatten(0, (batch, views))
    special = torch.cat([inner["camera_token"], inner["register_token"]], dim=2)
    chosen = torch.stack([special[0, min(view, 1)] for view in range(views)]).expand(batch, -1, -1, -1)
    x = torch.cat([chosen, tokens], dim=2)
    length = x.shape[2]
    grid = [[y + 1, c + 1] for y in range(rows) for c in range(columns)]
    one = torch.tensor([[0, 0]] * special.shape[2] + grid)
    mask = None
    if targets is not None:
        owner = torch.arange(views).repeat_interleave(length)
        mask = targets[:, owner][:, :, None] | ~targets[:, owner][:, None, :]
    outputs = []
    for index in range(config["depth"]):
        frame = block(x.flatten(0, 1), inner, f"frame_blocks.{index}", heads, 1e-5, positions=one)
        x = block(
            frame.reshape(batch, views * length, -1), inner, f"global_blocks.{index}", heads, 1e-5,
            positions=one.repeat(views, 1), mask=mask,
        )  # fmt: skip
        x = x.reshape(batch, views, length, -1)
        outputs.append(torch.cat([frame.reshape(x.shape), x], dim=-1))
    return outputs


def poses(outputs: Sequence[Tensor], state: State, config: Config) -> list[Tensor]:
    """The camera head's iterations, (B, V, 9) each."""
    inner, head = below(state, "camera_head"), config["camera_head"]
    token = norm(outputs[-1][:, :, 0], inner, "token_norm", 1e-5)
    plain = F.layer_norm(token, token.shape[-1:], eps=1e-6)
    found: list[Tensor] = []
    given = inner["empty_pose_tokens"].expand(*token.shape[:2], -1)
    for number in range(head["iterations"]):
        modulation = linear(F.silu(linear(given, inner, "embed_pose")), inner, "poseLN_modulation.1")
        shift, scale, gate = modulation.chunk(3, dim=-1)
        x = gate * (plain * (1 + scale) + shift) + token
        for index in range(head["trunk_depth"]):
            x = block(x, inner, f"trunk.{index}", config["num_heads"], 1e-5)
        delta = mlp(norm(x, inner, "trunk_norm", 1e-5), inner, "pose_branch")
        given = (delta if number == 0 else given + delta).detach()
        found.append(torch.cat([given[..., :7], given[..., 7:].relu()], dim=-1))
    return found


def uv(channels: int, rows: int, columns: int, size: tuple[int, int]) -> Tensor:
    """The dense head's position embedding (channels, rows, columns), cell by cell."""
    height, width = size
    diagonal = math.hypot(height, width)
    table = torch.zeros(channels, rows, columns)
    half = channels // 2
    for y in range(rows):
        for x in range(columns):
            place = (
                (2 * x + 1 - columns) / columns * width / diagonal,
                (2 * y + 1 - rows) / rows * height / diagonal,
            )
            for axis, value in enumerate(place):
                for i in range(half // 2):
                    angle = value * 100.0 ** (-i / (half / 2))
                    table[axis * half + i, y, x] = math.sin(angle)
                    table[axis * half + half // 2 + i, y, x] = math.cos(angle)
    return 0.1 * table


def conv(x: Tensor, state: State, name: str, **kwargs: Any) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **kwargs)


def refined(x: Tensor, state: State, name: str) -> Tensor:
    active = x.relu()
    return active + conv(conv(active, state, f"{name}.conv1", padding=1).relu(), state, f"{name}.conv2", padding=1)


def dense(outputs: Sequence[Tensor], name: str, size: tuple[int, int], state: State, config: Config) -> Tensor:
    """Raw values (B, V, channels, H, W) of a dense head, before its activation."""
    inner, patch = below(state, f"{name}"), config["patch_size"]
    rows, columns = size[0] // patch, size[1] // patch
    levels = []
    for number, layer in enumerate(config["dpt"]["layers"]):
        output = outputs[layer][:, :, -rows * columns :].flatten(0, 1)
        x = norm(output, inner, "norm", 1e-5).transpose(1, 2).unflatten(2, (rows, columns))
        x = conv(x, inner, f"projects.{number}")
        x = x + uv(x.shape[1], rows, columns, size)
        if number in (0, 1):
            weight, bias = (inner[f"resize_layers.{number}.{leaf}"] for leaf in ("weight", "bias"))
            x = F.conv_transpose2d(x, weight, bias, stride=4 if number == 0 else 2)
        if number == 3:
            x = conv(x, inner, "resize_layers.3", stride=2, padding=1)
        levels.append(conv(x, inner, f"scratch.layer{number + 1}_rn", padding=1))
    x = torch.zeros(())
    for number in (4, 3, 2, 1):
        unit, skip = f"scratch.refinenet{number}", levels[number - 1]
        x = skip if number == 4 else x + refined(skip, inner, f"{unit}.resConfUnit1")
        x = refined(x, inner, f"{unit}.resConfUnit2")
        into = levels[number - 2].shape[-2:] if number > 1 else [2 * side for side in x.shape[-2:]]
        x = F.interpolate(x, size=tuple(into), mode="bilinear", align_corners=True)
        x = conv(x, inner, f"{unit}.out_conv")
    x = conv(x, inner, "scratch.output_conv1", padding=1)
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    x = conv(x + uv(x.shape[1], *size, size), inner, "scratch.output_conv2.0", padding=1).relu()
    return conv(x, inner, "scratch.output_conv2.2").unflatten(0, outputs[0].shape[:2])


def depth_and_points(
    outputs: Sequence[Tensor], size: tuple[int, int], state: State, config: Config
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(depth (B, V, H, W), its confidence, points (B, V, H, W, 3), their confidence)."""
    raw = dense(outputs, "depth_head", size, state, config)
    cloud = dense(outputs, "point_head", size, state, config)
    values = cloud[:, :, :3].movedim(2, -1)
    points = values.sign() * (values.abs().exp() - 1)
    return raw[:, :, 0].exp(), 1 + raw[:, :, 1].exp(), points, 1 + cloud[:, :, 3].exp()


# Spa3R ----------------------------------------------------------------------------------------------------------------


def camera(encoding: Tensor) -> tuple[Tensor, Tensor]:
    """World-to-camera (4, 4), and the focal lengths (x, y) in widths and heights of the picture."""
    x, y, z, w = encoding[3:7]
    s = 2 / encoding[3:7].square().sum()
    rotation = torch.stack([
        torch.stack([1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)]),
        torch.stack([s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)]),
        torch.stack([s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)]),
    ])  # fmt: skip
    pose = torch.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, encoding[:3]
    return pose, 0.5 / torch.tan(encoding[[8, 7]] / 2)


def transformer(tokens: Tensor, state: State, name: str, layers: int, heads: int, attention: Any) -> Tensor:
    """Registers in front, blocks without layer scale, a norm; ``attention`` takes q, k, v of (B, heads, N, d)."""
    inner = below(state, name)
    x = torch.cat([inner["register_tokens"].expand(len(tokens), -1, -1), tokens], dim=1)
    for index in range(layers):
        at = f"blocks.{index}"
        qkv = linear(norm(x, inner, f"{at}.norm1", 1e-6), inner, f"{at}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = head_norm(q, inner, f"{at}.attn.q_norm"), head_norm(k, inner, f"{at}.attn.k_norm")
        x = x + linear(attention(q, k, v).transpose(1, 2).flatten(2), inner, f"{at}.attn.proj")
        x = x + mlp(norm(x, inner, f"{at}.norm2", 1e-6), inner, f"{at}.mlp")
    return norm(x, inner, "norm", 1e-6)[:, inner["register_tokens"].shape[1] :]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def encoded(context: Tensor, grid: tuple[int, int], state: State, config: Config) -> Tensor:
    """Features (B, Vc, n, 2C) -> all tokens (B, Nq + Vc n, D) behind the norm."""
    tokens = linear(context, state, "projection").flatten(1, 2)
    queries = state["query_embed.weight"].expand(len(tokens), -1, -1)
    still = state["encoder.register_tokens"].shape[1] + queries.shape[1]
    patches = [[y + 1, x + 1] for y in range(grid[0]) for x in range(grid[1])]
    positions = torch.tensor([[0, 0]] * still + patches * context.shape[1])
    return transformer(
        torch.cat([queries, tokens], dim=1), state, "encoder", config["encoder_layers"], config["num_heads"],
        lambda q, k, v: softmax_attention(rotated(q, positions), rotated(k, positions), v),
    )  # fmt: skip


def token_matrices(pose: Tensor, grid: tuple[int, int], still: int, width: int) -> tuple[Tensor, Tensor]:
    """For every token of one view a (width, width) matrix of what PRoPE does, and its inverse; identity for others."""
    extrinsic, (fx, fy) = camera(pose)
    lifted = torch.eye(4)
    lifted[0, 0], lifted[1, 1] = fx, fy
    projection = lifted @ extrinsic
    there, back = [torch.eye(width)] * still, [torch.eye(width)] * still
    quarter = width // 4
    for y in range(grid[0]):
        for x in range(grid[1]):
            blocks = [projection] * (width // 8)
            for place in (x, y):
                for_axis = torch.zeros(quarter, quarter)
                for i in range(quarter // 2):
                    angle = place * 100.0 ** (-i / (quarter // 2))
                    j = i + quarter // 2
                    for_axis[i, i] = for_axis[j, j] = math.cos(angle)
                    for_axis[i, j], for_axis[j, i] = -math.sin(angle), math.sin(angle)
                blocks.append(for_axis)  # of the output; queries, keys and values turn the other way
            matrix = torch.block_diag(*blocks)
            there.append(matrix)
            back.append(torch.linalg.inv(matrix.double()).float())
    return torch.stack(there), torch.stack(back)


def rays(pose: Tensor, grid: tuple[int, int]) -> Tensor:
    """(n, 3) unit directions through the middles of the patches."""
    _, focal = camera(pose)
    found = []
    for y in range(grid[0]):
        for x in range(grid[1]):
            at = torch.stack([
                (x + 0.5 - grid[1] / 2) / (focal[0] * grid[1]), (y + 0.5 - grid[0] / 2) / (focal[1] * grid[0]),
                torch.ones(()),
            ])  # fmt: skip
            found.append(at / at.norm())
    return torch.stack(found)


def decoded(latents: Tensor, pose: Tensor, grid: tuple[int, int], state: State, config: Config) -> Tensor:
    """Latents (B, Nq, D), poses (B, V, 9) -> tokens (B, V, n, D), view by view."""
    heads, count = config["num_heads"], latents.shape[1]
    still = state["decoder.register_tokens"].shape[1] + count
    views = []
    for scene, cameras in zip(latents, pose, strict=True):
        for one in cameras:
            there, back = token_matrices(one, grid, still, latents.shape[-1] // heads)

            def attention(q: Tensor, k: Tensor, v: Tensor, there: Tensor = there, back: Tensor = back) -> Tensor:
                q = torch.einsum("nji,bhnj->bhni", there, q)
                k, v = (torch.einsum("nij,bhnj->bhni", back, x) for x in (k, v))
                return torch.einsum("nij,bhnj->bhni", there, softmax_attention(q, k, v))

            tokens = torch.cat([scene, linear(rays(one, grid), state, "pose_tokenizer")])[None]
            out = transformer(tokens, state, "decoder", config["decoder_layers"], heads, attention)
            views.append(out[0, count:])
    return torch.stack(views).unflatten(0, pose.shape[:2])


def spa3r(
    images: Tensor, targets: Tensor, state: State, config: Config, *, asymmetric: bool, smooth: bool, all_views: bool
) -> dict[str, Tensor]:
    """Everything from pictures (B, V, 3, H, W) and roles (B, V) to the losses, under the names of a reference case."""
    vggt, size = config["vggt"], (images.shape[-2], images.shape[-1])
    grid = (size[0] // vggt["patch_size"], size[1] // vggt["patch_size"])
    patches = grid[0] * grid[1]
    outputs = aggregated(images, targets if asymmetric else None, state, vggt)
    features = outputs[-1][:, :, -patches:]
    seen = torch.stack([one[~mask] for one, mask in zip(features, targets, strict=True)])
    if not asymmetric:
        alone = torch.stack([one[~mask] for one, mask in zip(images, targets, strict=True)])
        seen = aggregated(alone, None, state, vggt)[-1][:, :, -patches:]
    pose = poses(outputs, state, vggt)[-1]
    depth = F.interpolate(depth_and_points(outputs, size, state, vggt)[0], size=grid, mode="nearest").flatten(2)
    tokens = encoded(seen, grid, state, config)
    latents = tokens[:, : len(state["query_embed.weight"])]
    decoder = decoded(latents, pose, grid, state, config)
    semantic = semantics(images, grid, state, config["semantic"])
    predicted = {name: mlp(decoder, state, f"heads.{name}") for name in ("geo", "sem")}
    probe = mlp(decoder.detach(), state, "depth_prob")[..., 0]
    counted = torch.ones_like(targets) if all_views else targets

    def difference(one: Tensor, other: Tensor) -> Tensor:
        error = (one - other)[counted].abs()
        return torch.where(error < 1, 0.5 * error.square(), error - 0.5).mean() if smooth else error.mean()

    losses = {}
    for name, truth in (("geo", features), ("sem", semantic)):
        cosine = (predicted[name] * truth).sum(-1) / (predicted[name].norm(dim=-1) * truth.norm(dim=-1))
        losses[f"loss/{name}/l1"] = difference(predicted[name], truth)
        losses[f"loss/{name}/cos"] = (1 - cosine)[counted].mean()
    losses["loss/depth_prob"] = difference(probe, depth)
    return {
        "agg_last": outputs[-1], "pose_enc": pose, "f_ctx": seen, "encoder": tokens, "latents": latents,
        "pred_geo": predicted["geo"], "pred_sem": predicted["sem"], "dino_target": semantic,
        **losses, "loss/total": torch.stack([*losses.values()]).sum(),
    }  # fmt: skip


def semantics(images: Tensor, grid: tuple[int, int], state: State, config: Config) -> Tensor:
    """The stand-in of DINOv3 on the stretched picture, resized to the grid: (B, V, n, dim)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    square = F.interpolate(images.flatten(0, 1), size=(224, 224), mode="bilinear", align_corners=False)
    maps = conv((square - mean) / std, state, "dino.conv", stride=config["patch_size"])
    maps = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2).unflatten(0, images.shape[:2])


# Spa3-VLM -------------------------------------------------------------------------------------------------------------


def fused(visual: Tensor, latents: Tensor, state: State, heads: int) -> Tensor:
    """Visual tokens (N, C) that have read latents (Nq, D), by the published adapter."""
    given = linear(latents, state, "geometry_projector.0")
    given = linear(0.5 * given * (1 + torch.erf(given / math.sqrt(2))), state, "geometry_projector.2")
    at = "geom_cross_attention"
    q, k, v = (
        linear(x, state, f"{at}.{name}_proj").unflatten(-1, (heads, -1)).transpose(0, 1)
        for x, name in ((visual, "q"), (given, "k"), (given, "v"))
    )
    q, k = head_norm(q, state, f"{at}.q_norm"), head_norm(k, state, f"{at}.k_norm")
    read = linear(softmax_attention(q, k, v).transpose(0, 1).flatten(1), state, f"{at}.proj")
    read = norm(read, state, "ln", 1e-5)
    hidden = linear(read, state, "geometry_adaptor.0")
    added = linear(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))), state, "geometry_adaptor.2")
    return visual + added * linear(read, state, "geometry_gate.0").sigmoid()
