"""Text for language models: a byte-level tokenizer built in code, any other by folder or name, and chat templates."""

from __future__ import annotations

from models.text.template import Chat, Encoded, missing_answer
from models.text.tokenizer import BYTES, SPECIAL_TOKENS, check_fits, load_tokenizer, token_id

__all__ = ["BYTES", "SPECIAL_TOKENS", "Chat", "Encoded", "check_fits", "load_tokenizer", "missing_answer", "token_id"]
