"""Tokenizers: one of bytes built in code, or any other from a folder or by its hub name; all with our special tokens.

``<img>`` and ``</img>`` stand around a block of ``<|image|>`` placeholders, one for each patch token of an image;
``<ray>`` and ``</ray>`` around a block of ``<|raymap|>`` placeholders, one for each query. A model puts projected
tokens and queries in the placeholders' places.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from models.encoders.hf import quiet_transformers
from models.errors import ModelError, WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTES = "bytes"
IMAGE_START, IMAGE, IMAGE_END = "<img>", "<|image|>", "</img>"
RAY_START, RAYMAP, RAY_END = "<ray>", "<|raymap|>", "</ray>"
SPECIAL_TOKENS = (IMAGE_START, IMAGE_END, IMAGE, RAY_START, RAY_END, RAYMAP)
VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
VISION_TOKENS = (VISION_START, IMAGE_PAD, VISION_END)
"""What Qwen's vision-language models write around an image and in the place of each of its tokens. Their tokenizers
have them, and so has that of bytes; they are added to no other.
"""

_TURN_START, _TURN_END, _END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
#: ChatML. The generation marks tell transformers what an assistant wrote; nothing is said that was not given.
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer ``name`` with all of :data:`SPECIAL_TOKENS`.

    Args:
        name: "bytes" (268 entries; the id of a byte is its value), a local folder, or a hub name.

    Raises:
        ModelError: It has no chat template, or no fast (Rust) implementation.
        WeightsError: There is no such folder, or nothing in it can be loaded as a tokenizer.
    """
    if name == BYTES:
        return _byte_tokenizer()
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(name).expanduser()
    is_local = path.is_absolute() or path.is_dir() or name.startswith(".")
    # Without its file transformers would make an empty tokenizer for some families, and every word "unknown".
    if is_local and not (path / "tokenizer.json").is_file():
        raise WeightsError(f"tokenizer {name!r}: {path} has no tokenizer.json; give the folder of a language model")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(path) if is_local else name)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(
            f'tokenizer {name!r} cannot be loaded; give "bytes", a folder with tokenizer.json, or a hub name that can '
            f"be had here: {error}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"tokenizer {name!r} is a {type(tokenizer).__name__}; one with a tokenizer.json is needed")
    if not tokenizer.chat_template:
        raise ModelError(f"tokenizer {name!r} has no chat template; choose that of an instruction-tuned model")
    added = add_special_tokens(tokenizer)
    if added:
        logging.getLogger(__name__).info("tokenizer %s: %d special tokens added, now %d", name, added, len(tokenizer))
    return tokenizer


def add_special_tokens(tokenizer: PreTrainedTokenizerFast) -> int:
    """Add those of :data:`SPECIAL_TOKENS` that the tokenizer does not have as such; returns how many.

    They get the first free ids; :func:`check_fits` says whether a model has rows for them.
    """
    from transformers import AddedToken

    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    missing = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS if token not in special]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    return len(missing)


def check_fits(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """ModelError unless a model with ``vocab_size`` embedding rows has one for every token, the added ones too."""
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > vocab_size:
        raise ModelError(
            f"the tokenizer's ids go up to {needed - 1} but the language model has {vocab_size} embedding rows: "
            f"give it {needed} or more (its vocab_size), or choose a smaller tokenizer (data.text.tokenizer)"
        )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Id of a token. ModelError when the tokenizer has no such token."""
    found = tokenizer.backend_tokenizer.token_to_id(token)
    if found is None:
        raise ModelError(
            f"the tokenizer has no token {token!r} ({len(tokenizer)} tokens); load it with load_tokenizer, which adds "
            f"{', '.join(SPECIAL_TOKENS)}"
        )
    return int(found)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte of UTF-8, ids 0 to 255, then ChatML's three tokens, ours and Qwen's for images."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={_letter(byte): byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = (_END, _TURN_START, _TURN_END, *SPECIAL_TOKENS, *VISION_TOKENS)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_TURN_END,
        pad_token=_END,
        chat_template=_CHATML,
        clean_up_tokenization_spaces=False,
    )


def _letter(byte: int) -> str:
    """The printable character that byte-level tokenizers write for a byte (GPT-2's table).

    Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(0x100 + [other for other in range(256) if other not in printable].index(byte))
