"""Exports of Spa3R and Spa3-VLM: what transformers, PEFT and a fresh process get from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.cli import main
from actors.export import export_run
from actors.export.forward import outputs, random_inputs
from configs import RunConfig
from models.errors import WeightsError
from models.pretrained import StoredTensors, describe_pretrained, load_part, load_pretrained
from models.spa3r.vlm.qwen import published_name
from services.features.encode import build_encoder
from tests.support import reload_spa3_export
from tests.support.spa3_runs import built_before, make_spa3r_run, make_vlm_run

ROOT = Path(__file__).parents[3]
Run = tuple[Path, RunConfig]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spa3")


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Run]:
    return {
        "field": make_spa3r_run(root),
        "plain": make_vlm_run(root, "name=plain", "recipe.spa3_vlm.geometry=none"),
        "low": make_vlm_run(root, "name=low", "peft=lora", "peft.rank=4"),
    }


@torch.no_grad()
def visual_tokens(config: RunConfig) -> Tensor:
    encoder: Any = build_encoder("visual", config)
    tokens = encoder.load().model(reload_spa3_export.pixels(), grid_thw=reload_spa3_export.GRID).pooler_output
    return tokens[None]


@torch.no_grad()
def ours(folder: Path, config: RunConfig) -> Tensor:
    """The logits of the run's own part, for what transformers' class is given as pixels."""
    llm: Any = load_pretrained(folder / "weights" / "llm")
    # The text of the language model alone: as a prompt of transformers has it.
    network = llm.language.config
    network.vision_start_token_id, network.vision_end_token_id = (llm.image_token_id - 1, llm.image_token_id + 1)
    ids = reload_spa3_export.prompt(network)
    batch = {"input_ids": ids, "visual": visual_tokens(config), "grids": torch.tensor([[[2, 2]]])}
    adapter, llm.adapter = llm.adapter, None  # transformers' class has none
    logits = llm.logits(llm.hidden(batch))
    llm.adapter = adapter
    return logits


@pytest.fixture(scope="module")
def exports(runs: dict[str, Run], root: Path) -> dict[str, Any]:
    made = {name: export_run(folder, config, root / "out" / name) for name, (folder, config) in runs.items()}
    folder, config = runs["low"]
    return made | {"merged": export_run(folder, config, root / "out" / "merged", merge=True)}


@pytest.fixture(scope="module")
def reloaded(exports: dict[str, Any], root: Path) -> dict[str, Tensor]:
    """What a fresh process finds in all of them."""
    result, folders = root / "found.safetensors", [str(made.folder) for made in exports.values()]
    command = [sys.executable, "-m", "tests.support.reload_spa3_export", str(result), *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(result)


def test_what_is_exported(exports: dict[str, Any]) -> None:
    assert {name: set(made.contents) for name, made in exports.items()} == {
        "field": {"spa3r"},
        "plain": {"language", "llm", "spa3r"},
        "low": {"language", "language-adapter", "llm", "adapter", "spa3r"},
        "merged": {"language", "llm", "adapter", "spa3r"},
    }
    assert exports["field"].contents["spa3r"] == "part spa3r-tiny, by its published names"
    card = (exports["merged"].folder / "README.md").read_text()
    assert 'language = AutoModelForImageTextToText.from_pretrained("./language")' in card
    assert 'llm = load_pretrained("llm")' in card
    assert 'adapter = load_pretrained("adapter")' in card
    resolved = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert resolved["recipe"]["spa3_vlm"]["geometry"] == "cross"
    assert "# Spa3-VLM" in card
    assert "# Spa3R" in (exports["field"].folder / "README.md").read_text()


def test_the_lines_of_the_card_load_it_in_a_fresh_process(exports: dict[str, Any]) -> None:
    folder = exports["merged"].folder
    lines = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", f"{lines}\nprint(*(type(part).__name__ for part in (language, llm, adapter, spa3r)))"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Qwen2_5_VLForConditionalGeneration", "Spa3VLM", "CrossAdapter", "Spa3R"]


def test_the_language_model_has_the_published_layout_and_its_vision_tower(
    exports: dict[str, Any], runs: dict[str, Run]
) -> None:
    stored = load_file(exports["plain"].folder / "language" / "model.safetensors")
    folder, config = runs["plain"]
    llm: Any = load_pretrained(folder / "weights" / "llm")
    encoder: Any = build_encoder("visual", config)
    tower = {f"visual.{name}": tensor for name, tensor in encoder.load().model.state_dict().items()}
    text = {published_name(name): t for name, t in llm.language.state_dict().items() if name != "lm_head.weight"}
    assert stored.keys() == tower.keys() | text.keys(), "the head is tied"
    assert all(torch.equal(stored[name], tensor) for name, tensor in {**tower, **text}.items())
    settings = json.loads((exports["plain"].folder / "language" / "config.json").read_text())
    assert settings["vision_config"]["depth"] == encoder.config.depth
    assert settings["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]


@pytest.mark.parametrize("name", ["plain", "merged", "low"])
def test_transformers_gives_what_the_run_gives(name: str, reloaded: dict[str, Tensor], runs: dict[str, Run]) -> None:
    folder, config = runs["plain" if name == "plain" else "low"]
    torch.testing.assert_close(reloaded[f"{name}/visual"], visual_tokens(config), rtol=1e-5, atol=1e-6)
    found, expected = reloaded[f"{name}/logits"], ours(folder, config)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4 if name == "low" else 2e-5)
    assert float(expected.std()) > 0.01


def test_a_fresh_process_loads_parts_with_their_adapter(
    reloaded: dict[str, Tensor], exports: dict[str, Any], runs: dict[str, Run]
) -> None:
    for name in ("plain", "merged"):
        folder, config = runs["plain" if name == "plain" else "low"]
        llm = load_pretrained(folder / "weights" / "llm")
        expected = reload_spa3_export.grounded(llm, visual_tokens(config))
        torch.testing.assert_close(reloaded[f"{name}/grounded"], expected, rtol=1e-4, atol=1e-5)
        again = load_pretrained(exports[name].folder / "llm").state_dict()
        assert again.keys() == llm.state_dict().keys(), "without the tower, as a trainer holds it"
        assert all(torch.equal(tensor, again[key]) for key, tensor in llm.state_dict().items())
    refused = bytes(reloaded["low/refused"].tolist()).decode()
    assert "without its low-rank updates" in refused
    settings = json.loads((exports["low"].folder / "language-adapter" / "adapter_config.json").read_text())
    assert settings["exclude_modules"] == r".*\bvisual\..*", "the tower has layers of the same names"
    alone = load_pretrained(exports["low"].folder / "adapter").state_dict()
    whole = load_pretrained(runs["low"][0] / "weights" / "llm").state_dict()
    assert all(torch.equal(tensor, whole[f"adapter.{key}"]) for key, tensor in alone.items())


def test_merging_is_proven_by_the_whole_model(exports: dict[str, Any], runs: dict[str, Run]) -> None:
    folder, config = runs["low"]
    proof = exports["merged"].proofs["language"]
    assert 0 <= proof.error <= 1e-4 < 1e-2 < proof.change
    assert exports["low"].proofs["language"] == proof
    merged = load_pretrained(folder / "weights" / "llm")
    _, built = built_before(config, folder, "vlm")
    base = built.module.eval()
    base.adapter.load_state_dict(merged.adapter.state_dict())  # type: ignore[union-attr]
    inputs = random_inputs(base)
    assert {"visual", "latents", "grids"} <= set(inputs["batch"]), "pictures and latents take part"
    before, after = outputs(base, inputs), outputs(merged, inputs)
    scale = float(after.square().mean().sqrt())
    assert proof.change == pytest.approx(float((after - before).abs().max()) / scale, rel=0.05)


def test_updates_that_do_not_belong_to_the_base_are_refused(root: Path, tmp_path: Path) -> None:
    folder, config = make_vlm_run(tmp_path, "peft=lora", "peft.rank=4")
    file = folder / "weights" / "llm-adapter" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(WeightsError, match=r"weights/llm is not what its base and llm-adapter give"):
        export_run(folder, config, tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_spa3r_is_taken_back_as_a_published_checkpoint(
    reloaded: dict[str, Tensor], exports: dict[str, Any], runs: dict[str, Run]
) -> None:
    folder, _ = runs["field"]
    spa3r = load_pretrained(folder / "weights" / "spa3r")
    for name in ("field", "merged"):
        torch.testing.assert_close(reloaded[f"{name}/field"], reload_spa3_export.field(spa3r), rtol=1e-4, atol=1e-5)
    stored = load_file(exports["field"].folder / "spa3r" / "model.safetensors")
    assert stored.keys() == spa3r.state_dict().keys()
    assert {"projection.weight", "query_embed.weight", "pose_tokenizer.weight"} <= stored.keys()


def test_exports_are_where_other_runs_begin(exports: dict[str, Any], runs: dict[str, Run], root: Path) -> None:
    merged = exports["merged"].folder
    # The tower, the language model and Spa3R of an export stand for those that it was made of.
    _, config = make_vlm_run(
        root, "name=next", f"encoders.visual.weights={merged}/language", "encoders.visual.arch={}",
        f"encoders.spa3r.weights={merged}/spa3r", f"model.init.llm={merged}/llm",
    )  # fmt: skip
    assert config.encoders["spa3r"].digest == runs["low"][1].encoders["spa3r"].digest
    torch.testing.assert_close(visual_tokens(config), visual_tokens(runs["low"][1]))
    _, built = built_before(config, root / "runs" / "next", "vlm")
    whole = load_pretrained(runs["low"][0] / "weights" / "llm").state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in built.module.state_dict().items())
    # And a published Qwen2.5-VL, which is read tensor by tensor, is proven behind low-rank updates too.
    folder, config = make_vlm_run(
        root, "name=published", f"model.init.language={merged}/language", "peft=lora", "peft.rank=2",
        "recipe.spa3_vlm.geometry=append",
    )  # fmt: skip
    made = export_run(folder, config, root / "out" / "published", merge=True)
    assert made.proofs["language"].holds
    lazily = StoredTensors.of(merged / "llm")
    assert all(torch.equal(lazily[name], whole[name]) for name in lazily)
    assert "adapter.mlp.fc2.weight" in lazily


def test_a_layout_that_nobody_knows_is_named(exports: dict[str, Any], tmp_path: Path) -> None:
    described = describe_pretrained(exports["plain"].folder / "llm")
    assert described["layouts"] == {"language": "qwen2_5_vl"}
    (tmp_path / "model.safetensors").write_bytes((exports["plain"].folder / "llm" / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(described | {"layouts": {"language": "other"}}))
    with pytest.raises(WeightsError, match=r"'language' has the layout 'other'; known are qwen2_5_vl, or none"):
        load_part(load_pretrained(exports["plain"].folder / "llm"), tmp_path)


def test_the_command_exports_and_the_export_is_asked(
    runs: dict[str, Run], exports: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = runs["plain"]
    assert main(["export", "--run", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "Qwen2_5_VLForConditionalGeneration of transformers" in capsys.readouterr().out
    shown = ["--image", "rooms/room0_0000", "--question", "What is there?", "--json"]
    assert main(["ask", "--run", str(folder), *shown]) == 0
    (first,) = json.loads(capsys.readouterr().out)
    assert main(["ask", "--run", str(folder), *shown, "--part", f"llm={tmp_path}/out/llm"]) == 0
    (again,) = json.loads(capsys.readouterr().out)
    assert again["answers"] == first["answers"]
    assert again["features"]["computed"] == 0
    assert main(["export", "--run", str(folder), "--out", str(tmp_path / "other"), "--merge"]) == 2
    assert "has no low-rank updates" in capsys.readouterr().err
