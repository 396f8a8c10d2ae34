"""View sets to answers in one process: Spa3R is trained, its latents are features, the language model reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import configs
from actors import driver
from actors.cli import main
from models.pretrained import describe_pretrained, load_pretrained
from models.spa3r.vlm.model import Spa3VLM

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

COMMON = (
    "size=tiny", "cluster=inline", "backend=single", "data.rooms.scenes=4", "data.rooms.views=6",
    "data.rooms.width=64", "data.rooms.height=48", "encoders.patches.height=42", "encoders.patches.width=56",
    "trainer.warmup_steps=1", "trainer.checkpoint_every=0", "trainer.validate_every=0", "trainer.threads=1",
    "trainer.log_every=1", "logger.tensorboard=false", "logger.progress=off",
)  # fmt: skip
FIELD = ("recipe=spa3r_pretrain", "trainer.steps=2", "trainer.micro_batch=1", "recipe.view_set.views=[4,4]",
         "evaluate.samples=1", "encoders.semantic.height=48", "encoders.semantic.width=64")  # fmt: skip
VLM = ("recipe=spa3_vlm", "trainer.steps=3", "trainer.micro_batch=2", "evaluate.samples=4", "encoders.visual.side=56",
       "encoders.visual.height=28", "encoders.visual.width=56", "generate.max_new_tokens=3")  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    driver.train(configs.load([*COMMON, *FIELD, f"storage.root={folder}"]))
    return folder


def test_the_chain_ends_in_answers_beside_their_baselines(root: Path) -> None:
    result = driver.train(configs.load([*COMMON, *VLM, f"storage.root={root}"]))
    assert result.steps == 3
    evaluation = json.loads((result.folder / "evaluation.json").read_text())
    metrics = evaluation["metrics"]
    assert evaluation["samples"] > 0
    assert metrics["text/ce"]["baseline_name"] == "before training"
    assert metrics["text/ce"]["value"] != metrics["text/ce"]["baseline"]
    assert 0 <= metrics["text/token_accuracy"]["value"] <= 1
    (answers,) = [row for name, row in metrics.items() if name.startswith("answers/vsibench")]
    assert answers["better"] == "higher"
    assert 0 <= answers["baseline"] <= 1
    read = describe_pretrained(result.folder / "weights" / "adapter")["reads"]
    saved = configs.load(file=result.folder / "config.yaml")
    assert read == saved.encoders["spa3r"].digest
    llm = load_pretrained(result.folder / "weights" / "llm")
    assert isinstance(llm, Spa3VLM)
    assert llm.adapter is not None
    assert bool(llm.adapter.mlp.fc2.weight.any()), "what starts at zero was trained"  # type: ignore[union-attr]


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    questions = ("--question", "How many chairs are there?", "--question", "What is left of the bed?")
    assert main(["ask", *arguments, "--image", "rooms/room0_0000", *questions, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert len(found["answers"]) == 2
    assert isinstance(found, dict)
    return found


def test_a_warmed_run_computes_no_feature(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warmed = (*COMMON, *VLM, f"storage.root={root}", f"cache.root={tmp_path}", "name=warmed")
    assert main(["features", "warm", *warmed]) == 0
    folder = driver.train(configs.load(warmed)).folder
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["hit_rate"] for row in rows if "hit_rate" in row] == [1.0] * 3
    found = asked(capsys, "--run", str(folder))
    assert found["features"] == {"cached": 6 + 1, "computed": 0}, "each picture's tokens, and the latents of all"


def test_low_rank_updates_keep_the_adapter_whole(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low = ("name=low", "peft=lora", "peft.rank=2", "recipe.spa3_vlm.questions_per_sample=1")
    folder = driver.train(configs.load([*COMMON, *VLM, *low, f"storage.root={root}"])).folder
    assert (folder / "weights" / "llm-adapter" / "adapter_model.safetensors").is_file()
    alone = load_pretrained(folder / "weights" / "adapter").state_dict()
    merged = load_pretrained(folder / "weights" / "llm").state_dict()
    assert not any("lora" in name for name in merged)
    assert all(torch.equal(value, merged[f"adapter.{name}"]) for name, value in alone.items())
    assert bool(alone["mlp.fc2.weight"].any())
    # What it leaves is exported, proven, and answers as the run does.
    assert main(["export", "--run", str(folder), "--out", str(tmp_path / "out"), "--merge"]) == 0
    proof = json.loads((tmp_path / "out" / "export.json").read_text())["proofs"]["language"]
    assert proof["merged_from_adapted"] < 1e-4
    assert proof["merged_from_base"] > 100 * proof["merged_from_adapted"]
    run = ("--run", str(folder))
    assert asked(capsys, *run)["answers"] == asked(capsys, *run, "--part", f"llm={tmp_path}/out/llm")["answers"]
