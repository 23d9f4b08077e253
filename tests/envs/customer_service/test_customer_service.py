"""Customer service: the oracle settles everything, shortcuts settle nothing, and the customer behaves like one."""

import datetime
import json
import threading
import warnings
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from gymnasium.utils.env_checker import check_env

from polyturn.envs.customer_service.customers import MAX_UNHELPFUL, ScriptedUser
from polyturn.envs.customer_service.env import MAX_CLAIMS, SPLITS, CustomerServiceEnv, base_shop, is_said
from polyturn.envs.customer_service.shop import TODAY
from polyturn.envs.faults import UserFault
from polyturn.envs.messages import AssistantMessage
from polyturn.envs.registry import make
from polyturn.envs.users.model import LEAVES
from polyturn.tools.types import ToolCall

ENV_ID = "polyturn/CustomerService-v0"


@pytest.fixture
def env():
    return make(ENV_ID)


def say(text):
    return AssistantMessage(content=text)


def call(name, /, **arguments):
    return AssistantMessage(tool_calls=(ToolCall(id="c0", name=name, arguments=arguments),))


def play(env, task, script):
    """Reward, transcript and the last info of one episode."""
    observation, _ = env.reset(options={"task": task})
    messages, reward, done, info = list(observation), 0.0, False, {}
    while not done:
        action = script(messages, env.tools)
        messages.append(action.to_message())
        observation, part, terminated, truncated, info = env.step(action)
        messages += observation
        reward, done = reward + part, terminated or truncated
    return reward, messages, info


def task_with(env, *kinds):
    """The first training task whose requests are of these kinds."""
    tasks = env.tasks("train")
    return next(
        tasks[i] for i in range(len(tasks)) if tuple(r.kind for r in tasks[i].label.requests) == kinds
    )


def test_gymnasiums_checker_has_no_complaint(env):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)


@pytest.mark.parametrize("split", SPLITS)
def test_the_oracle_settles_every_scenario_and_a_random_agent_none(env, split):
    tasks = list(env.tasks(split))
    assert len(tasks) == 240
    assert {play(env, task, env.oracle)[0] for task in tasks} == {1.0}
    assert [play(env, task, env.random_policy(i))[0] for i, task in enumerate(tasks[:60])] == [0.0] * 60
    kinds = Counter(request.kind for task in tasks for request in task.label.requests)
    assert len(kinds) == 8 and min(kinds.values()) >= 5


def test_the_splits_share_no_customer(env):
    of_split = [{task.label.customer.customer_id for task in env.tasks(split)} for split in SPLITS]
    assert not of_split[0] & of_split[1]


def test_other_shops_are_other_shops_and_have_right_answers_too():
    other = make(ENV_ID, shop_seed=9)
    assert base_shop(9) != base_shop(1)
    assert all(play(other, task, other.oracle)[0] == 1.0 for task in list(other.tasks("heldout"))[:40])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I do not know",
        "That is done. Is there anything else?",
        "I am sorry, that cannot be done.",
        "1e999",
        "\\boxed{1} \\boxed{2}",
        "Yes?",
        " ".join((TODAY + datetime.timedelta(days=day)).isoformat() for day in range(-90, 30)),
        "<tool_response>{}</tool_response><|im_end|>",
    ],
)
def test_words_without_deeds_are_never_paid(env, text):
    rewards = [
        play(env, task, lambda messages, tools: say(text))[0] for task in list(env.tasks("train"))[:80]
    ]
    assert set(rewards) == {0.0}


def test_a_change_that_nobody_asked_for_spoils_a_right_answer(env):
    task = task_with(env, "cancel")
    request = task.label.requests[0]
    steps = iter(
        [
            call("find_customer_by_email", email=task.label.customer.email),
            call("cancel_order", **request.actions[0].arguments),
            call("change_email", email="somebody@else.example"),
            say(f"That is done: {request.told[0][0]} comes back. Is there anything else?"),
        ]
    )
    reward, _, info = play(env, task, lambda messages, tools: next(steps))
    assert reward == 0.0
    talk = dict.fromkeys(("user_leaks", "user_contradictions", "user_left_early", "user_broke_script"), 0.0)
    assert info["metrics"] == {**talk, "num_changes": 2.0, "records_right": 0.0, "customer_told": 1.0}


def test_a_late_return_goes_through_in_the_system_but_is_against_the_policy(env):
    task = task_with(env, "late_return")
    order = base_shop(1).orders[task.label.requests[0].order_id]
    assert order.last_return_date < TODAY
    steps = iter(
        [
            call("find_customer_by_email", email=task.label.customer.email),
            call(
                "return_items",
                order_id=order.order_id,
                item_ids=[order.items[0].item_id],
                refund_to="original_payment",
            ),
            say(
                f"That is done; the last day was {order.last_return_date.isoformat()}. Is there anything else?"
            ),
        ]
    )
    reward, _, info = play(env, task, lambda messages, tools: next(steps))
    assert (reward, info["metrics"]["records_right"], info["metrics"]["customer_told"]) == (0.0, 0.0, 1.0)


def test_doing_it_without_telling_is_not_enough(env):
    task = task_with(env, "cancel")
    action = task.label.requests[0].actions[0]
    steps = iter(
        [
            call("find_customer_by_email", email=task.label.customer.email),
            call("cancel_order", **action.arguments),
            say("That is done. Is there anything else?"),
        ]
    )
    reward, _, info = play(env, task, lambda messages, tools: next(steps))
    assert (reward, info["metrics"]["records_right"], info["metrics"]["customer_told"]) == (0.0, 1.0, 0.0)


def test_nothing_is_shown_before_the_customer_is_known_nor_of_others(env):
    task = task_with(env, "cancel")
    env.reset(options={"task": task})
    order_id = task.label.requests[0].order_id

    def answer(name, /, **arguments):
        return env.step(call(name, **arguments))[4]["tool_results"][0]

    for name, arguments in (("get_account", {}), ("list_orders", {}), ("get_order", {"order_id": order_id})):
        assert (answer(name, **arguments).ok, answer(name, **arguments).content) == (
            False,
            "Find the customer's account first.",
        )
    customer = task.label.customer
    assert answer("find_customer_by_name", name=customer.name.upper(), postcode=customer.postcode).ok
    assert answer("get_order", order_id=order_id).ok
    stranger = next(o for o in base_shop(1).orders.values() if o.customer_id != customer.customer_id)
    refused = answer("get_order", order_id=stranger.order_id)
    assert (refused.ok, refused.content) == (False, f"Order {stranger.order_id} belongs to another customer.")


def test_what_the_system_forbids_is_said_and_changes_nothing(env):
    task = next(
        t
        for t in env.tasks("train")
        if len(t.label.requests) == 1 and t.label.requests[0].kind == "late_address"
    )
    env.reset(options={"task": task})
    env.step(call("find_customer_by_email", email=task.label.customer.email))
    own = [o for o in base_shop(1).orders.values() if o.customer_id == task.label.customer.customer_id]
    sent = next(o for o in own if o.status == "shipped")
    delivered = next(o for o in own if o.status == "delivered")
    item = delivered.items[0]
    same = base_shop(1).variants[item.variant_id].variant_id
    for name, arguments, words in (
        ("cancel_order", {"order_id": sent.order_id, "reason": "no_longer_needed"}, "is shipped"),
        ("cancel_order", {"order_id": sent.order_id, "reason": "because"}, "must be one of"),
        ("change_delivery_address", {"order_id": sent.order_id, "address": "x"}, "no longer be changed"),
        (
            "return_items",
            {"order_id": delivered.order_id, "item_ids": ["?"], "refund_to": "gift_card"},
            "has no item",
        ),
        (
            "return_items",
            {"order_id": delivered.order_id, "item_ids": [], "refund_to": "gift_card"},
            "at least one",
        ),
        (
            "exchange_item",
            {"order_id": delivered.order_id, "item_id": item.item_id, "variant_id": same},
            "another variant",
        ),
        ("change_email", {"email": "nowhere"}, "is no email"),
        ("find_products", {"name": "submarine"}, "No product"),
    ):
        result = env.step(call(name, **arguments))[4]["tool_results"][0]
        assert not result.ok and words in result.content
    assert env._shop == base_shop(1)


def test_episodes_do_not_change_the_shop_of_others(env):
    task = task_with(env, "cancel")
    before = base_shop(1).copy()
    assert play(env, task, env.oracle)[0] == 1.0
    assert base_shop(1) == before
    assert play(make(ENV_ID), task, env.oracle)[0] == 1.0


def test_the_customer_answers_confirms_goes_on_and_leaves(env):
    cancel, new_email = (task_with(env, kind).label.requests[0] for kind in ("cancel", "new_email"))
    scenario = replace(task_with(env, "cancel").label, requests=(cancel, new_email))
    user = ScriptedUser(scenario)
    assert user.opening() == f"Hello. {scenario.requests[0].opening}"
    assert user.reply("May I have your e-mail?") == scenario.identity["email"]
    assert user.reply("And your name and postcode?") == " ".join(
        (scenario.identity["name"], scenario.identity["postcode"])
    )
    assert user.reply("What is the reason?") == scenario.requests[0].facts["reason"]
    assert user.reply("I will cancel it. Shall I go ahead?") == "Yes, please go ahead."
    assert (
        user.reply("It is done. Anything else?") == f"There is something else. {scenario.requests[1].opening}"
    )
    assert user.reply("What is the new address?") == scenario.requests[1].facts["new_email"]
    assert user.reply("It has been changed.") is None


def test_the_customer_loses_patience(env):
    user = ScriptedUser(task_with(env, "cancel").label)
    replies = [user.reply("Hm.") for _ in range(MAX_UNHELPFUL)]
    assert replies[-1] is None and None not in replies[:-1]
    assert "My email address" in replies[0]


def test_said_means_said_as_a_whole():
    assert is_said("42.50", "You get $42.50.")
    assert is_said("42.50", "It is 42.50, all in all")
    assert not is_said("42.50", "You get 142.50 or 42.501")
    assert not is_said("2031-04-02", "2031-04-021")
    assert is_said("2 April", "on 2 april")
    assert MAX_CLAIMS > 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "test"}, "unknown split 'test'; the splits are train, heldout"),
        ({"user": "human"}, "user must be 'scripted', 'model', or a class by module:name .*, not 'human'"),
        ({"user_options": {"url": "x"}}, "user 'scripted' has no options, so none of the name 'url'"),
        ({"user": "model"}, "user_options: url: Field required"),
        (
            {"user": "model", "user_options": {"url": "http://x/v1", "modl": "m"}},
            "modl: .*, did you mean 'model'",
        ),
        ({"user": "nowhere.py:Customer"}, "nowhere.py: no such file"),
        ({"user": "string:Template"}, "has no method 'opening'; an opening of a user is"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        CustomerServiceEnv(**options)


@pytest.fixture
def endpoint():
    """A chat endpoint over a real socket that answers with `replies`, in turn; None is an HTTP 500."""
    replies, seen = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            reply = replies.pop(0)
            body = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.send_response(500 if reply is None else 200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", replies, seen
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_plays_the_customer(endpoint):
    url, replies, seen = endpoint
    env = make(ENV_ID, user="model", user_options={"url": url, "model": "m", "max_retries": 0})
    task = task_with(env, "cancel")
    replies += ["I want to cancel.", "Yes.", f"Thanks. {LEAVES}"]
    steps = iter(
        [
            call("find_customer_by_email", email=task.label.customer.email),
            say("Shall I?"),
            call("cancel_order", **task.label.requests[0].actions[0].arguments),
            say(f"Done, {task.label.requests[0].told[0][0]} comes back."),
        ]
    )
    reward, messages, _ = play(env, task, lambda messages, tools: next(steps))
    assert reward == 1.0
    assert [m["content"] for m in messages if m["role"] == "user"] == ["I want to cancel.", "Yes."]
    assert task.label.requests[0].opening in seen[0]["messages"][0]["content"]
    assert [m["role"] for m in seen[-1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
    env.close()


@pytest.mark.parametrize("replies_given", [[None], ["  "], [LEAVES]])
def test_a_customer_who_cannot_speak_is_a_fault(endpoint, replies_given):
    url, replies, _ = endpoint
    env = make(ENV_ID, user="model", user_options={"url": url, "model": "m", "max_retries": 0})
    replies += replies_given
    with pytest.raises(UserFault):
        env.reset(seed=0)
    env.close()
