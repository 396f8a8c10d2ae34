"""Bad configurations, each with the message that its author gets.

The same form, a table of (what is wrong, words of the message), is used for data under tests/unit/services/data and
for the cache under tests/unit/services/features.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import configs
from configs import ConfigError

#: (overrides, what the message must say: the key, the value, what is allowed, the nearest name)
OVERRIDES: list[tuple[list[str], list[str]]] = [
    # names
    (["recipe=prob"], ["recipe=prob", "Did you mean probe?", "Options: probe"]),
    (["size=tine"], ["size=tine", "Did you mean tiny?", "paper, small, tiny"]),
    (["encoder=dinov2-smal"], ["encoder=dinov2-smal", "Did you mean dinov2-small?"]),
    (["data=room"], ["data=room", "Did you mean rooms?", "scannet"]),
    (["cluster=lokal"], ["cluster=lokal", "Did you mean local?", "attach, inline, local"]),
    (["trainer.learning_rates=1"], ["unknown key trainer.learning_rates (value 1)", "Allowed under trainer: steps"]),
    (["trainer.stepz=5"], ["unknown key trainer.stepz (value 5)", "Did you mean trainer.steps?"]),
    (["lr=3e-4"], ["unknown key lr (value 0.0003)", "Did you mean trainer.lr?"]),
    (["optimizer.lr=1"], ["unknown key optimizer", "Allowed: name, size, seed"]),
    (["encoders.features.familly=clip"], ["encoders.features.familly", "Did you mean encoders.features.family?"]),
    (["cluster.nodes.big.gpus=8"], ["unknown key cluster.nodes.big.gpus (value 8)", "cluster.nodes.big.num_gpus?"]),
    (["data.sources.rooms.path=/x"], ["unknown key data.sources.rooms.path", "Allowed under data.sources.rooms"]),
    # form
    (["trainer.steps"], ["'trainer.steps' is no override", "key=value"]),
    (["trainer.betas=[0.9"], ["'trainer.betas=[0.9' cannot be read"]),
    (["trainer.lr=1e-3,1e-4"], ["is a sweep", "give one value"]),
    (["trainer.lr=1e-3", "trainer.lr=1e-4"], ["trainer.lr is given twice", "1e-3", "1e-4"]),
    (["size=tiny", "size=small"], ["size is given twice"]),
    (["data={sources: 1}"], ["data is a group", "set single keys as data.key=value"]),
    (["trainer.lr.peak=1"], ["trainer.lr.peak: trainer.lr is a value", "it has no keys"]),
    (["~trainer.lrr"], ["~trainer.lrr: there is no such key"]),
    (["cache=shared"], ["cache.remote has no value", "give cache.remote=..."]),
    (["data=scannet"], ["data.sources.scannet.root has no value"]),
    # types
    (["trainer.steps=2.0"], ["trainer.steps must be an integer, got 2.0 (float)"]),
    (["trainer.steps=true"], ["trainer.steps must be an integer, got True (bool)"]),
    (["trainer.lr=fast"], ["trainer.lr must be a number, got 'fast' (str)"]),
    (["trainer.activation_checkpointing=1"], ["activation_checkpointing must be true or false, got 1 (int)"]),
    (["trainer.activation_checkpointing=yess"], ["must be true or false, got 'yess'"]),
    (["name=7"], ["name must be a text, got 7 (int)", "quote it"]),
    (["cache.remote=null"], ["cache.remote must be a text, got None", '""']),
    (["encoders.features.layers=4"], ["encoders.features.layers must be a list", "got 4", "=[a,b]"]),
    (["encoders.features.layers=[1,x]"], ["encoders.features.layers[1] must be an integer, got 'x'"]),
    (["recipe.quotas=[view]"], ["recipe.quotas must map names", "got ['view']"]),
    (["encoders.features=dinov2"], ["encoders.features must be a section", "got 'dinov2'"]),
    # numbers
    (["trainer.lr=nan"], ["trainer.lr must be a finite number, got nan"]),
    (["trainer.clip_norm=inf"], ["trainer.clip_norm must be a finite number, got inf"]),
    (["trainer.steps=-3"], ["trainer.steps=-3 is out of range", "at least 1"]),
    (["trainer.lr=0"], ["trainer.lr=0.0 is out of range", "more than 0"]),
    (["trainer.ema=1"], ["trainer.ema=1.0", "at least 0 and less than 1"]),
    (["data.rooms.scenes=2"], ["data.rooms.scenes=2", "at least 3"]),
    (["data.max_broken=2"], ["data.max_broken=2.0", "at most 1"]),
    (["trainer.betas=[0.9]"], ["trainer.betas=[0.9] must be two numbers"]),
    (["cluster.object_store_bytes=1000"], ["cluster.object_store_bytes=1000"]),
    (["service.num_gpus=1.5"], ["service.num_gpus=1.5 must be a whole number above 1"]),
    # allowed values
    (["cache.mode=alway"], ["cache.mode='alway'", "Did you mean always?", "always, never, auto"]),
    (["trainer.precision=fp16"], ["trainer.precision='fp16'", "float32, bfloat16"]),
    (["encoders.features.dtype=half"], ["encoders.features.dtype='half'", "float32, bfloat16, float16"]),
    (["encoders.features.family=dino"], ["encoders.features.family='dino'", "Did you mean dinov"]),
    (["data.sources.rooms.format=scanet"], ["data.sources.rooms.format='scanet'", "Did you mean scannet?"]),
    (["name=a/b"], ["name='a/b' is not a folder name"]),
    # contradictions
    (["encoders.features.layers=[2,9]"], ["encoders.features.layers=[2, 9]", "beyond the 4 layers"]),
    (["encoders.features.layers=[3,2]"], ["encoders.features.layers=[3, 2]", "increasing"]),
    (["encoders.features.height=113"], ["height=113 is not a multiple of the patch size 14", "112, 126"]),
    (["encoders.features.side=28"], ["encoders.features.side=28", "for qwen2_5_vl, not dinov2"]),
    (["encoder=dinov3-small", "encoders.features.width=230"], ["width=230", "patch size 16", "224, 240"]),
    (["encoders.features.weights=facebook/dinov2-small"], ["arch", "contradicts", "weights=random"]),
    (["encoders.features.upstream=other"], ["encoders.features.upstream='other'", "reads no records"]),
    (["recipe.features=feature"], ["recipe.features='feature' names no encoder", "Did you mean features?"]),
    (["recipe.quotas={view: 0}"], ["recipe.quotas", "one must be above 0"]),
    (["recipe.view_set.views=[4,2]"], ["recipe.view_set.views=[4, 2]", "smallest <= largest"]),
    (["~data.sources.rooms"], ["data.sources is empty"]),
    (["data.sources.rooms.weight=0"], ["every weight is 0"]),
    (["data.sources.rooms.splits={dev: /x}"], ["splits.dev: no such split", "train, val, test"]),
    (["data.sources.more.format=colmap"], ["data.sources.more.root is empty", "colmap"]),
    (["cluster.roles.trainer.workers=[3]"], ["trainer.micro_batch=8", "3 workers", "1, 2, 4, 8"]),
    (["cluster.roles.trainer.workers=[4,2]"], ["workers=[4, 2]", "[min,max]"]),
    (
        ["cluster.roles.trainer.workers=[2,3]"],
        [
            "trainer.workers=[2, 3]",
            "3 cannot share trainer.micro_batch=8",
            "trainer.micro_batch to 6 or 12",
            "set cluster.roles.trainer.workers to [1, 2] or [4] or [8]",
        ],
    ),
    (
        ["cluster.roles.trainer.workers=[1,8]"],
        ["3, 5, 6, 7 cannot share", "set cluster.roles.trainer.workers to [1, 2]"],
    ),
    (["cluster.roles.trainer.workers=[1,99]"], ["3, 5, 6, 7, 9, 10, 11, 12 and others cannot share"]),
    (
        ["recipe=spa3_vlm", "trainer.micro_batch=4", "cluster.roles.vlm.workers=[1,3]"],
        ["roles.vlm.workers=[1, 3]", "to 6"],
    ),
    (["cluster.roles.trainer.workers=[2]", "cluster=inline"], ["workers=[2] contradicts cluster.mode=inline"]),
    (["cluster.roles.trainer.workers=[2]", "backend=single"], ["contradicts backend.name=single", "backend=ddp"]),
    (["backend=zero3", "trainer.ema=0.9"], ["trainer.ema=0.9 contradicts backend.name=zero3", "backend=zero2"]),
    (["roles.trainer.backend=zero3", "trainer.ema=0.9"], ["contradicts roles.trainer.backend=zero3"]),
    (["cluster.roles.trainr.workers=[1]"], ["cluster.roles.trainr", "Did you mean trainer?"]),
    (["cluster.mode=attach"], ["cluster.mode=attach needs cluster.address"]),
    (["cluster.address=127.0.0.1:6379"], ["cluster.address", "contradicts cluster.mode=local"]),
    (["cache.mode=never", "cache.remote=s3://b/c"], ["cache.remote=s3://b/c contradicts cache.mode=never"]),
    (["cache.mode=never", "cache.codec=fp8_e4m3"], ["cache.codec=fp8_e4m3 contradicts cache.mode=never"]),
    (["cache.budget_bytes=1000"], ["cache.budget_bytes=1000 is smaller than one shard", "cache.shard_bytes"]),
    (["cache.root=s3://bucket/c"], ["cache.root='s3://bucket/c'", "cache.remote"]),
    (["cache.remote=features"], ["cache.remote='features'", "absolute folder or a URI"]),
    (["storage.root=outputs"], ["storage.root='outputs' is relative", "absolute"]),
    (["storage.root=s3://bucket/runs"], ["storage.root='s3://bucket/runs' is a URI", "cache.remote=s3://"]),
    (["trainer.warmup_steps=400"], ["trainer.warmup_steps=400 must be less than trainer.steps=400"]),
    (["peft.targets=[q]"], ["peft.targets=['q'] has no effect", "peft=lora"]),
    (["data.checks.min_depth=40"], ["data.checks.min_depth=40.0", "data.checks.max_depth"]),
    (["data.pairs.min_overlap=0.96"], ["data.pairs.min_overlap=0.96", "less than data.pairs.max_overlap=0.95"]),
    (["data.augment.jitter=[0.5,0.5]"], ["data.augment.jitter=[0.5, 0.5]", "four numbers >= 0", "hue up to 0.5"]),
    (["data.augment.jitter=[0.5,0.5,0.5,0.9]"], ["data.augment.jitter=", "hue up to 0.5"]),
    (["data.augment.min_crop=0"], ["data.augment.min_crop=0.0 is out of range", "more than 0"]),
]


@pytest.mark.parametrize(("overrides", "words"), OVERRIDES, ids=[" ".join(case[0]) for case in OVERRIDES])
def test_a_bad_override_is_refused_by_name(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        configs.load(overrides)
    message = str(refused.value)
    for word in words:
        assert word in message


#: (text of a file given with --config, overrides on top, words of the message)
FILES: list[tuple[str, list[str], list[str]]] = [
    ("trainer: {lr: 0.1}\ntrainer: {lr: 0.2}\n", [], ["duplicate key trainer"]),
    ("trainer:\n  steps: 3\n  steps: 4\n", [], ["duplicate key steps"]),
    ("- a\n- b\n", [], ["expected a mapping"]),
    ("trainer: [1, 2\n", [], ["not a valid YAML configuration"]),
    ("trainer: 5\n", [], ["trainer must be a section", "got 5"]),
    ("trainer: {lr: '3e-4'}\n", [], ["trainer.lr must be a number, got '3e-4' (str)"]),
    ("trainer: {lr: .nan}\n", [], ["trainer.lr must be a finite number"]),
    ("recipe: {quotas: {1: 2.0}}\n", [], ["recipe.quotas", "a name must be a non-empty string, got 1"]),
    ("version: 2\n", [], ["unknown key version (value 2)"]),
    ("seed: 1\n", ["size=small"], ["size=small", "composed already", "only single keys"]),
]


@pytest.mark.parametrize(("text", "overrides", "words"), FILES, ids=[case[0].splitlines()[0] for case in FILES])
def test_a_bad_file_is_refused(text: str, overrides: list[str], words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        configs.load(overrides, file=file)
    message = str(refused.value)
    for word in words:
        assert word in message


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        configs.load(file=tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read"):
        configs.load(file=tmp_path / "binary.yaml")


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(ConfigError, match="3 problems") as refused:
        configs.load(["trainer.steps=0", "trainer.lr=-1", "cache.mode=maybe"])
    assert [key in str(refused.value) for key in ("trainer.steps", "trainer.lr", "cache.mode")] == [True] * 3


def test_a_circle_of_encoders_is_refused() -> None:
    chain = ["encoders.{}.family=pooled", "encoders.{}.upstream={}"]
    with pytest.raises(ConfigError, match="break the circle"):
        configs.load([*(chain[0].format(n) for n in "ab"), chain[1].format("a", "b"), chain[1].format("b", "a")])


def test_a_loaded_configuration_cannot_change() -> None:
    config = configs.load()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    assert config.seed == 0
