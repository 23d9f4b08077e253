"""Programs graded by what they print."""

import contextlib

import pytest

from polyturn.envs.code.env import builtin_tasks
from polyturn.envs.code.grading import StdioCase, grade_stdio, limits_for, same_output
from polyturn.tools.python import SharedSandboxes
from polyturn.tools.sandbox import Limits

CASES = (StdioCase(stdin="1 2\n", stdout="3\n"), StdioCase(stdin="5 5\n", stdout="10\n"))


@pytest.fixture(scope="module")
def grade():
    with contextlib.closing(SharedSandboxes()) as sandboxes:

        def run(code, cases=CASES, **options):
            with sandboxes.create(limits_for(cases, Limits())) as sandbox:
                return grade_stdio(code, cases, sandbox, **options)

        yield run


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_shipped_solution_passes_and_an_empty_one_does_not(grade, split):
    tasks = builtin_tasks("stdio", split)
    for task in (tasks[i] for i in range(len(tasks))):
        assert grade(task.metadata["canonical_solution"], task.label).all_passed, task.task_id
        assert grade("pass", task.label).num_passed == 0


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("3\n", "3", True),
        ("  3 \n\n", "3\n", True),
        ("1\n2", "1 2", False),
        ("0.50 1", "0.5 1.0", True),
        ("1e2", "100", True),
        ("nan", "nan", True),
        ("nan 1", "nan 1.0", True),
        ("sNaN", "1", False),
        ("inf", "1", False),
        ("1" * 70, "1" * 69 + "2", False),
        ("", "3", False),
        ("3 3", "3", False),
        ("3\n3", "3", False),
        ("yes", "Yes", False),
        ("0.333333 x", "0.3333333333 x", True),
        ("0.33333", "0.3333333333", False),
        ("0.3333333333", "0.33", False),
        ("1234567.89", "1234567.90", False),
        ("50000000000000001", "50000000000000000", False),
        ("50000000000000001", "50000000000000000.000000", False),
        ("inf", "inf.0", False),
    ],
)
def test_what_counts_as_the_same(printed, expected, same):
    assert same_output(printed, expected) is same


@pytest.mark.parametrize(
    "code",
    [
        "import os\nprint('passed')\nos._exit(0)",
        "print(3)",
        "print('3\\n10')",
        "print(*range(1000))",
        "import sys\nsys.exit(0)",
        "while True: pass",
        "print(sum(map(int, input().split())))\nraise SystemExit(1)",
        "x = [0]\nwhile True: x += x",
        "while True: print('3')",
        "import os\nprint(open('/proc/self/environ').read(), os.listdir('.'), os.listdir('/proc'))",
        "",
    ],
)
def test_no_program_that_does_not_solve_it_passes(grade, code):
    assert not grade(code, timeout_s=1.0).all_passed


def test_credit_is_the_fraction_of_cases_and_failures_are_told(grade):
    code = "a, b = map(int, input().split())\nprint(a + b if a < 5 else 'no')"
    report = grade(code, stop_at_first=False)
    assert (report.num_passed, report.num_tests) == (1, 2)
    assert report.failures == ("test 2: for the input '5 5' it must print '10', but it printed 'no'",)
    more = (CASES[1], CASES[0])
    assert grade(code, more).num_passed == 0, "all or nothing stops at the first failure"
    assert grade(code, more, stop_at_first=False).num_passed == 1
    assert "ZeroDivisionError" in grade("1 / 0").failures[0]


def test_all_cases_share_one_limit_of_time(grade):
    report = grade("import time\ntime.sleep(0.4)", CASES * 5, timeout_s=1.0, total_s=0.6, stop_at_first=False)
    assert "no time was left" in report.failures[-1]


def test_a_right_output_is_paid_however_long_it_is(grade):
    numbers = "".join(f"{number}\n" for number in range(100_000))
    case = StdioCase(stdin="100000\n", stdout=numbers)
    code = "for number in range(int(input())):\n    print(number, ' ')"
    assert grade(code, [case], timeout_s=10.0).all_passed
    assert not grade(f"{code}\nprint('.' * 3_000_000)", [case], timeout_s=10.0).all_passed


def test_no_case_finds_what_another_left(grade):
    for name in ("here", "/tmp/here", "/dev/shm/here"):
        code = f"open({name!r}, 'x').write('1')\nprint(sum(map(int, input().split())))"
        assert grade(code, CASES * 3, timeout_s=10.0).all_passed, name
        knows = f"import os\nprint(10 if os.path.exists({name!r}) else 3)\nopen({name!r}, 'w')"
        assert grade(knows, CASES, timeout_s=10.0).num_passed == 1
    locked = "import os\nopen('here', 'x')\nos.chmod('.', 0)\nprint(sum(map(int, input().split())))"
    assert grade(locked, CASES, timeout_s=10.0).all_passed
