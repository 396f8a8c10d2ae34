"""A run is opened: its parts are found, belong together, and fit its tokenizer; what is missing is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import configs
import models
from actors.parts import find_parts, open_pipeline, open_run
from actors.trainers.roles import deciding_settings
from configs import ConfigError
from models.errors import ModelError, WeightsError
from models.uniugg.direct import DirectLLM
from services.contracts import FeatureKey, FeatureRequest
from services.errors import DataError
from services.features.encode import Encoder, pin_weights
from tests.support.uniugg_parts import make_run, save_part


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    for recipe in ("uniugg_finetune", "uniugg_direct", "uniugg_align"):
        make_run(root, recipe)
    return root


def test_parts_of_a_run_and_of_those_before_it(root: Path):
    folder, config = open_run(str(root / "runs" / "uniugg_finetune-tiny"))
    found = find_parts(config, folder)
    runs = root / "runs"
    assert found == {
        "encoder": runs / "uniugg_encoder-tiny" / "weights" / "encoder",
        "llm": folder / "weights" / "llm",
        # The decoder that learned to read the VAE's reconstructions, not that of the first phase.
        "spatial_decoder": runs / "uniugg_vae-tiny" / "weights" / "spatial_decoder",
        "vae": runs / "uniugg_vae-tiny" / "weights" / "vae",
        "diffusion": folder / "weights" / "diffusion",
    }
    assert set(find_parts(config, folder, imagine=False)) == {"encoder", "llm"}


def test_the_direct_variant_reads_with_the_first_decoder(root: Path):
    folder, config = open_run(str(root / "runs" / "uniugg_direct-tiny"))
    found = find_parts(config, folder)
    assert set(found) == {"encoder", "llm", "spatial_decoder"}
    assert found["spatial_decoder"] == root / "runs" / "uniugg_encoder-tiny" / "weights" / "spatial_decoder"
    pipeline = open_pipeline(folder)
    assert isinstance(pipeline.llm, DirectLLM)
    assert pipeline.size == (112, 112)


def test_a_run_by_folder_by_name_and_by_recipe(root: Path):
    storage = f"storage.root={root}"
    folder = root / "runs" / "uniugg_finetune-tiny"
    for run, overrides in (
        (str(folder), []),
        ("uniugg_finetune-tiny", [storage]),
        ("", ["recipe=uniugg_finetune", storage]),
        ("", ["name=uniugg_finetune-tiny", storage]),
    ):
        found, config = open_run(run, [*overrides, "generate.steps=7"])
        assert (found, config.recipe.name, config.generate.steps) == (folder, "uniugg_finetune", 7)


def test_a_storage_that_was_moved_is_used_where_it_lies(tmp_path: Path):
    """Its runs are the same ones for a checkpoint, and find each other; what is named elsewhere stays there."""
    folder, config = make_run(tmp_path / "here")
    decided = deciding_settings(config)
    assert "run:uniugg_encoder-tiny/encoder" in decided.values()
    (tmp_path / "here").rename(tmp_path / "there")
    run = tmp_path / "there" / "runs" / folder.name
    for overrides in ([], [f"storage.root={tmp_path / 'there'}"]):
        _, found = open_run(str(run), overrides)
        assert found.storage.root == str(tmp_path / "there")
        assert deciding_settings(found) == decided
        assert open_pipeline(found, folder=run, imagine=False).encoder is not None
    (tmp_path / "here").mkdir()  # a storage that is still there is the one that was meant
    _, found = open_run(str(run))
    assert (found.storage.root, found.encoders) == (config.storage.root, config.encoders)


def test_an_unknown_run_names_those_there_are(root: Path):
    with pytest.raises(DataError, match=r"uniugg_fintune-tiny is no run: .* there are uniugg_finetune-tiny"):
        open_run("uniugg_fintune-tiny", [f"storage.root={root}"])


def test_a_run_that_cannot_imagine(root: Path):
    folder = root / "runs" / "uniugg_align-tiny"
    with pytest.raises(ConfigError, match=r"recipe uniugg_align, which cannot imagine views; .*uniugg_joint"):
        open_pipeline(folder)
    asked = open_pipeline(folder, imagine=False)
    assert (asked.vae, asked.spatial_decoder) == (None, None)


@pytest.mark.parametrize(
    ("run", "part", "recipe"),
    [
        ("uniugg_encoder-tiny", "encoder", "uniugg_encoder"),
        ("uniugg_vae-tiny", "vae", "uniugg_vae"),
        ("uniugg_vae-tiny", "spatial_decoder", "uniugg_vae"),
        ("uniugg_finetune-tiny", "llm", "uniugg_finetune"),
        ("uniugg_finetune-tiny", "diffusion", "uniugg_finetune"),
    ],
)
def test_every_missing_part_is_named_with_its_recipe(root: Path, run: str, part: str, recipe: str):
    folder, config = open_run(str(root / "runs" / "uniugg_finetune-tiny"))
    place = root / "runs" / run / "weights" / part
    aside = place.with_name("aside")
    place.rename(aside)
    try:
        with pytest.raises(
            WeightsError, match=rf"part '{part}' is missing: .*{part}.* train recipe={recipe} size=tiny"
        ):
            open_pipeline(config, folder=folder)
        assert find_parts(config, folder, given={part: aside})[part] == aside
        assert find_parts(config, folder, given={part: f"run:{run}/aside"})[part] == aside
    finally:
        aside.rename(place)


def test_a_vit_that_was_trained_again_is_refused_unless_it_is_asked_for(root: Path, tmp_path: Path):
    folder, config = make_run(tmp_path)
    encoder = Path(config.encoders["vit"].weights)
    save_part(encoder, "encoder", seed=9)
    with pytest.raises(WeightsError, match=r"encoder has sha256 .*was trained again since"):
        open_pipeline(folder)
    assert open_pipeline(folder, imagine=False, given={"encoder": encoder}).encoder is not None
    described = json.loads((folder / "weights/llm/config.json").read_text())
    (folder / "weights/llm/config.json").write_text(json.dumps({**described, "reads": "c" * 64}))
    with pytest.raises(WeightsError, match=r"tokens of a ViT with sha256 cccc.*train recipe=uniugg_finetune again"):
        open_pipeline(folder, imagine=False, given={"encoder": encoder})


def test_modules_in_memory_stand_for_folders(root: Path):
    folder, config = open_run(str(root / "runs" / "uniugg_finetune-tiny"))
    llm = models.build("uniugg-llm-tiny")
    assert open_pipeline(config, folder=folder, given={"llm": llm}).llm is llm
    with pytest.raises(ConfigError, match="--part decoder: a run has the parts encoder, spatial_decoder, llm"):
        open_pipeline(config, folder=folder, given={"decoder": folder})


def test_a_part_of_another_kind_is_named_with_its_folder(root: Path):
    folder, config = open_run(str(root / "runs" / "uniugg_finetune-tiny"))
    llm = folder / "weights" / "llm"
    with pytest.raises(WeightsError, match=r"part 'vae' \(.*weights/llm\) must be a SpatialVae, this is a UniuggLLM"):
        open_pipeline(config, folder=folder, given={"vae": llm})


def test_a_checkpoint_of_another_tokenizer(root: Path, tmp_path: Path):
    folder, config = open_run(str(root / "runs" / "uniugg_finetune-tiny"))
    other = tmp_path / "llm"
    shutil.copytree(folder / "weights" / "llm", other)
    described = json.loads((other / "config.json").read_text())
    described["settings"]["image_token_id"] = 5
    (other / "config.json").write_text(json.dumps(described))
    with pytest.raises(WeightsError, match=r"trained with image_token_id=5, tokenizer 'bytes' has \d+ for <\|image\|>"):
        open_pipeline(config, folder=folder, given={"llm": other})
    small = models.build("uniugg-llm-tiny")
    small.vocab_size = 200  # type: ignore[assignment]
    with pytest.raises(ModelError, match="has 200 embedding rows"):
        open_pipeline(config, folder=folder, given={"llm": small})


def test_a_diffusion_of_other_latents(root: Path):
    folder, config = open_run(str(root / "runs" / "uniugg_finetune-tiny"))
    vae = models.build("spatial-vae-tiny")
    vae.latent_mean += 0.5  # type: ignore[operator]
    with pytest.raises(WeightsError, match=r"with latent_mean=\[0\.0, .*those of the VAE have \[0\.5, "):
        open_pipeline(config, folder=folder, given={"vae": vae})


def test_a_run_is_described_once(root: Path):
    folder = str(root / "runs" / "uniugg_finetune-tiny")
    with pytest.raises(ConfigError, match=r"--run .* and --config other\.yaml both say"):
        open_run(folder, [], "other.yaml")
    with pytest.raises(ConfigError, match="data=scannet: a saved configuration is composed already"):
        open_run(folder, ["data=scannet"])


def test_encoders_that_no_points_can_be_made_of(root: Path):
    folder, config = open_run(str(root / "runs" / "uniugg_direct-tiny"))
    vit = config.encoders["vit"]
    for changed, said in (
        (dataclasses.replace(vit, family="mast3r"), r"encoders\.vit\.family=mast3r: .*--part spatial_decoder="),
        (dataclasses.replace(vit, weights="random"), r"encoders\.vit\.weights=random: nothing was trained"),
    ):
        with pytest.raises((ConfigError, WeightsError), match=said):
            find_parts(dataclasses.replace(config, encoders={**config.encoders, "vit": changed}), folder)
    probe = configs.load([f"storage.root={root}"])
    with pytest.raises(ConfigError, match="recipe probe, which cannot answer questions"):
        open_pipeline(probe, imagine=False)


#: Encoders of the paper's ablations (a) and (b), at tiny: 7 x 7 tokens of 96 channels, as the parts read.
OTHERS = {
    "radio": [
        "encoders.vit.family=radio", "encoders.vit.weights=random",
        "encoders.vit.arch={hidden_size: 96, num_hidden_layers: 2, num_attention_heads: 3, patch_size: 16,"
        " max_img_size: 128, num_cls_tokens: 4, num_registers: 4, summary_idxs: [0, 1, 2]}",
    ],
    "mast3r": [
        "encoders.vit.family=mast3r", "encoders.vit.weights=random",
        "encoders.vit.arch={model: mast3r-tiny, encoder_width: 96, encoder_heads: 3, patch: 16}",
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_a_run_on_another_encoder_sees_what_it_was_trained_on(family: str, tmp_path: Path):
    """The ablations' runs are used like others: pictures become the tokens that the service gave in training."""
    folder, config = make_run(tmp_path, "uniugg_finetune", *OTHERS[family])
    config = pin_weights(config)
    pipeline = open_pipeline(config, folder=folder)
    images = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), dtype=np.uint8)
    served = Encoder("vit", config, device="cpu")
    answers = served.encode(
        [
            FeatureRequest(key=FeatureKey(bytes(16)), sample_id=str(i), encoder="vit", pixels=p)
            for i, p in enumerate(images)
        ]
    )
    served.close()
    wanted = torch.stack([torch.from_numpy(np.array(answer["tokens"].data)) for answer in answers])  # type: ignore[index]
    torch.testing.assert_close(pipeline.see(images), wanted[:, 0].float(), atol=1e-5, rtol=1e-5)
    K = torch.tensor([[80.0, 0, 55.5], [0, 80.0, 55.5], [0, 0, 1]])
    made = pipeline.imagine(images[0], K, torch.eye(4)[None], steps=2, guidance=1.0)
    assert made.target_points.shape == (1, 112, 112, 3)
    assert pipeline.generate_text([[*pipeline.prompt[:3]]], None, max_new_tokens=2, stop=()), "it answers too"
    other = dataclasses.replace(config.encoders["vit"], seed=5)
    with pytest.raises(WeightsError, match=r"encoders\.vit .* is expected"):
        open_pipeline(dataclasses.replace(config, encoders={**config.encoders, "vit": other}), folder=folder)
