"""Which tasks of a split are the same, nearly the same, or among those that are trained on.

Nearly the same is what shares most of its shingles, runs of `WIDTH` words: candidates by MinHash in bands (Broder 1997;
Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4), and of those the ones that are so by count. It
takes time in proportion to the number of tasks.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyturn.envs.messages import Task
from polyturn.envs.tasks.order import task_digest

WIDTH = 3
"""Words of a shingle."""
MAX_WORDS = 256
"""The first so many words of a prompt are compared for likeness."""
NEAR = 0.8
"""Two prompts are nearly the same that share so much of their shingles (Jaccard)."""
ROWS, BANDS = 4, 8
"""Of the MinHash: a pair with a likeness s is a candidate with probability 1 - (1 - s^ROWS)^BANDS: .98 at 0.8."""

_EDGES = ".,;:!?\"'`"


@dataclass(frozen=True, slots=True)
class TaskText:
    """A task as it is compared."""

    task_id: str
    prompt: str
    """What the policy is told, system messages aside."""
    words: tuple[str, ...]
    """The prompt in lower case, without white space and the punctuation around words."""
    label: Hashable
    answers: tuple[str, ...]
    """The right answers, where they are texts or numbers."""

    @classmethod
    def of(cls, task: Task) -> TaskText:
        prompt = "\n".join(m["content"] for m in task.messages if m["role"] != "system")
        return cls(task.task_id, prompt, words_of(prompt), _label_key(task.label), answers_of(task.label))


def words_of(text: str) -> tuple[str, ...]:
    """A text without case, white space and the punctuation around its words; signs such as `+` stay."""
    words = (word.strip(_EDGES) for word in unicodedata.normalize("NFKC", text).lower().split())
    return tuple(word for word in words if word)


def answers_of(label: object) -> tuple[str, ...]:
    """A label as answers that could be given: none where it is no text, number, or list of such."""
    given = label if isinstance(label, list | tuple) else [label]
    if any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in given):
        return ()
    return tuple(text for one in given if (text := str(one).strip()))


def _label_key(label: object) -> Hashable:
    if label is None or isinstance(label, str | int | float):
        return label
    return task_digest(Task(task_id="label", messages=(), label=label))


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Tasks that are like others."""

    pairs: tuple[tuple[str, str], ...] = ()
    """The id of each, and of another that it is like: the first of those."""

    @property
    def num_tasks(self) -> int:
        return len(self.pairs)


def duplicates(texts: Sequence[TaskText]) -> Found:
    """Tasks whose prompt, in lower case and without punctuation, and whose label another before them has."""
    return _again((text, (text.words, text.label)) for text in texts)


def other_answers(texts: Sequence[TaskText]) -> Found:
    """Tasks with the prompt of another before them, and another label; none where prompts do not tell tasks apart."""
    if not _tell_apart(texts):
        return Found()
    first: dict[Hashable, TaskText] = {}
    found = []
    for text in texts:
        other = first.setdefault(text.words, text)
        if other.label != text.label:
            found.append((text.task_id, other.task_id))
    return Found(pairs=tuple(found))


def leaks(texts: Sequence[TaskText], training: Sequence[TaskText]) -> Found:
    """Tasks that are trained on: with the same prompt, and where prompts do not tell tasks apart the same label."""
    by_prompt = _tell_apart(texts)

    def key(text: TaskText) -> Hashable:
        return text.words if by_prompt else (text.words, text.label)

    first: dict[Hashable, TaskText] = {}
    for text in training:
        first.setdefault(key(text), text)
    pairs = ((text.task_id, first[key(text)].task_id) for text in texts if key(text) in first)
    return Found(pairs=tuple(pairs))


def answers_in_prompt(texts: Sequence[TaskText]) -> Found:
    """Tasks one of whose answers stands in the prompt, as whole words; each with that answer."""
    found = []
    for text in texts:
        told = f" {' '.join(text.words)} "
        for answer in text.answers:
            wanted = " ".join(words_of(answer))
            if wanted and f" {wanted} " in told:
                found.append((text.task_id, answer))
                break
    return Found(pairs=tuple(found))


def near_duplicates(texts: Sequence[TaskText], others: Sequence[TaskText] | None = None) -> Found:
    """Tasks that are nearly the same as one before them, or as one of `others`; those that are the same aside."""
    if not texts or (others is not None and not others):
        return Found()
    all_texts = [*(others or ()), *texts]
    num_others = len(all_texts) - len(texts)
    shingles, starts = _shingles(all_texts)
    signatures = _signatures(shingles, starts)
    ends = np.append(starts[1:], len(shingles))
    found: dict[int, int] = {}
    for first, second in _candidates(signatures):
        if second < num_others or second in found or (others is not None and first >= num_others):
            continue
        if (signatures[first] == signatures[second]).mean() < NEAR - 0.25:
            continue
        if all_texts[first].words == all_texts[second].words:
            continue
        one = set(shingles[starts[first] : ends[first]].tolist())
        two = set(shingles[starts[second] : ends[second]].tolist())
        if len(one & two) >= NEAR * len(one | two):
            found[second] = first
    return Found(pairs=tuple((all_texts[b].task_id, all_texts[a].task_id) for b, a in sorted(found.items())))


def _again(keyed: Iterable[tuple[TaskText, Hashable]]) -> Found:
    first: dict[Hashable, str] = {}
    pairs = []
    for text, key in keyed:
        other = first.setdefault(key, text.task_id)
        if other is not text.task_id:
            pairs.append((text.task_id, other))
    return Found(pairs=tuple(pairs))


def _tell_apart(texts: Sequence[TaskText]) -> bool:
    """Whether prompts say which task it is; in a game it may be hidden in the label, and all prompts are alike."""
    if len(texts) < 2:
        return any(text.words for text in texts)
    return Counter(text.words for text in texts).most_common(1)[0][1] <= len(texts) / 2


Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]
_MIX = np.uint64(0xFF51AFD7ED558CCD)


def _shingles(texts: Sequence[TaskText]) -> tuple[Hashes, Places]:
    """The hashes of all shingles, one for each word, text after text, and where each text begins. None is empty."""
    numbers: defaultdict[str, int] = defaultdict(itertools.count(1).__next__)
    parts = [text.words[:MAX_WORDS] or ("",) for text in texts]
    # Behind each text stand blanks, so that a shingle lies within it; a text of one word has one shingle.
    padded = (word for part in parts for word in (*part, *_BLANKS))
    words = np.fromiter(map(numbers.__getitem__, padded), dtype=np.uint64)
    hashes = np.zeros(len(words) - len(_BLANKS), dtype=np.uint64)
    for offset in range(WIDTH):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += _mixed(words[offset : offset + len(hashes)])
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    keep = np.repeat(len(_BLANKS) * np.arange(len(parts)), lengths) + np.arange(int(lengths.sum()))
    return _mixed(hashes[keep]), starts


_BLANKS = ("",) * (WIDTH - 1)


def _mixed(values: Hashes) -> Hashes:
    """The finaliser of MurmurHash3: every bit depends on every other."""
    values = values ^ (values >> np.uint64(33))
    values *= _MIX
    return values ^ (values >> np.uint64(29))


def _signatures(shingles: Hashes, starts: Places) -> Hashes:
    """The MinHash of each text, `(texts, ROWS * BANDS)`: for each multiplier the least hash of its shingles."""
    multipliers = np.random.default_rng(0).integers(0, 2**63, ROWS * BANDS, dtype=np.uint64) * 2 + 1
    return np.stack(
        [np.minimum.reduceat(shingles * m, starts) for m in multipliers.astype(np.uint64)], axis=1
    )


def _candidates(signatures: Hashes) -> Iterable[tuple[int, int]]:
    """Pairs that agree in a band: each text with the first of those that agree with it."""
    for band in range(BANDS):
        rows = signatures[:, band * ROWS : (band + 1) * ROWS]
        keys = np.zeros(len(rows), dtype=np.uint64)
        for column in range(ROWS):
            keys = _mixed(keys * np.uint64(31) + rows[:, column])
        order = np.argsort(keys, kind="stable")
        is_first = np.append(True, keys[order][1:] != keys[order][:-1])
        heads = order[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]]
        yield from zip(heads[~is_first].tolist(), order[~is_first].tolist(), strict=True)
