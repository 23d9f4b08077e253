"""Tests are run, whatever their form: right code is paid, and only right code."""
# ruff: noqa: E501

import contextlib
import json

import pytest

from polyturn.envs.code.grading import BrokenTests, as_unit_tests, grade_unit_tests
from polyturn.tools.python import SharedSandboxes


@pytest.fixture(scope="module")
def grade():
    with contextlib.closing(SharedSandboxes()) as sandboxes:

        def run(code, label, **options):
            with sandboxes.create() as sandbox:
                return grade_unit_tests(code, as_unit_tests(label), sandbox, **options)

        yield run


def source(test, entry_point="f", **others):
    return {"test": test, "entry_point": entry_point, **others}


RAISES = "def check(candidate):\n    try:\n        candidate(-1)\n        assert False\n    except ValueError:\n        pass\n"
EVEN = "def f(x):\n    if x < 0: raise ValueError\n    return x % 2 == 0"
ODD = "def f(x):\n    return x % 2 == 1"
TREE = "class Tree:\n    def __init__(self, x, left=None):\n        self.x, self.left = x, left\n\n"

# Name: (label, right code, wrong code).
FORMS = {
    "unittest": (
        source(
            "import unittest\nclass TestF(unittest.TestCase):\n    def test_even(self):\n        self.assertTrue(f(2))\n"
            "    def test_odd(self):\n        self.assertFalse(f(3))\n    def test_all(self):\n"
            "        for x in range(4):\n            with self.subTest(x):\n                self.assertEqual(f(x), x % 2 == 0)\n"
            "    def test_negative(self):\n        with self.assertRaises(ValueError):\n            f(-2)\n"
            "if __name__ == '__main__':\n    unittest.main()\nunittest.main()"
        ),
        EVEN,
        ODD,
    ),
    "unittest with a set-up": (
        source(
            "import unittest\nfrom solution import f\nclass Case(unittest.TestCase):\n    def setUp(self):\n"
            "        self.x = 2\n    def test(self):\n        assert f(self.x) is True"
        ),
        EVEN,
        ODD,
    ),
    "a check that returns a truth value": (source("def check(g):\n    return g(2) is True"), EVEN, ODD),
    "functions as pytest runs them": (
        source("from solution import f\ndef test_even():\n    assert f(2)\ndef test_odd():\n    assert not f(3)"),
        EVEN,
        ODD,
    ),
    "pytest's own names": (
        source(
            "import pytest\nfrom solution import f\n@pytest.mark.parametrize('x, even', [(2, True), (3, False)])\n"
            "def test_all(x, even):\n    assert f(x) is even\n@pytest.mark.parametrize('x', [4, pytest.approx(6)])\n"
            "@pytest.mark.slow\ndef test_one(x):\n    assert x == 6 or f(x)\ndef test_negative():\n"
            "    with pytest.raises(ValueError):\n        f(-1)\nclass TestMore:\n    def setup_method(self):\n"
            "        self.x = 8\n    def test_it(self):\n        assert f(self.x)\n"
            "    @pytest.mark.parametrize('x', range(0, 9, 2))\n    def test_each(self, x):\n        assert f(x)\n"
            "if __name__ == '__main__':\n    pytest.main()"
        ),
        EVEN,
        ODD,
    ),
    "an exception that must come, by pytest": (
        source("import pytest\ndef test_it():\n    with pytest.raises(StopIteration, match='over'):\n        f()"),
        "def f(): raise StopIteration('it is over')",
        "def f(): raise StopIteration('x')",
    ),
    "numbers that are near": (
        source("import pytest\ndef test_it():\n    assert f() == pytest.approx([0.3, 1])"),
        "def f(): return [0.1 + 0.2, 1]",
        "def f(): return [0.31, 1]",
    ),
    "an exception that must come": (source(RAISES), EVEN, ODD),
    "any exception must come": (source(RAISES.replace("ValueError", "Exception")), EVEN, ODD),
    "the same by hand": (
        source("try:\n    f(-1)\n    raised = False\nexcept Exception:\n    raised = True\nassert raised"),
        EVEN,
        ODD,
    ),
    "assertions in branches": (
        source("for x in range(4):\n    if x % 2:\n        assert not f(x)\n    else:\n        assert f(x)"),
        EVEN,
        ODD,
    ),
    "a helper that nobody calls": (
        source("def helper():\n    assert f(1) == 99\ndef check(candidate):\n    assert candidate(2)"),
        EVEN,
        ODD,
    ),
    "a helper that is called": (
        source("def holds(x, y):\n    assert f(x) is y\n    return 1\ndef check(c):\n    holds(2, True)\n    holds(3, False)"),
        EVEN,
        ODD,
    ),
    "one of several is right": (
        source(
            "def check(candidate):\n    for wanted in (7, True):\n        try:\n            assert candidate(2) == wanted\n"
            "            break\n        except AssertionError:\n            pass\n    else:\n        assert False"
        ),
        EVEN,
        "def f(x): return 3",
    ),
    "an assertion whose failure is swallowed": (
        source("try:\n    assert f(2)\nexcept Exception:\n    pass\nassert f(4) is not None"),
        EVEN,
        ODD,
    ),
    "a data class from before the function": (
        source(
            "assert f(2) and not f(3)",
            prompt="from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
            "def f(x):\n",
        ),
        f"from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Q:\n    x: int\n{EVEN}",
        ODD,
    ),
    "a name that is given to a lambda": (source("assert f(2)", prompt="def f(x):\n"), "f = lambda x: x % 2 == 0", ODD),
    "in place, deep inside, by name": (
        source("row = [1]\nrows = [row]\nf(x=rows)\nassert row == [1, 2] and rows[0] is row"),
        "def f(x): x[0].append(2)",
        "def f(x): x[0] = [1, 2, 3]",
    ),
    "an exception class of the prompt's": (
        source(
            "try:\n    f(1)\n    assert False\nexcept Odd as e:\n    assert str(e) == 'one'",
            prompt="class Odd(Exception):\n    pass\ndef f(x):\n",
        ),
        "def f(x): raise Odd('one')",
        "def f(x): raise KeyError('one')",
    ),
    "a subclass of a built-in exception": (
        source("try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass"),
        "class TooSmall(ValueError): pass\ndef f(x): raise TooSmall(x)",
        "class TooSmall(Exception): pass\ndef f(x): raise TooSmall(x)",
    ),
    "an exception with arguments of its own": (
        source("import json\ntry:\n    f('{')\n    assert False\nexcept ValueError:\n    pass"),
        "import json\ndef f(x): return json.loads(x)",
        "def f(x): return {}",
    ),
    "an exception of a library's": (
        source("import decimal\ntry:\n    f('x')\n    assert False\nexcept decimal.InvalidOperation:\n    pass"),
        "from decimal import Decimal\ndef f(x): return Decimal(x)",
        "def f(x): raise ValueError",
    ),
    "the end of an iteration that must come": (
        source("try:\n    f()\n    assert False\nexcept StopIteration:\n    pass"),
        "def f(): return next(iter([]))",
        "def f(): raise ValueError",
    ),
    "an exit that must come": (
        source("try:\n    f()\n    assert False\nexcept SystemExit:\n    pass"),
        "import sys\ndef f(): sys.exit(2)",
        "def f(): raise Exception",
    ),
    "a method of a class": (
        source("def check(candidate):\n    assert candidate(2) is True", entry_point="Solution().is_even"),
        "class Solution:\n    def is_even(self, x: List[int]) -> Optional[bool]: return x % 2 == 0",
        "class Solution:\n    def is_even(self, x): return x % 2 == 1",
    ),
    "a method that the tests make themselves": (
        source(
            "assert Solution().is_even(2) is True",
            entry_point="Solution.is_even",
            prompt="class Solution:\n    def is_even(self, x):\n",
        ),
        "return x % 2 == 0",
        "return x % 2 == 1",
    ),
    "the form of APPS": (
        {"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [[3], [[1, 2]]]},
        "class Solution:\n    def add(self, a, b): return a + b",
        "class Solution:\n    def add(self, a, b): return 3",
    ),
    "the form of APPS as text, a function, whole keys": (
        json.dumps({"fn_name": "f", "inputs": [[{"1": "a"}], [{"2": "b"}]], "outputs": [{"1": ["a", 1.1]}, {"2": ["b", 2.2]}]}),
        "def f(d): return {k: (v, k * 1.1) for k, v in d.items()}",
        "def f(d): return {}",
    ),
    "a whole number that no float is": (
        {"entry_point": "f", "cases": [{"args": [50000000000000001], "expected": [50000000000000001]}]},
        "def f(x): return [x // 1]",
        "def f(x): return [x / 1]",
    ),
    "floats by their value": (
        {"entry_point": "f", "cases": [{"args": [0.1, 0.2], "expected": 0.3}, {"args": [1.0, 1.0], "expected": 2}]},
        "def f(x, y): return x + y",
        "def f(x, y): return round(x + y, 1) + 1e-7",
    ),
    "a long list": (
        {"entry_point": "f", "cases": [{"args": [300_000], "expected": list(range(300_000))}]},
        "def f(n): return list(range(n))",
        "def f(n): return list(range(n - 1)) + [0]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_right_code_is_paid_and_only_right_code(grade, name):
    label, right, wrong = FORMS[name]
    report = grade(right, label, timeout_s=20.0)
    assert report.all_passed, report
    assert not grade(wrong, label, timeout_s=20.0).all_passed


# What happens to a solution is no exception that a test could wait for, and what it raises ends nothing of a test's.
EVENTS = {
    "leaves": "import os\ndef f(x): os._exit(0)",
    "never comes back": "def f(x):\n    while True: pass",
    "gives an object": "def f(x): return object()",
    "gives a class": "def f(x): return int",
    "gives a list of objects": "def f(x): return [object()]",
    "writes nonsense": "import os\ndef f(x):\n    for fd in range(3, 99):\n        try: os.write(fd, b'{]\\n')\n        except OSError: pass",
    "writes an answer of another kind": (
        "import os\ndef f(x):\n    for fd in range(3, 99):\n        try: os.write(fd, b'{\"error\": 5}\\n')\n"
        "        except OSError: pass"
    ),
    "kills itself": "import os\ndef f(x): os.kill(os.getpid(), 9)",
    "stops itself": "import os\ndef f(x): os.kill(os.getpid(), 19)",
    "closes its pipes": "import os\ndef f(x): os.closerange(0, 99)",
    "needs more memory": "def f(x): return [0] * (1 << 33) and 5",
    "kills the tests": "import os\ndef f(x): os.kill(os.getppid(), 9)",
    "recurses in its answer": "def f(x):\n    v = []\n    for _ in range(90000): v = [v]\n    return v",
}
EXPECTING = (
    "try:\n    f(-1)\n    raised = False\nexcept Exception:\n    raised = True\nassert raised",
    "try:\n    f(-1)\n    raised = False\nexcept:\n    raised = True\nassert raised",
    "import unittest\nclass Case(unittest.TestCase):\n    def test(self):\n        with self.assertRaises(Exception):\n"
    "            f(-1)\n    @unittest.expectedFailure\n    def test_other(self):\n        self.assertEqual(f(-1), 1)",
)


@pytest.mark.parametrize("name", EVENTS)
def test_no_event_is_the_exception_that_a_test_expects(grade, name):
    if name == "needs more memory":
        # A MemoryError is an exception of the solution's own, as it would be anywhere.
        assert grade(EVENTS[name], source("assert f(-1) == 5")).num_passed == 0
        return
    for test in EXPECTING:
        report = grade(EVENTS[name], source(test), timeout_s=1.5)
        assert not report.all_passed, test
        assert report.fraction <= 0.5


SWALLOWED = [
    "assert all(map(f, range(5)))",
    "assert all(f(x) for x in range(5))",
    "assert [x for x, y in zip(map(f, [1, 2]), [True, True]) if not y] == []",
    "for x in map(f, range(3)):\n    assert x is True\nassert True",
    "assert not any(map(f, range(5)))",
    "assert list(map(f, [1])) == []",
    "import unittest\nclass Case(unittest.TestCase):\n    def test(self):\n        self.assertTrue(all(map(f, [1, 2])))",
]


@pytest.mark.parametrize(
    "kind",
    [
        "StopIteration",
        "StopAsyncIteration",
        "GeneratorExit",
        "SystemExit",
        "KeyboardInterrupt",
        "AssertionError",
    ],
)
def test_what_a_solution_raises_ends_no_loop_of_a_test(grade, kind):
    for code in (
        f"def f(x): raise {kind}",
        f"class Mine({kind}): pass\ndef f(x): raise Mine",
        "import unittest\ndef f(x): raise unittest.SkipTest('no')",
        "class SkipTest(Exception): pass\ndef f(x): raise SkipTest",
    ):
        for test in SWALLOWED[:: 1 if "raise " + kind in code else 3]:
            assert grade(code, source(test)).num_passed == 0, (code, test)


def test_a_test_is_not_skipped_by_what_the_solution_raises(grade):
    test = (
        "import unittest\nfrom unittest import SkipTest\nclass Case(unittest.TestCase):\n    def test(self):\n"
        "        self.assertEqual(f(1), 2)\n    def test_more(self):\n        self.assertEqual(f(1), 2)"
    )
    code = "import unittest\ndef f(x): raise unittest.SkipTest('no')"
    assert grade(code, source(test)).num_passed == 0
    assert grade("class SkipTest(Exception): pass\ndef f(x): raise SkipTest", source(test)).num_passed == 0


BROKEN = [
    "assert f(f(1)) == 2",
    "x = f(1)\nassert f(x) is None",
    "def check(candidate):\n    return candidate(candidate(1)) == 1",
    "name = f(1)\nassert undefined",
    "f(1)\nimport no_such_module\nassert f(2)",
]
MISCHIEF = [
    "def f(x):\n    v = 1\n    for _ in range(100): v = [v]\n    return v",
    "def f(x): return object()",
    "def f(x): return range(1) and [0] * 2_100_000",
    "def f(x): raise NameError('x')",
    "def f(x): raise ImportError('x')",
    "raise ImportError('x')",
    "import os, signal\nfor _ in range(3): os.fork()\ndef f(x): return {1: {2: {3}}}",
    "def f(x): return '\\ud800'",
]


@pytest.mark.parametrize("code", MISCHIEF)
def test_a_program_cannot_say_that_the_task_is_broken(grade, code):
    for test in BROKEN:
        assert not grade(code, source(test), timeout_s=5.0).all_passed


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ("import no_such_module\nassert f(1)", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("assert undefined(1) == f(1)", "NameError"),
        ("try:\n    f(lambda: 1)\nexcept:\n    pass\nassert f(1)", "a value of type function"),
        ("def test_it(fixture, other):\n    assert f(1)", "nothing is known to give to fixture, other"),
        ("def test_it(fixture):\n    assert f(1) == fixture", "nothing is known to give to fixture"),
    ],
)
def test_tests_that_fail_by_themselves_are_the_tasks_fault(grade, test, words):
    if "undefined" in test:
        # In an assertion it is one that fails; before any it is nobody's but the test's.
        assert not grade("def f(x): return 1", source(test)).all_passed
        return
    with pytest.raises(BrokenTests, match=words):
        grade("def f(x): return 1", source(test))


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ("pass\nf", "asserts nothing"),
        ("# nothing but a comment", "asserts nothing"),
        ("def check(candidate):\n    pass", "asserts nothing"),
        ("def check(candidate):\n    candidate(1)", "asserts nothing"),
        ("def check(candidate):\n    candidate(1) == 2\n    return True", "asserts nothing"),
        ("def check(candidate):\n    print(candidate(1))\n    assert True", "asserts nothing"),
        ("assert (f(1) == 2, 'why')", "asserts nothing"),
        ("def check(candidate):\n    assert candidate(1) == 2 or True", "asserts nothing"),
        ("try:\n    assert f(1) == 2\nexcept AssertionError:\n    print('failed')", "asserts nothing"),
        ("def check(candidate):\n    assert 1 == 1 + 0", "never calls"),
        ("def check(candidate):\n    assert other(1) == 2", "never calls"),
        ("import unittest\ndef helper():\n    assert f(1) == 2", "nothing of the test is run"),
        ("def check(candidate:", "no Python"),
        (">>> f(1)\n2", "no Python"),
    ],
)
def test_tests_that_tell_nothing_are_refused_at_the_start_with_their_row(tmp_path, test, words):
    from polyturn.envs.code.env import CodeUnitTestsEnv

    with pytest.raises(ValueError, match=words):
        as_unit_tests(source(test))
    path = tmp_path / "rows.jsonl"
    right = {"prompt": "def f(x):\n", "entry_point": "f", "test": "assert f(1) == 2"}
    path.write_text(f"{json.dumps(right)}\n{json.dumps(right | {'test': test})}\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{words}"):
        CodeUnitTestsEnv(path=path)


def test_a_solution_that_is_never_called_or_tests_that_are_never_reached_pay_nothing(grade):
    for test in (
        "if f is None:\n    assert f(1)",
        "assert f is not None",
        "def check(candidate):\n    for x in []:\n        assert f(x)",
    ):
        assert grade("def f(x): return 1", source(test)).num_passed == 0 or "is not None" in test
        assert not grade("def f(x): return 1", source(test)).all_passed


@pytest.mark.parametrize(
    "test",
    [
        "    try:\n        candidate(-1)\n    except ValueError:\n        return\n    assert False",
        "    try:\n        candidate(-1)\n    except ValueError:\n        pass\n    else:\n        raise AssertionError",
        "    try:\n        candidate(-1)\n        raise AssertionError\n    except ValueError:\n        pass",
        "    match candidate(2):\n        case True: pass\n        case _: assert False",
        "    if candidate(2) is not True:\n        raise AssertionError",
    ],
)
def test_code_that_keeps_clear_of_every_denial_is_right(grade, test):
    label = source(f"def check(candidate):\n{test}")
    assert grade(EVEN, label).all_passed
    assert not grade("def f(x): return 7", label).all_passed


def test_a_denial_that_the_test_itself_catches_pays_nobody(grade):
    label = source(
        "def check(candidate):\n    try:\n        candidate(2)\n        raise ValueError\n    except Exception:\n        pass"
    )
    assert not grade(EVEN, label).all_passed
