"""A cache of the Hugging Face hub with what was never downloaded, so that hub names are found without a network."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def empty_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """An empty cache in the place of the user's, offline; returns it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def snapshot(cache: Path, name: str) -> Path:
    """The folder of the files that the cache holds of the hub name ``name``, made as ``hf download`` does."""
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return folder
