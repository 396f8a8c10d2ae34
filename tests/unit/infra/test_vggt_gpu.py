from __future__ import annotations

import json

import pytest
import torch

from infra.bench.vggt_gpu import main


def test_a_line_a_number_of_frames(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "vggt-tiny", "--size", "28", "42", "--rounds", "1", "--device", "cpu"]
    assert main([*options, "--frames", "1", "3"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["name"], second["extra"]["frames"]) == ("vggt-tiny-1", 3)
    assert first["value"] > 0
    assert second["extra"]["flop"] > 3 * first["extra"]["flop"], "the views see each other too"
    assert first["gib"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    out = capsys.readouterr()
    assert "no GPU here" in out.err
    assert not out.out
