"""`docs/architecture.md` tells the truth: what it names exists, the way of a token is as short as it says, and the
worked episode has the arrays that the code makes of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyturn.agents.episode import Episode, Outcome, TurnRecord
from polyturn.agents.ledger import TOKEN_COLUMNS, Ledger
from polyturn.agents.sglang_policy import read_generation
from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.trainer.algorithms.objective import Objective, evaluate_objective
from polyturn.trainer.credit.estimates import assign_credit, make_samples
from polyturn.trainer.data.balance import cut_into_updates
from polyturn.trainer.data.samples import TrainSample

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
NAMED = re.compile(r"`((?:\w+/)+\w+\.py):([A-Za-z_][\w.]*)`")
MAX_FILES, MAX_HOPS, MAX_CONTAINERS = 25, 38, 16


def definitions(path: Path) -> dict[str, ast.AST]:
    """Functions, classes, methods and constants of a file by their qualified names."""
    found: dict[str, ast.AST] = {}

    def walk(body: Sequence[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found[prefix + node.name] = node
                walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[prefix + node.target.id] = node
            elif isinstance(node, ast.Assign):
                found.update({prefix + t.id: node for t in node.targets if isinstance(t, ast.Name)})

    walk(ast.parse(path.read_text()).body, "")
    return found


def section(title: str) -> str:
    """The text under a heading, up to the next of its level."""
    return PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def rows(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_all_that_the_page_names_exists() -> None:
    missing = [
        f"{path}:{name}"
        for path, name in NAMED.findall(PAGE)
        if not (ROOT / path).is_file() or name not in definitions(ROOT / path)
    ]
    assert len(NAMED.findall(PAGE)) > 40 and missing == []


def test_every_hop_of_the_way_is_taken() -> None:
    """A function of the way is used somewhere, or registered: nothing stands there that a run passes by."""
    folders = ("agents", "rollout", "trainer")
    product = "\n".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))
    hops = {hop: definitions(ROOT / hop[0])[hop[1]] for hop in NAMED.findall(section("The way of a token"))}
    unused = [
        f"{path}:{name}"
        for (path, name), node in hops.items()
        if not re.search(rf"(?<!def )\b{name.rpartition('.')[2]}\b", product)
        and not getattr(node, "decorator_list", [])
    ]
    assert unused == []


def test_the_way_is_as_short_as_the_page_says() -> None:
    way = section("The way of a token")
    hops = NAMED.findall(way)
    containers = re.findall(r"`([A-Z]\w+)`", section("What it is carried in"))
    said = re.search(r"\*\*(\d+) files, (\d+) functions, (\d+) containers\*\*", PAGE)
    assert said is not None
    counted = (len({path for path, _ in hops}), len(hops), len(containers))
    assert len(set(hops)) == len(hops) and len(set(containers)) == len(containers)
    assert tuple(int(number) for number in said.groups()) == counted
    assert counted[0] <= MAX_FILES and counted[1] <= MAX_HOPS and counted[2] <= MAX_CONTAINERS
    carried = {name for _, *cells in rows(way) for name in re.findall(r"`([A-Z]\w+)`", cells[-1])}
    assert carried == set(containers)


def answer(token_ids: Sequence[int], logprobs: Sequence[float], versions: Sequence[str]) -> dict[str, Any]:
    """What SGLang's `/generate` gives."""
    ends = [sum(v <= version for v in versions) for version in sorted(set(versions))]
    starts = [0, *ends[:-1]]
    spans = [
        {"version": version, "start": start, "end": end}
        for version, start, end in zip(sorted(set(versions)), starts, ends, strict=True)
    ]
    return {
        "output_ids": list(token_ids),
        "meta_info": {
            "output_token_logprobs": [
                [value, token, None] for value, token in zip(logprobs, token_ids, strict=True)
            ],
            "finish_reason": {"type": "stop"},
            "weight_versions": spans,
        },
    }


def an_episode(name: str, ledger: Ledger, reward: float) -> Episode:
    return Episode(
        episode_id=name,
        group_id="capital",
        env_id="polyturn/TwoHopSearch-v0",
        task_id="capital",
        seed=0,
        outcome=Outcome.COMPLETED,
        stop_reason="terminated",
        reward=reward,
        num_turns=2,
        turn_records=(TurnRecord(), TurnRecord(reward=reward)),
        segments=ledger.to_segments(),
    )


@pytest.fixture(scope="module")
def worked() -> Mapping[str, Mapping[str, Any]]:
    """The worked episode at every station, by the functions that a run uses."""
    first = read_generation(answer([21, 22], [-0.5, -0.25], ["4", "4"]))
    second = read_generation(answer([41, 42, 43], [-1.0, -0.5, -0.25], ["4", "5", "5"]))
    ledger = Ledger()
    ledger.append_observation([11, 12, 13])
    ledger.append_generation(first)
    ledger.append_observation([31])
    ledger.append_generation(second)
    other = Ledger()
    other.append_observation([11, 12, 13])
    other.append_generation(read_generation(answer([23], [-0.75], ["4"])))
    episodes = [an_episode("a", ledger, 1.0), an_episode("b", other, 0.0)]
    segment = episodes[0].segments[0]
    scored = {
        sample.sample_id: replace(sample, proximal_logprobs=sample.behavior_logprobs)
        for sample in make_samples(episodes)
    }
    algorithm = AlgorithmConfig()
    credit = assign_credit(episodes, scored, algorithm, version=5)
    (update,) = cut_into_updates(credit.samples, 1)
    return {
        "generation": {name: getattr(second, name) for name in ("token_ids", "logprobs", "policy_versions")},
        "segment": {name: getattr(segment, name) for name in TOKEN_COLUMNS},
        "credit": {"advantages": credit.samples[0].advantages},
        **packed(update.samples, update.counts, algorithm),
    }


def packed(samples: Sequence[TrainSample], counts: Any, algorithm: AlgorithmConfig) -> dict[str, Any]:
    """The pack of an update, and its loss where the policy is that of the step's start."""
    packing = pytest.importorskip("polyturn.trainer.megatron.packing")
    batch = packing.make_packed_batch(samples, device=torch.device("cpu"))
    objective = Objective.from_config(algorithm, temperature=1.0)
    start = np.concatenate([sample.behavior_logprobs[sample.sampled] for sample in samples])
    logprobs = torch.from_numpy(start).requires_grad_()
    tokens = packing.token_batch(batch, objective, counts, logprobs, torch.zeros_like(logprobs))
    sums = evaluate_objective(tokens, objective, counts)
    (gradient,) = torch.autograd.grad(sums.loss, logprobs)
    return {
        "pack": {"input_ids": batch.input_ids[0], "rows": batch.rows, "targets": batch.targets},
        "loss": {"advantages": tokens.advantages, "gradient": gradient},
    }


@pytest.mark.parametrize("station", ["generation", "segment", "credit", "pack", "loss"])
def test_the_worked_episode(worked: Mapping[str, Mapping[str, Any]], station: str) -> None:
    text = section("A worked episode").split(f"```text {station}\n", 1)[1].split("```", 1)[0]
    told = {name: numbers for name, *numbers in map(str.split, text.splitlines())}
    assert set(told) == set(worked[station])
    for name, values in worked[station].items():
        array = values.detach().numpy() if isinstance(values, torch.Tensor) else values
        np.testing.assert_allclose(
            np.array(told[name], dtype=np.float64), array.astype(np.float64), atol=5e-4, err_msg=name
        )


def test_documents_name_files_that_exist() -> None:
    """By path from the root, as readers open them. Files of a package that is made by a command are not ours."""
    named = re.compile(
        r"`((?:agents|configs|envs|rollout|tools|trainer|benchmarks|examples)/[\w/]+\.\w+)(?::\w+)?`"
    )
    missing = [
        f"{page.name}: {path}"
        for page in sorted((ROOT / "docs").glob("*.md"))
        for path in named.findall(page.read_text())
        if not (ROOT / path).is_file()
    ]
    assert missing == []
