"""Preflight of recipes with several encoders, kinds and roles: against real modules, and what is missing by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import configs
import models
from actors import preflight
from actors.preflight import checks
from actors.preflight.batches import Lengths, fake_batch
from actors.preflight.checks import EXAMPLES, data_problems
from actors.preflight.encoders import encoder_costs
from actors.preflight.fake import building
from actors.preflight.memory import spread, step_cost
from actors.preflight.missing import missing
from actors.preflight.render import render
from actors.preflight.sizes import data_sizes
from actors.preflight.trained import how_to_train
from actors.preflight.work import counting
from actors.trainers.recompute import checkpoint_activations
from configs.roles import ROLES
from configs.schema import BackendConfig, RunConfig
from configs.validate import RECIPES
from models.pretrained import save_pretrained
from models.registry import spec
from models.spec import RoleSpec, TensorSpec
from models.uniugg.diffusion import UNET_FILE
from models.uniugg.objectives import LanguageObjective
from services.errors import PlacementError
from tests.support.hub import empty_cache, snapshot

UNIUGG = [recipe for recipe in RECIPES if recipe.startswith("uniugg_")]


def load(tmp_path: Path, *overrides: str) -> RunConfig:
    return configs.load([f"storage.root={tmp_path}", *overrides])


# --- every recipe ----------------------------------------------------------------------------------------------------

HEAVY = [pytest.param(recipe, size, marks=pytest.mark.slow) for recipe in UNIUGG for size in ("small", "paper")]
CASES = [*((recipe, "tiny") for recipe in UNIUGG), *HEAVY]


@pytest.mark.parametrize(("recipe", "size"), CASES)
def test_every_recipe_is_planned_before_anything_was_trained(recipe: str, size: str, tmp_path: Path) -> None:
    config = load(tmp_path, f"recipe={recipe}", f"size={size}")
    plan = preflight.plan(config)
    assert tuple(plan.steps) == ROLES[recipe]
    assert {role.role for role in plan.roles} == {*ROLES[recipe], "feature"}
    with torch.device("meta"):
        whole = models.build(config.model.name)
    built = sum(p.numel() for p in whole.parameters())
    planned = sum(cost.trainable + cost.frozen for cost in plan.steps.values())
    if recipe == "uniugg_align":  # of the model's two roles the one that reads
        built -= sum(p.numel() for p in whole.get_submodule("diffusion").parameters())
    assert planned == built
    tree = json.loads(json.dumps(plan.as_dict(), allow_nan=False))
    for role in ROLES[recipe]:
        assert tree["steps"][role]["flops"] > 0
        assert tree["peaks"][role] > 4 * tree["steps"][role]["trainable"]
    assert sorted(tree["cache"]["encoders"]) == sorted(encoder["name"] for encoder in tree["encoders"])
    text = render(plan, width=400)
    for word in (*ROLES[recipe], *plan.cache.encoders, *plan.missing):
        assert word in text
    assert not list(tmp_path.iterdir()), "planning writes nothing"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", UNIUGG)
def test_the_paper_s_sizes_fit_the_cluster_that_is_named_for_them(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine they do not, which is said with that name."""
    example = EXAMPLES[frozenset(ROLES[recipe])]
    too_large = preflight.plan(load(tmp_path, f"recipe={recipe}", "size=paper"))
    assert any(f"describe other machines as cluster={example} does" in problem for problem in too_large.problems)
    monkeypatch.setattr(checks, "file_system", lambda path: "lustre" if path.is_relative_to(tmp_path) else "xfs")
    config = load(tmp_path, f"recipe={recipe}", "size=paper", f"cluster={example}", "cache.root=/mnt/nvme/loom3d")
    plan = preflight.plan(config)
    assert plan.fits, plan.problems
    assert all(role.device_bytes > 0 for role in plan.roles)


def test_public_weights_are_found_in_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A UNet by the name of its pipeline; until it is there, the plan says so and the start says how to have it."""
    cache, name = empty_cache(monkeypatch, tmp_path / "hub"), "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config = load(tmp_path, "recipe=uniugg_joint", f"model.init.unet={name}")
    costs = encoder_costs(config)
    (line,) = [line for line in missing(config, costs) if "unet" in line]
    assert line.startswith(f"model.init.unet={name} is not on this machine, and is fetched when the run starts")
    (line,) = [line for line in missing(config, costs, fetch=True) if "unet" in line]
    assert f"hf download {name} --include 'unet/config.json'" in line
    folder = snapshot(cache, name)
    assert [line for line in missing(config, costs) if "unet" in line], "its other parts are not enough"
    (folder / "unet").mkdir()
    (folder / "unet" / UNET_FILE).write_bytes(b"")
    assert not [line for line in missing(config, costs) if "unet" in line]


@pytest.mark.slow
def test_the_paper_s_model_on_a_described_cluster(tmp_path: Path) -> None:
    nodes = [
        "cluster.nodes.local.count=2", "cluster.nodes.local.num_gpus=8", "cluster.nodes.local.memory_gb=800",
        "cluster.nodes.local.gpu_memory_gb=80", "cluster.nodes.local.tflops=300",
        "cluster.roles.llm.num_gpus=1", "cluster.roles.diffusion.num_gpus=1",
    ]  # fmt: skip
    one = preflight.plan(load(tmp_path, "recipe=uniugg_joint", "size=paper", *nodes))
    many = preflight.plan(
        load(tmp_path, "recipe=uniugg_joint", "size=paper", *nodes, "backend=fsdp2",
             "cluster.roles.llm.workers=[8]", "cluster.roles.diffusion.workers=[4]")
    )  # fmt: skip
    assert one.steps["llm"].trainable == many.steps["llm"].trainable == pytest.approx(3.1e9, rel=0.01)
    assert one.steps["diffusion"].trainable == pytest.approx(0.86e9, rel=0.01)
    llm, alone = (plan.steps["llm"].kinds["conversation"] for plan in (many, one))
    assert llm.optimiser == alone.optimiser // 8
    assert llm.gradients == alone.gradients // 8
    assert alone.weights / 8 < llm.weights < alone.weights / 2
    assert llm.flops == pytest.approx(alone.flops / 8, rel=0.01)
    assert any("'llm': one worker needs about" in problem for problem in one.problems)
    assert many.fits, many.problems
    (edge,) = many.edges
    generations = many.steps["llm"].micro_batches["generation"]
    assert edge.forward_bytes == edge.backward_bytes == generations * 64 * 196 * 2048 * 4
    assert many.schedule.bottlenecks[1] == "training llm"
    assert many.schedule.train_s == many.schedule.role_s["llm"] > many.schedule.role_s["diffusion"]


# --- roles -----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "tokens": TensorSpec(shape=(None, 1, 7, 7, 96), dtype="float32"),
    "input_ids": TensorSpec(shape=(None,), dtype="int64"),
    "supervised": TensorSpec(shape=(None,), dtype="bool"),
}
LENGTHS = Lengths(views=2, tokens=160)


def language() -> RoleSpec:
    return spec("uniugg-tiny").role("llm").bind(objective=LanguageObjective(translation_scale="metres"))


def fake_language() -> Any:
    with building():
        return models.build("uniugg-llm-tiny")


def real_flops(module: torch.nn.Module, batch: dict[str, Any]) -> int:
    with counting() as counter:
        torch.stack(list(language().step(module, batch, {}).sums.values())).sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_work_of_a_role_that_reads_text_is_that_of_a_real_one(checkpointing: bool) -> None:
    real, fake = models.build("uniugg-llm-tiny"), fake_language()
    batch = fake_batch("conversation", COLUMNS, 2, LENGTHS, fake)
    cost = step_cost(fake, language(), batch, checkpointing=checkpointing)
    if checkpointing:
        checkpoint_activations(real, language())
    assert cost.flops == real_flops(real, fake_batch("conversation", COLUMNS, 2, LENGTHS, real)) > 0
    assert cost.trainable == sum(p.numel() for p in real.parameters())


def test_checkpointing_trades_memory_for_work() -> None:
    module = fake_language()
    batch = fake_batch("conversation", COLUMNS, 8, LENGTHS, module)
    plain, less = (step_cost(module, language(), batch, checkpointing=on) for on in (False, True))
    assert less.activations < plain.activations / 2
    assert plain.flops < less.flops < 4 / 3 * plain.flops
    assert less.peak() < plain.peak()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_a_role_that_reads_text_is_what_a_tracker_measures(checkpointing: bool) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    from actors.preflight.fake import stepping

    module, role = fake_language(), language()
    batch = fake_batch("conversation", COLUMNS, 8, LENGTHS, module)
    estimate = step_cost(module, role, batch, checkpointing=checkpointing)
    if checkpointing:
        checkpoint_activations(module, role)
    tracker = MemTracker()
    with stepping(module):
        optimiser = torch.optim.AdamW(module.parameters())
        tracker.track_external(module, optimiser, batch["tokens"])
        with tracker:
            for _ in range(2):  # the optimiser's moments exist from the second step on
                tracker.reset_mod_stats()
                torch.stack(list(role.step(module, batch, {}).sums.values())).sum().backward()
                optimiser.step()
                optimiser.zero_grad()
    measured = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]
    assert estimate.peak() == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(
    ("backend", "weights", "master", "gradients", "optimiser"),
    [
        ("ddp", 1, 0, 1, 1),
        ("zero2", 1, 0.25, 0.25, 0.25),
        ("zero3", 0.25, 0.25, 0.25, 0.25),
        ("fsdp2", 0.25, 0, 0.25, 0.25),
    ],
)
def test_what_a_backend_divides(
    backend: str, weights: float, master: float, gradients: float, optimiser: float
) -> None:
    module, role = fake_language(), language()
    whole = step_cost(module, role, fake_batch("conversation", COLUMNS, 2, LENGTHS, module))
    part = spread(whole, module, role, BackendConfig(name=backend), 4)
    buffers = sum(b.numel() * b.element_size() for b in module.buffers())
    assert part.weights - buffers == pytest.approx(weights * (whole.weights - buffers))
    assert part.master == pytest.approx(master * whole.gradients)
    assert part.gradients == pytest.approx(gradients * whole.gradients)
    assert part.optimiser == pytest.approx(optimiser * whole.optimiser)
    assert (part.gathered > 0) == (backend in ("zero3", "fsdp2"))
    assert (part.buckets > 0) == backend.startswith("zero")
    assert part.host == 0
    kept = spread(whole, module, role, BackendConfig(name="fsdp2", reshard_after_forward=False), 4)
    assert kept.gathered == whole.weights - buffers
    alone = spread(whole, module, role, BackendConfig(name="fsdp2"), 1)
    assert (alone.weights, alone.gradients, alone.gathered) == (whole.weights, whole.gradients, 0)


def test_offload_moves_to_the_host_what_the_optimiser_has() -> None:
    module, role = fake_language(), language()
    whole = step_cost(module, role, fake_batch("conversation", COLUMNS, 2, LENGTHS, module))
    peaks, host = {}, {}
    for name, offload in [("zero2", "none"), ("zero2", "optimizer"), ("zero3", "none"), ("zero3", "optimizer"),
                          ("zero3", "parameters")]:  # fmt: skip
        part = spread(whole, module, role, BackendConfig(name=name, offload=offload), 4, accelerated=True)
        peaks[name, offload], host[name, offload] = part.peak(2), part.host
        assert (part.optimiser, part.master) == (0, 0) or offload == "none"
    assert peaks["zero2", "optimizer"] < peaks["zero2", "none"]
    assert peaks["zero3", "parameters"] < peaks["zero3", "optimizer"] < peaks["zero3", "none"]
    part = whole.gradients // 4
    assert host["zero3", "optimizer"] == 5 * part
    assert host["zero2", "optimizer"] == host["zero3", "parameters"] == 6 * part


def test_only_what_is_trained_has_gradients_and_moments(tmp_path: Path) -> None:
    align = preflight.plan(load(tmp_path, "recipe=uniugg_align", "recipe.train.llm=[projector.*]")).steps["llm"]
    projector = models.build("uniugg-llm-tiny").get_submodule("projector")
    assert align.trainable == sum(p.numel() for p in projector.parameters())
    assert align.kinds["conversation"].optimiser == 8 * align.trainable
    whole = preflight.plan(load(tmp_path, "recipe=uniugg_joint")).steps
    lora = preflight.plan(load(tmp_path, "recipe=uniugg_joint", "roles.llm.peft=lora")).steps
    assert lora["llm"].trainable < whole["llm"].trainable / 2
    assert lora["llm"].frozen > whole["llm"].trainable / 2
    assert lora["llm"].kinds["conversation"].optimiser == 8 * lora["llm"].trainable
    assert lora["diffusion"] == whole["diffusion"]


def test_roles_go_to_the_nodes_that_hold_them(tmp_path: Path) -> None:
    overrides = [
        "recipe=uniugg_joint", "cluster.nodes.big.resources={role_llm: 2, role_feature: 1}",
        "cluster.nodes.small.resources={role_diffusion: 1}", "cluster.nodes.small.tflops=1e-4", "~cluster.nodes.local",
        "cluster.roles.llm.workers=[2]",
    ]  # fmt: skip
    plan = preflight.plan(load(tmp_path, *overrides))
    assert {role.role: role.nodes for role in plan.roles} == {
        "llm": ("big", "big"), "diffusion": ("small",), "feature": ("big",),
    }  # fmt: skip
    assert plan.schedule.bottlenecks[1] == "training diffusion"
    inline = preflight.plan(load(tmp_path, "recipe=uniugg_joint", "cluster=inline")).schedule
    assert inline.train_s == pytest.approx(sum(inline.role_s.values()))


# --- what is missing -------------------------------------------------------------------------------------------------


def test_parts_of_earlier_runs_are_asked_for_with_what_makes_them(tmp_path: Path) -> None:
    config = load(tmp_path, "recipe=uniugg_joint")
    wanted = {
        "encoders.vit.weights=run:uniugg_encoder-tiny/encoder": "recipe=uniugg_encoder size=tiny",
        "encoders.vae.weights=run:uniugg_vae-tiny/vae": "recipe=uniugg_vae size=tiny",
        "encoders.reconstruction.weights=run:uniugg_vae-tiny/vae": "recipe=uniugg_vae size=tiny",
        "model.init.llm=run:uniugg_align-tiny/llm": "recipe=uniugg_align size=tiny",
    }
    plan = preflight.plan(config)
    assert plan.fits
    assert len(plan.missing) == len(wanted)
    with pytest.raises(PlacementError) as refused:
        preflight.check(config)
    for key, command in wanted.items():
        (line,) = [line for line in plan.missing if line.startswith(key)]
        assert f"train it first with `loom3d train {command}`" in line
        assert line in str(refused.value)


def test_a_run_of_another_name_is_asked_for_by_it() -> None:
    assert how_to_train("mine") == "loom3d train name=mine recipe=... size=..."
    assert how_to_train("uniugg_vae-small") == "loom3d train recipe=uniugg_vae size=small"


def test_parts_that_are_there_decide_shapes(tmp_path: Path) -> None:
    vit, vae = models.build("uniugg-vit-tiny"), models.build("spatial-vae-tiny", latent_channels=6)
    save_pretrained(vit, tmp_path / "runs/uniugg_encoder-tiny/weights/encoder", "uniugg-vit-tiny", {})
    settings = {"latent_channels": 6}
    save_pretrained(vae, tmp_path / "runs/uniugg_vae-tiny/weights/vae", "spatial-vae-tiny", settings)
    plan = preflight.plan(load(tmp_path, "recipe=uniugg_joint"))
    (line,) = plan.missing
    assert line.startswith("model.init.llm")
    by_name = {encoder.name: encoder for encoder in plan.encoders}
    assert by_name["vae"].outputs["mean"].shape == (6, 14, 14)
    assert by_name["vae"].parameters == sum(p.numel() for p in vae.parameters())
    assert by_name["vit"].parameters == sum(p.numel() for p in vit.parameters())
    assert 0 < by_name["vae"].flops < by_name["reconstruction"].flops


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["recipe=uniugg_align", "data.text.tokenizer=/no/model"], ["data.text.tokenizer=/no/model", "bytes"]),
        (["recipe=uniugg_joint", "model.init.unet=/no/unet"], ["model.init.unet=/no/unet", "diffusers' layout"]),
        (["recipe=uniugg_joint", "model.init.unet=/"], ["model.init.unet=/ is", "diffusion_pytorch_model.safetensors"]),
        (["recipe=uniugg_align", "model.init.language=/no/qwen"], ["model.init.language=/no/qwen", "no such folder"]),
        (["recipe=uniugg_vae", "recipe.uniugg.lpips_weights=/no/alex"], ["recipe.uniugg.lpips_weights=/no/alex"]),
        (["recipe=uniugg_vae", "evaluate.lpips_weights=/no/alex"], ["evaluate.lpips_weights=/no/alex"]),
        (["recipe=uniugg_vae", "encoders.vit.weights=/no/vit"], ["encoders.vit.weights=/no/vit", "run:NAME/PART"]),
    ],
)
def test_what_is_missing_is_named(overrides: list[str], words: list[str], tmp_path: Path) -> None:
    config = load(tmp_path, *overrides)
    found = missing(config, encoder_costs(config))
    assert any(all(word in line for word in words) for line in found), found


@pytest.mark.parametrize(
    ("recipe", "kind", "words"),
    [
        ("uniugg_joint", "conversation", "questions and answers; add a source that has them (data=rooms-qa)"),
        ("uniugg_align", "conversation", "set recipe.quotas.conversation=0"),
    ],
)
def test_kinds_that_no_source_gives_are_refused(recipe: str, kind: str, words: str, tmp_path: Path) -> None:
    config = load(tmp_path, f"recipe={recipe}", "data=rooms")
    (problem,) = data_problems(config, data_sizes(config))
    assert f"recipe.quotas gives {kind!r} a share" in problem
    assert words in problem


def test_pictures_without_depth_make_no_pairs(tmp_path: Path) -> None:
    from PIL import Image

    from services.data.sources import run_index

    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / "pictures" / f"{i}.png")
    config = load(
        tmp_path / "store", "recipe=uniugg_vae", "data=images", f"data.sources.images.root={tmp_path}/pictures"
    )
    assert not list(data_problems(config, data_sizes(config))), "not indexed yet: not known"
    run_index(config)
    (problem,) = data_problems(config, data_sizes(config))
    assert "views of scenes with depth" in problem


def test_records_are_counted_by_encoder(tmp_path: Path) -> None:
    joint = preflight.plan(load(tmp_path, "recipe=uniugg_joint", "data.rooms.scenes=10", "data.rooms.views=4"))
    assert joint.cache.encoders == {"vit": 40, "vae": 40, "reconstruction": 40}
    total = sum(40 * encoder.record_bytes for encoder in joint.encoders)
    assert joint.cache.bytes == total


ALEXNET = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


def test_lpips_counts_where_its_network_is_there_and_stays_real(tmp_path: Path) -> None:
    from models.uniugg.losses_rgb import _lpips

    tensors = {}
    for number, (out, channels, side) in ALEXNET.items():
        tensors[f"features.{number}.weight"] = torch.randn(out, channels, side, side) / 100
        tensors[f"features.{number}.bias"] = torch.zeros(out)
    trunk = tmp_path / "alexnet.safetensors"
    save_file(tensors, trunk)
    base = ["recipe=uniugg_vae", "encoders.vit.weights=random"]
    without = preflight.plan(load(tmp_path, *base)).steps["trainer"]
    with_it = preflight.plan(load(tmp_path, *base, f"recipe.uniugg.lpips_weights={trunk}")).steps["trainer"]
    assert with_it.flops > without.flops
    assert with_it.trainable == without.trainable
    kept = dict(_lpips(str(trunk), torch.device("cpu")).network.named_parameters())
    assert torch.equal(next(p for p in kept.values() if p.shape == (64, 3, 11, 11)), tensors["features.0.weight"])
