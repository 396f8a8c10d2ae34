"""Conversations as token ids, and which of them are supervised, by the chat template that the tokenizer brings.

The template is rendered with marks in the texts' places. What stands between the marks is the template's own and is
encoded with special tokens; texts are encoded without any, so that nothing a user writes becomes a control or an image
token. An assistant's text and the token that ends its turn are supervised, nothing else; where the whole turn is asked
for, so is the line break that ChatML writes behind that token. A template may strip a text; one that changes it
otherwise is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from models.errors import ModelError
from models.text.tokenizer import (
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    RAY_END,
    RAY_START,
    RAYMAP,
    VISION_TOKENS,
    token_id,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_MARK = "<image>"
"""What a corpus in LLaVA's form writes in a user's turn where an image stands."""
ROLES = ("system", "user", "assistant")
_CONTROL_NAME = re.compile(r"<\|[^|<>\s]+\|>")
"""What everybody's control tokens look like; others are found missing where an answer has no end."""
_MARK = re.compile("\ue000(\\d+)\ue001")

ANSWER, TURN = "answer", "turn"
"""What is supervised: an answer with the token that ends it, or with the white space behind that token too."""

Turns = Sequence[tuple[str, str]]
"""(role, text) in order."""
Images = int | Sequence[int]
"""How many images a conversation has, or the placeholders of each of them."""


@dataclass(kw_only=True)
class Encoded:
    """Token ids, and for each whether it is supervised (its label is its own id, predicted from those before it)."""

    ids: list[int] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)

    def add(self, ids: Sequence[int], supervised: bool = False) -> None:
        """Append tokens."""
        self.ids.extend(ids)
        self.supervised.extend([supervised] * len(ids))

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """What a template writes around the texts of turns with certain roles: one part more than there are texts."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]
    """Leading tokens of each part that are supervised with the answer before it; 0 where none is."""


class Chat:
    """Makes token sequences of conversations.

    Args:
        tokenizer: as :func:`models.text.load_tokenizer` gives it; ModelError when one of our special tokens is
            missing or its template does not end an assistant's turn.
        tokens_per_image: placeholders of an image, where a conversation does not say how many each of its own has.
        queries: raymap placeholders of a generation prompt; as many as an image has by default.
        system: put before conversations without a system turn; "" leaves that to the template.
        vision: image blocks as Qwen's vision-language models read them: their own tokens, and no line break between
            an image and the question.
        supervise: :data:`ANSWER` or :data:`TURN`.

    Safe to use from several threads.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        tokens_per_image: int,
        queries: int | None = None,
        system: str = "",
        vision: bool = False,
        supervise: str = ANSWER,
    ) -> None:
        from tokenizers import Tokenizer

        if tokens_per_image < 1 or (queries is not None and queries < 1):
            raise ModelError(f"an image needs at least one token, got {tokens_per_image} and {queries} queries")
        if supervise not in (ANSWER, TURN):
            raise ModelError(f"what is supervised is {ANSWER} or {TURN}, got {supervise!r}")
        self.tokenizer, self._whole_turn = tokenizer, supervise == TURN
        self.system, self.vision, self.tokens_per_image = system, vision, tokens_per_image
        names = VISION_TOKENS if vision else (IMAGE_START, IMAGE, IMAGE_END)
        self._image = tuple(token_id(tokenizer, name) for name in names)
        start, ray, end = (token_id(tokenizer, name) for name in (RAY_START, RAYMAP, RAY_END))
        self._rays = [start, *[ray] * (tokens_per_image if queries is None else queries), end]
        self._control = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        # Copies: whether special tokens are split is a switch of the tokenizer that other threads would see.
        state = tokenizer.backend_tokenizer.to_str()
        self._frames, self._texts = Tokenizer.from_str(state), Tokenizer.from_str(state)
        for copy in (self._frames, self._texts):
            copy.no_padding()
            copy.no_truncation()
        self._texts.encode_special_tokens = True
        self._frame = lru_cache(maxsize=512)(self._make_frame)
        after = self._frame(("user", "assistant"), False).ids[2]
        self.end_of_turn = after[self._end_of(after) - 1]
        """Id of the token that ends an answer: where a model that generates stops."""

    def conversation(self, turns: Turns, images: Images = 0) -> Encoded:
        """A whole conversation for training. ``images`` is how many there are, or the placeholders of each.

        ``<image>`` in users' turns becomes an image block; images without one stand before the first user's text.
        Blocks are filled in order. A conversation that begins with an answer gets an empty question before it.

        Raises:
            ModelError: No answer with text; more marks than images; a role that the template does not know.
        """
        turns = self._checked(turns)
        missing = missing_answer(turns)
        if missing:
            raise ModelError(missing)
        return self._encode(turns, images, generate=False)

    def question(self, turns: Turns, images: Images = 0) -> Encoded:
        """A prompt that ends where the answer begins, unsupervised. Marks and images as in :meth:`conversation`."""
        turns = self._checked(turns)
        if turns[-1][0] == "assistant":
            raise ModelError("the conversation ends with an answer; nothing is asked")
        return self._encode(turns, images, generate=True)

    def generation(self) -> Encoded:
        """The constant prompt for a view: the template up to a user's text, an image block, the block of queries."""
        roles = ("system", "user") if self.system else ("user",)
        frame = self._frame(roles, False)
        encoded = Encoded()
        encoded.add(frame.ids[0])
        if self.system:
            encoded.add(self._text_ids(self.system))
            encoded.add(frame.ids[1])
        encoded.add(self._block(self.tokens_per_image))
        encoded.add(self._rays)
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens without special ones."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _checked(self, turns: Turns) -> list[tuple[str, str]]:
        """The turns with a system turn and a first question where they lack one."""
        unknown = [role for role, _ in turns if role not in ROLES]
        if unknown or not turns:
            raise ModelError(f"a conversation has turns of {', '.join(ROLES)}; got {unknown or 'no turn at all'}")
        checked = list(turns)
        if self.system and checked[0][0] != "system":
            checked.insert(0, ("system", self.system))
        first = 1 if checked[0][0] == "system" else 0
        if len(checked) > first and checked[first][0] == "assistant":
            checked.insert(first, ("user", ""))
        return checked

    def _encode(self, turns: Turns, images: Images, *, generate: bool) -> Encoded:
        counts = [self.tokens_per_image] * images if isinstance(images, int) else list(images)
        if any(count < 1 for count in counts):
            raise ModelError(f"an image needs at least one token, got {counts}")
        if self.vision:
            turns = [
                (role, text.replace(f"{IMAGE_MARK}\n", IMAGE_MARK) if role == "user" else text) for role, text in turns
            ]
        marks = sum(text.count(IMAGE_MARK) for role, text in turns if role == "user")
        if marks > len(counts):
            raise ModelError(f"the conversation has {marks} marks {IMAGE_MARK} and {len(counts)} images")
        frame = self._frame(tuple(role for role, _ in turns), generate)
        texts = self._rendered_texts(turns, frame, generate)
        encoded = Encoded()
        blocks = [self._block(count) for count in counts]
        in_front = len(blocks) - marks
        for (role, _), text, part, end in zip(turns, texts, frame.ids, frame.ends, strict=False):
            _add_part(encoded, part, end)
            if role != "user":
                encoded.add(self._text_ids(text), role == "assistant")
                continue
            gap = "\n" if in_front and text and not self.vision else ""
            for _ in range(in_front):
                encoded.add(blocks.pop(0))
            self._add_question(encoded, gap + text, blocks)
            in_front = 0
        _add_part(encoded, frame.ids[-1], frame.ends[-1])
        if in_front:
            raise ModelError(f"the conversation has {len(counts)} images and no user's turn to put them in")
        return encoded

    def _block(self, count: int) -> list[int]:
        """An image of ``count`` placeholders."""
        start, image, end = self._image
        return [start, *[image] * count, end]

    def _add_question(self, encoded: Encoded, text: str, blocks: list[list[int]]) -> None:
        """A user's text, with the next image blocks in the places of marks."""
        for place, piece in enumerate(text.split(IMAGE_MARK)):
            if place:
                encoded.add(blocks.pop(0))
            encoded.add(self._text_ids(piece))

    def _text_ids(self, text: str) -> list[int]:
        """Ids of what somebody wrote. ModelError when a control token comes out in spite of all care."""
        if not text:
            return []
        ids: list[int] = self._texts.encode(text, add_special_tokens=False).ids
        if not self._control.isdisjoint(ids):
            found = next(i for i in ids if i in self._control)
            raise ModelError(
                f"the text holds {self.tokenizer.convert_ids_to_tokens(found)!r}, which this tokenizer cannot tell "
                f"from its special token; remove it from the text: {text!r:.80}"
            )
        return ids

    def _rendered_texts(self, turns: Turns, frame: _Frame, generate: bool) -> list[str]:
        """The texts as the template writes them: as they are, or stripped."""
        rendered = self._render(turns, generate)
        texts, place = [], 0
        for number, (_, text) in enumerate(turns):
            place += len(frame.texts[number])
            after = frame.texts[number + 1]
            for candidate in (text, text.strip(), text.lstrip(), text.rstrip()):
                if rendered.startswith(candidate + after, place):
                    texts.append(candidate)
                    place += len(candidate)
                    break
            else:
                raise ModelError(
                    f"the tokenizer's chat template changes the text of turn {number} ({turns[number][0]}); what is "
                    f"supervised would be unknown: {text!r:.80}"
                )
        return texts

    def _make_frame(self, roles: tuple[str, ...], generate: bool) -> _Frame:
        """What the template writes around texts of these roles."""
        marks = [(role, f"\ue000{place}\ue001") for place, role in enumerate(roles)]
        pieces = _MARK.split(self._render(marks, generate))
        parts, order = tuple(pieces[::2]), pieces[1::2]
        if order != [str(place) for place in range(len(roles))]:
            raise ModelError(
                f"the tokenizer's chat template does not write turns of {list(roles)} once each and in order "
                f"(it writes {order}); give it turns that it knows, or choose another tokenizer"
            )
        for name in _CONTROL_NAME.findall("".join(parts)):
            if self._frames.token_to_id(name) is None:
                raise ModelError(
                    f"the tokenizer's chat template writes {name!r}, which the tokenizer has no token for; they do not "
                    "belong together (data.text.tokenizer)"
                )
        ids = tuple(tuple(self._frames.encode(part, add_special_tokens=False).ids) for part in parts)
        ends = [0]
        for place, role in enumerate(roles):
            ends.append(self._supervised_of(ids[place + 1]) if role == "assistant" else 0)
        return _Frame(texts=parts, ids=ids, ends=tuple(ends))

    def _supervised_of(self, part: tuple[int, ...]) -> int:
        """How many tokens after an answer are supervised with it."""
        end = self._end_of(part)
        while self._whole_turn and end < len(part) and self._is_space(part[end]):
            end += 1
        return end

    def _is_space(self, token: int) -> bool:
        return token not in self._control and str(self.tokenizer.decode([token])).isspace()

    def _end_of(self, part: tuple[int, ...]) -> int:
        """How many tokens after an answer belong to it: up to the first special token."""
        for place, token in enumerate(part):
            if token in self._control:
                return place + 1
        raise ModelError(
            "the tokenizer's chat template ends an assistant's turn with no special token, so a model could not learn "
            "to stop; choose another tokenizer (data.text.tokenizer)"
        )

    def _render(self, turns: Turns, generate: bool) -> str:
        from jinja2 import TemplateError

        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except TemplateError as error:
            raise ModelError(
                f"the tokenizer's chat template refuses turns of {[role for role, _ in turns]}: {error}"
            ) from error
        return str(text)


def missing_answer(turns: Turns) -> str:
    """Why a conversation cannot be trained on: it has no answer, or an empty one; "" where it can."""
    if not any(role == "assistant" for role, _ in turns):
        return f"the conversation has no answer: its turns are {[role for role, _ in turns]}"
    empty = [place for place, (role, text) in enumerate(turns) if role == "assistant" and not text.strip()]
    return f"the answer in turn {empty[0]} of the conversation is empty" if empty else ""


def _add_part(encoded: Encoded, part: Sequence[int], end: int) -> None:
    """A part of the template; its first ``end`` tokens belong to the answer before it and are supervised."""
    encoded.add(part[:end], True)
    encoded.add(part[end:])
