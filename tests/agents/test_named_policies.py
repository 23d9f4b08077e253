"""Policies by name: who plays, what is wrong with a name, and the best of several."""

import asyncio
import contextlib
import random
import re
from pathlib import Path

import pytest
import yaml

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import BEST_OF_SAMPLES, Outcome
from polyturn.agents.policies.best_of import BestOfTurns, make_choice
from polyturn.agents.policies.episodes import MessageEpisodes
from polyturn.agents.policies.named import NAMES, make_policy, serves_model
from polyturn.agents.policies.scripted import ScriptedPolicy
from polyturn.agents.policy import PolicyFault, Reply
from polyturn.configs.schema.endpoint import ChatEndpoint
from polyturn.configs.schema.policies import BestOf
from polyturn.envs.messages import AssistantMessage, ListTasks, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.evaluation.who_plays import SGLANG
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall
from tests.support.chat_server import chat_server, message
from tests.support.option_readers import Readers

TASK = Task.from_prompt("t", "Say 7", label="7")


class Says(ToolEnv):
    """Pays for the label, after any number of calls."""

    @tool
    def note(self, text: str) -> str:
        """Note.

        Args:
            text: Any.
        """
        return text

    def grade(self, message):
        return {"right": float(message.content == self.task.label)}

    def oracle(self, messages, tools):
        return AssistantMessage(content=self.task.label)


class Untaught(Says):
    oracle = None


SCRIPTS = '''
import itertools
from polyturn.envs.messages import AssistantMessage

def seven(messages, tools, suffix=""):
    return "7" + suffix

async def later(messages, tools):
    return AssistantMessage(content="7")

class Counts:
    """Keeps what it has done, for one episode."""
    def __init__(self, start=6):
        self.numbers = itertools.count(start)
    def __call__(self, messages, tools):
        return str(next(self.numbers))

def nothing(messages, tools):
    return None

def wrong(messages):
    return "7"

def longest(episode):
    assert episode.task.label is None and episode.reward is None and not episode.reward_parts
    return float(len(episode.answer))

def is_seven(messages, message):
    return float(message.content == "7")

def raises(*arguments, **options):
    raise KeyError("x")

def odd(episode):
    return float("nan")
'''


@pytest.fixture
def scripts(tmp_path):
    path = tmp_path / "scripts.py"
    path.write_text(SCRIPTS)
    return path


async def play(policy, env=None, seed=0, task=TASK):
    async with contextlib.aclosing(policy):
        return await policy.play(
            env=env or Says(tasks=ListTasks([TASK])),
            task=task,
            seed=seed,
            limits=EpisodeLimits(),
            episode_id="e",
            group_id="g",
        )


async def test_the_oracle_and_a_random_policy_are_the_environments():
    assert (await play(make_policy("oracle"))).reward == 1.0
    drawn = [await play(make_policy("random"), seed=seed) for seed in (1, 1, 2)]
    said = [[m for m in episode.messages if m["role"] == "assistant"] for episode in drawn]
    assert said[0] == said[1] != said[2]
    with pytest.raises(ValueError, match="has no scripted oracle"):
        make_policy("oracle").check(Untaught())
    make_policy("random").check(Untaught())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [("seven", {}, "7"), ("seven", {"suffix": "!"}, "7!"), ("later", {}, "7"), ("Counts", {"start": 7}, "7")],
)
async def test_a_script_of_ones_own_plays(scripts, name, options, said):
    policy = make_policy(f"scripted:{scripts}:{name}", options)
    for _ in range(2):
        episode = await play(policy)
        assert (episode.outcome, episode.messages[-1]["content"]) == (Outcome.COMPLETED, said)


async def test_a_script_that_says_nothing_is_a_fault(scripts):
    episode = await play(make_policy(f"scripted:{scripts}:nothing"))
    assert (episode.outcome, episode.stop_reason) == (Outcome.FAILED, "policy_fault")
    assert "returned None; a script is `def script(messages" in episode.error


async def test_an_endpoint_plays_and_is_named_without_secrets(tmp_path):
    (tmp_path / "key").write_text("sk-very-secret-0001")
    async with chat_server(message("7")) as server:
        policy = make_policy(
            f"openai:{server.url}", {"model": "m", "api_key_file": str(tmp_path / "key"), "temperature": 0}
        )
        assert policy.label == f"m at {server.url}/chat/completions"
        assert (await play(policy)).reward == 1.0
    assert server.requests[0]["temperature"] == 0


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("oracl", {}, "there is no policy 'oracl', did you mean 'oracle'"),
        ("oracle:x", {}, "there is no policy 'oracle:x'"),
        ("oracle", {"a": 1}, "has no options, so none of the name 'a'"),
        ("scripted", {}, "is written with module:name or path/to/file.py:name, as scripted:"),
        ("openai", {}, "is written with its URL"),
        ("openai:http://x/v1", {}, "openai: model: Field required"),
        ("openai:http://x/v1", {"modl": "m"}, "openai: modl: .*, did you mean 'model'"),
        ("openai:x", {"model": "m"}, "openai: url: "),
        ("model", {}, "nothing is served here"),
        ("best_of", {}, "best_of: policy: Field required"),
        ("best_of", {"policy": "oracl"}, "there is no policy 'oracl'"),
        ("best_of", {"policy": "oracle", "num_samples": 1}, "num_samples: "),
        ("best_of", {"policy": "oracle", "per": "turn", "by": "grade"}, "a turn has no grade"),
        ("best_of", {"policy": "oracle", "by": "grade", "by_options": {"a": 1}}, "'grade' has none"),
        ("best_of", {"policy": "human", "per": "turn"}, "4 samples of a turn .* 'human' takes 1; raise"),
        ("best_of", {"policy": "oracle", "by": "best"}, "not of the form module:name"),
    ],
)
def test_what_is_wrong_with_a_name_is_said(name, options, words):
    with pytest.raises(ValueError, match=words):
        make_policy(name, options)


def test_a_plug_in_of_another_shape_is_refused_at_the_start(scripts):
    with pytest.raises(ValueError, match="cannot be called as a script"):
        make_policy(f"scripted:{scripts}:wrong")
    with pytest.raises(ValueError, match="a score of a message is"):
        make_policy("best_of", {"policy": "oracle", "per": "turn", "by": f"{scripts}:longest"})
    with pytest.raises(ValueError, match="cannot be called as a reward"):
        make_policy("best_of", {"policy": "oracle", "by": f"{scripts}:is_seven"})


def test_what_is_made_of_a_served_model_is_known_before_one_is():
    assert serves_model("model") and not serves_model("openai:http://x/v1", {"model": "m"})
    inner = {"policy": "best_of", "options": {"policy": "model"}}
    assert serves_model("best_of", inner) and not serves_model("best_of", {"policy": "oracle"})
    with pytest.raises(ValueError, match="takes a policy that speaks in messages, and 'model' does not"):
        make_policy("best_of", {"policy": "model", "per": "turn"}, model=Model())


class Model:
    """Stands where a served model does: it plays, and speaks no messages."""

    label, max_at_once = "model", None

    def check(self, env):
        pass

    async def play(self, **episode):
        numbers = random.Random(episode["seed"])
        return await MessageEpisodes(
            "model", lambda env, seed: ScriptedPolicy(lambda m, t: str(numbers.randrange(10)))
        ).play(**episode)

    async def aclose(self):
        pass


async def test_the_best_episode_by_the_grade_is_an_upper_bound_and_says_so():
    policy = make_policy("best_of", {"policy": "model", "num_samples": 40, "by": "grade"}, model=Model())
    assert "an upper bound" in policy.label
    episode = await play(policy)
    assert (episode.reward, episode.episode_id) == (1.0, "e")
    assert episode.metrics == {BEST_OF_SAMPLES: 40.0}
    assert (await play(policy)).messages == episode.messages, "the samples follow from the episode's seed"


async def test_the_best_episode_by_a_score_of_ones_own_which_sees_no_label_and_no_grade(scripts):
    async with chat_server(
        *(message(text, usage={"prompt_tokens": 5}) for text in ("7", "long", "7"))
    ) as server:
        options = {
            "policy": f"openai:{server.url}",
            "options": {"model": "m"},
            "num_samples": 3,
            "by": f"{scripts}:longest",
        }
        episode = await play(make_policy("best_of", options))
    assert (episode.messages[-1]["content"], episode.reward) == ("long", 0.0)
    assert episode.metrics["policy_prompt_tokens"] == 15.0, "what it costs is that of all samples"


async def test_the_majority_of_episodes_and_of_messages():
    said = ["8", " 7.", "9", "7", "8"]
    for per in ("episode", "turn"):
        async with chat_server(*map(message, said)) as server:
            options = {"policy": f"openai:{server.url}", "num_samples": 4, "per": per}
            options["options"] = {"model": "m", "max_concurrent_requests": 4}
            policy = make_policy("best_of", options)
            assert policy.max_at_once == {"episode": 4, "turn": 1}[per]
            episode = await play(policy)
        assert episode.messages[-1]["content"].strip(" .") == "7", per
        assert len(server.requests) == 4


@pytest.mark.parametrize("score", ["raises", "odd"])
async def test_a_score_that_fails_fails_the_episode(scripts, score):
    episode = await play(make_policy("best_of", {"policy": "oracle", "by": f"{scripts}:{score}"}))
    assert (episode.outcome, episode.reward, episode.stop_reason) == (Outcome.FAILED, None, "policy_fault")
    assert f"best_of: the score {scripts}:{score}" in episode.error


async def test_a_sample_that_fails_fails_all_of_it():
    async with chat_server(message("7"), message("7", finish_reason="error")) as server:
        options = {"policy": f"openai:{server.url}", "options": {"model": "m", "max_retries": 0}}
        episode = await play(make_policy("best_of", options))
    assert (episode.outcome, len(server.requests)) == (Outcome.FAILED, 2)


def best_of_turns(replies, **settings):
    given = iter(replies)

    class Inner:
        async def reply(self, *, messages, tools):
            found = next(given)
            if isinstance(found, Exception):
                raise found
            await asyncio.sleep(0)
            return found

    settings = BestOf(policy="x", per="turn", num_samples=len(replies), **settings)
    return BestOfTurns(Inner(), len(replies), make_choice(settings))


def calling(call_id, text):
    return AssistantMessage(tool_calls=(ToolCall(id=call_id, name="note", arguments={"text": text}),))


async def test_calls_are_told_apart_by_what_they_do_and_not_by_their_ids():
    policy = best_of_turns([calling("a", "x"), calling("b", "y"), calling("c", "y")])
    reply = await policy.reply(messages=[], tools=[])
    assert reply.message == calling("b", "y")
    assert reply.counts == {BEST_OF_SAMPLES: 3.0}


async def test_what_was_cut_off_is_chosen_where_nothing_is_whole():
    cut = Reply(message=AssistantMessage(content="7"), finish_reason="length", counts={"policy_x": 1.0})
    whole = Reply(message=AssistantMessage(content="8"), counts={"policy_x": 2.0})
    reply = await best_of_turns([cut, cut, whole]).reply(messages=[], tools=[])
    assert (reply.message.content, reply.finish_reason) == ("8", "stop")
    assert reply.counts == {"policy_x": 4.0, BEST_OF_SAMPLES: 3.0}
    assert (await best_of_turns([cut, cut]).reply(messages=[], tools=[])).finish_reason == "length"


async def test_a_message_by_a_score_and_a_fault_among_the_samples(scripts):
    replies = [AssistantMessage(content=text) for text in "8879"]
    reply = await best_of_turns(replies, by=f"{scripts}:is_seven").reply(messages=[], tools=[])
    assert reply.message.content == "7"
    with pytest.raises(PolicyFault, match="gone"):
        await best_of_turns([replies[0], PolicyFault("gone")]).reply(messages=[], tools=[])
    with pytest.raises(PolicyFault, match="KeyError"):
        await best_of_turns(replies, by=f"{scripts}:raises").reply(messages=[], tools=[])


def documented(heading):
    """The names in the first column of the table under a heading of docs/policies.md, with their defaults."""
    text = (Path(__file__).parents[2] / "docs/policies.md").read_text().partition(f"{heading}\n")[2]
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    return {name: row[1].strip("`") for row in cells for name in re.findall(r"`([\w:]+)`", row[0])}


@pytest.mark.parametrize(("heading", "section"), [("## Endpoints", ChatEndpoint), ("## Best of n", BestOf)])
def test_the_documented_options_are_those_that_there_are_and_each_is_read(heading, section):
    found = documented(heading)
    assert found.keys() == section.model_fields.keys() - {"url"}
    for name, default in found.items():
        field = section.model_fields[name]
        assert field.is_required() == (default == ""), name
        told = yaml.safe_load({"none": "null"}.get(default, default))
        assert field.is_required() or field.get_default() == told, name
    reads = Readers().read
    assert [name for name in section.model_fields if (section, name) not in reads] == []


async def test_the_documented_script_plays(tmp_path):
    text = (Path(__file__).parents[2] / "docs/policies.md").read_text()
    path = tmp_path / "my_agent.py"
    path.write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    assert (await play(make_policy(f"scripted:{path}:play"))).messages[-1]["content"] == "I do not know."


def test_the_documented_names_are_those_that_there_are():
    of_evaluations = {f"{SGLANG}URL"}
    assert set(documented("# Policies")) == {*NAMES, *of_evaluations}


async def test_what_was_chosen_among_several_cannot_be_trained_on():
    torch = pytest.importorskip("torch", reason="training is not installed")
    assert torch is not None
    from polyturn.trainer.credit.estimates import make_samples

    chosen = await play(make_policy("best_of", {"policy": "oracle"}))
    assert make_samples([await play(make_policy("oracle"))]) == ()
    with pytest.raises(ValueError, match=r"episode e is the best of 4 samples: .* train without best_of"):
        make_samples([chosen])
