"""Text towers with a small tokenizer made here."""

from __future__ import annotations

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from models.encoders.text import load_text_encoder
from models.errors import ModelError, WeightsError

WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "a", "red", "chair", "near", "the", "sofa"]
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"vocab_size": len(WORDS), "max_position_embeddings": 12, "pad_token_id": 0, "bos_token_id": 1}
VISION = {**{k: TEXT[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}}
VISION |= {"image_size": 32, "patch_size": 16}


@pytest.fixture(params=["clip", "siglip"])
def folder(request, tmp_path):
    text = {**TEXT, "eos_token_id": 2}
    if request.param == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
        model = transformers.CLIPModel(config)
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION))
    model.eval().save_pretrained(tmp_path)
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(tmp_path)
    return request.param, tmp_path, model


def test_tokens_carry_their_characters(folder):
    name, path, model = folder
    encoder = load_text_encoder("clip_text" if name == "clip" else "siglip2_text", str(path), dtype="float32")
    text = "the red  chair near a sofa"
    out = encoder([encoder.prepare(text, {}), encoder.prepare("a", {})])
    for key, spec in encoder.outputs().items():
        assert tuple(out[key].shape) == (2, *spec.shape)
        assert str(out[key].dtype) == f"torch.{spec.dtype}"
    pieces = [text[start:end] for start, end in out["offsets"][0].tolist() if end > start]
    assert pieces == ["the", "red", "chair", "near", "a", "sofa"]
    assert out["mask"].sum(dim=1).tolist() == [8, 3]
    ids = torch.stack([encoder.prepare(t, {})["input_ids"] for t in (text, "a")])
    with torch.inference_mode():
        want = model.get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(out["summary"][:, 0], want, atol=1e-5, rtol=1e-5)


def test_neighbours_and_length_change_nothing(folder):
    name, path, _ = folder
    encoder = load_text_encoder("clip_text" if name == "clip" else "siglip2_text", str(path), dtype="float32")
    one, two = encoder.prepare("a red sofa", {}), encoder.prepare("the chair near the sofa", {})
    assert torch.equal(encoder([one, two])["tokens"][0], encoder([one])["tokens"][0])


def test_the_tokenizer_is_part_of_the_identity(folder):
    name, path, _ = folder
    family = "clip_text" if name == "clip" else "siglip2_text"
    before = load_text_encoder(family, str(path)).identity()
    tokenizer = path / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"sofa"', '"bench"'))
    after = load_text_encoder(family, str(path)).identity()
    assert {k for k in before if before[k] != after[k]} == {"tokenizer"}
    assert str(path) not in str(before)


def test_what_a_text_tower_cannot_be_is_refused(folder, tmp_path):
    name, path, _ = folder
    with pytest.raises(ModelError, match="needs a folder with weights and tokenizer"):
        load_text_encoder("clip_text", "random")
    wrong = "siglip2_text" if name == "clip" else "clip_text"
    with pytest.raises(ModelError, match=f"are no {wrong}"):
        load_text_encoder(wrong, str(path))
    for file in path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(WeightsError, match=r"no tokenizer\.json"):
        load_text_encoder("clip_text" if name == "clip" else "siglip2_text", str(path))
