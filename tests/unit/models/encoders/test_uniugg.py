"""Trained parts as frozen encoders: their records, identities, and what does not fit together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from models.encoders.uniugg import READS, Mast3rViT, UniuggPosterior, UniuggReconstruction, UniuggViT
from models.errors import ModelError, WeightsError
from models.pretrained import save_pretrained
from tests.support.hub import empty_cache, snapshot

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
SIZE: dict[str, Any] = {"height": 32, "width": 48, "dtype": "float32"}


def save(folder: Path, name: str, *, seed: int = 0, extra: dict[str, Any] | None = None, **settings: Any) -> str:
    torch.manual_seed(seed)
    module = models.build(name, **settings)
    save_pretrained(module, folder, name, module.settings, extra=extra)  # type: ignore[arg-type]
    return str(folder)


@pytest.fixture
def vit(tmp_path: Path) -> UniuggViT:
    return UniuggViT(save(tmp_path / "encoder", "uniugg-vit-tiny"), **SIZE)


def record(encoder: Any) -> dict[str, torch.Tensor]:
    return {name: value[0] for name, value in encoder([encoder.prepare(IMAGE, {})]).items()}


def behind(kind: Any, upstream: UniuggViT, weights: str, **changes: Any) -> Any:
    return kind(upstream, "none", **{"weights": weights, "arch": {}, "seed": 0, "dtype": "float32", **changes})


def test_the_vit_gives_what_the_student_gives(vit: UniuggViT):
    assert vit.model is None, "nothing is loaded before it is needed"
    shapes = {name: spec.shape for name, spec in vit.outputs().items()}
    assert shapes == {"tokens": (1, 2, 3, 96), "summary": (3, 96)}
    made = record(vit)
    student = vit.part.load()
    pixels = vit.prepare(IMAGE, {})[None]
    with torch.no_grad():
        torch.testing.assert_close(made["tokens"][0], student(pixels).tokens[0])
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == shapes
    assert vit.parameter_count() == sum(p.numel() for p in student.parameters())
    assert vit.flops_per_image() > 2 * 6 * vit.parameter_count() / 10
    from models.uniugg.encoder import normalise

    exact = normalise(torch.from_numpy(np.array(IMAGE[:32, :48])))
    plain = UniuggViT("random", height=32, width=48).prepare(np.array(IMAGE[:32, :48]), {})
    torch.testing.assert_close(plain, exact, msg="the same normalisation as in training")


def test_posterior_and_reconstruction(vit: UniuggViT, tmp_path: Path):
    folder = save(tmp_path / "vae", "spatial-vae-tiny")
    posterior = behind(UniuggPosterior, vit, folder, dtype="bfloat16")
    rebuilt = behind(UniuggReconstruction, vit, folder, dtype="bfloat16")
    given = record(vit)
    made = posterior([posterior.prepare(given, {})])
    vae = posterior.part.load()
    with torch.no_grad():
        mean, logvar = vae.encode(given["tokens"])
        torch.testing.assert_close(made["mean"], mean)
        torch.testing.assert_close(made["logvar"], logvar)
        tokens = rebuilt([rebuilt.prepare(given, {})])
        torch.testing.assert_close(tokens["tokens"][0], vae.decode(mean).bfloat16())
    torch.testing.assert_close(tokens["summary"][0], given["summary"].bfloat16())
    for encoder, out in ((posterior, made), (rebuilt, tokens)):
        specs = {name: (spec.shape, spec.dtype) for name, spec in encoder.outputs().items()}
        found = {name: (tuple(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for name, t in out.items()}
        assert specs == found
    assert made["mean"].dtype == torch.float32, "whatever the encoder's dtype"
    assert posterior.parameter_count() == sum(p.numel() for p in vae.parameters())


def test_identity_follows_the_weights_of_the_whole_chain(vit: UniuggViT, tmp_path: Path):
    first = save(tmp_path / "vae", "spatial-vae-tiny")
    again = save(tmp_path / "copy", "spatial-vae-tiny")
    other = save(tmp_path / "other", "spatial-vae-tiny", seed=1)
    base = behind(UniuggPosterior, vit, first).identity()
    json.dumps(base)
    assert behind(UniuggPosterior, vit, again).identity() == base
    assert behind(UniuggPosterior, vit, other).identity() != base
    assert behind(UniuggReconstruction, vit, first).identity() != base
    second = UniuggViT(save(tmp_path / "encoder2", "uniugg-vit-tiny", seed=1), **SIZE)
    assert behind(UniuggPosterior, second, first).identity() != base
    assert str(tmp_path) not in json.dumps(base)
    resized = UniuggViT(str(tmp_path / "encoder"), **{**SIZE, "height": 16})
    assert resized.identity() != vit.identity()


def test_weights_that_change_between_identity_and_loading_are_refused(vit: UniuggViT, tmp_path: Path):
    vit.identity()
    save(tmp_path / "encoder", "uniugg-vit-tiny", seed=5)
    with pytest.raises(WeightsError, match="changed after the run began"):
        vit.load()


def test_random_parts_follow_their_seed_and_the_channels_before_them():
    arch = {"model": "uniugg-vit-tiny", "width": 48, "heads": 3, "depth": 1}
    vit = UniuggViT("random", arch=arch, seed=3, **SIZE)
    same = UniuggViT("random", arch=arch, seed=3, **SIZE)
    assert vit.identity() == same.identity() != UniuggViT("random", arch=arch, seed=4, **SIZE).identity()
    assert torch.equal(record(vit)["tokens"], record(same)["tokens"])
    posterior = behind(UniuggPosterior, vit, "random", arch={"depth": 1})
    made = posterior([posterior.prepare(record(vit), {})])
    assert made["mean"].shape == (1, 4, 4, 6)
    assert posterior.part.settings["channels"] == 48


def test_parts_that_do_not_fit_are_refused(vit: UniuggViT, tmp_path: Path):
    vae = save(tmp_path / "vae", "spatial-vae-tiny", channels=32)
    with pytest.raises(WeightsError, match="tokens of 32 channels, the encoder before it gives 1 of 96"):
        behind(UniuggPosterior, vit, vae)
    with pytest.raises(WeightsError, match=r"is a spatial-vae-tiny; family uniugg_vit takes uniugg-vit-\*"):
        UniuggViT(vae, **SIZE)
    with pytest.raises(WeightsError, match="train that part first"):
        UniuggViT(str(tmp_path / "nowhere"), **SIZE)
    with pytest.raises(ModelError, match="weights=random only"):
        UniuggViT(vae, arch={"width": 8}, **SIZE)
    with pytest.raises(ModelError, match="both sides must be multiples of the patch"):
        UniuggViT("random", **{**SIZE, "height": 30})
    trained_on = {READS: vit.identity()["weights"]}
    behind(UniuggPosterior, vit, save(tmp_path / "right", "spatial-vae-tiny", extra=trained_on))
    wrong = save(tmp_path / "wrong", "spatial-vae-tiny", extra={READS: "0" * 64})
    with pytest.raises(WeightsError, match=r"trained on tokens of an encoder with sha256 0{16}"):
        behind(UniuggPosterior, vit, wrong)
    (tmp_path / "right" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no \['"):
        behind(UniuggPosterior, vit, str(tmp_path / "right")).identity()


def test_mast3r_s_vit_in_our_layout_and_in_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from safetensors.torch import save_file

    from models.checkpoints import published_names
    from models.encoders import uniugg

    torch.manual_seed(0)
    whole = models.build("mast3r-tiny")
    save_pretrained(whole, tmp_path / "ours", "mast3r-tiny", {})
    names = published_names(whole)
    (tmp_path / "published").mkdir()
    save_file(
        {names[n]: t.contiguous() for n, t in whole.state_dict().items()}, tmp_path / "published/model.safetensors"
    )
    (tmp_path / "published/config.json").write_text('{"landscape_only": false}')
    monkeypatch.setattr(uniugg, "PUBLISHED_MAST3R", "mast3r-tiny")
    ours, published = (Mast3rViT(str(tmp_path / which), **SIZE) for which in ("ours", "published"))
    made = record(ours)
    pixels = torch.from_numpy(np.array(IMAGE[:32, :48])).permute(2, 0, 1).float() / 127.5 - 1
    exact = Mast3rViT("random", **SIZE).prepare(np.array(IMAGE[:32, :48]), {})
    torch.testing.assert_close(exact, pixels, msg="its own normalisation, not CLIP's")
    with torch.no_grad():
        tokens, grid = whole.encoder(ours.prepare(IMAGE, {})[None])
    torch.testing.assert_close(made["tokens"], tokens.unflatten(1, grid))
    torch.testing.assert_close(made["summary"], tokens.mean(1))
    torch.testing.assert_close(record(published)["tokens"], made["tokens"])
    assert {name: spec.shape for name, spec in ours.outputs().items()} == {"tokens": (1, 4, 6, 64), "summary": (1, 64)}
    assert ours.parameter_count() == sum(p.numel() for p in whole.encoder.parameters())
    assert len(list(ours.model.parameters())) == len(list(whole.encoder.parameters())), "the decoder is left out"
    posterior = behind(UniuggPosterior, published, "random")
    assert posterior([posterior.prepare(made, {})])["mean"].shape == (1, 4, 8, 12)
    cache, name = empty_cache(monkeypatch, tmp_path / "hub"), "naver/MASt3R"
    with pytest.raises(WeightsError, match="hf download naver/MASt3R"):
        Mast3rViT(name, **SIZE)
    shutil.copytree(tmp_path / "published", snapshot(cache, name), dirs_exist_ok=True)
    assert Mast3rViT(name, **SIZE).identity() == published.identity(), "by its hub name"
