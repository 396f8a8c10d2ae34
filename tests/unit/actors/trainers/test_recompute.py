from __future__ import annotations

import pytest
import torch
from torch import Tensor

import models
from actors.trainers.recompute import checkpoint_activations
from configs import ConfigError
from models.probe.spec import TRAINER
from tests.support.toy_role import ROLE, Toy


def run(recompute: bool) -> tuple[dict[str, Tensor], int, list[str]]:
    """Gradients of a probe, bytes that its forward pass keeps for the backward pass, names of its state."""
    torch.manual_seed(0)
    module = models.build("probe-tiny", channels=16, classes=5)
    if recompute:
        assert checkpoint_activations(module, TRAINER) == 1
    generator = torch.Generator().manual_seed(1)
    batch = {
        "tokens": torch.randn(2, 4, 4, 4, 16, generator=generator),
        "summary": torch.randn(2, 1, 16, generator=generator),
        "depth": torch.rand(2, 56, 56, generator=generator) + 1,
        "labels": torch.randint(0, 5, (2, 56, 56), generator=generator),
        "weight": torch.ones(2),
    }
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = torch.stack(list(TRAINER.step(module, batch, {}).sums.values())).sum()
        before_backward = sum(kept.values())
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return gradients, before_backward, list(module.state_dict())


def test_gradients_and_names_are_the_same_and_less_is_kept() -> None:
    plain, plain_bytes, plain_names = run(recompute=False)
    again, again_bytes, again_names = run(recompute=True)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name
    assert plain_names == again_names
    assert again_bytes < 0.6 * plain_bytes


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"activation_checkpointing=true: role 'toy' has no blocks"):
        checkpoint_activations(Toy(), ROLE)
