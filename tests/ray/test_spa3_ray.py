"""Spa3R's recipes inside Ray Train workers: what one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors import driver
from configs.roles import ROLES
from tests.support.spa3_ranks import losses, spa3_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

TUNED = {"spa3r_pretrain": ("backend=fsdp2",), "spa3_vlm": ("backend=zero2", "peft=lora", "peft.rank=2")}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("recipe", TUNED)
def test_two_workers_agree_with_one_process(recipe: str, tmp_path: Path) -> None:
    (role,) = ROLES[recipe]
    backend, *tuning = TUNED[recipe]
    more = ["recipe.spa3_vlm.baseline=off"] if recipe == "spa3_vlm" else []
    inline = driver.train(spa3_run(tmp_path, recipe, "name=inline", *tuning, *more))
    split = driver.train(
        spa3_run(
            tmp_path, recipe, "name=split", "cluster=local", backend, f"cluster.roles.{role}.workers=[2]",
            "cluster.max_failures=0", "trainer.activation_checkpointing=true", *tuning, *more,
        )
    )  # fmt: skip
    ours, theirs = losses(split.folder), losses(inline.folder)
    assert list(ours) == list(theirs) == [1, 2, 3]
    for step, terms in theirs.items():
        assert ours[step] == pytest.approx(terms, rel=2e-5), step
    assert (split.folder / "weights").is_dir()
    for name, row in inline.metrics.items():
        assert split.metrics[name]["value"] == pytest.approx(row["value"], rel=1e-2, abs=1e-2), name
