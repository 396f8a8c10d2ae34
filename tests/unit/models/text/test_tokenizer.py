"""Tokenizers: bytes built in code, others from a folder, the special tokens of both."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ModelError, WeightsError
from models.text import SPECIAL_TOKENS, check_fits, load_tokenizer, token_id
from models.text.tokenizer import add_special_tokens
from tests.support.smollm2 import smollm2_tokenizer

BYTE = load_tokenizer("bytes")


def test_a_token_is_a_byte() -> None:
    text = "Größe: 3 m² 🪑\n\x00\x7f"
    assert BYTE(text, add_special_tokens=False)["input_ids"] == list(text.encode())
    assert len(BYTE) == 268 <= 512
    assert sorted(BYTE.get_vocab().values()) == list(range(268))


@given(st.text())
def test_bytes_come_back(text: str) -> None:
    ids = BYTE(text, add_special_tokens=False)["input_ids"]
    assert BYTE.decode(ids, clean_up_tokenization_spaces=False) == text


def test_special_tokens_are_one_token_each() -> None:
    text = "a<img><|image|></img><ray><|raymap|></ray><|im_end|>"
    ids = BYTE(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 8
    assert BYTE.decode(ids, skip_special_tokens=True) == "a"
    assert [token_id(BYTE, name) for name in SPECIAL_TOKENS] == [259, 260, 261, 262, 263, 264]
    with pytest.raises(ModelError, match=r"no token '<video>' \(268 tokens\)"):
        token_id(BYTE, "<video>")


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    BYTE.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    text = "<|im_start|>user\n<img><|image|></img>é<|im_end|>"
    assert again(text)["input_ids"] == BYTE(text)["input_ids"]
    assert again.chat_template == BYTE.chat_template
    assert add_special_tokens(again) == 0


def test_missing_special_tokens_are_added_and_must_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    smollm2_tokenizer().save_pretrained(tmp_path)
    with caplog.at_level("INFO"):
        tokenizer = load_tokenizer(str(tmp_path))
    assert "6 special tokens added, now 49158" in caplog.text
    assert [token_id(tokenizer, name) for name in SPECIAL_TOKENS] == list(range(49152, 49158))
    check_fits(tokenizer, 49158)
    with pytest.raises(ModelError, match=r"ids go up to 49157 but the language model has 49152 embedding rows"):
        check_fits(tokenizer, 49152)


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(WeightsError, match="'nobody/nothing' cannot be loaded"):
        load_tokenizer("nobody/nothing")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))
    plain = load_tokenizer("bytes")
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match="has no chat template"):
        load_tokenizer(str(tmp_path / "plain"))
