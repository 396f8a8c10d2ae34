"""Select questions such that guessing without the images gains little, and deal the letters of the options.

Everything is done per split and type, because a guess is learnt on one split and tried on another.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from services.contracts import Question
from services.data.questions.draft import Draft, generator
from services.data.questions.single import NO, PRESENCE, SCENE_TYPE, YES

LETTERS = "ABCDEFGH"
SMALL_VOCABULARY = 4
"""Up to this many possible options are kept near the rarest one's frequency; more of them, and numbers, near the
median one's."""
SLACK = 1.5
"""How much more frequent than that an answer may be (but for left or right): exactness would cost most questions."""
MOST_RIGHT = 0.4
"""An option may be right in at most this share of the questions that offer it (of four, chance is 0.25)."""
VALUE_STEP = 0.1
"""Numbers within this relative distance of each other count as the same value: a guess of one scores on both."""


def balance(drafts: Sequence[Draft], seed: int) -> list[Question]:
    """The drafts that remain, as questions with letters. The order of the drafts makes no difference."""
    groups: dict[tuple[str, str], list[Draft]] = defaultdict(list)
    for draft in sorted(drafts, key=lambda d: (d.scene, d.type, d.text, d.answer, d.wrong)):
        groups[str(draft.split), draft.type].append(draft)
    kept: list[Question] = []
    for (split, kind), group in sorted(groups.items()):
        rng = generator(seed, "balance", split, kind)
        shuffled = [group[i] for i in rng.permutation(len(group))]
        kept += _deal(_select(kind, shuffled), rng)
    return sorted(kept, key=lambda question: question.id)


def _select(kind: str, drafts: list[Draft]) -> list[Draft]:
    if kind == "object_rel_distance":
        return limit_success(drafts, lambda option: option)
    if kind == "obj_appearance_order":
        return limit_success(drafts, lambda option: option.split(", ")[0])
    if drafts and drafts[0].wrong:
        # Route plans have one gap or two: each length is balanced by itself.
        return cap_each(drafts, lambda draft: draft.answer.count(","), lambda draft: draft.answer)
    if kind == PRESENCE:
        return even(drafts, lambda draft: draft.text, lambda draft: draft.answer, (YES, NO))
    if kind == SCENE_TYPE:
        return cap(drafts, lambda draft: draft.answer)
    same_text = cap_each(drafts, lambda draft: draft.text, lambda draft: value_bin(draft.answer))
    return cap(same_text, lambda draft: value_bin(draft.answer))


def value_bin(answer: str) -> int:
    """Logarithmic bin of a positive number, about ``VALUE_STEP`` wide."""
    return math.floor(math.log(float(answer)) / math.log1p(VALUE_STEP))


def cap(drafts: Sequence[Draft], answer: Callable[[Draft], Hashable]) -> list[Draft]:
    """Limit how often an answer occurs: see ``SMALL_VOCABULARY`` and ``SLACK``.

    A wrong option that never is right counts as an answer of frequency 0: then each answer may occur once.
    """
    counts = Counter(answer(draft) for draft in drafts)
    possible = set(counts) | {option for draft in drafts for option in draft.wrong}
    if not counts:
        return []
    if drafts[0].wrong and len(possible) <= SMALL_VOCABULARY:
        frequency, slack = min(counts[value] for value in possible), SLACK if len(possible) > 2 else 1.0
    else:
        frequency, slack = int(np.percentile(list(counts.values()), 50, method="lower")), SLACK
    limit = max(1, math.floor(slack * frequency))
    kept, taken = [], Counter[Hashable]()
    for draft in drafts:
        taken[answer(draft)] += 1
        if taken[answer(draft)] <= limit:
            kept.append(draft)
    return kept


def cap_each(
    drafts: Sequence[Draft], group: Callable[[Draft], Hashable], answer: Callable[[Draft], Hashable]
) -> list[Draft]:
    """:func:`cap` within every group (as "how many chairs"), so that a question's words do not give its answer."""
    groups: dict[Hashable, list[Draft]] = defaultdict(list)
    for draft in drafts:
        groups[group(draft)].append(draft)
    kept = {id(draft) for members in groups.values() for draft in cap(members, answer)}
    return [draft for draft in drafts if id(draft) in kept]


def even(
    drafts: Sequence[Draft],
    group: Callable[[Draft], Hashable],
    answer: Callable[[Draft], Hashable],
    answers: Sequence[Hashable],
) -> list[Draft]:
    """As many drafts of every answer in each group as it has of the rarest; a group that lacks an answer goes."""
    counts = Counter((group(draft), answer(draft)) for draft in drafts)
    kept, taken = [], Counter[tuple[Hashable, Hashable]]()
    for draft in drafts:
        taken[group(draft), answer(draft)] += 1
        if taken[group(draft), answer(draft)] <= min(counts[group(draft), value] for value in answers):
            kept.append(draft)
    return kept


def limit_success(drafts: Sequence[Draft], word: Callable[[str], str]) -> list[Draft]:
    """Keep drafts so that no option (``word`` of it) is right in more than ``MOST_RIGHT`` of its appearances.

    Greedy, repeated until nothing can be added: a draft that is refused now may fit when its answer has appeared
    more often as a wrong option of others. The same holds for each subject's own answers.
    """
    kept: list[Draft] = []
    offered: Counter[str] = Counter()
    right: Counter[str] = Counter()
    subjects: Counter[str] = Counter()
    of_subject: Counter[tuple[str, str]] = Counter()
    waiting = list(drafts)
    while True:
        refused = []
        for draft in waiting:
            answer = word(draft.answer)
            share = (right[answer] + 1) / (offered[answer] + 1)
            # One answer makes up at most half of the questions with the same words, and at least one of them.
            allowed = 1 + subjects[draft.subject] // 2
            if (right[answer] and share > MOST_RIGHT) or of_subject[draft.subject, answer] >= allowed:
                refused.append(draft)
                continue
            kept.append(draft)
            right[answer] += 1
            subjects[draft.subject] += 1
            of_subject[draft.subject, answer] += 1
            offered.update({word(option) for option in (draft.answer, *draft.wrong)})
        if len(refused) == len(waiting):
            return kept
        waiting = refused


def _deal(drafts: list[Draft], rng: np.random.Generator) -> list[Question]:
    """Questions with lettered options. The right one goes round all letters, for each answer on its own."""
    turn = {count: int(rng.integers(count)) for count in {len(draft.wrong) + 1 for draft in drafts}}
    numbers: Counter[str] = Counter()
    questions = []
    for draft in sorted(drafts, key=lambda d: d.answer):
        number = numbers[draft.scene]
        numbers[draft.scene] += 1
        name = f"{draft.scene}/{draft.type}/{number}"
        if not draft.wrong:
            questions.append(
                Question(id=name, type=draft.type, text=draft.text, answer=draft.answer, views=draft.views)
            )
            continue
        count = len(draft.wrong) + 1
        place = turn[count] % count
        turn[count] += 1
        options = [draft.wrong[i] for i in rng.permutation(count - 1)]
        options.insert(place, draft.answer)
        lettered = tuple(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        questions.append(
            Question(
                id=name,
                type=draft.type,
                text=draft.text,
                answer=LETTERS[place],
                options=lettered,
                views=draft.views,
            )
        )
    return questions
