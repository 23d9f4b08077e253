"""Verdicts on hard pairs of answers: accuracy and time of the math verifier, beside math-verify in the same run.

A pair is a row `{"gold", "pred", "expect", "mode", "cat"}`; `mode` is `boxed` (an answer) or `text` (a whole reply).
math-verify has no bound of its own that holds outside a main thread, so it runs in a process that is killed at its
deadline; a pair that is cut off counts as refused, and its time is the deadline.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyturn.envs.rewards.math import MathVerifier

PAIRS = Path(__file__).parent / "math_pairs.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a grader said of one pair, and how many seconds it took."""

    correct: bool
    seconds: float
    reason: str = ""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: math_verdicts.py --pairs benchmarks/math_pairs.jsonl --show-errors",
    )
    parser.add_argument(
        "--pairs", type=Path, default=PAIRS, help="a JSONL file of pairs (default: the shipped one)"
    )
    parser.add_argument("--short", action="store_true", help="math-verify on every tenth pair only")
    parser.add_argument("--no-peer", action="store_true", help="without math-verify")
    parser.add_argument(
        "--peer-deadline", type=float, default=1.0, help="seconds that math-verify may take a pair"
    )
    parser.add_argument(
        "--show-errors", action="store_true", help="print every pair with an unexpected verdict"
    )
    return parser.parse_args()


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """The rows of a pair file. Raises `SystemExit` naming the line that cannot be read."""
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            row = json.loads(line)
            if missing := {"gold", "pred", "expect"} - row.keys():
                raise SystemExit(f"{path}:{number}: missing {', '.join(sorted(missing))}")
            pairs.append(row)
    return pairs


def run_ours(pairs: list[dict[str, Any]]) -> list[Outcome]:
    """Verdicts of our verifier, its pool started beforehand as in a run that is under way."""
    with MathVerifier() as verifier:
        verifier.warm()
        outcomes = []
        for pair in pairs:
            verdict = verifier.verify(pair["gold"], pair["pred"], mode=pair.get("mode", "boxed"))
            outcomes.append(Outcome(correct=verdict.correct, seconds=verdict.seconds, reason=verdict.reason))
        return outcomes


def serve_peer(pipe: Any) -> None:
    """Answer pairs with math-verify's own way: its default readers on the gold answer and the prediction."""
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    pipe.send("ready")
    while True:
        gold, answer = pipe.recv()
        golds = parse(gold, parsing_timeout=None)
        pipe.send(bool(verify(golds, parse(answer, parsing_timeout=None), timeout_seconds=None)))


class Peer:
    """math-verify in a process that is killed when it takes too long."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._context = multiprocessing.get_context("spawn")
        self._start()

    def judge(self, pair: dict[str, Any]) -> Outcome:
        answer = pair["pred"] if pair.get("mode") == "text" else f"$\\boxed{{{pair['pred']}}}$"
        started = time.perf_counter()
        self._pipe.send((f"$\\boxed{{{pair['gold']}}}$", answer))
        try:
            correct = self._pipe.poll(self._deadline_s) and self._pipe.recv()
            cut_off = time.perf_counter() - started >= self._deadline_s
        except EOFError:
            correct, cut_off = False, True
        seconds = time.perf_counter() - started
        if cut_off:
            self.close()
            self._start()
        return Outcome(correct=bool(correct), seconds=seconds)

    def close(self) -> None:
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=serve_peer, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()


def summary(pairs: list[dict[str, Any]], outcomes: list[Outcome]) -> dict[str, Any]:
    """Accuracy, errors of both kinds, times in milliseconds and pairs per second."""
    verdicts = [(pair["expect"], outcome.correct) for pair, outcome in zip(pairs, outcomes, strict=True)]
    seconds = [outcome.seconds for outcome in outcomes]
    return {
        "pairs": len(pairs),
        "accuracy": round(sum(expect == got for expect, got in verdicts) / len(verdicts), 4),
        "false_positives": sum(got and not expect for expect, got in verdicts),
        "false_negatives": sum(expect and not got for expect, got in verdicts),
        "median_ms": round(statistics.median(seconds) * 1e3, 3),
        "worst_ms": round(max(seconds) * 1e3, 1),
        "pairs_per_second": round(len(seconds) / sum(seconds), 1),
    }


def show(name: str, figures: dict[str, Any]) -> None:
    print(
        f"{name:<22} {figures['pairs']:>6} {figures['accuracy']:>9.2%} {figures['false_positives']:>7}"
        f" {figures['false_negatives']:>7} {figures['median_ms']:>10.3f} {figures['worst_ms']:>9.1f}"
        f" {figures['pairs_per_second']:>9.1f}"
    )


def main() -> None:
    arguments = parse_arguments()
    pairs = read_pairs(arguments.pairs)
    outcomes = run_ours(pairs)
    ours = summary(pairs, outcomes)
    if arguments.show_errors:
        for pair, outcome in zip(pairs, outcomes, strict=True):
            if pair["expect"] != outcome.correct:
                kind = "accepted" if outcome.correct else "refused"
                print(
                    f"{kind}: {pair.get('cat', '')}: {pair['gold'][:60]!r} {pair['pred'][:80]!r} {outcome.reason}"
                )
    heads = ("pairs", "accuracy", "false +", "false -", "median ms", "worst ms", "pairs/s")
    print(
        f"{'':<22} {heads[0]:>6} {heads[1]:>9} {heads[2]:>7} {heads[3]:>7} {heads[4]:>10} {heads[5]:>9} {heads[6]:>9}"
    )
    show("polyturn", ours)
    result = {"benchmark": "math_verdicts", "short": arguments.short, "file": arguments.pairs.name, **ours}
    result["reasons"] = dict(Counter(outcome.reason for outcome in outcomes).most_common())
    if not arguments.no_peer:
        chosen = range(0, len(pairs), 10 if arguments.short else 1)
        some = [pairs[index] for index in chosen]
        peer = Peer(arguments.peer_deadline)
        try:
            theirs = summary(some, [peer.judge(pair) for pair in some])
        finally:
            peer.close()
        same = summary(some, [outcomes[index] for index in chosen])
        if arguments.short:
            show("polyturn, same pairs", same)
        show("math-verify", theirs)
        result["math_verify"] = theirs
        result["speed_ratio"] = round(same["pairs_per_second"] / theirs["pairs_per_second"], 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
