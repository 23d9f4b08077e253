"""How much processor time it takes to compare tasks with each other and with those that are trained on.

Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable

from polyturn.envs.messages import Task
from polyturn.rollout.evaluation.duplicates import (
    Found,
    TaskText,
    answers_in_prompt,
    duplicates,
    leaks,
    near_duplicates,
    other_answers,
)

NUM_WORDS = 50


def make_tasks(rng: random.Random, num_tasks: int, name: str) -> list[Task]:
    """Tasks of random words, a tenth of them with one word of the one before changed."""
    vocabulary = [f"word{index}" for index in range(20_000)]
    tasks: list[Task] = []
    words = rng.choices(vocabulary, k=NUM_WORDS)
    for index in range(num_tasks):
        if index % 10 == 9:
            words = [*words]
            words[rng.randrange(NUM_WORDS)] = rng.choice(vocabulary)
        else:
            words = rng.choices(vocabulary, k=NUM_WORDS)
        tasks.append(Task.from_prompt(f"{name}-{index}", " ".join(words), label=str(index)))
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=100_000, help="of each of the two splits")
    parser.add_argument("--short", action="store_true", help="2,000 tasks")
    arguments = parser.parse_args()
    num_tasks = 2_000 if arguments.short else arguments.tasks
    rng = random.Random(0)
    evaluated, trained_on = make_tasks(rng, num_tasks, "test"), make_tasks(rng, num_tasks, "train")
    start = time.process_time()
    texts, training = [*map(TaskText.of, evaluated)], [*map(TaskText.of, trained_on)]
    seconds = {"read": time.process_time() - start}
    checks: dict[str, Callable[[], Found]] = {
        "duplicates": lambda: duplicates(texts),
        "other_answers": lambda: other_answers(texts),
        "leaks": lambda: leaks(texts, training),
        "answer_in_prompt": lambda: answers_in_prompt(texts),
        "near_duplicates": lambda: near_duplicates(texts),
        "near_leaks": lambda: near_duplicates(texts, training),
    }
    found = {}
    for name, check in checks.items():
        start = time.process_time()
        found[name] = check().num_tasks
        seconds[name] = time.process_time() - start
        print(f"{name:<18} {seconds[name]:6.2f} s of a processor  {found[name]:,} found")
    rounded = {name: round(value, 3) for name, value in seconds.items()}
    print(
        json.dumps(
            {
                "tasks": num_tasks,
                "cpu_s": rounded,
                "total_cpu_s": round(sum(seconds.values()), 2),
                "found": found,
            }
        )
    )


if __name__ == "__main__":
    main()
