from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from infra.bench import train_gpu
from infra.bench.train_gpu import CASES, device_peak, main, mfu

QUICK = ["--device", "cpu", "--size", "tiny", "--warmup", "0", "--steps", "1", "--set", "data.text.max_length=192",
         "--set", "trainer.micro_batch=1"]  # fmt: skip


def lines(capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    assert main([*QUICK, *options]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_case_takes_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    found = lines(capsys)
    assert [line["name"] for line in found] == [case.named("tiny") for case in CASES]
    for line in found:
        assert line["value"] > 0
        assert line["tokens_per_s"] == pytest.approx(line["extra"]["tokens"] / line["value"] * 1e3, rel=1e-2)
        assert line["tflops"] == pytest.approx(line["extra"]["flop"] / line["value"] / 1e9, abs=1e-4)
        assert line["plan_gib"] > 0
        assert (line["mfu"], line["gib"], line["gib_over_plan"]) == (None, None, None)
    crossing = {line["name"]: line["extra"]["crossing"] for line in found}
    assert crossing["uniugg_joint-tiny/llm"] == {"synthetic_activations": [], "synthetic_gradients": ["condition"]}
    assert crossing["uniugg_joint-tiny/diffusion"]["synthetic_activations"] == ["condition"]
    (diffusion,) = [line for line in found if line["name"] == "uniugg_joint-tiny/diffusion"]
    assert diffusion["extra"]["tokens"] == 14 * 14, "one sample's latents"


def test_recomputation_is_no_work_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    name = "uniugg_joint-tiny/llm"
    (plain,) = lines(capsys, "--only", name)
    (again,) = lines(capsys, "--only", name, "--set", "trainer.activation_checkpointing=true")
    assert again["extra"]["flop"] == plain["extra"]["flop"]
    assert again["extra"]["flop_recomputed"] > 0 == plain["extra"]["flop_recomputed"]


def test_what_does_not_fit_is_said_and_the_rest_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(_: Any, case: train_gpu.Case, __: Any) -> tuple[float, int, int]:
        if case.role == "llm":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return 0.5, 2**30, 1000

    monkeypatch.setattr(train_gpu, "_measure", measure)
    first, second = lines(capsys, "--only", "uniugg_joint-tiny/llm", "--only", "uniugg_joint-tiny/diffusion")
    assert (first["fits"], first["value"], first["said"]) == (False, None, "CUDA out of memory")
    assert first["plan_gib"] > 0
    assert (second["fits"], second["value"], second["tokens_per_s"], second["gib"]) == (True, 500.0, 2000.0, 1.0)
    assert second["gib_over_plan"] == pytest.approx(1 / second["plan_gib"], rel=0.05)


def test_mfu_is_the_share_of_the_published_peak() -> None:
    assert device_peak("NVIDIA H100 80GB HBM3") == device_peak("NVIDIA H200") == 989e12
    assert device_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert device_peak("NVIDIA L40S") == 362e12
    assert device_peak("NVIDIA GeForce RTX 4090") == 165e12
    assert mfu(989e12, 2.0, device_peak("NVIDIA H200")) == 0.5
    assert mfu(3e12, 0.1, device_peak("something", 100e12)) == 0.3


@pytest.mark.parametrize("name", ["cpu", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090 D",
                                  "NVIDIA A100-SXM4-80GB MIG 1g.10gb"])  # fmt: skip
def test_an_unknown_device_has_no_mfu(name: str) -> None:
    assert device_peak(name) is None
    assert mfu(1e12, 1.0, device_peak(name)) is None


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*QUICK, "--only", "nothing"])
    assert "uniugg_joint-tiny/diffusion" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    out = capsys.readouterr()
    assert "no GPU here" in out.err
    assert not out.out
