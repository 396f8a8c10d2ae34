"""One item to look at: its pictures, and its conversation token by token with what is supervised."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from configs.schema import TextConfig
from services.contracts import Item, View
from services.data.images import load_image
from services.data.show import STYLE, TILES, tiles
from services.errors import DataError, ModelError

_STYLE = (
    ".text{white-space:pre-wrap;font:14px/1.9 ui-monospace,monospace}.text span{border-left:1px solid #b9c2cc}"
    ".text .yes{background:#cdebd2}"
)


def show_item(item: Item, text: TextConfig, folder: Path) -> Path:
    """Write the page ``index.html`` of an item into ``folder``, self-contained; returns its path.

    An image's placeholders are shown as one. DataError when a picture cannot be read, or the conversation cannot be
    trained on (without an answer, say); ModelError when ``text.tokenizer`` cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = [f"{len(item.images)} images", f"{len(item.turns)} turns", f"split {item.split or 'none'}"]
    facts += [f"label {item.label}"] if item.label else []
    facts += [f"{item.question.type}, answer {item.question.answer}"] if item.question else []
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(item.id)}</title>'
        f"<style>{STYLE}{_STYLE}</style><body><h1>{escape(item.id)}</h1>"
        f'<p class="meta">{escape(" · ".join(facts))}</p>'
    ]
    if item.images:
        parts.append(_pictures(item))
    if item.turns:
        parts.append(_conversation(item, text))
    page = folder / "index.html"
    page.write_text("".join(parts) + "</body></html>\n", encoding="utf-8")
    return page


def _pictures(item: Item) -> str:
    chosen = np.unique(np.linspace(0, len(item.images) - 1, min(TILES, len(item.images))).round().astype(int))
    views = [View(image=item.images[place]) for place in chosen]
    file = io.BytesIO()
    Image.fromarray(tiles(views, lambda view: load_image(view.image))).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    note = f"{len(views)} of {len(item.images)}, in the order in which the conversation speaks of them."
    return f'<h2>Images</h2><p class="meta">{note}</p><img alt="Images" src="data:image/png;base64,{data}">'


def _conversation(item: Item, text: TextConfig) -> str:
    """The tokens as spans; supervised ones are marked."""
    from models.text import Chat, load_tokenizer

    tokenizer = load_tokenizer(text.tokenizer)
    chat = Chat(tokenizer, tokens_per_image=1, system=text.system, supervise=text.supervise)
    try:
        encoded = chat.conversation([(turn.role, turn.text) for turn in item.turns], len(item.images))
    except ModelError as error:
        raise DataError(f"item {item.id!r}: {error}") from error
    pieces = tokenizer.convert_ids_to_tokens(encoded.ids)
    spans = [
        f'<span class="{"yes" if yes else "no"}">{escape(_readable(piece))}</span>'
        for piece, yes in zip(pieces, encoded.supervised, strict=True)
    ]
    note = (
        f"{len(encoded)} tokens of the tokenizer {text.tokenizer}, an image counted as one; {sum(encoded.supervised)} "
        "supervised (green)."
    )
    return f'<h2>Conversation</h2><p class="meta">{escape(note)}</p><p class="text">{"".join(spans)}</p>'


def _readable(piece: str) -> str:
    """A token as byte-level tokenizers write it, with its spaces and line breaks."""
    return piece.replace("Ġ", " ").replace("Ċ", "⏎\n")
