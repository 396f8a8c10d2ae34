"""Bin-packing of roles onto nodes, and errors that say what is short."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from configs.schema import ClusterConfig, NodeConfig, RoleConfig, RunConfig, ServiceConfig, TrainerConfig
from services.errors import PlacementError
from services.runtime.placement import (
    MEMORY,
    Bundle,
    Node,
    bundles_from_config,
    largest_sizes,
    nodes_from_config,
    nodes_from_ray,
    place,
)


def node(name, labels=None, **offers):
    return Node(name=name, offers=offers, labels=labels or {})


def bundle(role, count=1, labels=None, **asks):
    return Bundle(role=role, count=count, asks=asks, labels=labels or {})


def test_every_worker_gets_a_node_that_can_hold_it():
    placed = place(
        [bundle("llm", 2, GPU=4), bundle("diffusion", 3, GPU=1), bundle("feature", 2, GPU=0.5, role_feature=1)],
        [node("a", GPU=8), node("b", GPU=4, role_feature=2)],
    )
    assert placed.nodes["feature"] == ("b", "b")
    assert len(placed.nodes["llm"]) == 2
    assert {name: offers["GPU"] for name, offers in placed.free.items()} == {"a": 0, "b": 0}


def test_the_search_steps_back_where_greed_fails():
    # Largest first onto the fullest node: 4 goes to the node of 4, 3+3 needs the node of 6 untouched.
    placed = place(
        [bundle("x", 2, CPU=3), bundle("y", 2, CPU=2), bundle("z", 1, CPU=4)], [node("a", CPU=6), node("b", CPU=8)]
    )
    assert sum(offers["CPU"] for offers in placed.free.values()) == 0


def test_labels_decide():
    nodes = [node("a", {"zone": "1"}, CPU=1), node("b", {"zone": "2"}, CPU=1)]
    assert place([bundle("x", CPU=1, labels={"zone": "2"})], nodes).nodes["x"] == ("b",)
    with pytest.raises(PlacementError, match=r"role 'x' fits no node.*label zone=3"):
        place([bundle("x", CPU=1, labels={"zone": "3"})], nodes)


def test_a_worker_too_large_for_any_node_is_named_with_what_each_lacks():
    with pytest.raises(PlacementError, match=r"role 'llm' fits no node \(a: asks for GPU 8 of 4, memory_gb 80 of 64"):
        place([bundle("llm", GPU=8, memory_gb=80)], [node("a", GPU=4, memory_gb=64)])
    with pytest.raises(PlacementError, match="there are no nodes"):
        place([bundle("llm", GPU=1)], [])


def test_too_many_workers_are_named_with_the_shortfall():
    with pytest.raises(PlacementError, match=r"role 'llm' gets 2 of 3 workers.*short of 2 GPU"):
        place([bundle("llm", 3, GPU=2)], [node("a", GPU=2), node("b", GPU=2)])


def test_sums_that_fit_but_cannot_be_cut_are_an_error_too():
    with pytest.raises(PlacementError, match="no way to cut them"):
        place([bundle("llm", 2, GPU=3)], [node("a", GPU=4), node("b", GPU=2)])


def test_two_nodes_of_one_name_are_refused():
    with pytest.raises(PlacementError, match="one name"):
        place([], [node("a"), node("a")])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, 4), max_size=4), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_what_was_cut_from_nodes_always_fits_back(cuts, rnd):
    """Bundles made by cutting full nodes into pieces have a packing, whatever the order they come in."""
    nodes = [node(f"n{i}", CPU=sum(pieces) or 1) for i, pieces in enumerate(cuts)]
    bundles = [bundle(f"r{i}-{j}", CPU=piece) for i, pieces in enumerate(cuts) for j, piece in enumerate(pieces)]
    rnd.shuffle(bundles)
    placed = place(bundles, nodes)
    used = Counter()
    for b in bundles:
        used[placed.nodes[b.role][0]] += b.asks["CPU"]
    for n in nodes:
        assert used[n.name] + placed.free[n.name]["CPU"] == n.offers["CPU"]
        assert placed.free[n.name]["CPU"] >= 0


def test_the_default_config_fits_its_own_nodes():
    config = RunConfig()
    placed = place(bundles_from_config(config), nodes_from_config(config.cluster))
    assert placed.nodes == {"trainer": ("local",), "feature": ("local",)}


def test_role_resources_keep_roles_where_they_belong():
    cluster = ClusterConfig(
        nodes={
            "gpu": NodeConfig(count=2, num_gpus=8, resources={"role_llm": 8}, accelerator="H200"),
            "small": NodeConfig(num_gpus=1, resources={"role_feature": 2}),
        },
        roles={"llm": RoleConfig(workers=[2, 4], num_gpus=8, accelerator="H200")},
    )
    config = RunConfig(cluster=cluster, service=ServiceConfig(replicas=2, num_gpus=0.5))
    placed = place(bundles_from_config(config), nodes_from_config(cluster))
    assert sorted(placed.nodes["llm"]) == ["gpu-0", "gpu-1"]  # the smallest of its sizes
    assert placed.nodes["feature"] == ("small", "small")


def test_inline_runs_have_no_service_to_place():
    config = RunConfig(cluster=ClusterConfig(mode="inline"))
    assert [b.role for b in bundles_from_config(config)] == ["trainer"]


def test_nodes_of_a_running_cluster():
    listing = [
        {"Alive": True, "NodeID": "1", "Resources": {"CPU": 4.0, "memory": 8e9}, "Labels": {"zone": "a"}},
        {"Alive": False, "NodeID": "2", "Resources": {"CPU": 64.0}},
    ]
    (only,) = nodes_from_ray(listing)
    assert only.offers == {"CPU": 4.0, MEMORY: 8.0}
    assert only.labels == {"zone": "a"}


def test_two_roles_on_two_kinds_of_gpu():
    config = configs.load(["recipe=uniugg_joint", "size=paper", "cluster=mixed-gpus-joint"])
    placed = place(bundles_from_config(config), nodes_from_config(config.cluster)).nodes
    assert set(placed["llm"]) == {"language"}
    assert set(placed["diffusion"]) | set(placed["feature"]) == {"image-0", "image-1"}
    assert (len(placed["llm"]), len(placed["diffusion"]), len(placed["feature"])) == (8, 4, 4)


def joint(llm, diffusion, batch=8, replicas=0):
    roles = {"llm": RoleConfig(workers=llm, num_gpus=1), "diffusion": RoleConfig(workers=diffusion, num_gpus=1)}
    return RunConfig(
        trainer=TrainerConfig(micro_batch=batch),
        cluster=ClusterConfig(roles=roles),
        service=ServiceConfig(replicas=replicas, num_gpus=1),
    )


def gpus(*counts):
    return [node(f"n{i}", GPU=count, role_llm=9, role_diffusion=9, role_feature=9) for i, count in enumerate(counts)]


def test_elastic_roles_take_what_there_is():
    assert largest_sizes(joint([1, 8], [1]), gpus(4, 3)) == {"llm": 4, "diffusion": 1}, "6 do not divide 8"
    assert largest_sizes(joint([1, 8], [1, 2]), gpus(4, 3)) == {"llm": 4, "diffusion": 2}
    assert largest_sizes(joint([1, 8], [1, 2]), gpus(4)) == {"llm": 2, "diffusion": 2}, "a node was lost"
    assert largest_sizes(joint([1, 8], [1], replicas=2), gpus(4)) == {"llm": 1, "diffusion": 1}, "encoders count too"
    assert largest_sizes(joint([2], [3], batch=6), gpus(8)) == {"llm": 2, "diffusion": 3}
    with pytest.raises(PlacementError, match="GPU"):
        largest_sizes(joint([2, 4], [1]), gpus(2))
