"""Strategies of training compared on described clusters: numbers from the formula, what fits, clusters by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import configs
from actors import preflight
from actors.preflight import checks
from actors.preflight.batches import Lengths
from actors.preflight.checks import EXAMPLES
from actors.preflight.encoders import encoder_costs
from actors.preflight.plan import Strategy
from actors.preflight.render import render
from actors.preflight.roles import Traced, trace_roles
from actors.preflight.strategies import BACKENDS, METHODS
from actors.trainers.tensors import bucket_elements
from configs.roles import ROLES
from configs.schema import RunConfig
from services.runtime import placement

N = 8
SPA3 = ("spa3r_pretrain", "spa3_vlm")
SEVEN = ("encoder=[qwen-vision-7b,spa3r-paper]", "model.name=spa3-vlm-7b",
         "model.init.language=Qwen/Qwen2.5-VL-7B-Instruct",
         "data.text.tokenizer=Qwen/Qwen2.5-VL-7B-Instruct")  # fmt: skip


def load(tmp_path: Path, *overrides: str) -> RunConfig:
    return configs.load([f"storage.root={tmp_path}", *overrides])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Eight workers, a GPU each, of which they have nine tenths."""
    return load(tmp_path_factory.mktemp("plan"), "recipe=spa3_vlm", "cluster=8x80gb", "trainer.micro_batch=8",
                "trainer.accumulation=2", "trainer.precision=bfloat16")  # fmt: skip


@pytest.fixture(scope="module")
def compared(tiny: RunConfig) -> preflight.Plan:
    return preflight.plan(tiny, compare=True)


def peak(traced: Traced, backend: str, offload: str) -> int:
    """Of a worker by the table of actors.preflight.memory, written down a second time."""
    (cost,) = traced.kinds.values()
    parameters = [p for p in traced.module.parameters() if p.requires_grad]
    sizes = [p.numel() * p.element_size() for p in traced.module.parameters()]
    weights, trained = sum(sizes), 4 * cost.trainable
    part, rest = trained // N, cost.weights - weights  # rest: buffers
    blocks = [c for c in traced.module.modules() if type(c).__name__ in traced.spec.checkpointed]
    inside = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks]
    bucket, largest = 4 * bucket_elements(cost.trainable), 4 * max(p.numel() for p in parameters)
    alive = cost.activations + cost.working
    if backend == "ddp":
        stays, comes = cost.weights + 2 * trained, max(alive + trained, 2 * trained)
    elif backend == "fsdp2":
        outer = weights - sum(inside)
        own = {id(p) for block in blocks for p in block.parameters()}
        trained_outer = sum(4 * p.numel() for p in parameters if id(p) not in own)
        gathered = min(outer + 2 * max(inside), weights)
        stays = rest + weights // N + 2 * trained // N
        comes = max(alive + gathered + part, part + outer + 2 * trained_outer, 2 * part)
    else:
        whole = backend == "zero3"
        stays = rest + (weights // N if whole else weights) + bucket
        gathered = weights - _embeddings(traced) if whole else 0
        reducing = min(trained, max(bucket, largest))
        if offload == "none":
            stays += part + 2 * trained // N
            comes = max(alive + gathered + part, part + reducing, 3 * part)
        else:
            stays -= weights // N if offload == "parameters" else 0
            kept = 0 if whole else largest
            comes = max(alive + gathered + kept, kept + reducing)
    return stays + comes + cost.batch


def _embeddings(traced: Traced) -> int:
    """Bytes of frozen tables."""
    import torch

    tables = [m.weight for m in traced.module.modules() if isinstance(m, torch.nn.Embedding)]
    return sum(t.numel() * t.element_size() for t in tables if not t.requires_grad)


def test_the_numbers_are_the_formula_s(tiny: RunConfig, compared: preflight.Plan) -> None:
    (vlm,) = (role for role in compared.roles if role.role == "vlm")
    found = {(one.peft, one.backend, one.offload): one for one in compared.strategies}
    assert set(found) == {(peft, *backend) for peft in METHODS for backend in BACKENDS}
    lengths = Lengths(views=8, tokens=2048, frame=(3, 4), set_tokens=8 * 48, set_views=8, set_contexts=4, packed=4)
    for peft in METHODS:
        config = load(Path(tiny.storage.root), "recipe=spa3_vlm", "cluster=8x80gb", "trainer.micro_batch=8",
                      "trainer.accumulation=2", "trainer.precision=bfloat16", f"peft={peft}")  # fmt: skip
        traced = trace_roles(config, encoder_costs(config), 1, lengths)["vlm"]
        for backend, offload in BACKENDS:
            one = found[peft, backend, offload]
            assert one.device_bytes == pytest.approx(peak(traced, backend, offload), rel=1e-3), (peft, backend, offload)
            assert one.room_bytes == 72 * 10**9
            assert one.trainable == traced.on(config.backend, N, accelerated=True).trainable
    chosen = [one for one in compared.strategies if one.chosen]
    assert [(one.peft, one.backend, one.offload) for one in chosen] == [("none", "ddp", "none")]
    assert (chosen[0].device_bytes, chosen[0].host_bytes) == (vlm.device_bytes, vlm.host_bytes)


def test_what_each_strategy_is_for(compared: preflight.Plan) -> None:
    by = {(one.peft, one.backend, one.offload): one for one in compared.strategies}

    def device(*key: str) -> int:
        return by[key].device_bytes  # type: ignore[index]

    for peft in METHODS:
        assert device(peft, "fsdp2", "none") < device(peft, "ddp", "none")
        assert device(peft, "zero3", "parameters") < device(peft, "zero3", "optimizer")
        assert by[peft, "zero3", "parameters"].host_bytes > by[peft, "zero3", "optimizer"].host_bytes
        assert by[peft, "zero2", "optimizer"].host_bytes > by[peft, "zero2", "none"].host_bytes
    assert all(device("lora", *backend) < device("none", *backend) for backend in BACKENDS)


def test_a_table_says_what_fits(compared: preflight.Plan) -> None:
    text = render(compared, width=200)
    assert "strategies (8 x vlm with 1 samples each)" in text
    rows = [line for line in text.splitlines() if " zero3 " in line]
    assert len(rows) == 6
    assert all("of 72 GB" in row and "fits" in row for row in rows)
    assert [line for line in text.splitlines() if "->" in line and "ddp" in line]
    tree = json.loads(json.dumps(compared.as_dict(), allow_nan=False))
    assert len(tree["strategies"]) == len(compared.strategies)
    assert all(one["fits"] for one in tree["strategies"])


def test_what_does_not_fit_says_why(tiny: RunConfig, compared: preflight.Plan) -> None:
    """A GPU between what the least and the most need; and a node whose memory offloading exceeds."""
    needs = sorted(one.device_bytes for one in compared.strategies)
    hosts = {role.role: role.workers * role.host_bytes for role in compared.roles}
    node = dataclasses.replace(
        tiny.cluster.nodes["gpu"],
        gpu_memory_gb=(needs[0] + needs[-1]) / 2 / 1e9 / 0.9,
        memory_gb=(sum(hosts.values()) + 1e6) / 1e9,
    )
    cluster = dataclasses.replace(tiny.cluster, nodes={"gpu": node})
    found = preflight.plan(dataclasses.replace(tiny, cluster=cluster), compare=True).strategies
    assert not all(one.device_bytes > one.room_bytes for one in found)
    assert any(one.device_bytes > one.room_bytes for one in found)
    for one in found:
        over = one.device_bytes > one.room_bytes
        assert any("role 'vlm': one worker needs" in problem for problem in one.problems) == over
        beyond = N * one.host_bytes > hosts["vlm"] + 1e6
        assert any(problem.startswith("node gpu") for problem in one.problems) == beyond
        assert one.fits == (not one.problems)
    assert any(problem.startswith("node gpu") for one in found for problem in one.problems)


def test_a_model_without_layers_for_updates_is_compared_whole(tmp_path: Path) -> None:
    config = load(tmp_path, "recipe=probe", "cluster=8x32gb", "trainer.micro_batch=8")
    found = preflight.plan(config, compare=True).strategies
    assert {one.peft for one in found} == {"none"}
    assert {one.role for one in found} == {"trainer"}
    assert not preflight.plan(config).strategies, "only where they are asked for"


# --- clusters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gpus", "gigabytes"), [("1x24gb", 1, 24), ("1x80gb", 1, 80), ("8x32gb", 8, 32), ("8x80gb", 8, 80)]
)
def test_a_cluster_is_what_its_name_says_for_any_recipe(name: str, gpus: int, gigabytes: int, tmp_path: Path) -> None:
    for recipe in ("probe", "spa3r_pretrain", "spa3_vlm", "uniugg_align"):
        config = load(tmp_path, f"recipe={recipe}", f"cluster={name}", "trainer.micro_batch=8")
        (node,) = config.cluster.nodes.values()
        assert (node.num_gpus, node.gpu_memory_gb) == (gpus, gigabytes)
        assert set(config.cluster.roles) == set(ROLES[recipe])
        assert all(role.workers == [gpus] for role in config.cluster.roles.values())
        placed = placement.place(placement.bundles_from_config(config), placement.nodes_from_config(config.cluster))
        assert placed.free["gpu"]["GPU"] == pytest.approx(0, abs=1e-6)
    one = load(tmp_path, "recipe=spa3_vlm", f"cluster={name}", "trainer.micro_batch=8", "cluster.roles.vlm.workers=[1]")
    assert one.cluster.roles["vlm"].workers == [1]


@pytest.mark.parametrize("recipe", SPA3)
@pytest.mark.parametrize("size", ["tiny", pytest.param("small", marks=pytest.mark.slow)])
def test_small_sizes_fit_this_machine(recipe: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "disk_problems", lambda *_: iter(()))  # whatever is free here
    plan = preflight.plan(load(tmp_path, f"recipe={recipe}", f"size={size}"))
    assert plan.fits, plan.problems


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "overrides"), [("spa3r_pretrain", ()), ("spa3_vlm", ()), ("spa3_vlm", SEVEN)])
def test_the_paper_s_sizes_fit_the_cluster_that_is_named_for_them(
    recipe: str, overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine they do not, which is said with that name."""
    example = EXAMPLES[frozenset(ROLES[recipe])]
    given = (f"recipe={recipe}", "size=paper", *overrides)
    too_large = preflight.plan(load(tmp_path, *given))
    assert any(f"describe other machines as cluster={example} does" in problem for problem in too_large.problems)
    monkeypatch.setattr(checks, "file_system", lambda path: "lustre" if path.is_relative_to(tmp_path) else "xfs")
    plan = preflight.plan(load(tmp_path, *given, f"cluster={example}", "cache.root=/mnt/nvme/loom3d"))
    assert plan.fits, plan.problems
    assert all(role.device_bytes > 0 for role in plan.roles)


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "billions"), [((), 3.1), (SEVEN, 7.65)], ids=["3B", "7B"])
def test_the_paper_s_language_models_on_described_clusters(
    overrides: tuple[str, ...], billions: float, tmp_path: Path
) -> None:
    """16 bytes of state a parameter, cut into eight where a backend cuts it, and activations beside it."""
    base = ("recipe=spa3_vlm", "size=paper", *overrides)
    eight = _by_name(preflight.plan(load(tmp_path, *base, "cluster=8x80gb"), compare=True).strategies)
    whole = eight["none", "ddp", "none"]
    assert whole.trainable == pytest.approx(billions * 1e9, rel=0.01)
    state = 4 * whole.trainable
    assert whole.device_bytes > 5 * state
    assert eight["none", "zero3", "none"].device_bytes < whole.device_bytes - 2.5 * state
    assert eight["none", "fsdp2", "none"].fits
    assert eight["none", "ddp", "none"].fits == (billions < 4)
    assert eight["lora", "ddp", "none"].fits
    single = ("cluster=1x80gb", "trainer.micro_batch=1", "trainer.accumulation=64")
    one = _by_name(preflight.plan(load(tmp_path, *base, *single), compare=True).strategies)
    assert one["lora", "zero2", "none"].fits
    assert one["none", "zero3", "parameters"].host_bytes > 6 * state
    assert one["none", "ddp", "none"].device_bytes > one["none", "zero2", "optimizer"].device_bytes


def _by_name(found: Any) -> dict[tuple[str, str, str], Strategy]:
    return {(one.peft, one.backend, one.offload): one for one in found}
