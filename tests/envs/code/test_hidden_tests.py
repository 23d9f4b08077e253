"""What a grader knows is nowhere in the memory of the program that it grades, on any backend."""

import contextlib

import pytest

from polyturn.envs.code.env import builtin_tasks
from polyturn.envs.code.grading import UnitTests, grade_unit_tests
from polyturn.tools.sandbox import SandboxUnavailable, make_backend

PLANTED = "quetzalcoatlus-northropi"

# Reads all of its own memory that can be read, kernel's copies of its pipes left out, which it does not hold.
LOOKING = r"""
import ctypes, gc, re, sys

ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # its own memory, through /proc, is closed to it until it says this

def memory():
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as mem:
        for line in maps:
            span, mode, *_ = line.split()
            start, end = (int(number, 16) for number in span.split("-"))
            if mode[0] == "r" and "[v" not in line:
                mem.seek(start)
                yield mem.read(end - start)

def objects():
    seen, queue = set(), [*gc.get_objects(), *gc.get_objects(generation=2), *sys.modules.values()]
    while queue:
        one = queue.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, (str, bytes, bytearray)):
            yield bytes(one, "utf-8", "replace") if isinstance(one, str) else bytes(one)
        queue += gc.get_referents(one)

def frames():
    frame = sys._getframe()
    while frame:
        yield repr((frame.f_locals, frame.f_globals.keys())).encode("utf-8", "replace")
        frame = frame.f_back
"""


def masked(word):
    return bytes(byte ^ 1 for byte in word.encode())


# It never holds the word that it looks for, or it would find itself.
SOLUTION = f"""{LOOKING}
mask = bytes(byte ^ 1 for byte in range(256))
def found(masked_word):
    looks = (memory, objects, frames)
    return [look.__name__ for look in looks if any(masked_word in block.translate(mask) for block in look())]
own = "a word of its own"
def f(x):
    mine = own
    raise ValueError(str((found({masked(PLANTED)}), found({masked("a word of its own")}))))
"""
NOTHING = "([], ['memory', 'objects', 'frames'])"
"""It sees its own word, and not the tests'."""

THIEF = (
    LOOKING
    + r"""
def steal(*given):
    for block in memory():
        for text in re.findall(rb"assert \w+\([^\x00]*?(?=\\n|\n)", block):
            text = text.decode("utf-8", "replace").replace('\\"', '"')
            for middle in [match.start() for match in re.finditer(" == ", text)]:
                asked = []
                try:
                    eval(re.sub(r"^assert \w+", "ask", text[:middle]), {"ask": lambda *a: asked.append(a)})
                    if asked[-1] == given:
                        return eval(text[middle + 4 :])
                except Exception:
                    pass
"""
)


@pytest.fixture(scope="module", params=["native", "bubblewrap", "docker"])
def backend(request):
    if request.param == "docker":
        made = make_backend("docker", host=request.getfixturevalue("docker_host"))
    else:
        try:
            made = make_backend("embedded", launcher=request.param)
        except SandboxUnavailable as reason:
            pytest.skip(str(reason))
    with contextlib.closing(made):
        yield made


def test_a_solution_finds_no_word_of_the_tests_in_its_memory(backend):
    tests = UnitTests(
        test=f"assert f(1) == '{PLANTED}'\nassert f(2) == '{PLANTED}', '{PLANTED}'", entry_point="f"
    )
    with backend.create() as sandbox:
        for _ in range(3):  # nor in what the same sandbox has graded before
            report = grade_unit_tests(SOLUTION, tests, sandbox, timeout_s=60)
            assert report.num_passed == 0
            found = report.failures[0].rpartition("ValueError: ")[2]
            assert found == f"{NOTHING})"
    with backend.create() as sandbox:
        # Whatever else goes in and out: code, stdin, arguments and output of executions before.
        for fresh in (True, False):
            print_it = f"import sys\nprint('{PLANTED}', input(), sys.argv)\nprint(input(), file=sys.stderr)"
            told = sandbox.exec(print_it, stdin=f"{PLANTED}\n{PLANTED}", arguments=[PLANTED], fresh=fresh)
            assert told.stdout.count(PLANTED) == 3
            assert told.stderr.count(PLANTED) == 1
        code = f"{SOLUTION}\ntry:\n    f(1)\nexcept ValueError as error:\n    print(error)"
        assert sandbox.exec(code, timeout_s=60).stdout == f"{NOTHING}\n"


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_program_that_knows_no_problem_is_paid_for_none(backend, every):
    paid = []
    for split in ("train", "heldout"):
        tasks = builtin_tasks("unit_tests", split)
        for task in (tasks[index] for index in range(0, len(tasks), every)):
            with backend.create() as sandbox:
                code = f"{THIEF}\ndef {task.label.entry_point}(*given): return steal(*given)"
                report = grade_unit_tests(code, task.label, sandbox, timeout_s=20.0)
            paid.append(report.num_passed)
    assert set(paid) == {0} and len(paid) >= 16 // every
