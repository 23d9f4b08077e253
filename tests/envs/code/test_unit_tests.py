"""Unit tests of what a model wrote: right code passes, and nothing that code does is a verdict."""

import contextlib
import json

import pytest

from polyturn.envs.code.env import builtin_tasks
from polyturn.envs.code.grading import BrokenTests, UnitTests, as_unit_tests, grade_unit_tests
from polyturn.envs.code.harness import MAGIC_NUMBER, harness
from polyturn.envs.code.harness.values import DoesNotCross, Opaque, Packer, unpack
from polyturn.tools.python import SandboxFailed, SharedSandboxes
from polyturn.tools.sandbox import ExecResult

TESTS = UnitTests(
    test="def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(5) == 6\n"
    "    assert candidate(-1) == 0",
    entry_point="increase",
    prompt='import math\n\ndef helper(x):\n    return x\n\ndef increase(x: int) -> int:\n    """One more."""\n',
)


@pytest.fixture(scope="module")
def sandboxes():
    with contextlib.closing(SharedSandboxes()) as shared:
        yield shared


@pytest.fixture
def grade(sandboxes):
    def run(code, tests=TESTS, **options):
        with sandboxes.create() as sandbox:
            return grade_unit_tests(code, tests, sandbox, **options)

    return run


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_shipped_solution_passes_and_an_empty_one_does_not(grade, split):
    for task in [
        builtin_tasks("unit_tests", split)[i] for i in range(len(builtin_tasks("unit_tests", split)))
    ]:
        assert grade(task.metadata["canonical_solution"], task.label).all_passed, task.task_id
        public = grade(task.metadata["canonical_solution"], task.metadata["public"])
        assert public.all_passed
        assert public.num_tests == 2
        empty = f"def {task.label.entry_point}(*a): pass"
        assert grade(empty, task.label).num_passed == 0, task.task_id


@pytest.mark.parametrize(
    "code",
    [
        "def increase(x):\n    return x + 1",
        "    return x + 1",
        "\n  \n    y = 1\n    return x + y",
        "return x + 1",
        "y = 1\nreturn helper(x) + y",
        "async def other(): pass\ndef increase(x): return math.floor(x + 1.5)",
        "print('noise', flush=True)\ndef increase(x):\n    print('noise')\n    return True if x == 0 else x + 1",
    ],
)
def test_an_answer_is_the_function_or_its_body_with_what_the_prompt_defines(grade, code):
    assert grade(code).all_passed


# Each is paid by some grader that runs tests and solution in one namespace or process, or believes what is printed.
FORGERIES = {
    "leaves with status 0": "import os\nos._exit(0)",
    "leaves when called": "import os\ndef increase(x): os._exit(0)",
    "exits": "import sys\nsys.exit(0)",
    "exits when called": "def increase(x): raise SystemExit(0)",
    "equals everything": (
        "class Any:\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n    __hash__ = lambda s: 0\n"
        "def increase(x): return Any()"
    ),
    "an int that equals everything": (
        "class Any(int):\n    __eq__ = lambda s, o: True\n    __hash__ = lambda s: 0\ndef increase(x): return Any(99)"
    ),
    "a text that equals everything": (
        "class Any(str):\n    __eq__ = lambda s, o: True\n    __hash__ = lambda s: 0\n"
        "    __str__ = lambda s: '2'\ndef increase(x): return Any('x')"
    ),
    "a decorator over check": "def pay(f): return lambda *a: None\n@pay\ndef check(candidate): pass\nincrease = pay(0)",
    "its own check": "def check(candidate): return True\ndef increase(x): return 99",
    "builtins": (
        "import builtins\nfor n in ('all', 'any', 'isinstance', 'exec', 'compile', 'eval', 'len', 'print'):\n"
        "    setattr(builtins, n, lambda *a, **k: True)\nbuiltins.AssertionError = builtins.Exception = KeyError\n"
        "def increase(x): return 99"
    ),
    "unittest and operator": (
        "import unittest, operator, ast\nunittest.TestCase.assertEqual = lambda *a, **k: None\n"
        "operator.eq = lambda a, b: True\nast.Assert = ast.Pass\ndef increase(x): return 99"
    ),
    "a printed verdict": (
        'import sys, os\nfor fd in range(0, 20):\n    try: os.write(fd, b\'\\n{"passed": 3, "total": 3, '
        '"failures": []}\\nAll tests passed\\n1.0\\n\')\n    except OSError: pass\ndef increase(x): return 99'
    ),
    "the harness's own names": (
        "import __main__\nfor name in list(vars(__main__)):\n    if callable(vars(__main__)[name]):\n"
        "        setattr(__main__, name, lambda *a, **k: {'value': 2})\ndef increase(x): return 99"
    ),
    "frames": (
        "import sys\ndef increase(x):\n    f = sys._getframe()\n    while f:\n"
        "        for k in list(f.f_globals):\n            if 'passed' in k or 'record' in k: f.f_globals[k] = 3\n"
        "        f = f.f_back\n    return 99"
    ),
    "the garbage player": (
        "import gc\ndef increase(x):\n    for o in gc.get_objects():\n"
        "        if isinstance(o, str) and 'assert' in o: raise ValueError(o)\n"
        "        if isinstance(o, dict) and 'nonce' in o: return x + 1\n    return 99"
    ),
    "modules in the work folder": (
        "import os\nfor n in ('json', 'ast', 'io', 'random', 'decimal', 'fractions', 'collections'):\n"
        "    open(n + '.py', 'w').write('import os; os.write(1, b\"passed\"); os._exit(0)')\ndef increase(x): return 99"
    ),
    "replies before questions": (
        'import os, json\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"value": null}\\n{"value": 99, '
        '"arguments": [1], "passed": 3}\\n\' * 5)\n    except OSError: pass\ndef increase(x): return 99'
    ),
    "nonsense for replies": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[' * 100000 + b'\\n')\n    except OSError: pass\n"
        "def increase(x): return 99"
    ),
    "kills the tests": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef increase(x): return 99",
    "interrupts the tests": (
        "import os, signal\ndef increase(x):\n    os.kill(os.getppid(), signal.SIGINT)\n    return 99"
    ),
    "kills everyone": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "raises what the test might expect": "def increase(x): raise AssertionError()",
    "never ends": "while True: pass",
    "never ends when called": "def increase(x):\n    while True: pass",
    "an endless text": "def increase(x): return 'x' * (1 << 26)",
    "a value without an end": "def increase(x):\n    v = []\n    v.append(v)\n    return v",
    "a deep value": "def increase(x):\n    v = 2\n    for _ in range(500): v = [v]\n    return v",
    "a broken program": "def increase(x:\n",
    "nothing": "",
    "no such function": "def decrease(x): return x",
    "control characters": "\x00\ud800",
    "no function": "increase = 2",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_no_forgery_is_paid(grade, name):
    report = grade(FORGERIES[name], timeout_s=1.0)
    assert report.num_passed == 0, report
    assert report.num_tests >= 1
    assert report.failures


def test_the_solution_can_read_neither_the_tests_nor_the_nonce(grade):
    code = (
        "import os\n"
        "def look():\n"
        "    found = []\n"
        "    for pid in [os.getppid(), 1]:\n"
        "        for name in ('mem', 'fd/0', 'fd/1', 'environ', 'maps'):\n"
        "            try:\n"
        "                with open(f'/proc/{pid}/{name}', 'rb') as f: f.read(1)\n"
        "                found.append(f'{pid}/{name}')\n"
        "            except OSError: pass\n"
        "    return found\n"
        "def increase(x): raise ValueError(str(look()) + str(sorted(os.listdir('/proc/self/fd'))))\n"
    )
    (first, *_) = grade(code).failures
    assert "ValueError: [][" in first, first


def test_the_tests_import_nothing_that_the_solution_wrote(grade):
    code = "def f(x):\n    open('colorsys.py', 'w').write('ONE_THIRD = 99')\n    return 99"
    test = "f(1)\nimport colorsys\nassert f(1) == colorsys.ONE_THIRD"
    assert grade(code, UnitTests(test=test, entry_point="f")).num_passed == 0


def test_credit_counts_assertions_and_goes_on_after_a_failed_one(grade):
    report = grade("def increase(x): return x + 1 if x > 0 else 7")
    assert (report.num_passed, report.num_tests, report.all_passed) == (2, 3, False)
    assert report.failures == ("candidate(-1) == 0",)
    assert report.reward(partial_credit=True) == pytest.approx(2 / 3)
    assert report.reward(partial_credit=False) == 0.0


def test_what_is_lost_in_the_middle_counts_as_failed(grade):
    report = grade(
        "def increase(x):\n    if x == 5:\n        while True: pass\n    return x + 1", timeout_s=1.0
    )
    assert (report.num_passed, report.num_tests) == (1, 3)
    assert "took too long" in report.failures[0]


VALUES = """
None, True, 0, -(2**70), 1.5, 0.1 + 0.2, "ä\\x00", b"\\xff", bytearray(b"x"), (1, (2,)), [1, [2]], {1: {"a": 2}},
{1, 2}, frozenset({3}), 2 + 3j, range(2, 9, 3), [], {}, (), deque([1, [2]], 3), OrderedDict([(2, 1), (1, 2)]),
Counter("aab"),
Decimal("0.10"), Decimal("1e400"), Fraction(-1, 3), date(2026, 2, 28), datetime(2026, 2, 28, 23, 59, 1, 5), time(1, 2),
timedelta(days=-1, seconds=5), list(range(300_000)), "x" * 1_000_000, float("inf"), 10**5000
"""
IMPORTS = """
from collections import Counter, OrderedDict, deque
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
"""


def test_values_cross_as_they_are(grade):
    values = eval(f"[{VALUES}]", (names := {}, exec(IMPORTS, names))[0])
    for value in values:
        for lenient in (True, False):
            back = unpack(json.loads(json.dumps(Packer(lenient=lenient).pack(value))))
            assert back == value
            assert type(back) is type(value)
    with pytest.raises(DoesNotCross):
        Packer(lenient=False).pack([object()])
    told = unpack(Packer(lenient=True).pack([1, object()]))
    assert (told[0], type(told[1])) == (1, Opaque)
    test = f"{IMPORTS}\nimport sys\nsys.set_int_max_str_digits(0)\nfor value in [{VALUES}]:\n"
    test += "    assert same(value) == value and type(same(value)) is type(value)"
    report = grade("def same(x): return x", UnitTests(test=test, entry_point="same"), timeout_s=30.0)
    assert report.all_passed, report
    assert report.num_tests == len(values)


LAZY = [
    ("return (x for x in [1, 2])", "list(f()) == [1, 2]"),
    ("return map(str, [1, 2])", "list(f()) == ['1', '2']"),
    ("return zip([1], 'a')", "next(f()) == (1, 'a')"),
    ("return {1: 2}.keys()", "f() == {1}"),
    ("return {1: [2]}.values()", "list(f()) == [[2]]"),
    ("return {1: 2}.items()", "sorted(f()) == [(1, 2)]"),
    ("return reversed([1, 2])", "[*f()] == [2, 1]"),
]


def test_what_can_be_gone_through_once_crosses_as_such(grade):
    for body, test in LAZY:
        assert grade(f"def f():\n    {body}", UnitTests(test=f"assert {test}", entry_point="f")).all_passed, (
            body
        )
    assert not grade(
        "def f(): return map(str, [1])", UnitTests(test="assert f() == ['1']", entry_point="f")
    ).num_passed


def test_arguments_that_are_changed_in_place_are_changed_for_the_test_too(grade):
    test = "xs = [3, 1, 2]\nassert arrange(xs) is None\nassert xs == [1, 2, 3]"
    assert grade("def arrange(xs): xs.sort()", UnitTests(test=test, entry_point="arrange")).all_passed
    assert not grade("def arrange(xs): pass", UnitTests(test=test, entry_point="arrange")).all_passed


def test_exceptions_cross_by_name(grade):
    test = "try:\n    f(0)\nexcept ValueError as e:\n    assert str(e) == 'zero'\nelse:\n    assert False"
    tests = UnitTests(test=test, entry_point="f")
    assert grade("def f(x): raise ValueError('zero')", tests).num_passed == 1
    assert grade("def f(x): raise KeyError('zero')", tests).num_passed == 0
    assert grade("class ValueError(Exception): pass\ndef f(x): return 1", tests).num_passed == 0


def test_rows_of_arguments_and_values_are_tests_too(grade):
    cases = [{"args": [1, 2], "expected": [3]}, {"args": [], "kwargs": {"b": 1}, "expected": [1]}]
    tests = as_unit_tests({"cases": cases, "entry_point": "f"})
    assert grade("def f(a=0, b=0): return [a + b]", tests).num_passed == 2


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ("def check(candidate:", "the test is no Python"),
        ("assert candidate(lambda: 1) == 2", "the test gives the solution a value of type function"),
    ],
)
def test_tests_that_cannot_be_run_are_the_tasks_fault(grade, test, words):
    with pytest.raises(BrokenTests, match=words):
        grade("def f(x): return 2", UnitTests(test=test, entry_point="f"))


class Broken:
    """A sandbox whose results are given: what a backend says when it, and not the code, fails."""

    def __init__(self, *statuses):
        self.statuses, self.resets = list(statuses), 0

    def exec(self, code, **options):
        status = self.statuses.pop(0) if self.statuses else "ok"
        exit_code = 0 if status == "ok" else None
        return ExecResult(
            status=status, stdout="", stderr="no room", exit_code=exit_code, seconds=0.0, detail="x"
        )

    def reset(self):
        self.resets += 1

    def alive(self):
        return True


@pytest.mark.parametrize(
    "statuses", [["setup_error"] * 3, ["sandbox_died", "sandbox_died"], ["ok"], ["timeout"], ["oom"]]
)
def test_a_sandbox_that_fails_before_the_solution_runs_is_never_a_failed_test(statuses):
    with pytest.raises(SandboxFailed):
        grade_unit_tests("def increase(x): return x + 1", TESTS, Broken(*statuses))


def test_an_interpreter_of_another_version_compiles_the_harness_itself(grade, monkeypatch):
    other = harness().replace(f"MAGIC = {MAGIC_NUMBER!r}", "MAGIC = b'another'")
    assert other != harness()
    monkeypatch.setattr("polyturn.envs.code.grading.harness", lambda: other)
    assert grade("def increase(x): return x + 1").all_passed
    assert grade("def increase(x): return x").num_passed == 0
