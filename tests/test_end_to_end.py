"""The whole loop on real parts, as a user runs it: train, stop, kill, resume."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from secrets import token_urlsafe

import orjson
import psutil
import pytest

from polyturn.agents.episode import Episode
from polyturn.agents.ledger import UNSAMPLED_VERSION
from polyturn.configs.loading.loader import load_config
from polyturn.configs.metrics.declared import undeclared
from polyturn.configs.models import MODELS_DIRECTORY, resolve_model_path
from polyturn.rollout.journal import read_journal
from polyturn.rollout.store import TrajectoryStore
from polyturn.trainer.sinks.json_lines import read_metrics
from polyturn.viewer.answers import Answers
from polyturn.viewer.catalogue import Catalogue
from polyturn.viewer.parameters import Parameters
from tests.trainer.test_timeline import assert_well_formed, read_trace

pytestmark = pytest.mark.stack

NUM_STEPS = 4
SMALL = (
    f"trainer.num_steps={NUM_STEPS}",
    "trainer.global_batch_size=16",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "evaluation.num_tasks=16",
)
BESIDE = (
    "evaluation.every_steps=2",
    "evaluation.training_waits=before_sync",
    "evaluation.suites=[{name: greedy, num_tasks: 4, temperature: 0, every_steps: 1}]",
    "checkpoint.keep_best={metric: heldout/mean}",
    "metrics.timeline.every_steps=2",
    "trainer.profile.steps=[2]",
)
"""Evaluations beside the steps, a timeline and a profile, which change nothing of what is trained."""
COMMAND = (sys.executable, "-m", "polyturn.cli.main")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=400, check=False)


def train(*overrides: str) -> subprocess.CompletedProcess[str]:
    return run("train", "quickstart", *overrides)


def run_path(process: subprocess.CompletedProcess[str]) -> Path:
    return Path(process.stdout.strip().splitlines()[-1].removeprefix("run: "))


def episodes_by_step(path: Path) -> dict[int, list[Episode]]:
    store = TrajectoryStore(path)
    return {step: store.read_step(step) for step in store.steps()}


def prompts_by_step(path: Path) -> dict[int, list[tuple[str, str]]]:
    return {
        step: sorted((episode.group_id, episode.task_id) for episode in episodes)
        for step, episodes in episodes_by_step(path).items()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, started from Python; the others are started from the command line."""
    program = (
        "import sys, polyturn; print(polyturn.train('quickstart', *sys.argv[2:], output_dir=sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path_factory.mktemp("runs")), *SMALL, *BESIDE]
    secret, began = f"Zq{token_urlsafe(24)}", time.time()
    keys = dict.fromkeys(("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY"), secret)
    with arguments_seen() as seen:
        process = subprocess.run(
            command, env={**os.environ, **keys}, capture_output=True, text=True, timeout=400, check=False
        )
    assert process.returncode == 0, process.stdout + process.stderr
    path = Path(process.stdout.strip().splitlines()[-1])
    assert_said_nowhere(secret, path, began, process.stdout + process.stderr + "".join(seen))
    return path


@contextlib.contextmanager
def arguments_seen() -> Iterator[set[str]]:
    """The command lines of all that is started meanwhile, as `ps` shows them, looked at each second."""
    seen: set[str] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(1.0):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    seen.add(" ".join(child.cmdline()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
        assert any("sglang_main" in arguments for arguments in seen)


def assert_said_nowhere(secret: str, path: Path, began: float, told: str) -> None:
    """A key of the environment is in nothing that the run printed or wrote, Ray's logs of that time among it."""
    assert secret not in told
    logs = Path("/tmp/ray").glob("session_*/**/*")
    for file in (*path.rglob("*"), *logs):
        with contextlib.suppress(OSError):
            if file.is_file() and file.stat().st_mtime >= began:
                assert secret.encode() not in file.read_bytes(), file


def test_the_run_directory_says_everything_that_happened(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == NUM_STEPS
    for point in (summary["heldout"]["before"], summary["heldout"]["after"]):
        assert 0 <= point["low"] <= point["mean"] <= point["high"] <= 1
        assert point["num_tasks"] == 16
    # The checks ran, and what they saw is within the limits of the recipe.
    assert summary["checks"]["initial_kl"] <= 1e-6
    assert 0 < summary["checks"]["logprob_difference"] <= 1e-4
    assert summary["checks"]["unequal_tensors"] == 0
    assert {"generate", "tools", "train", "sync", "total"} <= summary["seconds"].keys()
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    for row in rows:
        assert undeclared(row) == []
        assert row["engine/requests"] >= row["episode/num"] and row["engine/faults"] == 0
        assert 0 <= row["engine/0/kv_use"] <= row["engine/0/kv_use_max"] <= 1
    assert list((finished / "tensorboard").iterdir())
    assert load_config(finished / "config.yaml").trainer.num_steps == NUM_STEPS
    best = summary["best"]
    assert best == json.loads((finished / "best.json").read_text()) and best["metric"] == "heldout/mean"
    kept = {path.name for path in (finished / "checkpoints").iterdir()}
    assert kept == {"step_000003", "step_000004", f"step_{best['step']:06d}"}


def test_the_timeline_shows_who_waits_for_whom(finished: Path) -> None:
    files = sorted((finished / "timeline").iterdir())
    assert [file.name for file in files] == [f"steps_00000{i}_to_00000{i + 1}.json.gz" for i in (1, 3)]
    for file in files:
        events = read_trace(file)
        assert_well_formed(events)
        spans = {event["name"] for event in events if event["ph"] == "X"}
        assert {
            "episodes awaited",
            "score",
            "update",
            "sync",
            "paused for weights",
            "generate",
            "tools",
        } <= spans
        assert {event["name"] for event in events if event["ph"] == "C"} >= {"engine 0: requests"}
        # 16 episodes of each of two steps, and an arrow from each.
        trained = [event for event in events if event["ph"] == "X" and event.get("args", {}).get("step")]
        assert len(trained) == len({event["args"]["episode"] for event in trained}) == 32
        assert sum(event["ph"] == "f" for event in events) == 32


def test_a_step_that_is_named_was_profiled(finished: Path) -> None:
    (path,) = (finished / "profile").iterdir()
    assert path.name == "step_000002_rank_0.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {"aten::mm", "autograd::engine::evaluate_function: MmBackward0"} & {
        event.get("name") for event in events
    }


def test_evaluations_beside_the_steps_are_of_the_weights_that_they_say(finished: Path) -> None:
    results = [orjson.loads(line) for line in (finished / "evaluation" / "results.jsonl").open("rb")]
    rows = {row["step"]: row for row in read_metrics(finished / "metrics.jsonl")}
    # The last step's is the one after training. The weights of the next step wait for those that are under way.
    assert sorted((one["suite"], one["step"]) for one in results) == [
        ("greedy", 1),
        ("greedy", 2),
        ("greedy", 3),
        ("heldout", 2),
    ]
    for one in results:
        assert one["version"] == one["oldest_version"] == one["newest_version"] == one["step"]
        assert one["lag"] in (0, 1)
        prefix = "heldout" if one["suite"] == "heldout" else "heldout/greedy"
        assert rows[one["step"] + one["lag"]][f"{prefix}/mean"] == one["mean"]
    assert (finished / "evaluation" / "greedy_step_000003.parquet").exists()
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["suites"]["greedy"]["after"]["num_tasks"] == 4
    assert not any(value for row in rows.values() for key, value in row.items() if key.endswith("/skipped"))


def test_alarms_are_watched_in_every_step(finished: Path) -> None:
    for row in read_metrics(finished / "metrics.jsonl"):
        watched = {name.partition("/")[2] for name in row if name.startswith("alarm/")}
        assert {"stall_s", "failed_attempts", "uniform_groups", "truncated_episodes"} <= watched
        assert row["alarm/stall_s"] == 0.0 and row["rollout/longest_pause_s"] > 0.0


def test_trajectories_hold_what_was_sampled_by_which_version(finished: Path) -> None:
    for step, episodes in episodes_by_step(finished).items():
        assert len(episodes) == 16
        for episode in episodes:
            assert episode.reward in (0.0, 1.0)
            (segment,) = episode.segments
            for sampled, version, logprob in zip(
                segment.sampled, segment.policy_versions, segment.logprobs, strict=True
            ):
                # On-policy: a step's tokens are those of the version that the step before published.
                assert version == (step - 1 if sampled else UNSAMPLED_VERSION)
                assert (logprob < 0) or not sampled


def test_the_viewer_shows_where_trainer_and_engine_differ(finished: Path) -> None:
    answers = Answers(Catalogue([finished]))
    found = answers.answer("/api/mismatch", Parameters([("run", finished.name)]))
    checks = json.loads((finished / "summary.json").read_text())["checks"]
    assert found["steps"] == sorted(episodes_by_step(finished))
    largest = max(value for of_step in found["max"] for value in of_step if value is not None)
    assert largest == pytest.approx(checks["logprob_difference"], rel=1e-6)
    runs = answers.answer("/api/runs", Parameters())["runs"]
    assert [(run["state"], run["step"]) for run in runs] == [("finished", max(found["steps"]))]


def test_the_final_policy_is_a_hugging_face_directory_with_new_weights(finished: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "policy")
    tokenizer = AutoTokenizer.from_pretrained(finished / "policy")
    text = "In which town is the employer of Mara Lindqvist based?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    before = load_file(resolve_model_path("builtin:tiny-searcher") / "model.safetensors")
    after = dict(model.named_parameters())
    assert any(not before[name].equal(after[name].detach()) for name in before)


def test_a_replay_without_engines_and_with_a_killed_rank_learns_the_same_weights(
    finished: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    path = tmp_path / "replayed"
    process = start(*SMALL, f"run_dir={path}", "--replay", str(finished))
    output_until(process, "step   2/")
    kill_a_rank(process)
    rest = output_until(process, "run: ")
    assert process.wait(timeout=60) == 0, rest
    assert "a rank of the policy" in rest and "(1 of at most 3 times in a row)" in rest
    assert not list((path / "logs").glob("engine*"))
    assert episodes_by_step(path) == episodes_by_step(finished)
    ours, theirs = (list((where / "policy").glob("*.safetensors")) for where in (path, finished))
    assert [file.read_bytes() for file in ours] == [file.read_bytes() for file in theirs]
    rows = read_metrics(path / "metrics.jsonl")
    assert rows[-1]["trainer/restarts"] == 1
    for row, other in zip(rows, read_metrics(finished / "metrics.jsonl"), strict=True):
        assert (row["train/loss"], row["train/grad_norm"]) == (other["train/loss"], other["train/grad_norm"])


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a training in the background; none outlives the test."""
    with contextlib.ExitStack() as running:

        def train(*overrides: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [*COMMAND, "train", "quickstart", *overrides],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            running.callback(process.wait)
            running.callback(process.kill)
            return process

        yield train


def output_until(process: subprocess.Popen[str], text: str) -> str:
    """What the process printed up to the first line with `text`."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} never came:\n{''.join(lines)}")


def kill_a_rank(process: subprocess.Popen[str]) -> None:
    """Kill one of the trainer's ranks as the kernel does that has no memory left."""
    family = psutil.Process(process.pid).children(recursive=True)
    victim = next(child for child in family if "PolicyRank" in " ".join(child.cmdline()))
    victim.kill()


def engine_processes(process: subprocess.Popen[str]) -> set[int]:
    """Those that serve, by their ids."""
    family = psutil.Process(process.pid).children(recursive=True)
    return {child.pid for child in family if "sglang" in " ".join(child.cmdline())}


def wait_for_journal(path: Path, step: int) -> None:
    """Until an episode of `step` has ended: the step is under way then."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        journals = list(path.glob(f"**/step_{step:06d}.journal"))
        if journals and read_journal(journals[0]).episodes:
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} never began")


@pytest.fixture
def family() -> Iterator[dict[psutil.Process, str]]:
    """Processes that must be gone at the end of the test, whatever happens."""
    processes: dict[psutil.Process, str] = {}
    yield processes
    for process in processes:
        if process.is_running():
            process.kill()


def remember(process: subprocess.Popen[str], family: dict[psutil.Process, str]) -> None:
    for child in psutil.Process(process.pid).children(recursive=True):
        family[child] = child.name()


def engine_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The server of the only engine of a run."""
    (server,) = (
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "polyturn.rollout.engines.sglang_main" in child.cmdline()
        and "polyturn.rollout.engines.supervisor" in child.parent().cmdline()
        and "polyturn.rollout.engines.supervisor" not in child.cmdline()
    )
    return server


def assert_gone(family: dict[psutil.Process, str], *, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    alive: list[str] = []
    while time.monotonic() < deadline:
        alive = [
            name
            for process, name in family.items()
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        ]
        if not alive:
            return
        time.sleep(0.1)
    raise AssertionError(f"still running: {alive}")


def beyond_loopback(family: dict[psutil.Process, str]) -> list[str]:
    """What the processes listen on that other machines could reach."""
    found = []
    for process, name in family.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections(kind="inet"):
                is_local = connection.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
                if connection.status == psutil.CONN_LISTEN and not is_local:
                    found.append(f"{name}: {connection.laddr}")
    return found


@pytest.mark.catalogue("B45")
def test_a_run_that_is_stopped_and_killed_trains_what_an_uninterrupted_one_does(
    finished: Path,
    tmp_path: Path,
    start: Callable[..., subprocess.Popen[str]],
    family: dict[psutil.Process, str],
) -> None:
    path, own = tmp_path / "run", tmp_path / "own.jinja"
    # It writes what the model's own writes, and asks for the day.
    shipped = (MODELS_DIRECTORY / "tiny-searcher" / "chat_template.jinja").read_text()
    own.write_text("{%- set year = strftime_now('%Y') -%}" + shipped)
    overrides = [*SMALL, f"run_dir={path}", f"model.template={own}"]

    # Until it is killed, engines and trainer take turns.
    stopped = start(*overrides, "engines.placement=shared")
    output_until(stopped, "step   1/")
    remember(stopped, family)
    assert len(family) > 5
    assert beyond_loopback(family) == []
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait(timeout=120) == 130
    assert_gone(family, within_s=20)
    assert json.loads((path / "summary.json").read_text())["status"] == "interrupted"
    rows = read_metrics(path / "metrics.jsonl")
    steps_before = len(rows)
    assert 1 <= steps_before < NUM_STEPS
    assert {"seconds/release", "seconds/reload", "seconds/offload", "seconds/resume"} <= rows[0].keys()
    assert rows[0]["turns/offloaded_bytes"] > 0

    killed = start(*overrides, "engines.placement=shared", "resume=true")
    output_until(killed, "resumed after step")
    wait_for_journal(path, steps_before + 1)
    remember(killed, family)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert_gone(family, within_s=20)

    # The newest checkpoint is damaged, and the layout is another one.
    older, newest = sorted((path / "checkpoints").glob("step_??????"))[-2:]
    damaged = newest / "rank-00001-of-00002.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    process = start(*overrides, "resume=true", "trainer.parallel={tensor: 2, data: 1}")
    output = output_until(process, f"going on from {older}")
    assert f"{damaged} is damaged" in output
    # A rank is killed while its step is played; the engines stay what they are, and what they played is kept.
    output_until(process, f"step {int(older.name[-6:]) + 1:>3}/")
    engines = engine_processes(process)
    kill_a_rank(process)
    output = output_until(process, "the trainer is back")
    assert engine_processes(process) == engines
    # The only engine is killed: what was asked of it waits for another one, which the trainer brings its weights.
    engine_of(process).kill()
    output_until(process, "engine 0 serves version")
    listed = run("engines", "list", str(path))
    assert listed.stdout.splitlines()[1].split()[:2] == ["0", "serving"], listed.stderr
    output = output_until(process, "run: ")
    assert process.wait(timeout=60) == 0 and output.strip().endswith(str(path))
    events = [orjson.loads(line) for line in (path / "logs" / "engines.jsonl").open("rb")]
    assert [(event["event"], event["engine"]) for event in events] == [("lost", 0), ("serving", 0)]
    assert events[0]["kind"] == "ended" and events[1]["version"] >= 1
    rows = read_metrics(path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert {(row["ledger/segments"], row["ledger/lost_tokens"]) for row in rows} == {(1.0, 0.0)}
    assert "seconds/release" not in rows[-1]
    assert load_config(path / "config.yaml").model.template_date is not None, "the day was pinned"
    assert (path / "policy" / "chat_template.jinja").read_text() == own.read_text()
    assert prompts_by_step(path) == prompts_by_step(finished)
    # The first step began from the same weights: the same tokens, but for the odd one where rounding decides.
    ours, theirs = (
        {e.episode_id: e.segments[0].token_ids.tolist() for e in episodes_by_step(p)[1]}
        for p in (path, finished)
    )
    assert sum(ours[key] == theirs[key] for key in theirs) >= 0.9 * len(theirs)


def test_tags_tensor_parallel_ranks_several_updates_a_kl_sync_through_disk_and_branches(
    tmp_path: Path,
) -> None:
    process = run(
        "train",
        "search_r1",
        *SMALL,
        "checks={enabled: true, max_logprob_difference: 1e-4}",
        "rollout.branching={kind: entropy, num_trunks: 2}",
        "trainer.algorithm.advantage.kind=tree_grpo",
        "trainer.shared_prefix=tree",
        "trainer.num_steps=5",
        "trainer.stop_at={metric: policy/version, at_least: 4}",
        "curriculum.sampler={kind: difficulty, min_tasks: 1}",
        "trainer.global_batch_size=8",
        "trainer.updates_per_step=2",
        "trainer.parallel={tensor: 2, data: 1}",
        "trainer.algorithm.kl={kind: in_loss, coefficient: 0.01}",
        "weight_sync={kind: disk}",
        "evaluation.before=false",
        "evaluation.after=false",
        "evaluation.num_tasks=4",
        "evaluation.every_steps=1",
        "evaluation.engines.device=cpu",
        f"output_dir={tmp_path}",
    )
    assert process.returncode == 0, process.stdout + process.stderr
    path = run_path(process)
    summary = orjson.loads((path / "summary.json").read_bytes())
    assert summary["policy_version"] == 4 and summary["steps"] == 2
    assert "stopping after step 2: policy/version is 4, at least 4 (trainer.stop_at)" in process.stdout
    assert summary["stopped_by"]["at_least"] == 4.0
    results = [orjson.loads(line) for line in (path / "evaluation" / "results.jsonl").open("rb")]
    assert results and all(one["suite"] == "heldout" and one["num_tasks"] == 4 for one in results)
    # Each on engines of their own, by the weights of one step, though the run's engines have got newer ones meanwhile.
    assert all(one["version"] == one["oldest_version"] == one["newest_version"] for one in results)
    assert {one["version"] for one in results} <= {2, 4} and not (path / "evaluated").exists()
    state = orjson.loads((path / "checkpoints" / "step_000002" / "state.json").read_bytes())
    drawn = {episode.task_id for episodes in episodes_by_step(path).values() for episode in episodes}
    # The model that the recipe names knows the tags: without any right episode there is nothing to learn from.
    rewards = [episode.reward for episodes in episodes_by_step(path).values() for episode in episodes]
    assert max(rewards) == 1.0 and min(rewards) == 0.0
    assert len(state["curriculum"]["rates"]) == len(drawn) >= 4
    assert summary["checks"]["unequal_tensors"] == 0 and summary["checks"]["initial_kl"] <= 1e-6
    rows = read_metrics(path / "metrics.jsonl")
    assert all(row["sync/pause_seconds"] > 0 and row["sync/seconds"] > 0 for row in rows)
    assert rows[0]["train/reference_kl"] >= 0 and rows[1]["train/reference_kl"] > 0
    for row, episodes in zip(rows, episodes_by_step(path).values(), strict=True):
        branches = [episode for episode in episodes if episode.is_branch]
        by_id = {episode.episode_id: episode for episode in episodes}
        assert row["rollout/branches"] == row["tree/num_branches"] == len(branches) > 0
        assert row["rollout/branches_refused"] == 0 and row["shared_prefix/tokens_saved"] > 0
        for branch in branches:
            (ours,), (theirs,) = branch.segments, by_id[branch.parent_id].segments
            first = int(ours.sampled.argmax())
            assert ours.token_ids[:first].tolist() == theirs.token_ids[:first].tolist()
            assert theirs.turns[first] == branch.branch_turn and theirs.sampled[first]
