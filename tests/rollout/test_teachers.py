"""What teachers say of an episode's tokens: columns, several teachers, and failures that are never a number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from polyturn.agents.episode import NO_ENGINE, POLICY_FAULT, Episode, Outcome
from polyturn.agents.ledger import Ledger, Segment
from polyturn.agents.policy import EngineUnavailable, Generation, PolicyFault
from polyturn.configs.schema.engines import TeacherConfig
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import ListTasks, Task
from polyturn.envs.registry import make
from polyturn.rollout.groups import Prompt
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.player import EpisodePlayer
from polyturn.rollout.teachers import Teacher, Teachers
from tests.support.http_service import Reply, serving

TASK = Task.from_prompt("t", "?")
VOCAB_SIZE = 100


def segment(*, num_sampled: int = 3) -> Segment:
    """Two tokens of a prompt, an answer, an observation, another answer."""
    ledger = Ledger()
    ledger.append_observation([5, 6])
    for first in (10, 20):
        ledger.append_generation(
            Generation(
                token_ids=range(first, first + num_sampled),
                logprobs=[-1.0] * num_sampled,
                policy_versions=[0] * num_sampled,
                finish_reason="stop",
            )
        )
        ledger.append_observation([7])
    return ledger.to_segment()


EPISODE = Episode(
    episode_id="g.0.0",
    group_id="g",
    env_id="env",
    task_id="t",
    seed=0,
    outcome=Outcome.COMPLETED,
    stop_reason="terminated",
    reward=1.0,
    segments=(segment(), segment(num_sampled=2)),
)


def engine(scale: float = 0.1) -> Any:
    """Answers as SGLang 0.5.23 does: an entry for each token from `logprob_start_len` on, the first one empty."""

    def reply(body: dict[str, Any]) -> Reply:
        assert body["sampling_params"]["max_new_tokens"] == 0 and body["return_logprob"]
        ids = body["input_ids"][body["logprob_start_len"] :]
        entries = [[None if i == 0 else -scale * token, token, None] for i, token in enumerate(ids)]
        return {"output_ids": [], "meta_info": {"input_token_logprobs": entries}}

    return reply


def config(*urls: str, **options: Any) -> TeacherConfig:
    return TeacherConfig.model_validate({"name": "big", "path": "nowhere", "urls": urls, **options})


def teachers(*configs: TeacherConfig) -> Teachers:
    return Teachers([Teacher(one, vocab_size=VOCAB_SIZE) for one in configs])


async def teach(*configs: TeacherConfig, task: Task = TASK, episode: Episode = EPISODE) -> Episode:
    async with teachers(*configs) as asked:
        return await asked.teach(episode, task)


async def test_sampled_tokens_have_the_teachers_logprobs_and_nothing_else_has():
    with serving(engine()) as service:
        taught = await teach(config(service.url))
    for before, after in zip(EPISODE.segments, taught.segments, strict=True):
        expected = np.where(before.sampled, -0.1 * before.token_ids, 0.0)
        assert after.teacher_logprobs == pytest.approx(expected)
        assert replace(after, teacher_logprobs=None) == before
    # From before the first sampled token on: the prompt is not scored.
    assert {body["logprob_start_len"] for body in service.bodies} == {1} and len(service.bodies) == 2
    assert taught.metrics["teacher_seconds"] > 0
    assert replace(taught, segments=EPISODE.segments, metrics={}) == EPISODE


async def test_several_teachers_are_averaged_by_weight_and_chosen_by_environment_or_task():
    with serving(engine(0.1)) as one, serving(engine(0.3)) as other:
        small = config(one.url, name="small", weight=1.0)
        large = config(other.url, name="large", weight=3.0, environments=["env"])
        both = await teach(small, large)
        elsewhere = await teach(small, large, episode=replace(EPISODE, env_id="other"))
        named = await teach(small, large, task=replace(TASK, metadata={"teacher": "large"}))
        nobody = await teach(large, episode=replace(EPISODE, env_id="other"))
        with pytest.raises(EnvironmentFault, match=r"'huge'; there are small, large"):
            await teach(small, large, task=replace(TASK, metadata={"teacher": "huge"}))
    for episode, scale in ((both, 0.25), (elsewhere, 0.1), (named, 0.3)):
        (first, _) = episode.segments
        assert first.teacher_logprobs[first.sampled] == pytest.approx(-scale * first.token_ids[first.sampled])
    assert nobody is not None and nobody.segments == EPISODE.segments


async def test_an_engine_that_fails_is_tried_again_and_another_one_at_once():
    failures = iter([503, 503])
    with serving(lambda body: next(failures, None) or engine()(body)) as flaky:
        taught = await teach(config(flaky.url, max_retries=3), episode=one_segment())
    assert taught.segments[0].teacher_logprobs is not None and len(flaky.bodies) == 3
    with serving(lambda _: 503) as broken, serving(engine()) as sound:
        await teach(config(broken.url, sound.url), episode=one_segment())
        assert (len(broken.bodies), len(sound.bodies)) == (1, 1)


def one_segment() -> Episode:
    return replace(EPISODE, segments=EPISODE.segments[:1])


def answering(entries: list[Any]) -> Any:
    return lambda _: {"meta_info": {"input_token_logprobs": entries}}


TOKENS = segment().token_ids[1:].tolist()
UNUSABLE = {
    "garbage": lambda _: b"<html>",
    "no logprobs": lambda _: {"meta_info": {}},
    "other tokens": answering([[None, 6, None], *([-1.0, token + 1, None] for token in TOKENS[1:])]),
    "too few": answering([[None, 6, None], [-1.0, TOKENS[1], None]]),
    "not finite": lambda _: (
        b'{"meta_info": {"input_token_logprobs": [[null, 6], '
        + b", ".join(b"[NaN, %d]" % token for token in TOKENS[1:])
        + b"]}}"
    ),
    "null": answering([[None, token, None] for token in TOKENS]),
    "refused": lambda _: 400,
}


@pytest.mark.parametrize("name", UNUSABLE)
async def test_an_answer_that_cannot_be_used_is_a_fault(name):
    with serving(UNUSABLE[name]) as service, pytest.raises(PolicyFault) as raised:
        await teach(config(service.url), episode=one_segment())
    # What is no JSON may be one engine's alone; the rest would be the same elsewhere.
    num_tries = 4 if name == "garbage" else 1
    assert not isinstance(raised.value, EngineUnavailable) and len(service.bodies) == num_tries


@pytest.mark.parametrize("reply", [None, 503], ids=["hangs", "500s"])
async def test_an_engine_that_does_not_answer_fails_the_attempt_in_time(reply):
    with serving(lambda _: reply) as service, pytest.raises(EngineUnavailable, match="teacher big"):
        await teach(config(service.url, request_timeout_s=0.6, max_retries=1), episode=one_segment())


async def test_a_token_that_the_teacher_does_not_have_is_not_sent():
    """SGLang 0.5.23 ends when it gets one."""
    with serving(engine()) as service, pytest.raises(PolicyFault, match="no token 22, its vocabulary has 20"):
        teacher = Teacher(config(service.url), vocab_size=20)
        try:
            await teacher.score(segment())
        finally:
            await teacher.aclose()
    assert not service.bodies


@pytest.mark.parametrize(
    ("reply", "reason"), [(lambda _: 503, NO_ENGINE), (lambda _: b"no JSON", POLICY_FAULT)]
)
async def test_an_attempt_without_its_teacher_failed_and_has_no_reward(reply, reason):
    async def play(**_: Any) -> Episode:
        return EPISODE

    with serving(reply) as service:
        asked = teachers(config(service.url, max_retries=0))
        player = EpisodePlayer(
            make_env=lambda: make("polyturn/SingleTurn-v0"),
            tasks=ListTasks([TASK]),
            play=play,
            limits=RolloutLimits(
                max_concurrent_episodes=1, max_concurrent_requests=1, max_concurrent_tools=1
            ),
            seed=0,
            teachers=asked,
        )
        prompt = Prompt(task_index=0, epoch=0, position=0, group_id="g")
        async with asked:
            episode = await player.play(prompt, 0, 0, policy=None, slots=None)
        player.close()
    assert (episode.outcome, episode.reward, episode.stop_reason) == (Outcome.FAILED, None, reason)
