"""RealWorldQA (xAI 2024): letters found by rank among all places they occur, short answers by equality.

The rule for letters is that of the evaluation harness whose figures are published (its version 0.7); it looks for
capitals only, prefers an answer that starts or ends with the letter, and of equal ranks the later place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LETTERS = ("A", "B", "C", "D")
_FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
_START, _END, _PHRASE, _ANYWHERE = 10, 9, 7, 0
_STATED = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
_PHRASES = (
    *(f"{article}{noun} is" for noun in _STATED for article in ("", "the ")),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
"""What may come before a letter. Of each its first place counts, so that longer ones are more than the shorter."""


def read_letter(answer: str) -> str:
    """The letter A-D that an answer gives, "" where no capital one occurs.

    Ranks: at the start 10, at the end 9, after an answer phrase 7, "(X)" 6, "X." 5, "X:" 4, "X)" 3, "X " 2, and only
    where none of these is, anywhere 0. The later of two places of one rank wins.
    """
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare = text.strip()
    text = f" {text} "
    found = [
        (rank, text.rfind(form.format(letter)), letter)
        for form, rank in _FORMS
        for letter in LETTERS
        if form.format(letter) in text
    ]
    lower = text.lower()
    for phrase in _PHRASES:
        place = lower.find(phrase)
        if place >= 0:
            after = [(text.find(letter, place + len(phrase)), letter) for letter in LETTERS]
            found += [(_PHRASE, at, letter) for at, letter in after if at >= 0]
    for letter in LETTERS:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((_START, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((_END, len(text) - 1, letter))
    found = found or [(_ANYWHERE, text.rfind(letter), letter) for letter in LETTERS if letter in text]
    return max(found, key=lambda entry: entry[:2])[2] if found else ""


def score_answer(answer: str, truth: str) -> float:
    """1 if right: by letter where the truth is A-D, else equal after lower-casing, trailing full stops dropped."""
    truth = truth.strip()
    if truth.upper() in LETTERS:
        return float(read_letter(answer) == truth.upper())
    return float(answer.lower().strip().rstrip(".") == truth.lower())


def aggregate(scores: Sequence[float]) -> dict[str, float]:
    """``accuracy`` over all questions; empty without one."""
    return {"accuracy": float(np.mean(scores))} if len(scores) else {}
