"""Low-rank updates of Spa3-VLM: in the language model alone, the adapter trained whole beside them."""

from __future__ import annotations

import pytest
import torch

from actors.trainers.lora import apply_lora
from configs.schema import PeftConfig
from models.spa3r.vlm.spec import ROLE, step
from tests.support.spa3_vlm import batch_of, sample, small_vlm

GRIDS = [(2, 3), (1, 2)]


@pytest.mark.parametrize("kind", ["cross", "append", "none"])
def test_the_adapter_is_trained_whole_beside_updates(kind: str) -> None:
    model = small_vlm(adapter={"kind": kind})
    frames = [*GRIDS, (1, 5)] if kind == "append" else GRIDS
    batch = batch_of([sample(frames)], [GRIDS])
    if kind == "none":
        del batch["latents"]
    before = step(model, batch, {}).sums["ce"].detach()
    whole = {name for name, _ in model.named_parameters() if name.startswith("adapter.")}
    apply_lora(model, ROLE, PeftConfig(method="lora", rank=2))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if name.startswith("adapter.")} == whole
    assert len([name for name in trained if ".lora_" in name]) == 2 * 7 * 2, "two factors of seven layers of two blocks"
    assert len(trained) == len(whole) + 28
    loss = step(model, batch, {}).sums["ce"]
    assert torch.equal(loss, before), "updates begin at zero"
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
