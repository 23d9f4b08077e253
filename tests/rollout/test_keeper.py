"""What becomes of engines that fail, come or leave: each state and its ways out, without a clock of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import cast

import orjson
import pytest
from click.testing import Result
from ray.exceptions import ActorDiedError
from typer.testing import CliRunner

from polyturn.cli.main import app
from polyturn.configs.schema.engines import EnginesConfig, ReplaceConfig
from polyturn.rollout.engines.engine_log import EngineLog
from polyturn.rollout.engines.fleet import Ailment
from polyturn.rollout.engines.keeper import PROBE_S, EngineKeeper
from polyturn.rollout.engines.launch import Engines
from polyturn.rollout.engines.members import AILING_S
from polyturn.rollout.engines.membership import Membership
from polyturn.rollout.engines.process import EngineError
from polyturn.rollout.engines.requests import AddEngine, Refused, RemoveEngine, ask
from polyturn.rollout.engines.router_keeper import RouterKeeper
from polyturn.rollout.engines.server import ROUTER_START_TIMEOUT_S, EngineSpec

HUNG_AFTER_S = 30.0


class Process:
    """An engine that starts and ends when it is told to."""

    def __init__(self, number: int, url: str) -> None:
        self.number, self.url = number, url
        self.how: str | None = None
        self.is_ready = True
        self.fault: EngineError | None = None
        self.answers = True
        self.is_stopped = False

    def start(self) -> None: ...

    def ready(self) -> bool:
        if self.fault is not None:
            raise self.fault
        return self.is_ready

    def ended(self) -> str | None:
        return self.how

    def release(self) -> None: ...

    def stop(self) -> None:
        self.is_stopped = True


class Launcher:
    """Every engine has an address of its own."""

    def __init__(self) -> None:
        self.made: list[Process] = []
        self.prepare: Callable[[Process], None] = lambda _: None

    def __call__(self, number: int) -> Process:
        process = Process(number, f"http://engine{len(self.made)}")
        if len(self.made) >= 2:
            self.prepare(process)
        self.made.append(process)
        return process


class Players:
    def __init__(self) -> None:
        self.told: list[Membership] = []
        self.ailing: dict[int, Ailment] = {}
        self.under_way: dict[int, int] = {}

    def set_engines(self, members: Membership) -> None:
        self.told.append(members)

    def ailments(self) -> Mapping[int, Ailment]:
        return self.ailing

    def num_requests(self) -> Mapping[int, int]:
        return self.under_way


class OfVersion:
    """Weights that are on a disk, or that only the run's own thread can bring."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.are_on_disk = True
        self.outdated: set[str] = set()
        self.fault: EngineError | None = None

    def bring(self, url: str, admit: Callable[[int], None]) -> bool:
        del url
        if self.fault is not None:
            raise self.fault
        if self.are_on_disk:
            admit(self.version)
        return self.are_on_disk

    def serves(self, url: str) -> bool:
        return url not in self.outdated


class Run:
    """A keeper that looks when it is told to."""

    def __init__(self, directory: Path, *, elsewhere: bool = False, **options: float | None) -> None:
        self.now = 1000.0
        self.launcher, self.players, self.weights = Launcher(), Players(), OfVersion(4)
        self.told: list[str] = []
        config = EnginesConfig(device="cpu", num_engines=2)
        spec = EngineSpec(
            config=config, model_path=directory, dtype="float32", seeded=False, log_directory=directory
        )
        self.keeper = EngineKeeper(
            Engines(spec, self.launcher),
            ReplaceConfig.model_validate({"hung_after_s": HUNG_AFTER_S, **options}),
            players=self.players,
            directory=directory,
            log=EngineLog(directory, self.told.append),
            start_timeout_s=60.0,
            drain_s=10.0,
            are_updated_elsewhere=elsewhere,
            probe=lambda url: next(one for one in self.launcher.made if one.url == url).answers,
            clock=lambda: self.now,
        )
        self.keeper._weights = self.weights
        self.directory = directory

    def until(self, is_so: Callable[[], object], *, step_s: float = 0.1) -> None:
        """Look again and again; helpers of the keeper work in threads."""
        for _ in range(2000):
            self.keeper.look()
            if is_so():
                return
            self.now += step_s
            time.sleep(0.001)
        raise AssertionError("never so")

    @property
    def serving(self) -> dict[int, str]:
        return dict(self.keeper.members.serving)

    @property
    def events(self) -> list[tuple[str, int]]:
        lines = (self.directory / "engines.jsonl").read_bytes().splitlines()
        return [(line["event"], line["engine"]) for line in map(orjson.loads, lines)]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    made = []

    def start(**options: float | None) -> Run:
        made.append(Run(tmp_path, **options))
        return made[-1]

    yield start
    for run in made:
        run.keeper.close()


def test_an_engine_that_ended_is_replaced_and_serves_when_it_has_the_weights(
    make: Callable[..., Run],
) -> None:
    run = make()
    first, second = run.launcher.made
    run.weights.are_on_disk = False
    first.how = "SGLang server 0 was killed by SIGKILL"
    run.until(lambda: run.keeper.behind)
    assert run.players.told[0] == Membership(serving={1: second.url}), "it is taken out at once"
    assert first.is_stopped and run.serving == {1: second.url}
    assert run.keeper.behind == {0: "http://engine2"}
    assert run.keeper.take_figures() == {
        "engine/lost": 1,
        "engine/lost_ended": 1,
        "engine/serving": 1,
        "engine/missing": 1,
    }
    run.now += 7.0
    run.keeper.admit(0, 4)
    assert run.serving == {0: "http://engine2", 1: second.url}
    figures = run.keeper.take_figures()
    assert figures["engine/replaced"] == 1 and figures["engine/seconds_to_serving"] >= 7.0
    assert run.events == [("lost", 0), ("serving", 0)]
    assert "was killed by SIGKILL; its episodes go on elsewhere" in run.told[0]
    standing = orjson.loads((run.directory / "engines.json").read_bytes())["engines"]
    assert [(one["engine"], one["state"], one["version"]) for one in standing] == [
        (0, "serving", 4),
        (1, "serving", None),
    ]


def test_one_that_answers_nothing_is_lost_but_not_while_it_takes_weights(make: Callable[..., Run]) -> None:
    run = make()
    run.launcher.made[1].answers = False
    with run.keeper.quiet():
        run.until(lambda: run.now > 1000 + 2 * HUNG_AFTER_S, step_s=1.0)
        assert set(run.serving) == {0, 1}
    since = run.now
    run.until(lambda: run.events[:1] == [("lost", 1)] if run.told else False, step_s=1.0)
    assert run.now - since > HUNG_AFTER_S
    run.until(lambda: run.serving.get(1) == "http://engine2")
    assert run.keeper.take_figures()["engine/lost_hung"] == 1
    assert run.launcher.made[1].is_stopped


@pytest.mark.parametrize("kind", ["failing", "garbled"])
def test_one_that_fails_every_request_is_lost_when_that_lasts(make: Callable[..., Run], kind: str) -> None:
    run = make(faults_in_a_row=4)
    few = Ailment(num_faults=3, num_garbled=0, last="HTTP 500")
    run.players.ailing = {0: few}
    run.until(lambda: run.now > 1000 + 3 * (PROBE_S + AILING_S))
    assert set(run.serving) == {0, 1}
    run.players.ailing = {0: Ailment(num_faults=4, num_garbled=4 * (kind == "garbled"), last="NaN")}
    run.until(lambda: run.told)
    run.players.ailing = {}
    assert "engine 0 failed the last 4 requests: NaN" in run.told[0]
    run.until(lambda: run.serving.get(0) == "http://engine2")
    assert run.keeper.take_figures()[f"engine/lost_{kind}"] == 1


def test_starts_that_fail_come_ever_later_until_the_engine_is_given_up(make: Callable[..., Run]) -> None:
    run = make(attempts=3, first_wait_s=8.0)
    started: list[float] = []

    def fail(process: Process) -> None:
        started.append(run.now)
        process.fault = EngineError("no memory")

    run.launcher.prepare = fail
    run.launcher.made[0].how = "it crashed"
    run.until(lambda: ("given_up", 0) in run.events if run.told else False)
    waits = [later - earlier for earlier, later in pairwise(started)]
    assert len(started) == 3 and waits[0] >= 8.0 and waits[1] >= 16.0
    run.keeper.check()  # one is left
    run.launcher.made[1].how = "it crashed, too"
    run.until(lambda: ("given_up", 1) in run.events)
    with pytest.raises(EngineError, match="no engine is left: engine 1 was given up after 3 failed starts"):
        run.keeper.check()


def test_what_goes_while_it_starts_is_started_again(make: Callable[..., Run]) -> None:
    run = make(first_wait_s=0.1)

    def go(process: Process) -> None:
        if len(run.launcher.made) == 2:
            process.fault = ActorDiedError()  # type: ignore[assignment]

    run.launcher.prepare = go
    run.launcher.made[0].how = "its node is gone"
    run.until(lambda: run.serving.get(0) == "http://engine3")
    assert ("failed_start", 0) in run.events and "start 1 of engine 0 failed: " in run.told[1]


def test_one_that_does_not_take_the_weights_is_started_again(make: Callable[..., Run]) -> None:
    run = make()
    run.weights.fault = EngineError("it has not the weights that were written")
    run.launcher.made[0].how = "it crashed"
    run.until(lambda: ("failed_start", 0) in run.events if run.told else False)
    assert 0 not in run.serving, "it was never asked"
    run.weights.fault = None
    run.until(lambda: run.serving.get(0) == "http://engine3")


def test_a_run_whose_engines_die_again_and_again_is_ended(make: Callable[..., Run]) -> None:
    run = make(deaths_per_hour=2)
    for number in (0, 1, 0):
        run.until(lambda: set(run.serving) == {0, 1})
        newest = [one for one in run.launcher.made if one.number == number][-1]
        newest.how = f"engine {number} crashed"
        run.until(lambda number=number: number not in run.serving)
    with pytest.raises(
        EngineError, match=r"3 engines were lost within an hour.*deaths_per_hour=2.*0 crashed"
    ):
        run.keeper.check()


def test_nothing_new_is_asked_of_one_whose_version_others_changed(make: Callable[..., Run]) -> None:
    """Engines of somebody else: what is under way there ends, and it is asked again when it serves what it should."""
    run = make(elsewhere=True)
    run.weights.are_on_disk = False
    run.weights.outdated = {"http://engine1"}
    run.until(lambda: ("outdated", 1) in run.events if run.told else False)
    assert run.keeper.members.serving == {0: "http://engine0"}
    assert run.players.told[-1] == Membership(serving={0: "http://engine0"}, leaving={1: "http://engine1"})
    assert "engine 1 at http://engine1 serves another version than is asked for" in run.told[-1]
    run.weights.outdated, run.weights.are_on_disk = set(), True
    run.until(lambda: set(run.serving) == {0, 1})
    assert len(run.launcher.made) == 2, "nobody else's engine is started again"
    run.weights.are_on_disk = False
    run.keeper.fall_behind()
    assert run.players.told[-1] == Membership(serving={}, leaving={0: "http://engine0", 1: "http://engine1"})


def test_after_a_failure_those_that_do_not_answer_are_named_at_once(make: Callable[..., Run]) -> None:
    run = make()
    assert run.keeper.examine() == []
    run.launcher.made[1].answers = False
    assert run.keeper.examine() == [1]
    assert run.keeper.examine() == [], "it was lost already"


def test_engines_are_added_and_removed_through_the_runs_directory(make: Callable[..., Run]) -> None:
    run = make()

    def asked(request: AddEngine | RemoveEngine) -> str:
        found: list[str | Exception] = []

        def work() -> None:
            try:
                found.append(ask(run.directory, request, timeout_s=20))
            except (ValueError, TimeoutError) as fault:
                found.append(fault)

        thread = threading.Thread(target=work)
        thread.start()
        run.until(lambda: found, step_s=0.0)
        thread.join()
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    assert asked(AddEngine()) == "engine 2 is being started"
    run.until(lambda: run.serving.get(2) == "http://engine2")
    assert run.keeper.take_figures()["engine/added"] == 1
    run.players.under_way = {0: 1}
    assert asked(RemoveEngine(number=0)) == "engine 0 leaves when its requests have ended"
    assert run.keeper.members == Membership(
        serving={1: "http://engine1", 2: "http://engine2"}, leaving={0: "http://engine0"}
    )
    assert run.players.told[-1] == run.keeper.members
    run.keeper.look()
    assert not run.launcher.made[0].is_stopped, "it has a request under way"
    run.players.under_way = {}
    run.until(lambda: run.launcher.made[0].is_stopped)
    assert run.keeper.members == Membership(serving={1: "http://engine1", 2: "http://engine2"})
    assert run.keeper.take_figures()["engine/missing"] == 0
    with pytest.raises(Refused, match="there is no engine 0 to remove; there are 1, 2"):
        asked(RemoveEngine(number=0))
    asked(RemoveEngine(number=1))
    with pytest.raises(Refused, match="engine 2 is the only one that serves"):
        asked(RemoveEngine(number=2))
    (run.directory / "engine_requests" / "odd.json").write_text('{"kind": "explode"}')
    run.keeper.look()
    answer = orjson.loads((run.directory / "engine_requests" / "odd.answer.json").read_bytes())
    assert "odd.json is no request" in answer["refused"]


def test_the_command_line_lists_and_asks(make: Callable[..., Run], tmp_path: Path) -> None:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["engines", *arguments])

    assert "is no run whose engines are up" in invoke("add", str(tmp_path)).output
    run = make()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "engines.json").write_bytes((run.directory / "engines.json").read_bytes())
    lines = invoke("list", str(tmp_path)).output.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["0", "serving", "http://engine0"],
        ["1", "serving", "http://engine1"],
    ]
    late = invoke("remove", str(tmp_path), "1", "--timeout-s", "1")
    assert late.exit_code == 1 and "did not answer within 1 s; is it under way?" in late.output


def test_a_run_that_is_not_there_answers_nothing_and_the_request_is_taken_back(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.2 s"):
        ask(tmp_path, AddEngine(), timeout_s=0.2)
    assert list((tmp_path / "engine_requests").iterdir()) == []


def test_its_thread_hands_on_what_goes_wrong_in_it(make: Callable[..., Run]) -> None:
    run = make()

    def fail() -> Mapping[int, Ailment]:
        raise RuntimeError("the loop is closed")

    run.players.ailments = fail  # type: ignore[method-assign]
    with closing(run.keeper):
        run.keeper.begin(run.weights)
        assert run.keeper._keeping is not None
        run.keeper._keeping.exception(timeout=20)
        with pytest.raises(RuntimeError, match="the loop is closed"):
            run.keeper.check()


class Rebooting:
    """The engines of a router that has been killed: what was told to start it again, by whether that was for a hang."""

    has_router = True

    def __init__(self) -> None:
        self.restarts: list[bool] = []
        self.is_dead = True
        self.is_up = False

    def router_answers(self) -> bool:
        return self.is_up

    def keep_router(self, worker_urls: Sequence[str], *, is_hung: bool = False) -> str | None:
        del worker_urls
        if not self.is_dead and not is_hung:
            return None
        self.restarts.append(is_hung)
        self.is_dead = False
        return "sglang-router was killed"


def test_a_router_that_starts_has_the_time_for_it_and_one_that_hangs_has_not(tmp_path: Path) -> None:
    engines, now = Rebooting(), [0.0]
    with ThreadPoolExecutor(max_workers=1) as helpers:
        router = RouterKeeper(
            cast("Engines", engines),
            hung_after_s=HUNG_AFTER_S,
            log=EngineLog(tmp_path, lambda _: None),
            helpers=helpers,
            clock=lambda: now[0],
        )

        def look(seconds: float) -> None:
            for _ in range(int(seconds)):
                now[0] += 1.0
                router.look(["http://engine0"])
                if router._question is not None:
                    router._question.result()

        look(HUNG_AFTER_S)
        assert engines.restarts == [False]
        look(ROUTER_START_TIMEOUT_S - HUNG_AFTER_S - 2)
        assert engines.restarts == [False], "it is still being started"
        engines.is_up = True
        look(3)
        engines.is_up = False
        look(HUNG_AFTER_S + 2)
        assert engines.restarts == [False, True]
