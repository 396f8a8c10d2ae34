"""Preflight: counts against real modules, memory against a tracker, placement, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import configs
from actors import preflight
from actors.preflight import checks, published
from actors.preflight.batches import Lengths, fake_batch
from actors.preflight.encoders import EncoderCost, encoder_cost, record_bytes
from actors.preflight.fake import building, stepping
from actors.preflight.memory import StepCost, step_cost
from actors.preflight.rates import measured_rates
from actors.preflight.render import count, duration, form, render, size
from actors.preflight.work import counting
from configs.compose import groups
from configs.schema import RunConfig
from models.registry import build, spec
from models.spec import TensorSpec
from services.errors import DataError, ModelError, PlacementError, WeightsError
from services.runtime.placement import Node
from services.telemetry import events


def load(tmp_path: Path, *overrides: str) -> RunConfig:
    return configs.load([f"storage.root={tmp_path}", *overrides])


# --- memory and work of a step ---------------------------------------------------------------------------------------

SIZES = [("probe-tiny", 96, 8, 8, 112), ("probe-small", 384, 2, 16, 224)]


def features(channels: int, grid: int) -> EncoderCost:
    outputs = {
        "tokens": TensorSpec(shape=(4, grid, grid, channels), dtype="bfloat16"),
        "summary": TensorSpec(shape=(1, channels), dtype="bfloat16"),
    }
    return EncoderCost(
        name="features",
        parameters=0,
        weight_bytes=0,
        flops=0,
        outputs=outputs,
        record_bytes=0,
        working_bytes=0,
        available=True,
    )


def probe_batch(module: nn.Module, cost: EncoderCost, samples: int, pixels: int) -> dict[str, Any]:
    columns = {
        **cost.outputs,
        "depth": TensorSpec(shape=(pixels, pixels), dtype="float32"),
        "labels": TensorSpec(shape=(pixels, pixels), dtype="int64"),
        "scene_type": TensorSpec(shape=(), dtype="int64"),
    }
    return fake_batch("view", columns, samples, Lengths(views=1, tokens=1), module)


def fake_cost(name: str, channels: int, samples: int, grid: int, pixels: int, **settings: bool) -> StepCost:
    with building():
        module = build(name, channels=channels)
    batch = probe_batch(module, features(channels, grid), samples, pixels)
    return step_cost(module, spec(name).roles[0], batch, None, **settings)


@pytest.mark.parametrize(("name", "channels", "samples", "grid", "pixels"), SIZES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_memory_is_what_a_tracker_measures(
    name: str, channels: int, samples: int, grid: int, pixels: int, accumulation: int
) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    role, estimate = spec(name).roles[0], fake_cost(name, channels, samples, grid, pixels)
    tracker = MemTracker()
    with building():
        module = build(name, channels=channels)
    batch = probe_batch(module, features(channels, grid), samples, pixels)
    with stepping(module):
        optimiser = torch.optim.AdamW(module.parameters())
        tracker.track_external(module, optimiser, *(v for v in batch.values() if isinstance(v, torch.Tensor)))
        with tracker:
            for _ in range(2):  # the optimiser's moments exist from the second step on
                for _ in range(accumulation):
                    tracker.reset_mod_stats()
                    torch.stack(list(role.step(module, batch, {}).sums.values())).sum().backward()
                optimiser.step()
                optimiser.zero_grad()
    measured = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]
    assert estimate.peak(accumulation) == pytest.approx(measured, rel=0.15)


def test_work_and_parameters_match_a_real_module() -> None:
    role, cost = spec("probe-tiny").roles[0], features(96, 8)
    module = build("probe-tiny", channels=96)
    batch = probe_batch(module, cost, 2, 112)
    with counting() as counter:
        torch.stack(list(role.step(module, batch, {}).sums.values())).sum().backward()
    fake = fake_cost("probe-tiny", 96, 2, 8, 112)
    assert fake.flops == counter.get_total_flops() > 0
    assert fake.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert fake.gradients == 4 * fake.trainable
    assert fake.optimiser == 8 * fake.trainable


def test_autocast_and_ema_change_memory() -> None:
    def measure(**settings: bool) -> StepCost:
        return fake_cost("probe-tiny", 96, 8, 8, 112, **settings)

    plain = measure()
    assert measure(ema=True).optimiser == 12 * plain.trainable
    assert measure(autocast=True).activations < plain.activations


# --- encoders --------------------------------------------------------------------------------------------------------


def test_a_random_encoder_is_counted_without_its_weights(tmp_path: Path) -> None:
    from models.encoders.hf import load_encoder

    config = load(tmp_path)
    settings = config.encoders["features"]
    cost = encoder_cost("features", config)
    real = load_encoder(
        settings.family, settings.weights, arch=settings.arch, seed=settings.seed, height=settings.height,
        width=settings.width, layers=settings.layers, dtype=settings.dtype,
    )  # fmt: skip
    outputs = real.encode([torch.zeros(3, settings.height, settings.width)])
    assert cost.parameters == sum(p.numel() for p in real.parameters())
    assert {name: spec.shape for name, spec in cost.outputs.items()} == {
        n: tuple(t.shape[1:]) for n, t in outputs.items()
    }
    assert cost.record_bytes == sum(t[0].numel() * t.element_size() for t in outputs.values())
    tokens = math.prod(cost.outputs["tokens"].shape[1:3]) + 1
    # Twice the multiply-adds of every weight at every token is the bulk of it; attention adds a little.
    assert 1.0 < cost.flops / (2 * cost.parameters * tokens) < 1.5


PUBLISHED_PARAMETERS = {
    "dinov2-small": 22.1e6, "dinov2-base": 86.6e6, "dinov2-large": 304.4e6, "dinov3-base": 85.7e6,
    "qwen2_5_vl-3b": 668.7e6,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_published_encoders_are_planned_before_they_are_there(name: str, tmp_path: Path) -> None:
    config = load(tmp_path, f"encoder={name}")
    assert encoder_cost("features", config).parameters == pytest.approx(PUBLISHED_PARAMETERS[name], rel=0.01)


def test_every_published_name_of_the_tree_is_known() -> None:
    # Parts of UniUGG and Spa3R stand beside each other under `encoders`; they are trained, or there by another name.
    beside = ("uniugg-", "vggt-", "semantic-", "spa3r-", "qwen-vision-")
    names = [name for name in groups()["encoder"] if not name.startswith(beside)]
    named = {configs.load([f"encoder={name}"]).encoders["features"].weights for name in names}
    named.add(configs.load(["recipe=uniugg_encoder", "size=paper"]).encoders["teacher"].weights)
    assert named - {"random"} == set(published.ARCHITECTURES)


def test_an_unknown_name_needs_its_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="someone/else"):
        encoder_cost("features", load(tmp_path, "encoder=dinov2-small", "encoders.features.weights=someone/else"))


def test_real_weights_agree_with_the_table(weights_dir: Path, tmp_path: Path) -> None:
    table = encoder_cost("features", load(tmp_path, "encoder=dinov2-small"))
    stored = load(tmp_path, "encoder=dinov2-small", f"encoders.features.weights={weights_dir / 'dinov2-small'}")
    assert encoder_cost("features", stored) == dataclasses.replace(table, available=True)


def test_fp8_records_are_about_half() -> None:
    outputs = features(384, 16).outputs
    plain, small = record_bytes(outputs, "none"), record_bytes(outputs, "fp8_e4m3")
    tokens = 4 * 16 * 16 + 1
    assert plain == 2 * tokens * 384
    assert small == tokens * (384 + 4)
    exact = {"pose": TensorSpec(shape=(None, 9), dtype="float32", exact=True)}
    assert record_bytes(exact, "fp8_e4m3", 3) == record_bytes(exact, "none", 3) == 3 * 9 * 4


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_default_run_fits(tmp_path: Path) -> None:
    plan = preflight.plan(load(tmp_path))
    assert plan.fits, plan.problems
    assert {role.role: role.nodes for role in plan.roles} == {"trainer": ("local",), "feature": ("local",)}
    assert plan.cache.records == 40 * 8
    assert plan.cache.hit_rates == (0.0, 1.0, 1.0)
    assert sum(plan.data[0].views.values()) == 40 * 8
    assert plan.schedule.steps_per_epoch == plan.data[0].views["train"] // 8
    assert not list(tmp_path.iterdir()), "planning writes nothing"


@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_every_size_can_be_planned(name: str, tmp_path: Path) -> None:
    plan = preflight.plan(load(tmp_path, f"size={name}"))
    assert plan.steps["trainer"].trainable > 0
    assert plan.schedule.total_s > 0


def test_a_budget_of_half_gives_half_the_hits(tmp_path: Path) -> None:
    total = preflight.plan(load(tmp_path)).cache.bytes
    half = preflight.plan(load(tmp_path, f"cache.budget_bytes={total // 2}", "cache.shard_bytes=1000")).cache
    assert half.hit_rates == pytest.approx((0.0, 0.5, 0.5), abs=1e-3)
    assert half.stored_bytes == total // 2
    never = preflight.plan(load(tmp_path, "cache=off")).cache
    assert (never.hit_rates[1], never.stored_bytes) == (0.0, 0)


def test_two_kinds_of_node(tmp_path: Path) -> None:
    config = load(tmp_path, "size=paper", "cluster=mixed-gpus")
    plan = preflight.plan(config)
    roles = {role.role: role for role in plan.roles}
    assert roles["trainer"].nodes == ("train",) * 8
    assert roles["feature"].nodes == ("encode",) * 4
    assert roles["trainer"].device_bytes > 10**9
    assert plan.samples["trainer"] == 16
    # Time uses the rates of the nodes that hold the role: 8 trainers that compute 200 TFLOP/s and read 1 GB/s each.
    step = plan.steps["trainer"]
    assert plan.schedule.train_s == pytest.approx(config.trainer.steps * step.flops / 200e12)
    assert plan.schedule.read_s == pytest.approx(config.trainer.steps * 16 * plan.encoders[0].record_bytes / 1e9)
    assert plan.schedule.bottlenecks == ("encoding", "reading")


def test_more_than_one_node_needs_shared_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(tmp_path, "size=paper", "cluster=mixed-gpus")
    with pytest.raises(PlacementError, match=r"storage\.root=.* lies on a local disk .* 2 nodes"):
        preflight.check(config)
    monkeypatch.setattr(checks, "file_system", lambda path: "lustre" if path.is_relative_to(tmp_path) else "xfs")
    with pytest.raises(PlacementError, match=r"node-local tier .* shared file system .* cache\.root=") as refused:
        preflight.check(config)
    assert "storage.root=" not in str(refused.value)
    assert preflight.check(load(tmp_path, "size=paper", "cluster=mixed-gpus", "cache.root=/mnt/nvme/loom3d")).fits


def test_a_file_system_is_found_for_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert checks.file_system(tmp_path / "a" / "b") == checks.file_system(tmp_path) != ""
    assert checks.existing_parent(tmp_path / "a" / "b") == tmp_path


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.roles.trainer.num_gpus=1"], ["'trainer'", "GPU 1 of 0"]),
        (["cluster.roles.trainer.num_cpus=3"], ["'trainer'", "CPU 3 of 2"]),
        (["cluster.roles.trainer.accelerator=H100"], ["'trainer'", "accelerator_type:H100"]),
        (["service.num_gpus=1"], ["'feature'", "GPU 1 of 0"]),
        (
            ["cluster.roles.trainer.workers=[4]", "cluster.roles.trainer.num_cpus=1"],
            ["2 of 4 workers", "short of 2 CPU"],
        ),
        (["cluster.nodes.local.memory_gb=1"], ["node local", "need about", "it has 1 GB", "trainer.micro_batch"]),
        (["encoder=dinov2-large"], ["encoders.features.weights=facebook/dinov2-large is not on this machine"]),
        (["peft=lora"], ["probe-tiny names no modules"]),
    ],
)
def test_what_cannot_run_is_refused_by_name(overrides: list[str], words: list[str], tmp_path: Path) -> None:
    with pytest.raises((PlacementError, ModelError)) as refused:
        preflight.check(load(tmp_path, *overrides))
    for word in words:
        assert word in str(refused.value)


def test_an_optional_library_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(
        PlacementError, match=r"logger\.wandb=mine needs the library wandb: pip install 'loom3d\[wandb\]'"
    ):
        preflight.check(load(tmp_path, "logger.wandb=mine"))


def test_a_gpu_too_small_is_refused(tmp_path: Path) -> None:
    overrides = [
        "size=paper", "cluster.nodes.local.num_gpus=1", "cluster.nodes.local.gpu_memory_gb=8",
        "cluster.roles.trainer.num_gpus=1", "cluster.nodes.local.memory_gb=64", "cache=off",
    ]  # fmt: skip
    with pytest.raises(PlacementError, match=r"'trainer': one worker needs about .* GB of GPU memory"):
        preflight.check(load(tmp_path, *overrides))


def test_a_cache_larger_than_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(PlacementError, match=r"the features need .* set cache\.budget_bytes"):
        preflight.check(load(tmp_path))


def test_nodes_can_be_given(tmp_path: Path) -> None:
    node = Node(name="big", offers={"CPU": 64.0, "memory_gb": 256.0, "role_trainer": 8.0, "role_feature": 8.0})
    plan = preflight.plan(load(tmp_path, "cluster.roles.trainer.workers=[8]"), nodes=[node])
    assert plan.roles[0].nodes == ("big",) * 8
    assert plan.nodes[0].host_bytes == sum(r.host_bytes * len(r.nodes) for r in plan.roles)


def test_inline_runs_are_in_one_process(tmp_path: Path) -> None:
    plan = preflight.plan(load(tmp_path, "cluster=inline"))
    assert [role.role for role in plan.roles] == ["trainer"]
    assert any("inline" in note for note in plan.notes)


def test_a_source_that_was_not_indexed_is_noted(tmp_path: Path) -> None:
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(pictures / f"{i}.png")
    overrides = ["data=images", f"data.sources.images.root={pictures}"]
    plan = preflight.plan(load(tmp_path / "store", *overrides))
    assert any("loom3d data index" in note for note in plan.notes)
    from services.data.sources import run_index

    run_index(load(tmp_path / "store", *overrides))
    assert preflight.plan(load(tmp_path / "store", *overrides)).cache.records == 3


def test_rates_of_an_earlier_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    events.configure(run / "events", "trainer-0")
    for i in range(6):
        slow = 10.0 if i < 2 else 1.0
        for micro in (0, 1):
            events.emit("forward", 100.0 * i, 100.0 * i + 0.05 * slow, step=i, micro=micro)
            events.emit("backward", 100.0 * i, 100.0 * i + 0.15 * slow, step=i, micro=micro)
        events.emit("step", 100.0 * i, 100.0 * i + 0.1 * slow, step=i)
        events.emit("load", 100.0 * i, 100.0 * i + 7, step=i)
    events.emit("encode", 0.0, 2.0, inputs=4)
    events.configure(None, "")
    rates = measured_rates(run)
    assert (rates.step_s, rates.encode_s) == (pytest.approx(0.5), 0.5)
    config = load(tmp_path)
    schedule = preflight.plan(config, rates=run).schedule
    assert schedule.train_s == pytest.approx(0.5 * config.trainer.steps)
    assert schedule.encode_s == pytest.approx(0.5 * 320)
    assert schedule.rates == str(run)


def test_rates_need_a_run_with_steps(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="events"):
        measured_rates(tmp_path)
    (tmp_path / "events").mkdir()
    with pytest.raises(DataError, match="did not finish"):
        measured_rates(tmp_path)


def test_a_plan_as_json_and_as_text(tmp_path: Path) -> None:
    plan = preflight.plan(load(tmp_path, "cluster.nodes.local.memory_gb=1"))
    tree = json.loads(json.dumps(plan.as_dict(), allow_nan=False))
    assert tree["fits"] is False
    assert tree["cache"]["bytes"] == plan.cache.bytes
    text = render(plan)
    for word in ("trainer", "feature", "probe-tiny", "320 records", "does NOT fit", "node local", "training limits"):
        assert word in text


def test_an_axis_that_differs_has_a_letter() -> None:
    assert form((None, 1, 6, 8)) == "nx1x6x8"


def test_numbers_are_readable() -> None:
    assert [size(0), size(999), size(1.5e9), size(2e12)] == ["0 B", "999 B", "1.5 GB", "2 TB"]
    assert [count(5), count(22_100_000)] == ["5", "22.1 M"]
    assert [duration(3), duration(300), duration(9000), duration(864000)] == ["3 s", "5 min", "2.5 h", "10 days"]
