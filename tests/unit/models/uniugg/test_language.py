"""Language models by config and by folder: strict loading, larger vocabularies, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.errors import ModelError, WeightsError
from models.uniugg.language import build_language, language_settings, load_language

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
QWEN = {"model_type": "qwen2", "tie_word_embeddings": True, **TINY}
LLAMA = {"model_type": "llama", "tie_word_embeddings": False, **TINY}


def build(config: dict[str, Any] | None = None, vocabulary: int = 40, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build_language(config or QWEN, vocabulary).eval()


@pytest.mark.parametrize("config", [QWEN, LLAMA], ids=["tied", "not tied"])
def test_a_folder_comes_back_whole(config: dict[str, Any], tmp_path: Path):
    source = build(config)
    source.save_pretrained(tmp_path)
    settings = language_settings(str(tmp_path))
    assert settings["hidden_size"] == 32
    assert "architectures" not in settings
    target = build(settings, seed=1)
    ids = torch.arange(12)[None]
    assert not torch.allclose(target(input_ids=ids).logits, source(input_ids=ids).logits)
    load_language(target, str(tmp_path))
    torch.testing.assert_close(target(input_ids=ids).logits, source(input_ids=ids).logits)


def test_new_tokens_start_at_the_mean_of_the_old(tmp_path: Path):
    source = build()
    source.save_pretrained(tmp_path)
    target = build(vocabulary=43, seed=1)
    load_language(target, str(tmp_path))
    table, old = target.get_input_embeddings().weight, source.get_input_embeddings().weight
    assert torch.equal(table[:40], old)
    torch.testing.assert_close(table[40:], old.mean(0).expand(3, -1))
    assert target.get_output_embeddings().weight is table, "still tied"
    with pytest.raises(WeightsError, match="of another shape"):
        load_language(build(vocabulary=30), str(tmp_path))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path):
    build({**QWEN, "num_hidden_layers": 1}).save_pretrained(tmp_path / "shallow")
    with pytest.raises(WeightsError, match=r"missing \['model\.layers\.1"):
        load_language(build(), str(tmp_path / "shallow"))
    with pytest.raises(WeightsError, match="there is no such folder"):
        load_language(build(), str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(WeightsError, match="names no model_type"):
        language_settings(str(tmp_path))


def test_models_that_change_their_logits_after_the_head_are_refused():
    config = {"model_type": "cohere", "logit_scale": 0.5, **TINY}
    with pytest.raises(ModelError, match=r"cohere changes its logits after the head \(\{'logit_scale': 0.5\}\)"):
        build(config)
    with pytest.raises(ModelError, match="model_type '' is unknown"):
        build(TINY)
