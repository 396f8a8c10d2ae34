"""The geometry adapter: both forms against explicit algebra, zero at the start, each sample its own latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import models
from models.errors import ModelError
from models.spa3r.vlm.adapter import PAPER, RELEASED, AppendAdapter, CrossAdapter, make_adapter

WIDTH, LATENT, HEADS = 16, 6, 2


def adapter(seed: int = 0, **settings: Any) -> Any:
    """With values in the layer that starts at zero."""
    torch.manual_seed(seed)
    made: Any = make_adapter(WIDTH, LATENT, HEADS, settings)
    for name, parameter in made.named_parameters():
        if parameter.ndim == 1 or "fc2" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return made.eval()


def explicit(made: Any, visual: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """F + MLP(LN(CrossAttention(F, g(z)))) * sigmoid(gate) for one sample, head by head, with what there is of it."""
    state = {name: tensor.double() for name, tensor in made.state_dict().items()}

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if f"{name}.weight" not in state:
            return x
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    z = latents.double()
    if "projector.fc1.weight" in state:
        z = linear(gelu(linear(z, "projector.fc1")), "projector.fc2")
    q, k, v = (linear(x, f"attention.{name}") for name, x in (("query", visual.double()), ("key", z), ("value", z)))
    size, heads = WIDTH // HEADS, []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = norm(q[:, part], "attention.query_norm") @ norm(k[:, part], "attention.key_norm").T / size**0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v[:, part])
    a = norm(linear(torch.cat(heads, -1), "attention.out"), "norm")
    update = linear(gelu(linear(a, "mlp.fc1")), "mlp.fc2")
    if "gate.weight" in state:
        update = update / (1 + (-linear(a, "gate")).exp())
    return visual.double() + update


@pytest.mark.parametrize("switches", [PAPER, RELEASED, {**PAPER, "gate": True}, {**RELEASED, "norm": False}])
def test_every_form_is_its_equation(switches: dict[str, bool]) -> None:
    made = adapter(**switches)
    visual, latents = torch.randn(2, 7, WIDTH), torch.randn(2, 5, LATENT)
    out = made(visual, latents)
    for index in range(2):
        torch.testing.assert_close(
            out[index].double(), explicit(made, visual[index], latents[index]), atol=1e-5, rtol=0
        )
    assert ("gate" in made.parts(visual, latents)) == switches["gate"]


def test_the_published_form_has_the_published_names_and_size() -> None:
    with torch.device("meta"):
        made: Any = make_adapter(2048, 768, 16, {})
    assert sum(parameter.numel() for parameter in made.parameters()) == 28_857_344
    published = {made.published_names()[name]: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    assert published["geom_cross_attention.q_norm.weight"] == (128,)
    assert published["geometry_projector.0.weight"] == (2048, 768)
    assert published["geometry_adaptor.2.weight"] == (2048, 512)
    assert published["geometry_gate.0.bias"] == published["ln.weight"] == (2048,)
    assert {name.split(".")[0] for name in published} == {
        "geometry_projector", "geom_cross_attention", "ln", "geometry_adaptor", "geometry_gate",
    }  # fmt: skip


@pytest.mark.parametrize("switches", [PAPER, RELEASED])
def test_it_begins_as_the_identity_and_learns_from_there(switches: dict[str, bool]) -> None:
    made: Any = make_adapter(WIDTH, LATENT, HEADS, switches)
    visual, latents = torch.randn(2, 7, WIDTH), torch.randn(2, 5, LATENT)
    assert torch.equal(made(visual, latents), visual)
    assert made(visual.bfloat16(), latents.bfloat16()).equal(visual.bfloat16().float()), "no bit is lost"
    torch.nn.init.normal_(made.mlp.fc2.weight)
    for module in made.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(made(visual, latents), visual), "whoever initialises it again finds zero again"
    made(visual, latents).square().sum().backward()
    assert made.mlp.fc2.weight.grad.abs().max() > 0


def test_latents_that_are_padding_do_not_count() -> None:
    made = adapter()
    visual, latents = torch.randn(3, 4, WIDTH), torch.randn(3, 6, LATENT)
    there = torch.arange(6) < torch.tensor([6, 2, 0])[:, None]
    out = made(visual, latents, there)
    torch.testing.assert_close(out[:1], made(visual[:1], latents[:1]))
    torch.testing.assert_close(out[1:2], made(visual[1:2], latents[1:2, :2]))
    assert torch.equal(out[2], visual[2]), "a sample without latents keeps its tokens"
    out.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in made.parameters())


def test_kinds_and_what_is_refused() -> None:
    assert make_adapter(WIDTH, LATENT, HEADS, {"kind": "none"}) is None
    appended = make_adapter(WIDTH, LATENT, HEADS, {"kind": "append"})
    assert isinstance(appended, AppendAdapter)
    assert appended(torch.randn(2, 5, LATENT)).shape == (2, 5, WIDTH)
    chosen: Any = make_adapter(WIDTH, LATENT, HEADS, {"heads": 4})
    assert isinstance(chosen, CrossAdapter)
    assert chosen.attention.heads == 4
    with pytest.raises(ModelError, match="kind is one of cross, append, none"):
        make_adapter(WIDTH, LATENT, HEADS, {"kind": "concatenate"})
    with pytest.raises(ModelError, match=r"not \['gates'\]"):
        make_adapter(WIDTH, LATENT, HEADS, {"gates": True})
    with pytest.raises(ModelError, match=r"adapter\.heads=3 must divide the width 16"):
        make_adapter(WIDTH, LATENT, 3, {})


def test_seven_billion_are_built_without_memory() -> None:
    with torch.device("meta"):
        model: Any = models.build("spa3-vlm-7b")
    assert sum(parameter.numel() for parameter in model.language.parameters()) == 7_615_616_512
    assert model.adapter.attention.query_norm.weight.shape == (128,)
    assert not hasattr(model.language.model, "visual")
