"""Parts as folders: networks that lie elsewhere, tied weights, parts that are not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models
from models.errors import WeightsError
from models.pretrained import describe_pretrained, load_pretrained, network_of, read_pretrained, save_pretrained


def language_part(folder: Path, *, tied: bool = True, **extra: object) -> torch.nn.Module:
    """A small UniUGG LLM whose language model lies beside it, as transformers stores it."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "tie_word_embeddings": tied}
    language = {**models.spec("uniugg-llm-tiny").defaults["language"], **size}
    module = models.build("uniugg-llm-tiny", channels=8, language=language)
    settings = module.settings
    state = module.state_dict()
    network = {n.removeprefix("language."): t.clone() for n, t in state.items() if n.startswith("language.")}
    if tied:
        del network["lm_head.weight"]
    (folder / "language").mkdir(parents=True)
    save_file(network, folder / "language" / "model.safetensors")
    rest = {name: tensor for name, tensor in state.items() if not name.startswith("language.")}
    extra = {"networks": {"language": "../language/model.safetensors"}, **extra}
    save_pretrained(module, folder / "llm", "uniugg-llm-tiny", settings, tensors=rest, extra=extra)  # type: ignore[arg-type]
    return module


@pytest.mark.parametrize("tied", [True, False])
def test_a_network_may_lie_in_its_own_folder(tmp_path: Path, tied: bool) -> None:
    module = language_part(tmp_path, tied=tied)
    assert network_of(module) == "language"
    assert ("language.lm_head.weight" in read_pretrained(tmp_path / "llm")) is not tied
    again = load_pretrained(tmp_path / "llm").state_dict()
    assert again.keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in module.state_dict().items())


def test_a_missing_network_or_tensor_is_named(tmp_path: Path) -> None:
    language_part(tmp_path)
    file = tmp_path / "language" / "model.safetensors"
    stored = read_pretrained(tmp_path / "llm")
    kept = {n.removeprefix("language."): t for n, t in stored.items() if n.startswith("language.")}
    del kept["model.norm.weight"]
    save_file(kept, file)
    with pytest.raises(WeightsError, match=r"missing \['language.model.norm.weight'\]"):
        load_pretrained(tmp_path / "llm")
    file.unlink()
    with pytest.raises(WeightsError, match=r"language/model.safetensors cannot be read"):
        load_pretrained(tmp_path / "llm")


def test_a_part_without_its_updates_is_refused(tmp_path: Path) -> None:
    language_part(tmp_path, adapters={"language": "../language-adapter"})
    assert describe_pretrained(tmp_path / "llm")["model"] == "uniugg-llm-tiny"
    with pytest.raises(WeightsError, match=r"without its low-rank updates, which lie in \['../language-adapter'\]"):
        load_pretrained(tmp_path / "llm")


def test_a_folder_of_something_else_is_no_part(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Other"]}))
    with pytest.raises(WeightsError, match="does not describe a part of ours"):
        describe_pretrained(tmp_path)
    assert describe_pretrained(tmp_path, any_format=True) == {"architectures": ["Other"]}
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "model": "spatial-vae-tiny"}))
    with pytest.raises(WeightsError, match="does not describe a part of ours"):
        describe_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WeightsError, match=r"config\.json is not JSON .*save that part again"):
        describe_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_pretrained(tmp_path)
