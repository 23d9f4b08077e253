"""Rules: what they pay, and what nobody should be paid for."""

from pathlib import Path

import pytest

from polyturn.envs.messages import AssistantMessage, EpisodeView, Task, as_score
from polyturn.envs.rewards import contains, exact_match, f1, normalise_answer
from polyturn.envs.rewards.answers import find_answer, is_refusal, read_number, stated_number
from polyturn.envs.rewards.rules import RULES, make_rule
from polyturn.tools.sandbox import SandboxUnavailable


def view(answer, label=None, **fields):
    task = Task.from_prompt("t", "p", label=label)
    return EpisodeView(task=task, message=AssistantMessage(content=answer), messages=(), **fields)


def paid(rule, said, label, **options):
    return as_score(make_rule(rule, options)(view(said, label))).value


def test_exact_match_normalises_as_squad_does():
    assert normalise_answer(" The  Town, of Ashford! ") == "town of ashford"
    assert exact_match("ashford.", "Ashford") == 1.0
    assert exact_match("Ash ford", "Ashford") == 0.0
    assert exact_match("b", ["a", "B"]) == 1.0
    assert exact_match("theatre", "atre") == 0.0


@pytest.mark.parametrize(
    ("answer", "gold"), [("", ""), ("the", "a"), ("!", "?"), ("", "The"), ("   ", " "), ("a", "")]
)
def test_nothing_never_equals_nothing(answer, gold):
    """Articles and punctuation normalise to nothing, and two nothings are not an answer."""
    for compare in (exact_match, f1, contains):
        assert compare(answer, gold) == 0.0


def test_a_gold_answer_of_which_nothing_is_left_is_compared_as_it_stands():
    assert exact_match("a", "A") == 1.0
    assert exact_match(" + ", "+") == 1.0
    assert exact_match("-", "+") == 0.0


def test_f1_counts_words_in_common():
    assert f1("the big red dog", "red dog") == pytest.approx(2 * 2 / (3 + 2))
    assert f1("dog dog dog", "dog") == pytest.approx(2 * 1 / (3 + 1))
    assert f1("cat", "dog") == 0.0
    assert f1("yes it is", "yes") == 0.0
    assert f1("yes", "no way, yes") == 0.0
    assert f1("Yes.", "yes") == 1.0
    assert f1("big dog", ["cat", "dog"]) == pytest.approx(2 / 3)


def test_contains_wants_whole_words_and_few_of_them():
    assert contains("It is in Paris, France.", "paris") == 1.0
    assert contains("comparison", "paris") == 0.0
    assert contains(" ".join(f"town{i}" for i in range(65)) + " paris", "paris") == 0.0


REFUSALS = [
    "I do not know.",
    "I don't know",
    "I don\u2019t know, it may be Paris",
    "Unknown",
    "I am not sure, Paris?",
    "idk Paris",
    "Sorry, I cannot answer: Paris",
    "It cannot be determined",
    "N/A",
]


@pytest.mark.parametrize("answer", REFUSALS)
def test_a_refusal_is_not_paid(answer):
    assert is_refusal(answer)
    for rule in ("exact_match", "f1", "contains"):
        assert paid(rule, answer, "Paris do not know unknown") == 0.0


def test_an_answer_that_only_sounds_like_a_refusal_is_none():
    assert not is_refusal("I know it is Paris")
    assert not is_refusal("Not only Paris")
    assert paid("exact_match", "unknown", "Unknown") == 1.0, "where that is the right answer it is paid"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"),
        ("-1,234.5", "-1234.5"),
        ("2e3", "2000"),
        ("3/4", "0.75"),
        ("12 %", "12"),
        ("$5", "5"),
        ("\u22125", "-5"),
        (".5", "0.5"),
        ("5.", "5"),
    ],
)
def test_plain_numbers_are_read_exactly(text, number):
    assert read_number(text) == stated_number(text) == read_number(number) is not None


@pytest.mark.parametrize(
    "text",
    [
        "1e999",
        "-1e999",
        "inf",
        "-inf",
        "Infinity",
        "nan",
        "1e308",
        "9" * 200,
        "1e99999999",
        "1/0",
        "0x10",
        "9**9**9",
        "",
    ],
)
def test_what_is_not_finite_or_too_large_is_no_number(text):
    assert stated_number(text) is None
    with pytest.raises(ValueError, match="numeric: the label must be a number"):
        make_rule("numeric").check_label(text)
    assert paid("numeric", text, 5) == 0.0
    assert paid("numeric", text, 10**90, relative=0.99) == 0.0


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        ("The answer is 42.", 1),
        ("6 * 7 gives 42\n#### 42", 1),
        ("I got $42 in all", 1),
        ("**42**", 1),
        ("42 or 43", 0),
        ("41 42 43", 0),
        ("The answer is 41. The answer is 42.", 0),
        ("The answer is 42. The answer is 42", 1),
        ("<think>41</think>42", 1),
        ("<think>42", 0),
        ("forty-two", 0),
        ("4 2", 0),
        ("142", 0),
    ],
)
def test_numeric_pays_one_stated_number(answer, worth):
    assert paid("numeric", answer, 42) == worth
    assert paid("numeric", answer, "42.0") == worth


def test_numeric_tolerances_are_inclusive_and_exact():
    assert paid("numeric", "0.3", 0.3) == 1.0
    assert paid("numeric", "0.30000000000000004", 0.3) == 0.0
    assert paid("numeric", "101", 100, relative=0.01) == 1.0
    assert paid("numeric", "102", 100, relative=0.01) == 0.0
    assert paid("numeric", "100.5", 100, absolute=0.5) == 1.0
    for option in ({"absolute": -1}, {"relative": float("nan")}, {"absolute": float("inf")}):
        with pytest.raises(ValueError, match="must be a finite number of at least 0"):
            make_rule("numeric", option)


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "(B)",
        "B.",
        "B) Paris",
        "**B**",
        "The answer is (B).",
        "Answer: **B**",
        "Option B",
        "It\n\nB",
        r"Final answer: \boxed{B}",
        r"The answer is \boxed{\text{B}}",
        "The answer is B, not A",
        "answer is B. B.",
    ],
)
def test_multiple_choice_reads_the_letter(answer):
    assert paid("multiple_choice", answer, "B") == 1.0
    assert paid("multiple_choice", answer, 1) == 1.0
    assert paid("multiple_choice", answer, "A") == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "A or B",
        "A, B",
        "The answer is A or B",
        "The answer is A. The answer is B.",
        "A B C D",
        "(A) (B)",
        "A/B/C/D",
        "Answer: A, B, C and D",
        "The answer is (A) (B)",
        r"\boxed{A} \boxed{B}",
        "",
        "ABCD",
        "A dog",
        "b) no: B or C",
        "I do not know",
    ],
)
def test_multiple_choice_pays_no_hedge(answer):
    assert [paid("multiple_choice", answer, letter) for letter in "ABCD"] == [0.0] * 4


def test_where_the_answer_stands():
    text = "<think>\\boxed{1}</think>It is \\boxed{\\frac{1}{2}}, so <answer> half </answer>\nDone"
    assert find_answer(text, "boxed") == r"\frac{1}{2}"
    assert find_answer(text, "tag") == "half"
    assert find_answer(text, "last_line") == "Done"
    assert find_answer(r"\boxed{1} \boxed{ 1 }", "boxed") == "1"
    for hedge in (r"\boxed{1} \boxed{2}", r"\boxed{1", "no box"):
        assert find_answer(hedge, "boxed") is None
    for hedge in ("<answer>a</answer><answer>b</answer>", "<answer></answer>", "<answer>a"):
        assert find_answer(hedge, "tag") is None
    assert find_answer("x" * 30_000) is None
    assert paid("exact_match", "so <answer>Paris</answer>", "paris", answer="tag") == 1.0


def test_regex_finds_or_compares():
    assert paid("regex", "order 123-45 sent", None, pattern=r"\d{3}-\d{2}") == 1.0
    assert paid("regex", "order 123-45 sent", None, pattern=r"\d{3}-\d{2}", whole=True) == 0.0
    assert paid("regex", "city: Paris.", "paris", pattern=r"city: (\w+)") == 1.0
    assert paid("regex", "city: Rome.", "paris", pattern=r"city: (\w+)") == 0.0
    for pattern, words in (
        ("(", "cannot be read"),
        ("(a)(b)", "more than one group"),
        ("a*", "matches an empty"),
    ):
        with pytest.raises(ValueError, match=words):
            make_rule("regex", {"pattern": pattern})


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        (" <think>\na\n</think>\n\n<answer>b</answer>\n", 1),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think></think><answer>b</answer>", 0),
        ("<think>a</think><answer> </answer>", 0),
        ("<think>a</think><answer>b</answer> more", 0),
        ("<think>a</think>more<answer>b</answer>", 0),
        ("<think>a<think>a</think></think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0),
        ("<think>a</think>", 0),
        ("", 0),
    ],
)
def test_format_wants_each_tag_once_and_in_order(text, worth):
    assert paid("format", text, None) == worth


def test_math_and_unit_tests_are_rules_too():
    assert paid("math", r"so \boxed{\frac12}", "0.5") == 1.0
    assert paid("math", r"so \boxed{\frac13}", "0.5") == 0.0
    assert paid("math", "1e999", "inf") == 0.0
    label = {"entry_point": "f", "cases": [{"args": [2], "expected": 4}]}
    make_rule("unit_tests").check_label(label)
    for wrong in ("text", {"entry_point": "f"}, {"entry_point": "f", "tests": "x", "test": "y"}):
        with pytest.raises(ValueError, match="unit_tests: the label"):
            make_rule("unit_tests").check_label(wrong)
    assert paid("unit_tests", "no code at all", label) == 0.0


def test_unit_tests_pay_code_that_passes():
    label = {"entry_point": "f", "cases": [{"args": [2], "expected": 4}, {"args": [3], "expected": 6}]}
    codes = {"2 * x": 1.0, "x + 2": 0.0}
    try:
        for code, worth in codes.items():
            assert paid("unit_tests", f"```python\ndef f(x):\n    return {code}\n```", label) == worth
        half = "```python\ndef f(x):\n    return x + 2\n```"
        assert paid("unit_tests", half, label, partial_credit=True) == 0.5
    except SandboxUnavailable as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize(
    ("rule", "label"),
    [
        ("exact_match", None),
        ("exact_match", ""),
        ("f1", []),
        ("contains", ["a", ""]),
        ("multiple_choice", "K"),
        ("multiple_choice", True),
        ("multiple_choice", -1),
        ("numeric", "many"),
        ("numeric", True),
        ("math", ""),
    ],
)
def test_a_label_that_cannot_be_used_is_an_error_and_no_zero(rule, label):
    with pytest.raises(ValueError, match=rule):
        make_rule(rule).check_label(label)
    with pytest.raises(ValueError, match=rule):
        make_rule(rule)(view("anything", label))


def test_an_unknown_rule_or_option_is_told_with_the_nearest():
    with pytest.raises(ValueError, match="no reward rule 'exactmatch'; did you mean 'exact_match'"):
        make_rule("exactmatch")
    with pytest.raises(ValueError, match=r"no reward rule 'zzz'; there are exact_match, f1"):
        make_rule("zzz")
    with pytest.raises(
        ValueError, match="reward rule 'numeric' has no option 'absolut'; did you mean 'absolute'"
    ):
        make_rule("numeric", {"absolut": 1})
    with pytest.raises(ValueError, match=r"reward rule 'regex': .*pattern"):
        make_rule("regex")
    with pytest.raises(ValueError, match="f1: answer must be all, last_line, boxed or tag"):
        make_rule("f1", {"answer": "box"})


# What a model might try for each rule, beside what is tried above. None of it may be paid.
HACKS = [
    "",
    " ",
    ".",
    "I do not know",
    "1e999",
    "inf",
    "nan",
    "True",
    "{}",
    "[]",
    "label",
    "answer",
    "null",
    "\x00",
]
HACKS += [
    "\\boxed{}",
    "<answer></answer>",
    "</think>",
    "<think>",
    "*",
    "?",
    "()",
    "A B C D E F G H I J",
    "0 1 2 3 4",
]


@pytest.mark.parametrize(
    ("rule", "label", "right"),
    [
        ("exact_match", "Paris", "Paris"),
        ("f1", "Paris", "Paris"),
        ("contains", "Paris", "in Paris"),
        ("multiple_choice", "C", "C"),
        ("numeric", 3, "3"),
        ("math", "3", "3"),
    ],
)
def test_no_hack_is_paid(rule, label, right):
    assert paid(rule, right, label) == 1.0, "the rule pays what is right"
    assert {hack: paid(rule, hack, label) for hack in HACKS if paid(rule, hack, label)} == {}


def test_every_rule_is_documented():
    text = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert [name for name in RULES if f"| `{name}` |" not in text] == []
