"""Where spatial latents meet visual tokens (arXiv 2602.21186, section 3.3): F' = F + MLP(CrossAttention(F, z)).

The released weights have more in it than the paper's equation: a projector before the attention, norms of queries
and keys, a norm and a gate behind. Each is a switch, so that both forms, and any between, can be built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.layers.block import Mlp
from models.layers.linear import Linear

CROSS, APPEND, NONE = "cross", "append", "none"
KINDS = (CROSS, APPEND, NONE)

PAPER: Mapping[str, bool] = {"projector": False, "qk_norm": False, "norm": False, "gate": False}
"""The paper's equation as switches."""
RELEASED: Mapping[str, bool] = {"projector": True, "qk_norm": True, "norm": True, "gate": True}
"""The published weights' form as switches."""

_NORM_EPS = 1e-5
_BOTTLENECK = 4
"""The last MLP is this many times narrower inside than outside."""


class ZeroLinear(Linear):
    """A linear layer that starts at zero, and goes back there whenever somebody initialises it again."""

    def reset_parameters(self) -> None:
        """Zero weight and bias."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class CrossAttention(nn.Module):
    """One layer of attention from tokens to latents, without positions.

    Args:
        width: of a token, and inside.
        latent_width: of a latent.
        heads: must divide ``width``.
        qk_norm: LayerNorm (affine) over each head's queries and keys.
    """

    def __init__(self, width: int, latent_width: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ModelError(f"adapter.heads={heads} must divide the width {width} of the language model")
        self.heads = heads
        self.query, self.out = Linear(width, width), Linear(width, width)
        self.key, self.value = Linear(latent_width, width), Linear(latent_width, width)
        size = width // heads
        self.query_norm = nn.LayerNorm(size, eps=_NORM_EPS) if qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(size, eps=_NORM_EPS) if qk_norm else nn.Identity()

    def forward(self, tokens: Tensor, latents: Tensor, valid: Tensor | None = None) -> Tensor:
        """Tokens (B, N, width), latents (B, Q, latent_width), which latents exist (B, Q) -> (B, N, width)."""
        query = self.query_norm(self._split(self.query(tokens)))
        key, value = self.key_norm(self._split(self.key(latents))), self._split(self.value(latents))
        mask = None if valid is None else valid[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, heads, N, width / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CrossAdapter(nn.Module):
    """Adds to every visual token what it reads from the latents of its own sample; zero at the start.

    Args:
        width: of a visual token.
        latent_width: of a latent.
        heads: of the attention.
        projector: latents go through Linear, GELU, Linear to ``width`` first.
        qk_norm: norm of queries and keys.
        norm: LayerNorm behind the attention.
        gate: the MLP's output times the sigmoid of a linear layer.
    """

    def __init__(
        self, width: int, latent_width: int, heads: int, *, projector: bool, qk_norm: bool, norm: bool, gate: bool
    ) -> None:
        super().__init__()
        self.projector = Mlp(latent_width, width, width) if projector else nn.Identity()
        self.attention = CrossAttention(width, width if projector else latent_width, heads, qk_norm=qk_norm)
        self.norm = nn.LayerNorm(width, eps=_NORM_EPS) if norm else nn.Identity()
        hidden = max(1, width // _BOTTLENECK)
        self.mlp = Mlp(width, hidden, width)
        self.mlp.fc2 = ZeroLinear(hidden, width)
        self.gate = Linear(width, width) if gate else None

    def forward(self, visual: Tensor, latents: Tensor, valid: Tensor | None = None) -> Tensor:
        """Visual tokens (B, N, width), latents (B, Q, latent_width), which latents exist (B, Q) -> (B, N, width).

        A sample without any latent keeps its tokens as they are.
        """
        return visual + self.parts(visual, latents, valid)["update"]

    def parts(self, visual: Tensor, latents: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """What is computed on the way, by name: ``projected``, ``attended``, ``normed``, ``residual``, ``gate``
        (where there is one) and ``update``, which is added.
        """
        if valid is not None:  # softmax over nothing is not a number: such a sample looks at one latent, for nothing
            some = valid.any(1)
            valid = valid | (~some)[:, None]
        dtype = self.attention.query.weight.dtype
        parts = {"projected": self.projector(latents.to(dtype))}
        parts["attended"] = self.attention(visual.to(dtype), parts["projected"], valid)
        parts["normed"] = self.norm(parts["attended"])
        update = parts["residual"] = self.mlp(parts["normed"])
        if self.gate is not None:
            parts["gate"] = self.gate(parts["normed"]).sigmoid()
            update = update * parts["gate"]
        parts["update"] = update if valid is None else torch.where(some[:, None, None], update, 0.0)
        return parts

    def published_names(self) -> dict[str, str]:
        """Our parameter name -> its name in the published checkpoint."""
        return {name: _published(name) for name in self.state_dict()}


class AppendAdapter(nn.Module):
    """The ablation: latents become tokens of their own behind the visual ones, by the projector alone."""

    appends = True
    """Latents have placeholders of their own."""

    def __init__(self, width: int, latent_width: int) -> None:
        super().__init__()
        self.projector = Mlp(latent_width, width, width)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, Q, latent_width) -> (B, Q, width)."""
        return self.projector(latents.to(self.projector.fc1.weight.dtype))

    def published_names(self) -> dict[str, str]:
        """Our parameter name -> its name in the published checkpoint."""
        return {name: _published(name) for name in self.state_dict()}


_PUBLISHED = {
    "projector.fc1": "geometry_projector.0",
    "projector.fc2": "geometry_projector.2",
    "attention.query": "geom_cross_attention.q_proj",
    "attention.key": "geom_cross_attention.k_proj",
    "attention.value": "geom_cross_attention.v_proj",
    "attention.query_norm": "geom_cross_attention.q_norm",
    "attention.key_norm": "geom_cross_attention.k_norm",
    "attention.out": "geom_cross_attention.proj",
    "norm": "ln",
    "mlp.fc1": "geometry_adaptor.0",
    "mlp.fc2": "geometry_adaptor.2",
    "gate": "geometry_gate.0",
}


def _published(name: str) -> str:
    layer, _, leaf = name.rpartition(".")
    return f"{_PUBLISHED[layer]}.{leaf}"


def make_adapter(width: int, latent_width: int, heads: int, settings: Mapping[str, Any]) -> nn.Module | None:
    """The adapter that ``settings`` describe: ``kind`` (cross | append | none), ``projector``, ``qk_norm``, ``norm``,
    ``gate`` (those of the released form where left out), ``heads`` (of the language model where left out or 0).

    None for kind none. ModelError for a setting that there is not.
    """
    values = {"kind": CROSS, "heads": 0, **RELEASED, **settings}
    unknown = sorted(set(values) - {"kind", "heads", *RELEASED})
    if unknown or values["kind"] not in KINDS:
        raise ModelError(
            f"adapter={dict(settings)}: kind is one of {', '.join(KINDS)}; beside it there are heads, "
            f"{', '.join(RELEASED)}" + (f", not {unknown}" if unknown else "")
        )
    if values["kind"] == NONE:
        return None
    if values["kind"] == APPEND:
        return AppendAdapter(width, latent_width)
    switches = {name: bool(values[name]) for name in RELEASED}
    return CrossAdapter(width, latent_width, int(values["heads"]) or heads, **switches)
