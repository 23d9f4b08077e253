"""Tasks that are the same, nearly so, or trained on are found, and others are not."""

from __future__ import annotations

import random

import pytest

from polyturn.envs.messages import Task
from polyturn.rollout.evaluation.duplicates import (
    NEAR,
    WIDTH,
    TaskText,
    answers_in_prompt,
    duplicates,
    leaks,
    near_duplicates,
    other_answers,
    words_of,
)


def texts(*prompts: str | tuple[str, object]) -> list[TaskText]:
    pairs = [prompt if isinstance(prompt, tuple) else (prompt, "x") for prompt in prompts]
    return [
        TaskText.of(Task.from_prompt(f"t{i}", text, label=label)) for i, (text, label) in enumerate(pairs)
    ]


def test_duplicates_are_found_whatever_case_space_and_punctuation() -> None:
    found = duplicates(texts("Who wrote it?", "who  wrote\nit", "Who wrote this?", ("Who wrote it?", "y")))
    assert found.pairs == (("t1", "t0"),)
    assert duplicates(texts("What is 1 + 2?", "What is 1 - 2?", "What is 1.5?", "What is 15?")).num_tasks == 0


def test_the_same_question_with_another_answer_is_told_apart() -> None:
    asked = texts(("Who?", "a"), ("who", "b"), ("who", "a"), "other", "more", "still", "and")
    assert other_answers(asked).pairs == (("t1", "t0"),)
    assert duplicates(asked).pairs == (("t2", "t0"),)


def test_leaks_go_by_the_prompt_unless_it_says_nothing() -> None:
    training = texts(("Seen before?", "other"), "new")
    assert leaks(texts("unseen", "seen  BEFORE"), training).pairs == (("t1", "t0"),)
    games = texts(*(("Play.", house) for house in ("a", "b", "c")))
    assert leaks(games, texts(("Play.", "b"), ("Play.", "z"))).pairs == (("t1", "t0"),)
    assert other_answers(games).num_tasks == 0
    hidden = [TaskText.of(Task(task_id=f"g{i}", messages=(), label={"house": i % 2})) for i in range(3)]
    assert duplicates(hidden).pairs == (("g2", "g0"),)


def test_an_answer_in_the_prompt_is_whole_words_of_any_gold_answer() -> None:
    asked = texts(
        ("Was it Paris, or Rome?", ("London", "rome")),
        ("Is he Parisian?", "Paris"),
        ("What is 12 + 30?", 42),
        ("Is 42 even?", 42),
        ("?", {"tests": 1}),
        ("Is it so?", True),
    )
    assert answers_in_prompt(asked).pairs == (("t0", "rome"), ("t3", "42"))


def likeness(one: tuple[str, ...], other: tuple[str, ...]) -> float:
    def shingles(words: tuple[str, ...]) -> set[tuple[str, ...]]:
        padded = (*words, *[""] * (WIDTH - 1))
        return {padded[i : i + WIDTH] for i in range(len(words))}

    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_are_those_that_share_their_shingles(seed: int) -> None:
    """Against all pairs, counted: nothing is found that is not so, and of what is so hardly anything is missed."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(300)]
    originals = [rng.choices(words, k=rng.randint(1, 60)) for _ in range(60)]
    changed = []
    for original in originals:
        copy = list(original)
        for _ in range(rng.choice((0, 1, 1, 2, 8))):
            copy[rng.randrange(len(copy))] = rng.choice(words)
        changed.append(copy)
    first, second = (texts(*(" ".join(words) for words in group)) for group in (originals, changed))
    wanted = {
        b.task_id
        for b in second
        if any(b.words != a.words and likeness(a.words, b.words) >= NEAR for a in first)
    }
    found = near_duplicates(second, first)
    assert {task_id for task_id, _ in found.pairs} <= wanted
    assert len(wanted) >= 10 and found.num_tasks >= 0.9 * len(wanted)
    by_id = {text.task_id: text for text in first}
    for task_id, other in found.pairs:
        assert likeness(by_id[other].words, words_of(second[int(task_id[1:])].prompt)) >= NEAR
    together = [TaskText(f"b{t.task_id}", t.prompt, t.words, t.label, t.answers) for t in second]
    assert set(near_duplicates([*first, *together]).pairs) >= {
        (f"b{task_id}", other) for task_id, other in found.pairs
    }


def test_nothing_is_like_nothing() -> None:
    assert near_duplicates([]).num_tasks == near_duplicates(texts("a b c"), []).num_tasks == 0
    assert near_duplicates(texts("", "", "a")).num_tasks == 0
