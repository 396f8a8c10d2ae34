"""A joint run with low-rank updates on both sides: trained, killed and resumed, exported merged, read by others."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import configs
from actors import driver
from actors.cli import main
from actors.export.forward import outputs, random_inputs
from actors.report.units import with_unit
from models.pretrained import load_pretrained
from tests.support.uniugg_parts import make_run, save_part

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
RELOAD = """
import json, sys
import torch
from models import _torchvision
from actors.export.forward import outputs, random_inputs
from actors.export.run import load_network
from pathlib import Path
torch.set_num_threads(1)
found = {}
for child in ("language", "unet"):
    network = load_network(Path(sys.argv[1]) / child, child)
    found[child] = outputs(network, random_inputs(network)).tolist()
print(json.dumps(found))
"""
SETTINGS = (
    "recipe=uniugg_joint", "size=tiny", "cluster=inline", "backend=single", "peft=lora", "peft.rank=4",
    "data.rooms.scenes=6", "data.rooms.views=3", "data.rooms.width=64", "data.rooms.height=48",
    "encoders.vit.height=64", "encoders.vit.width=64", "trainer.steps=4", "trainer.warmup_steps=1",
    "trainer.micro_batch=2", "trainer.accumulation=2", "trainer.checkpoint_every=2", "trainer.validate_every=0",
    "trainer.threads=1", "trainer.log_every=1", "evaluate.samples=1", "generate.steps=1", "generate.max_new_tokens=4",
    "logger.tensorboard=false", "logger.progress=off",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the trained run, after parts of P1, P2 and stage i that nobody trained."""
    root = tmp_path_factory.mktemp("lora")
    shutil.rmtree(make_run(root, "uniugg_joint")[0])
    save_part(root / "runs" / "uniugg_align-tiny" / "weights" / "llm", "llm", seed=5)
    return driver.train(configs.load([*SETTINGS, f"storage.root={root}"])).folder


def weights(folder: Path) -> dict[str, bytes]:
    """All that a run leaves for others, by file."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / "weights").glob("*/*.safetensors"))
    }


def test_what_is_left_is_merged_with_the_updates_beside_it(finished: Path) -> None:
    assert set(weights(finished)) == {
        f"weights/{role}{file}"
        for role in ("llm", "diffusion")
        for file in ("/model.safetensors", "-adapter/adapter_model.safetensors", "-adapter/beside.safetensors")
    }
    saved = load_file(next((finished / "checkpoints" / "llm").glob("step-00000004")) / "weights.safetensors")
    heads = {name.split(".")[0] for name in saved if "lora_" not in name}
    assert heads == {"projector", "queries"}
    assert any("lora_" in name for name in saved)
    start = load_file(finished.parent / "uniugg_align-tiny" / "weights" / "llm" / "model.safetensors")
    end = load_file(finished / "weights" / "llm" / "model.safetensors")
    assert end.keys() == start.keys()
    changed = {name for name in end if not torch.equal(end[name], start[name])}
    assert {name.split(".")[0] for name in changed} == {"projector", "queries", "language"}
    assert all("_proj." in name for name in changed if name.startswith("language"))


def test_a_run_that_was_cut_off_ends_with_the_same_weights(finished: Path) -> None:
    before = weights(finished)
    shutil.rmtree(finished / "weights")
    manifest = finished / "checkpoints" / "joint.json"
    joint = json.loads(manifest.read_text())
    assert [step["step"] for step in joint["steps"]] == [2, 4]
    manifest.write_text(json.dumps({**joint, "steps": joint["steps"][:1]}))
    for role in ("llm", "diffusion"):
        shutil.rmtree(finished / "checkpoints" / role / "step-00000004")
    again = driver.train(configs.load(file=finished / "config.yaml"))
    assert (again.resumed_from, again.steps) == (2, 4)
    assert weights(finished) == before


def test_the_merged_export_gives_a_fresh_process_the_same_outputs(finished: Path, tmp_path: Path) -> None:
    arguments = ["--run", str(finished), "--out", str(tmp_path / "out")]
    assert main(["export", *arguments, "--merge", "--licence", "model.init.llm=apache-2.0"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    metrics = json.loads((finished / "evaluation.json").read_text())["metrics"]
    assert metrics
    assert all(f"| {with_unit(name)} |" in card for name in metrics)
    assert "low-rank updates of rank 4" in card
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    torch.set_num_threads(1)
    for part, child in {"llm": "language", "diffusion": "unet"}.items():
        network = load_pretrained(finished / "weights" / part).get_submodule(child)
        assert found[child] == outputs(network, random_inputs(network)).tolist()
