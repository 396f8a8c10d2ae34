"""A seen scene: read when the first question comes, and not again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import models
from models.errors import ModelError, WeightsError
from models.pretrained import save_pretrained
from models.spa3r.vlm.answers import generate_text
from models.spa3r.vlm.pipeline import Spa3VlmPipeline
from tests.support.spa3_vlm import batch_of, blocks, sample, small_vlm

GRIDS = [(2, 3), (3, 2)]
FRONT = [7, 8, *blocks(GRIDS)]
QUESTIONS = [[11, 12, 13], [21], [31, 32, 33, 34, 35]]


def seen() -> tuple[Spa3VlmPipeline, dict[str, torch.Tensor]]:
    model = small_vlm(seed=4, awake=True)
    torch.nn.init.normal_(model.language.lm_head.weight, std=0.5)
    batch = batch_of([sample(GRIDS)], [GRIDS])
    return Spa3VlmPipeline(model), {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def test_all_questions_now_and_later_share_one_reading() -> None:
    pipeline, columns = seen()
    scene = pipeline.look(columns)
    prompts = [FRONT + question for question in QUESTIONS]
    visual = {name: columns[name] for name in ("visual", "grids", "latents")}
    expected = generate_text(pipeline.llm, prompts, visual, max_new_tokens=5, stop=[])
    assert scene.answers(prompts[:2], max_new_tokens=5, stop=[], batch_size=1) == expected[:2]
    assert scene.answers(prompts[2:], max_new_tokens=5, stop=[]) == expected[2:]
    assert scene.answers([], max_new_tokens=5, stop=[]) == []
    assert scene.readings == 1
    assert len({tuple(found) for found in expected}) > 1


def test_text_alone_is_asked_too() -> None:
    pipeline, _ = seen()
    prompts = [[1, 2, 3, 4], [5, 6]]
    expected = generate_text(pipeline.llm, prompts, {}, max_new_tokens=4, stop=[])
    assert pipeline.look({}).answers(prompts, max_new_tokens=4, stop=[]) == expected


def test_questions_that_show_the_frames_elsewhere_are_refused() -> None:
    pipeline, columns = seen()
    with pytest.raises(ModelError, match="do not show the frames in the same places"):
        pipeline.look(columns).answers([[*FRONT, 11], [9, *FRONT, 11]], max_new_tokens=2, stop=[])
    with pytest.raises(ModelError, match=r"5 image tokens for 12 visual tokens"):
        pipeline.look(columns).answers([[*FRONT[:8], 11]], max_new_tokens=2, stop=[])
    with pytest.raises(ModelError, match="a scene is one sample, its column 'visual' has 2"):
        pipeline.look({"visual": columns["visual"].expand(2, -1, -1)})


def test_it_is_opened_from_the_part_of_a_run(tmp_path: Path) -> None:
    pipeline, columns = seen()
    save_pretrained(pipeline.llm, tmp_path / "llm", "spa3-vlm-tiny", pipeline.llm.settings)
    again = Spa3VlmPipeline.load(tmp_path / "llm")
    ours, theirs = (one.look(columns).answers([[*FRONT, 11]], max_new_tokens=4, stop=[]) for one in (pipeline, again))
    assert ours == theirs
    probe = {"channels": 8, "layers": 1, "summaries": 1, "classes": 3}
    save_pretrained(models.build("probe-tiny", **probe), tmp_path / "heads", "probe-tiny", probe)
    with pytest.raises(WeightsError, match="part 'llm' must be a Spa3VLM, got a Probe"):
        Spa3VlmPipeline.load(tmp_path / "heads")
