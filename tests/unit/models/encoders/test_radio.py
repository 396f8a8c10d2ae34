"""RADIO as its authors publish it: a config.json that does not say the network's form, and names of their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import models
from models.checkpoints import Part
from models.encoders.hf import load_encoder
from models.errors import ModelError, WeightsError
from models.uniugg.encoder import MEAN, STD, StudentViT, normalise

SETTINGS = {"width": 48, "depth": 2, "heads": 6, "patch": 8, "max_image": 64}


def published(vit: StudentViT) -> dict[str, Tensor]:
    """The tensors as RADIO's authors name them, on the hub."""
    whole: dict[str, list[Tensor]] = {}
    theirs = vit.reference_names()
    for name, tensor in vit.state_dict().items():
        other = theirs.get(name, name)
        whole.setdefault(other.name if isinstance(other, Part) else other, []).append(tensor)
    state = {name: torch.cat(parts) for name, parts in whole.items()}
    state |= {"input_conditioner.norm_mean": torch.tensor(MEAN)[:, None, None]}
    state |= {"input_conditioner.norm_std": torch.tensor(STD)[:, None, None], "summary_idxs": torch.tensor([0, 1, 2])}
    return {f"radio_model.{name}": tensor.contiguous() for name, tensor in state.items()}


def write(folder: Path, state: dict[str, Tensor], vit: str = "vit_small_patch16_224") -> str:
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["RADIOModel"], "args": {"model": vit, "cpe_max_size": 64}, "version": "radio_v2.5-l"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def student() -> StudentViT:
    torch.manual_seed(0)
    module = models.build("radio-tiny", **SETTINGS)
    assert isinstance(module, StudentViT)
    return module.eval()


def test_a_folder_of_the_hub_gives_the_student_s_features(student: StudentViT, tmp_path: Path) -> None:
    """As teacher through transformers, as student through our own class: the first phase starts with both the same."""
    folder = write(tmp_path / "radio", published(student))
    encoder = load_encoder("radio", folder, height=24, width=40, dtype="float32")
    assert encoder.outputs()["tokens"].shape == (1, 3, 5, 48)
    assert encoder.outputs()["summary"].shape == (3, 48)
    image = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    found = encoder([encoder.prepare(image, {})])
    with torch.no_grad():
        wanted = student(normalise(torch.from_numpy(image)[None]))
    torch.testing.assert_close(found["tokens"][0, 0], wanted.tokens[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["summary"], wanted.summary, rtol=1e-4, atol=1e-5)


def test_what_is_no_published_radio_is_refused(student: StudentViT, tmp_path: Path) -> None:
    state = published(student)
    with pytest.raises(ModelError, match=r"args.model='eradio' is no ViT that is known here \(vit_tiny, vit_small"):
        load_encoder("radio", write(tmp_path / "other", state, "eradio"), height=24, width=40)
    for lost in ("summary_idxs", "model.patch_generator.pos_embed"):
        partial = {name: tensor for name, tensor in state.items() if name != f"radio_model.{lost}"}
        with pytest.raises(WeightsError, match=f"has no tensor radio_model.{lost}"):
            load_encoder("radio", write(tmp_path / lost, partial), height=24, width=40)
    partial = {name: tensor for name, tensor in state.items() if not name.endswith("blocks.1.mlp.fc2.bias")}
    with pytest.raises(WeightsError, match=r"missing: encoder\.layer\.1\.mlp\.fc2\.bias"):
        load_encoder("radio", write(tmp_path / "partial", partial), height=24, width=40).load()
