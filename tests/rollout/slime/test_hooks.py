"""Hooks as people wrote them for slime, which is not installed here, are called from a recipe as they are."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.ledger import Segment
from polyturn.configs.loading.loader import load_config
from polyturn.envs.messages import AssistantMessage, EpisodeView, Task, as_score
from polyturn.envs.rewards.factory import make_group_rewards, make_reward
from polyturn.rollout.filters import make_filter
from polyturn.rollout.groups import Group, Prompt
from polyturn.rollout.order import GroupUnderWay, make_order
from tests.support.play import play_first

HOOKS = "polyturn.rollout.slime.hooks"
REWARDS = """
from slime.rollout.rm_hub.math_dapo_utils import compute_score
from slime.utils.types import Sample

async def right(args, sample, **kwargs):
    assert isinstance(sample, Sample) and args.partial_rollout is False
    return float(sample.response.strip() == sample.label) + args.bonus

async def parts(args, sample, **kwargs):
    return compute_score(sample.response, sample.label, strict_box_verify=True)

async def best(args, samples, **kwargs):
    longest = max(len(sample.response) for sample in samples)
    return [float(len(sample.response) == longest) for sample in samples]

async def wrong(args):
    return 0.0

class CustomRewardModel:
    def compute_reward(self, prompts, responses):
        return [float(response in prompt) for prompt, response in zip(prompts, responses)]
"""
FILTERS = """
from slime.rollout.filter_hub.base_types import DynamicFilterOutput

def hard(args, samples, **kwargs):
    rewards = [sample.get_reward_value(args) for sample in samples]
    assert all(len(sample.loss_mask) == sample.response_length == 2 for sample in samples)
    return DynamicFilterOutput(keep=sum(rewards) / len(rewards) < args.ceiling, reason="easy")

def legacy(args, samples, **kwargs):
    return samples[0].tokens == [1, 2, 3]

def newest(args, rollout_id, buffer, num_samples):
    buffer.sort(key=lambda group: -group[0].metadata["start_rollout_id"])
    taken = buffer[:num_samples]
    del buffer[:num_samples]
    return taken
"""
GENERATE = '''
import asyncio

from slime.rollout.sglang_rollout import GenerateState
from slime.utils.http_utils import post
from slime.utils.types import Sample


async def generate(args, sample: Sample, sampling_params) -> Sample:
    """Turns as in examples/search-r1 of slime's: the whole text is posted, observations are tokenized here."""
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    prompt_ids = state.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    sample.tokens = list(prompt_ids)
    text = sample.prompt
    for turn in range(args.max_turns):
        asked = {"text": text, "sampling_params": {**sampling_params, "stop": ["</calc>"]}, "return_logprob": True}
        output = await post(url, asked)
        found = output["meta_info"]["output_token_logprobs"]
        sample.append_response_tokens(
            args, tokens=[item[1] for item in found], log_probs=[item[0] for item in found],
            meta_info=output["meta_info"], text=output["text"],
        )
        text += output["text"]
        if "</calc>" not in output["text"]:
            break
        seen = "\\nResult: 42\\n"
        text += seen
        seen_ids = state.tokenizer(seen, add_special_tokens=False)["input_ids"]
        sample.append_response_tokens(args, tokens=seen_ids, trainable=False, text=seen)
    sample.num_calls = turn
    return sample


async def custom_generate(args, samples, evaluation=False):
    state = GenerateState(args)
    for sample in samples:
        ids = state.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
        url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
        answers = await asyncio.gather(*(post(url, {"input_ids": ids, "sampling_params": {}}) for _ in range(2)))
        sample.response = answers[-1]["text"]
    return samples


async def both(args, sample, sampling_params):
    return [sample, sample]


async def reward(args, sample, **kwargs):
    return {"score": float(sample.label in sample.response) - 0.1 * sample.num_calls, "pred": "text"}
'''


def view(answer: str, label: str = "6") -> EpisodeView:
    task = Task.from_prompt("t", "What is 2 * 3, or 6?", label=label)
    message = AssistantMessage(content=answer)
    return EpisodeView(task=task, message=message, messages=(*task.messages, message.to_message()))


def scored(config: dict[str, object], answer: str) -> dict[str, float] | float:
    loaded = load_config("quickstart", [f"reward={json.dumps({'kind': 'function', **config})}"])
    reward = make_reward(loaded.reward)
    score = as_score(asyncio.run(reward(view(answer))))
    return score.value


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, text in (("rewards", REWARDS), ("filters", FILTERS), ("playing", GENERATE)):
        (tmp_path / f"slime_{name}.py").write_text(text)
    return tmp_path


def test_rewards_with_slimes_signatures_grade(files: Path) -> None:
    def of(path: str, **options: object) -> dict[str, object]:
        return {"target": f"{HOOKS}:Reward", "options": {"path": path, **options}}

    dotted = {"python_path": [str(files)]}
    assert scored(of("slime_rewards.right", args={"bonus": 0.5}, **dotted), "6") == 1.5
    keyed = of(f"{files}/slime_rewards.py:parts", args={"reward_key": "score"})
    assert [scored(keyed, answer) for answer in (r"So \boxed{6}", r"So \boxed{7}")] == [1.0, -1.0]
    assert scored(of(f"{files}/slime_rewards.py"), "6") == 1.0
    assert scored(of(f"{files}/slime_rewards.py"), "7") == 0.0
    for options, told in (
        (of(f"{files}/slime_rewards.py:wrong"), "cannot be called with"),
        (of(f"{files}/slime_rewards.py:rigth"), "did you mean 'right'"),
        (of(f"{files}/slime_filters.py"), r"has 0 classes with compute_reward"),
    ):
        with pytest.raises(ValueError, match=told):
            scored(options, "6")
    with pytest.raises(ValueError, match=r"name the one that counts as options\.args\.reward_key"):
        scored(of("slime_rewards.parts", **dotted), "6")
    with pytest.raises(AttributeError, match=r"args\.bonus was not set by the script"):
        scored(of("slime_rewards.right", **dotted), "6")
    group = {"name": "best", "target": f"{HOOKS}:GroupReward", "options": {"path": "slime_rewards.best"}}
    (criterion,) = make_group_rewards(
        load_config("quickstart", [f"group_rewards={json.dumps([group])}"]).group_rewards
    )
    scores = asyncio.run(criterion.reward([view("a"), view("long")]))
    assert [score.value for score in scores] == [0.0, 1.0]


def group_of(*rewards: float) -> Group:
    segment = Segment(
        token_ids=[1, 2, 3],
        sampled=[False, True, True],
        logprobs=[0.0, -1.0, -2.0],
        policy_versions=[-1, 4, 4],
        turns=[0, 0, 0],
    )
    episode = Episode(
        episode_id="e",
        group_id="g",
        env_id="env",
        task_id="t",
        seed=0,
        outcome=Outcome.COMPLETED,
        stop_reason="terminated",
        reward=0.0,
        reward_parts={"score": 5.0},
        messages=({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}),
        segments=(segment,),
    )
    prompt = Prompt(task_index=0, epoch=0, position=7, group_id="g")
    return Group(
        group_id="g",
        prompt=prompt,
        episodes=tuple(replace(episode, reward=reward) for reward in rewards),
        num_expected=len(rewards),
        num_dropped=0,
        num_retries=0,
    )


def test_filters_with_slimes_signatures_choose(files: Path) -> None:
    def of(path: str, **args: object) -> object:
        options = {"path": path, "python_path": [str(files)], "args": args}
        chosen = {"kind": "plugin", "target": f"{HOOKS}:Filter", "options": options}
        return make_filter(load_config("quickstart", [f"rollout.filter={json.dumps(chosen)}"]).rollout.filter)

    hard = of("slime_filters.hard", ceiling=0.5)
    assert (hard(group_of(0.0, 0.5)), hard(group_of(1.0, 1.0))) == (None, "easy")
    assert of("slime_filters.hard", ceiling=4.0, reward_key="score")(group_of(0.0)) == "easy"
    assert of("slime_filters.legacy")(group_of(0.0)) is None
    nonzero = of("slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std")
    assert (nonzero(group_of(1.0, 1.0)), nonzero(group_of(0.0, 1.0))) == ("zero_std_1.0", None)
    options = {"path": "slime_filters.newest", "python_path": [str(files)]}
    order = {"kind": "plugin", "target": f"{HOOKS}:BufferOrder", "options": options}
    chosen = make_order(load_config("quickstart", [f"rollout.order={json.dumps(order)}"]).rollout)
    waiting = [
        GroupUnderWay(position=position, is_complete=position != 2, age=age)
        for position, age in ((1, 2), (2, 0), (3, 0), (4, 1))
    ]
    assert chosen(waiting, 2) == [3, 4]
    assert chosen(waiting, 4) is None


def play(files: Path, say, **options: object):
    (files / "tasks.jsonl").write_text(json.dumps({"prompt": "What is 6 * 7?", "label": "42"}) + "\n")
    agent = {"target": f"{HOOKS}:Generate", "options": {"python_path": [str(files)], **options}}
    config = load_config(
        "quickstart",
        [
            f"agent={json.dumps(agent)}",
            "environment.id=polyturn/SingleTurn-v0",
            f"environment.tasks={files}/tasks.jsonl",
            f"evaluation.tasks={files}/tasks.jsonl",
        ],
    )
    return play_first(config, say)


def test_a_generate_function_plays_and_what_it_posted_is_the_ledger(files: Path) -> None:
    episode, policy = play(
        files,
        lambda number, task: "<calc>6 * 7</calc>" if number == 0 else "It is 42",
        path="slime_playing.generate",
        reward="slime_playing.reward",
        args={"max_turns": 3, "reward_key": "score", "apply_chat_template": True},
    )
    assert (episode.outcome, episode.reward) == (Outcome.COMPLETED, 0.9), episode.error
    assert policy.sampling[0].stop == ("</calc>",)
    # The text that was posted second begins with the first answer: its very tokens stand there.
    (segment,) = episode.segments
    assert segment.token_ids[segment.sampled].tolist() == [*policy.written[0][1], *policy.written[1][1]]
    assert policy.written[1][0][: len(policy.written[0][0]) + len(policy.written[0][1])] == [
        *policy.written[0][0],
        *policy.written[0][1],
    ]
    assert segment.turns[segment.sampled].tolist() == [0] * len(policy.written[0][1]) + [1] * len(
        policy.written[1][1]
    )
    assert episode.metrics["num_tokens_beside_mask"] == 0.0
    assert [message["role"] for message in episode.messages] == ["user", "assistant", "user", "assistant"]


def test_a_generate_function_of_lists_leaves_the_grade_to_the_environment(files: Path) -> None:
    episode, _ = play(files, lambda number, task: task.label, path="slime_playing.custom_generate")
    assert (episode.outcome, episode.reward) == (Outcome.COMPLETED, 1.0), episode.error
    # Both were asked for at once, so that the second answer stands in a line of its own.
    assert len(episode.segments) == 2 and episode.num_turns == 2
    episode, _ = play(files, lambda number, task: "x", path="slime_playing.both")
    assert episode.outcome is Outcome.FAILED and "an episode has one reward here" in episode.error
