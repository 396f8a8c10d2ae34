"""Exports: what other libraries and a fresh process load from them, low-rank updates, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import configs
import models
from actors.cli import main
from actors.evaluate import save_parts
from actors.export import Exported, export_run
from actors.recipes import open_recipe
from actors.trainers.roles import adapt, write_settings
from configs import ConfigError, RunConfig
from models.encoders.weights import stored_digest
from models.errors import WeightsError
from models.pretrained import load_pretrained, save_pretrained
from services.errors import ResumeError
from tests.support import reload_export
from tests.support.uniugg_parts import NAMES, make_run, save_part

ROOT = Path(__file__).parents[3]
START = "uniugg_joint"


def lora_run(root: Path) -> tuple[Path, RunConfig]:
    """A run with low-rank updates on both roles, as training leaves it; the updates are at random."""
    folder, config = make_run(root, "uniugg_finetune", "peft=lora", "peft.rank=4")
    recipe = open_recipe(config)
    for role in recipe.roles:
        part = save_part(root / "runs" / f"{START}-tiny" / "weights" / role, role, seed=5)
        described = json.loads((part / "config.json").read_text())
        settings = {"model": NAMES[role], "settings": described["settings"]}
        built = recipe.rebuild(role, settings)
        module = adapt(config, role, built)
        shake(module)
        write_settings(folder, role, built)
        save_parts(recipe, {role: dataclasses.replace(built, module=module)}, folder, 7)
    return folder, config


def shake(module: torch.nn.Module) -> None:
    """Training as far as an export is concerned: other updates, other heads."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def reloaded(tmp_path: Path, *exports: Path) -> dict[str, Tensor]:
    """What a fresh process finds."""
    result = tmp_path / "found.safetensors"
    command = [sys.executable, "-m", "tests.support.reload_export", str(result), *map(str, exports)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(result)


@torch.no_grad()
def expected(folder: Path) -> dict[str, Tensor]:
    """The same from the parts that the run wrote."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    llm, diffusion = (load_pretrained(folder / "weights" / name) for name in ("llm", "diffusion"))
    ids = torch.tensor([list(reload_export.PROMPT.encode())])
    vae: Any = load_pretrained(folder.parent / "uniugg_vae-tiny" / "weights" / "vae")
    found = {
        "logits": llm.language(input_ids=ids).logits,  # type: ignore[operator]
        "noise": diffusion.unet(**reload_export.noise_inputs()).sample,  # type: ignore[operator]
        "tokens": vae.decode(reload_export.latent()),
        "llm state": torch.cat([t.float().flatten() for t in llm.state_dict().values()]),
        "diffusion state": torch.cat([t.float().flatten() for t in diffusion.state_dict().values()]),
    }
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    return lora_run(tmp_path_factory.mktemp("adapted"))


def test_a_fresh_process_gets_the_same_outputs(adapted: tuple[Path, RunConfig], tmp_path: Path) -> None:
    folder, config = adapted
    merged = export_run(folder, config, tmp_path / "merged", merge=True)
    beside = export_run(folder, config, tmp_path / "beside")
    assert set(merged.contents) == {"encoder", "vae", "spatial_decoder", "language", "llm", "unet", "diffusion"}
    assert set(beside.contents) == {*merged.contents, "language-adapter", "unet-adapter"}
    found, wanted = reloaded(tmp_path, merged.folder, beside.folder), expected(folder)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[f"merged/{name}"], tensor, rtol=0, atol=0)
    for name in ("logits", "noise"):
        torch.testing.assert_close(found[f"beside/{name}"], wanted[name], rtol=1e-3, atol=1e-4)
    assert torch.equal(found["beside/tokens"], wanted["tokens"])
    for name in ("llm", "diffusion"):
        refused = bytes(found[f"beside/{name} refused"].tolist()).decode()
        assert "without its low-rank updates" in refused
        assert "--merge" in refused


def test_merging_is_proven_with_figures(adapted: tuple[Path, RunConfig], tmp_path: Path) -> None:
    folder, config = adapted
    made = export_run(folder, config, tmp_path / "out", merge=True)
    assert set(made.proofs) == {"language", "unet"}
    described = json.loads((made.folder / "export.json").read_text())
    for name, proof in made.proofs.items():
        assert 0 <= proof.error <= 1e-4 < 1e-2 < proof.change
        assert described["proofs"][name]["merged_from_adapted"] == proof.error
        assert described["proofs"][name]["merged_from_base"] == proof.change
    base = load_pretrained(folder.parent / f"{START}-tiny" / "weights" / "llm")
    ids = torch.tensor([list(reload_export.PROMPT.encode())])
    with torch.no_grad():
        before = base.language(input_ids=ids).logits  # type: ignore[operator]
    assert float((expected(folder)["logits"] - before).abs().max()) > 1e-2


@pytest.mark.parametrize("spoilt", ["base", "updates"])
def test_weights_that_do_not_agree_are_refused(tmp_path: Path, spoilt: str) -> None:
    folder, config = lora_run(tmp_path)
    if spoilt == "base":  # the run that it started from was trained again
        save_part(tmp_path / "runs" / f"{START}-tiny" / "weights" / "llm", "llm", seed=6)
        message = r"weights/llm is not what its base and llm-adapter give: .*merged differs from adapted by \d"
    else:  # they changed nothing
        file = folder / "weights" / "diffusion-adapter" / "adapter_model.safetensors"
        save_file({name: torch.zeros_like(t) for name, t in load_file(file).items()}, file)
        message = r"weights/diffusion is not what its base and diffusion-adapter give"
    with pytest.raises(WeightsError, match=message):
        export_run(folder, config, tmp_path / "out", merge=True)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_the_next_stage_starts_from_the_merged_weights(adapted: tuple[Path, RunConfig]) -> None:
    folder, config = adapted
    weights = {role: str(folder / "weights" / role) for role in ("llm", "diffusion")}
    model = dataclasses.replace(config.model, init=weights)
    recipe = open_recipe(dataclasses.replace(config, model=model))
    for role, place in weights.items():
        settings = json.loads((folder / "models" / f"{role}.json").read_text())
        built = recipe.rebuild(role, settings)
        merged = load_pretrained(place).state_dict()
        assert all(torch.equal(tensor, merged[name]) for name, tensor in built.module.state_dict().items())
        described = json.loads((folder / "weights" / role / "config.json").read_text())
        assert described["trained_by"] == {"recipe": "uniugg_finetune", "run": folder.name, "step": 7}
        assert described["lora"] == {"role": role, "adapter": f"{role}-adapter", "rank": 4, "alpha": 16.0}


def probe_run(root: Path) -> tuple[Path, RunConfig]:
    config = configs.load(["recipe=probe", "size=tiny", f"storage.root={root}", "name=heads"])
    settings = {"channels": 8, "layers": 4, "summaries": 1, "classes": 3}
    folder = root / "runs" / "heads"
    torch.manual_seed(0)
    probe = models.build("probe-tiny", **settings)
    save_pretrained(probe, folder / "weights" / "heads", "probe-tiny", settings)
    (folder / "config.yaml").write_text(configs.to_yaml(config))
    metric = {"value": 0.1, "baseline": 0.3, "baseline_name": "mean depth", "better": "lower", "also": {"map": 0.2}}
    evaluation = {"split": "test", "step": 12, "samples": 5, "metrics": {"depth/abs_rel": metric}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder, config


def test_the_card_says_what_was_trained_and_how_well(tmp_path: Path) -> None:
    folder, config = probe_run(tmp_path)
    made = export_run(folder, config, tmp_path / "out", licences={"encoders.features": "apache-2.0"})
    assert dict(made.contents) == {"heads": "part probe-tiny"}
    card = (made.folder / "README.md").read_text()
    assert "| depth/abs_rel | 0.1 | lower | 0.3 (mean depth), 0.2 (map) |" in card
    assert "| `encoders.features` | random | - | apache-2.0 |" in card
    assert 'heads = load_pretrained("heads")' in card
    assert f"- torch {torch.__version__}" in card
    resolved = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert resolved["recipe"]["name"] == "probe"
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "unknown"  # random weights have none
    again = load_pretrained(made.folder / "heads").state_dict()
    assert all(torch.equal(t, again[n]) for n, t in load_pretrained(folder / "weights" / "heads").state_dict().items())


def test_weights_that_a_run_stands_on_are_named_by_digest_and_licence(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path, "uniugg_vae")
    shutil.rmtree(folder / "weights" / "llm")
    for part in ("vae", "spatial_decoder"):
        save_part(folder / "weights" / part, part)
    made = export_run(folder, config, tmp_path / "out", licences={"encoders.vit": "mit"})
    (vit,) = (weights for weights in made.weights if weights.name == "encoders.vit")
    encoder = tmp_path / "runs" / "uniugg_encoder-tiny" / "weights" / "encoder"
    assert (vit.place, vit.digest, vit.licence) == (str(encoder), stored_digest(encoder), "mit")
    assert {weights.licence for weights in made.weights if weights.name != "encoders.vit"} <= {"unknown"}
    assert set(made.contents) == {"encoder", "vae", "spatial_decoder"}
    save_part(encoder, "encoder", seed=9)
    with pytest.raises(WeightsError, match=r"encoders.vit.weights=.* was trained again since"):
        export_run(folder, config, tmp_path / "again")


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    folder, config = probe_run(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"--out .*full is there already and not empty"):
        export_run(folder, config, tmp_path / "full")
    with pytest.raises(ConfigError, match=r"--merge: run heads has no low-rank updates"):
        export_run(folder, config, tmp_path / "out", merge=True)
    with pytest.raises(ConfigError, match=r"no weights of that name; did you mean encoders.features\?"):
        export_run(folder, config, tmp_path / "out", licences={"encoders.feature": "mit"})
    (folder / "weights").rename(folder / "gone")
    with pytest.raises(ResumeError, match=r"nothing to export: it holds no checkpoint.*loom3d train recipe=probe"):
        export_run(folder, config, tmp_path / "out")
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000001" / "manifest.json").write_text("{}")
    with pytest.raises(ResumeError, match=r"its parts are saved when it is evaluated, and it was not yet"):
        export_run(folder, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_exports_a_run_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probe_run(tmp_path)
    root = f"storage.root={tmp_path}"
    (tmp_path / "out").mkdir()  # an empty folder will do
    assert main(["export", "--run", "heads", root, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "heads" / "model.safetensors").is_file()
    assert "part probe-tiny" in capsys.readouterr().out
    assert main(["export", "--run", "head", root, "--out", str(tmp_path / "other")]) == 2
    assert "heads" in capsys.readouterr().err
    assert main(["export", "--run", "heads", root, "--out", str(tmp_path / "other"), "--licence", "mit"]) == 2
    assert "write NAME=TEXT" in capsys.readouterr().err
    assert main(["export", "--run", "heads", root, "trainer.lr=3", "--out", str(tmp_path / "other")]) == 2
    assert "trainer.lr=3" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    (tmp_path / "file").write_text("kept")
    assert main(["export", "--run", "heads", root, "--out", str(tmp_path / "file" / "new")]) == 2
    assert "file is a file; give a folder" in capsys.readouterr().err


def test_an_export_is_used_by_other_commands(tmp_path: Path) -> None:
    """A part whose network lies in its library's folder loads as any other part."""
    folder, config = make_run(tmp_path, "uniugg_direct")
    made: Exported = export_run(folder, config, tmp_path / "out")
    assert {"language", "llm", "encoder", "spatial_decoder"} == set(made.contents)
    ours, again = load_pretrained(folder / "weights" / "llm"), load_pretrained(made.folder / "llm")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())
    stored = load_file(made.folder / "llm" / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"projector", "queries", "head"}
