"""Where weights are found: folders, names of the hub in its cache, and what to do about those that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.encoders.weights import is_here, local_folder, read_tensors, resolve_folder
from models.errors import WeightsError
from tests.support.hub import empty_cache, snapshot


def test_a_hub_name_is_found_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = empty_cache(monkeypatch, tmp_path)
    assert not is_here("nobody/network")
    folder = snapshot(cache, "nobody/network")
    save_file({"weight": torch.arange(3.0)}, folder / "model.safetensors")
    assert is_here("nobody/network")
    assert resolve_folder("nobody/network") == local_folder("nobody/network") == folder
    assert torch.equal(read_tensors("nobody/network")["weight"], torch.arange(3.0))


def test_what_is_not_here_is_said_with_the_command_that_fetches_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = empty_cache(monkeypatch, tmp_path)
    with pytest.raises(WeightsError) as refused:
        resolve_folder("nobody/network", ("unet/config.json",))
    for word in ("'nobody/network'", str(cache), "hf download nobody/network --include 'unet/config.json'", "HF_HUB_"):
        assert word in str(refused.value)


@pytest.mark.parametrize("place", ["{}/nowhere", "./nowhere", "~/nowhere-at-all"])
def test_a_path_is_never_taken_for_a_hub_name(place: str, tmp_path: Path) -> None:
    assert local_folder(place.format(tmp_path)) is None
    assert not is_here(place.format(tmp_path))
    with pytest.raises(WeightsError, match="there is no such folder"):
        resolve_folder(place.format(tmp_path))
