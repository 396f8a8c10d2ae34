"""Token columns of samples: conversations with their images' placeholders, and the prompt for generated views."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from configs import RunConfig
from models.errors import ModelError
from models.spec import TensorSpec
from models.text import Chat, Encoded, check_fits, load_tokenizer
from services.contracts import Item, Record, Tensor, Turn
from services.errors import DataError

#: Columns of a kind with text.
SPECS = {
    "input_ids": TensorSpec(shape=(None,), dtype="int64"),
    "supervised": TensorSpec(shape=(None,), dtype="bool"),
}


class TextColumns:
    """Makes ``input_ids`` (L,) int64 and ``supervised`` (L,) bool of what a language model reads.

    A supervised position's label is its own token, predicted from those before it. Safe to use from several threads.

    Args:
        config: the run; ``data.text`` is read.
        tokens_per_image: placeholders of an image, and of the queries of a view.
        vocab_size: embedding rows of the model, where they are known; ModelError when the tokenizer has more tokens.
        vision: image blocks of Qwen's vision-language models (see :class:`models.text.Chat`).
    """

    def __init__(
        self, config: RunConfig, tokens_per_image: int, *, vocab_size: int | None = None, vision: bool = False
    ) -> None:
        text = config.data.text
        self.tokenizer = load_tokenizer(text.tokenizer)
        if vocab_size is not None:
            check_fits(self.tokenizer, vocab_size)
        self.tokens_per_image = tokens_per_image
        self.max_length = text.max_length
        self._chat = Chat(
            self.tokenizer,
            tokens_per_image=tokens_per_image,
            system=text.system,
            vision=vision,
            supervise=text.supervise,
        )
        self.end_of_turn = self._chat.end_of_turn
        """Id that ends an answer."""
        self._generation = _record(self._fitting(self._chat.generation(), "the prompt for a generated view"))

    def conversation(self, item: Item, images: Sequence[int] | None = None) -> Record:
        """The columns of a conversation for training; ``images`` are the placeholders of each picture, where they are
        not ``tokens_per_image``.

        DataError names the item: no answer, more image marks than images, or longer than ``data.text.max_length``.
        """
        where = f"item {item.id!r}"
        try:
            encoded = self._chat.conversation(_pairs(item.turns), len(item.images) if images is None else images)
        except ModelError as error:
            raise DataError(f"{where}: {error}") from error
        return _record(self._fitting(encoded, where, len(item.images)))

    def generation(self) -> Record:
        """The columns of a sample whose target is a view: the same for all, nothing supervised."""
        return self._generation

    def question(self, turns: Sequence[Turn], images: int | Sequence[int] = 0) -> Record:
        """The columns of a prompt for inference: they end where the answer begins. DataError as for a conversation.

        ``images`` is how many there are, or the placeholders of each.
        """
        try:
            encoded = self._chat.question(_pairs(turns), images)
        except ModelError as error:
            raise DataError(f"the question: {error}") from error
        return _record(self._fitting(encoded, "the question", images if isinstance(images, int) else len(images)))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of tokens without special ones."""
        return self._chat.decode([int(token) for token in ids])

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Each token as its tokenizer writes it, to look at."""
        return [str(piece) for piece in self.tokenizer.convert_ids_to_tokens([int(token) for token in ids])]

    def _fitting(self, encoded: Encoded, where: str, images: int = 1) -> Encoded:
        if len(encoded) > self.max_length:
            each = "" if self._chat.vision else f" of {self.tokens_per_image}"
            raise DataError(
                f"{where}: {len(encoded)} tokens, of them {images} images{each}; "
                f"data.text.max_length={self.max_length} allows no more: raise it, or give fewer images"
            )
        return encoded


def _pairs(turns: Sequence[Turn]) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in turns]


def _record(encoded: Encoded) -> Record:
    return {
        "input_ids": Tensor(data=np.array(encoded.ids, np.int64), dtype="int64"),
        "supervised": Tensor(data=np.array(encoded.supervised, np.bool_), dtype="bool"),
    }
