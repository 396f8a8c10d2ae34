"""Spa3-VLM from a published Qwen2.5-VL: cut while it is read, its frozen weights kept as they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.recipes import open_recipe
from actors.recipes.spa3_vlm_base import BASE
from actors.trainers.backends import make_backend
from actors.trainers.lora import cast_base
from actors.trainers.roles import adapt, base_dtype, deciding_settings
from configs import ConfigError
from configs.schema import BackendConfig
from tests.support.backend_ranks import in_ranks
from tests.support.spa3_sharded import LANGUAGE, a_step, load_each, loop_of, publish, run_from, settings_of

LORA = ("peft=lora", "peft.rank=4")
#: Beside its part: a tensor that is whole for a moment, buffers of collectives, what Python holds.
CONSTANT = 20 * 2**20


def small(folder: Path, dtype: torch.dtype) -> Path:
    """The published model with two blocks."""
    text = {**LANGUAGE["text_config"], "num_hidden_layers": 2, "intermediate_size": 256}
    return publish(folder, dtype, {**LANGUAGE, "text_config": text})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_no_rank_of_the_recipe_holds_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of tensors as small as these the allocator would keep what is freed; a large model's it returns at once.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    folders = {dtype: publish(tmp_path / dtype, getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    sizes = {dtype: sum(f.stat().st_size for f in place.glob("*.safetensors")) for dtype, place in folders.items()}
    tuned = (("full", "float32"), ("lora", "bfloat16"))
    cases = [(backend, *rest) for backend in ("fsdp2", "zero3") for rest in tuned]
    names = {case: "-".join(case) for case in cases}
    runs = [
        run_from(folders[case[2]], f"backend={case[0]}", f"name={names[case]}", *(LORA if case[1] == "lora" else ()))
        for case in cases
    ]
    ranks = in_ranks(load_each, tmp_path / "ranks", 2, runs, [str(folders[case[2]]) for case in cases], timeout=800)
    whole = load_alone(folders)
    for case, name in names.items():
        _, tuning, dtype = case
        for rank in ranks:
            found, limit = rank[name], 0.6 * sizes[dtype] + CONSTANT
            said = f"{name}: {found['peak'] / 2**20:.0f} MiB of a model of {sizes[dtype] / 2**20:.0f} MiB"
            assert 0.3 * sizes[dtype] < found["peak"] < limit, said
            assert found["bases"] == ([f"torch.{dtype}"] if tuning == "lora" else [])
            assert found["trained"] == ["torch.float32"]
            expected = whole[tuning, dtype]
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5 if dtype == "float32" else 1e-2)
            assert found["norm"] == pytest.approx(expected["norm"], rel=1e-4 if dtype == "float32" else 5e-2)


def load_alone(folders: dict[str, Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """The same steps in this process."""
    return {
        (tuning, dtype): a_step(
            loop_of(run_from(folders[dtype], "backend=single", *(LORA if tuning == "lora" else ())), folders[dtype])
        )
        for tuning, dtype in (("full", "float32"), ("lora", "bfloat16"))
    }


def test_frozen_weights_stay_as_published_while_updates_are_float32(tmp_path: Path) -> None:
    folder = small(tmp_path / "qwen", torch.bfloat16)
    found = {
        name: a_step(loop_of(run_from(folder, "backend=single", *LORA, *more), folder))
        for name, more in {
            "auto": (), "float32": ("peft.base_dtype=float32",), "bfloat16": ("peft.base_dtype=bfloat16",
            "trainer.precision=bfloat16"), "dora": ("peft.dora=true",),
        }.items()
    }  # fmt: skip
    kept = {name: result["bases"] for name, result in found.items()}
    assert kept == {name: ["torch.float32" if name == "float32" else "torch.bfloat16"] for name in found}
    assert {name: result["trained"] for name, result in found.items()} == {name: ["torch.float32"] for name in found}
    for result in found.values():
        assert result["loss"] == pytest.approx(found["float32"]["loss"], rel=1e-2)
        assert result["norm"] == pytest.approx(found["float32"]["norm"], rel=0.1)
        updates = [value for name, value in result["weights"].items() if "lora_B" in name]
        assert updates
        assert all(bool(value.any()) for value in updates), "they begin at zero and have made a step"
    # What is trained whole is never in half precision, wherever it comes from.
    whole = a_step(loop_of(run_from(folder, "backend=single"), folder))
    assert (whole["bases"], whole["trained"]) == ([], ["torch.float32"])


def test_in_what_the_frozen_weights_are_kept(tmp_path: Path) -> None:
    def chosen(*overrides: str, start: str = "", accelerated: bool = False) -> torch.dtype:
        run = run_from(Path(start or "random"), *LORA, *overrides)
        return base_dtype(open_recipe(run), "vlm", accelerated=accelerated)

    half, single = small(tmp_path / "half", torch.bfloat16), small(tmp_path / "single", torch.float32)
    assert chosen(start=str(half)) == torch.bfloat16
    assert chosen(start=str(single)) == torch.float32
    assert chosen(start="Qwen/Qwen2.5-VL-7B-Instruct") == torch.bfloat16, "not here: as it is published"
    assert chosen() == torch.float32
    assert chosen("peft.base_dtype=float32", start=str(half)) == torch.float32
    assert chosen("trainer.precision=bfloat16", start=str(single), accelerated=True) == torch.bfloat16
    assert chosen(start=str(single), accelerated=True) == torch.float32, "its step computes in float32"
    assert chosen("peft.base_dtype=stored", "trainer.precision=bfloat16", accelerated=True) == torch.float32
    with pytest.raises(ConfigError, match=r"peft.base_dtype=bfloat16 is for peft=lora with trainer.precision=bfloat16"):
        run_from(half, *LORA, "peft.base_dtype=bfloat16")
    assert deciding_settings(run_from(half, *LORA, "peft.base_dtype=float32"))["peft.base_dtype"] == "float32"


def test_tied_weights_stay_tied_and_the_adapter_stays_float32(tmp_path: Path) -> None:
    folder = small(tmp_path / "qwen", torch.bfloat16)
    config = run_from(folder, "backend=single", *LORA)
    recipe = open_recipe(config)
    settings = settings_of(folder)
    settings["language"] = {**settings["language"], "tie_word_embeddings": True}
    built = recipe.rebuild("vlm", settings)
    module: Any = adapt(config, "vlm", built, base=torch.bfloat16)
    backend = make_backend(BackendConfig(name="single"), "cpu")
    module = backend.prepare(module, built.spec, config.trainer, built.weights)
    assert module.language.lm_head.weight is module.language.model.language_model.embed_tokens.weight
    assert module.language.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in module.adapter.parameters()} == {torch.float32}
    assert built.settings[BASE]["from"] == str(folder)
    again = cast_base(module, torch.float32)
    assert again.language.lm_head.weight is again.language.model.language_model.embed_tokens.weight  # type: ignore[union-attr]
