"""Composition: groups, sizes, shorthands, saved configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

import configs
from configs import validate
from configs.compose import groups
from configs.schema import RunConfig
from models.registry import spec

EXTRA = {  # what an option cannot do without
    "data": ["data.sources.{option}.root=/data"],
    "cache/shared": ["cache.remote=s3://bucket/features"],
    "logger/mlflow": ["logger.mlflow=http://127.0.0.1:5000"],
    "backend/zero3": ["trainer.ema=0"],
    "cluster/8x32gb": ["trainer.micro_batch=16"],
    "cluster/8x80gb": ["trainer.micro_batch=16"],
    "cluster/mixed-gpus": ["trainer.micro_batch=16"],
    "cluster/mixed-gpus-joint": ["recipe=uniugg_joint", "trainer.micro_batch=16"],
    "cluster/mixed-gpus-language": ["recipe=uniugg_align", "trainer.micro_batch=16"],
    # Parts of UniUGG stand beside each other under `encoders`, for recipes that look for them by name.
    **{f"encoder/uniugg-vit-{size}": ["recipe=uniugg_vae"] for size in ("tiny", "small", "paper")},
    **{f"encoder/uniugg-frozen-{size}": ["recipe=uniugg_joint"] for size in ("tiny", "small", "paper")},
    # So do those of Spa3R and of the language model behind it.
    **{f"encoder/vggt-{size}": ["recipe=spa3r_pretrain"] for size in ("tiny", "small", "1b")},
    **{
        f"encoder/semantic-{size}": ["recipe=spa3r_pretrain"]
        for size in ("tiny", "small", "large", "clip", "clip-tiny")
    },
    **{f"encoder/spa3r-{size}": ["recipe=spa3_vlm"] for size in ("tiny", "small", "paper")},
    **{f"encoder/qwen-vision-{size}": ["recipe=spa3_vlm"] for size in ("tiny", "small", "3b", "7b")},
    "variant_of/spa3r_pretrain/released": ["recipe=spa3r_pretrain"],
}


def all_options() -> list[tuple[str, str]]:
    return [(group, option) for group, options in groups().items() for option in options]


@pytest.mark.parametrize(("group", "option"), all_options())
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    overrides = [f"{group}={option}"]
    if group == "size":
        recipe, size = option.split("/")
        overrides = [f"recipe={recipe}", f"size={size}"]
    if group == "data" and not option.startswith("rooms"):
        overrides += [text.format(option=option) for text in EXTRA["data"]]
    config = configs.load([*overrides, *EXTRA.get(f"{group}/{option}", [])])
    assert isinstance(config, RunConfig)
    assert configs.from_yaml(configs.to_yaml(config)) == config


def test_every_recipe_has_every_size_and_trains_what_it_names() -> None:
    sizes = [f"{recipe}/{size}" for recipe in validate.RECIPES for size in validate.ALLOWED["size"]]
    assert sorted(groups()["size"]) == sorted(sizes)
    for text in sizes:
        recipe, size = text.split("/")
        config = configs.load([f"recipe={recipe}", f"size={size}"])
        assert (config.recipe.name, config.size) == (recipe, size)
        roles = [role.name for role in spec(config.model.name).roles]
        assert set(validate.ROLES[recipe]) <= set(roles), f"{text} trains {config.model.name}, which has {roles}"


@pytest.mark.parametrize("size", validate.ALLOWED["size"])
def test_a_recipe_starts_from_what_the_one_before_it_leaves(size: str) -> None:
    """Every run:NAME/PART of a size is a part of the run that recipe and size name when nothing else is chosen."""
    root = configs.load().storage.root
    parts = {
        "uniugg_encoder": {"encoder", "spatial_decoder"},
        "uniugg_vae": {"vae", "spatial_decoder"},
        "uniugg_align": {"llm"},
        "uniugg_joint": {"llm", "diffusion"},
        "spa3r_pretrain": {"spa3r"},
    }
    left = {f"{root}/runs/{run}-{size}/weights/{part}" for run, names in parts.items() for part in names}
    for recipe in validate.RECIPES[1:]:
        config = configs.load([f"recipe={recipe}", f"size={size}"])
        named = [*config.model.init.values(), *(encoder.weights for encoder in config.encoders.values())]
        asked = {weights for weights in named if weights.startswith(root)}
        assert asked <= left
        assert asked or recipe in ("uniugg_encoder", "spa3r_pretrain")


def test_data_that_a_recipe_chooses_can_be_chosen_again() -> None:
    assert list(configs.load(["recipe=uniugg_joint"]).data.sources) == ["rooms", "questions", "captions"]
    assert list(configs.load(["recipe=uniugg_joint", "data=rooms"]).data.sources) == ["rooms"]
    assert list(configs.load(["recipe=uniugg_encoder"]).data.sources) == ["rooms"]


def test_the_readme_line() -> None:
    config = configs.load(["recipe=probe", "size=tiny", "data=rooms", "trainer.lr=3e-4", "encoder=dinov2-small"])
    assert config.trainer.lr == 3e-4
    assert config.encoders["features"].weights == "facebook/dinov2-small"
    assert config.encoders["features"].layers == [3, 6, 9, 12]
    assert config.model.name == "probe-tiny"
    assert list(config.data.sources) == ["rooms"]


def test_nothing_chosen_is_the_tiny_probe_without_downloads() -> None:
    config = configs.load()
    assert (config.recipe.name, config.size, config.model.name) == ("probe", "tiny", "probe-tiny")
    assert config.encoders["features"].weights == "random"
    assert config.cluster.mode == "local"
    assert config.service.replicas == 1


def test_size_decides_encoder_model_and_data() -> None:
    tiny, small, paper = (configs.load([f"size={size}"]) for size in ("tiny", "small", "paper"))
    assert [c.model.name for c in (tiny, small, paper)] == ["probe-tiny", "probe-small", "probe-base"]
    assert [c.encoders["features"].weights for c in (small, paper)] == [
        "facebook/dinov2-small",
        "facebook/dinov2-large",
    ]
    assert tiny.data.rooms.scenes < small.data.rooms.scenes < paper.data.rooms.scenes


def test_a_choice_on_the_command_line_wins_over_the_size() -> None:
    config = configs.load(["size=small", "encoder=clip-tiny", "model=probe-tiny", "trainer=smoke", "trainer.steps=7"])
    assert config.encoders["features"].family == "clip"
    assert config.model.name == "probe-tiny"
    assert (config.trainer.steps, config.trainer.validate_every, config.trainer.micro_batch) == (7, 0, 16)


def test_two_sources_and_a_second_encoder() -> None:
    config = configs.load(
        ["data=[rooms,scannet]", "data.sources.scannet.root=/data/scannet", "encoder@encoders.second=dinov3-tiny"]
    )
    assert list(config.data.sources) == ["rooms", "scannet"]
    assert config.encoders["second"].family == "dinov3"
    assert config.encoders["features"].family == "dinov2"


def test_sections_not_in_a_file_start_from_their_defaults() -> None:
    config = configs.load(["recipe.quotas.question=1", "cluster.nodes.local.num_cpus=8"])
    assert config.recipe.quotas == {"view": 1.0, "question": 1.0}
    assert config.cluster.nodes["local"].num_cpus == 8
    assert config.cluster.nodes["local"].memory_gb == RunConfig().cluster.nodes["local"].memory_gb


def test_entries_are_added_removed_and_replaced() -> None:
    assert configs.load(["recipe.quotas.question=2", "~recipe.quotas.view"]).recipe.quotas == {"question": 2.0}
    assert configs.load(["recipe.quotas={question: 2}"]).recipe.quotas == {"question": 2.0}


def test_quoted_text_stays_text() -> None:
    config = configs.load(["name='007'", "cluster=attach", "cluster.address='a,b:1'", "data.quarantine=/a/it's ~ #1"])
    assert (config.name, config.cluster.address) == ("007", "a,b:1")
    assert config.data.quarantine == "/a/it's ~ #1"


def test_home_and_inputs_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.chdir(tmp_path)
    config = configs.load(
        [
            "storage.root=~/runs",
            "data=images",
            "data.sources.images.root=pictures",
            "data.quarantine=~/bad.txt",
            "data.sources.images.splits={train: train.txt}",
            "encoders.features.weights=./weights",
            "~encoders.features.arch",
        ]
    )
    assert config.storage.root == "/home/someone/runs"
    assert config.data.sources["images"].root == str(tmp_path / "pictures")
    assert config.data.sources["images"].splits == {"train": str(tmp_path / "train.txt")}
    assert config.data.quarantine == "/home/someone/bad.txt"
    assert config.encoders["features"].weights == str(tmp_path / "weights")


def test_uris_stay_as_they_are() -> None:
    config = configs.load(["cache=shared", "cache.remote=s3://bucket/loom3d", "cache.root=/mnt/nvme/cache"])
    assert config.cache.remote == "s3://bucket/loom3d"


def test_a_saved_configuration_loads_equal_and_takes_keys(tmp_path: Path) -> None:
    config = configs.load(["size=small", "trainer.lr=3e-4", "recipe.losses={depth_dpt: 0.5}", "seed=3"])
    file = tmp_path / "config.yaml"
    file.write_text(configs.to_yaml(config))
    assert configs.load(file=file) == config
    changed = configs.load(["trainer.steps=7", "trainer.warmup_steps=2"], file=file)
    assert changed.trainer.steps == 7
    assert changed.trainer.lr == 3e-4


def test_digest_names_what_is_asked_for() -> None:
    one, two = configs.load(), configs.load(["trainer.lr=3e-4"])
    assert configs.digest(one) != configs.digest(two)
    assert configs.digest(one, "data", "encoders") == configs.digest(two, "data", "encoders")
    assert configs.digest(one) == configs.digest(configs.from_yaml(configs.to_yaml(one)))


def test_an_integer_is_taken_for_a_float_key() -> None:
    value = configs.load(["cluster.nodes.local.tflops=3"]).cluster.nodes["local"].tflops
    assert (value, type(value)) == (3.0, float)


def test_loading_is_repeatable_inside_a_hydra_application() -> None:
    # The compose context is entered and left, so nothing global is left behind.
    assert configs.load() == configs.load()


def test_a_variant_says_more_of_some_recipes() -> None:
    rates = {
        (recipe, variant): configs.load([f"recipe={recipe}", "size=paper", f"variant={variant}"]).trainer.lr
        for recipe in ("spa3r_pretrain", "spa3_vlm")
        for variant in ("paper", "released")
    }
    assert rates == {
        ("spa3r_pretrain", "paper"): 1e-3, ("spa3r_pretrain", "released"): 2e-3,
        ("spa3_vlm", "paper"): 1e-5, ("spa3_vlm", "released"): 1e-5,
    }  # fmt: skip
    released = configs.load(["recipe=spa3_vlm", "variant=released"]).recipe.spa3_vlm.adapter
    assert (released.projector, released.qk_norm, released.norm, released.gate) == (True, True, True, True)
    assert not configs.load(["recipe=spa3_vlm"]).recipe.spa3_vlm.adapter.gate


def test_the_norm_that_a_recipe_asks_for_is_that_of_every_vggt() -> None:
    wanted = "recipe.spa3r.qk_norm_global=rmsnorm"
    config = configs.load(["recipe=spa3r_pretrain", wanted])
    vggts = {name: one.arch for name, one in config.encoders.items() if one.family.startswith("vggt")}
    assert len(vggts) == 2
    assert all(arch["qk_norm"] == "rmsnorm" and arch["model"] == "vggt-tiny" for arch in vggts.values())
    assert not any("qk_norm" in one.arch for name, one in config.encoders.items() if name not in vggts)
    assert configs.from_yaml(configs.to_yaml(config)) == config
    plain = configs.load(["recipe=spa3r_pretrain"])
    assert not any("qk_norm" in one.arch for one in plain.encoders.values()), "auto follows the weights"


def test_a_norm_is_asked_of_stored_weights_too_and_once() -> None:
    asked = ["recipe=spa3r_pretrain", "size=paper", "recipe.spa3r.qk_norm_global=rmsnorm"]
    assert configs.load(asked).encoders["patches"].arch == {"qk_norm": "rmsnorm"}
    with pytest.raises(
        configs.ConfigError, match=r"encoders\.views\.arch\.qk_norm=layernorm contradicts .*=rmsnorm; set one"
    ):
        configs.load([*asked, "encoders.views.arch={qk_norm: layernorm}"])
    with pytest.raises(
        configs.ConfigError, match=r"encoders\.patches\.arch=.* contradicts .*weights come with their arch"
    ):
        configs.load([*asked, "encoders.patches.arch={depth: 3}"])
