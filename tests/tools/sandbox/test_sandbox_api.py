"""What every backend promises: results, files, reset, persistence, threads."""

import threading

import pytest

from polyturn.tools.sandbox import Limits, make_backend

PATIENCE_S = 20.0


def test_code_runs_as_a_script_does(sandbox):
    result = sandbox.exec(
        "import sys\nprint(sys.argv[1:], input(), __name__)\nprint('warned', file=sys.stderr)\nsys.exit(3)",
        stdin="from stdin\nmore",
        arguments=["a", "b c"],
        timeout_s=PATIENCE_S,
    )
    assert (result.status, result.exit_code, result.ok) == ("ok", 3, False)
    assert result.stdout == "['a', 'b c'] from stdin __main__\n"
    assert result.stderr == "warned\n"
    assert result.detail == ""
    assert result.seconds > 0


def test_an_exception_is_a_result(sandbox):
    result = sandbox.exec("def f(x):\n    return 1 / x\nf(0)", timeout_s=PATIENCE_S)
    assert (result.status, result.exit_code) == ("ok", 1)
    assert 'File "main.py", line 2, in f\n    return 1 / x' in result.stderr
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert "runner" not in result.stderr


def test_code_that_does_not_parse(sandbox):
    result = sandbox.exec("def f(:", timeout_s=PATIENCE_S)
    assert (result.status, result.exit_code) == ("ok", 1)
    assert "SyntaxError" in result.stderr


@pytest.mark.parametrize(
    ("code", "exit_code", "stdout"),
    [
        ("import sys; sys.exit('said')", 1, ""),
        ("raise SystemExit", 0, ""),
        ("import os; os._exit(7)", 7, ""),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("exit(5)", 5, ""),
        ("import atexit; atexit.register(print, 'bye')", 0, "bye\n"),
        ("import threading as t, time\nt.Thread(target=lambda: (time.sleep(.05), print('late'))).start()", 0, "late\n"),
        ("import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__module__)", 0, "__main__\n"),
        ("from __future__ import annotations\ndef f(x: nonsense): pass\nprint('ok')", 0, "ok\n"),
        ("def f(x: int): pass\nprint(f.__annotations__['x'])", 0, "<class 'int'>\n"),
        ("import subprocess\nprint(subprocess.run(['echo', 'hi'], capture_output=True).stdout)", 0, "b'hi\\n'\n"),
        ("import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'print(1)'])", 0, "1\n"),
        ("import multiprocessing as m\nwith m.Pool(2) as p: print(p.map(abs, [-1, -2]))", 0, "[1, 2]\n"),
        ("print(sorted(__import__('sys').modules) and 'runner' in __import__('sys').modules)", 0, "False\n"),
        ("import tempfile\nwith tempfile.NamedTemporaryFile() as f: print(f.write(b'abc'))", 0, "3\n"),
        ("print('\\u00e4\\U0001f600')", 0, "\u00e4\U0001f600\n"),
        ("import sys; sys.stdout.buffer.write(b'\\xff')", 0, "\ufffd"),
    ],
)  # fmt: skip
def test_ends_of_scripts(sandbox, code, exit_code, stdout):
    result = sandbox.exec(code, timeout_s=PATIENCE_S)
    assert (result.status, result.exit_code, result.stdout) == ("ok", exit_code, stdout), result


def test_runs_are_separate_and_files_stay(sandbox):
    assert sandbox.exec(
        "import random\nx = 1\nopen('kept', 'w').write(str(random.random()))", timeout_s=PATIENCE_S
    ).ok
    assert sandbox.exec("x", timeout_s=PATIENCE_S).stderr.endswith("NameError: name 'x' is not defined\n")
    first = sandbox.read_file("kept")
    assert sandbox.exec(
        "import random\nopen('kept', 'w').write(str(random.random()))", timeout_s=PATIENCE_S
    ).ok
    assert sandbox.read_file("kept") != first


def test_a_deadline_ends_code_and_keeps_its_output(sandbox):
    result = sandbox.exec("print('before')\nwhile True: pass", timeout_s=0.5)
    assert (result.status, result.exit_code, result.stdout) == ("timeout", None, "before\n")
    assert "0.5 s" in result.detail
    assert not result.ok
    assert result.seconds >= 0.5
    assert sandbox.alive()


def test_the_deadline_of_the_limits_holds_without_a_timeout(backend):
    with backend.create(Limits(wall_s=0.5)) as sandbox:
        assert sandbox.exec("import time; time.sleep(100)").status == "timeout"


def test_cpu_seconds_end_code(backend):
    with backend.create(Limits(cpu_s=1)) as sandbox:
        result = sandbox.exec("while True: pass", timeout_s=60)
        assert (result.status, result.exit_code) == ("timeout", None)
        assert "CPU" in result.detail


def test_memory_ends_code(sandbox):
    result = sandbox.exec("x = []\nwhile True: x.append(bytearray(1 << 22))", timeout_s=PATIENCE_S)
    assert result.status == "oom"
    assert result.detail


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_bounded(backend, stream):
    with backend.create(Limits(output_bytes=1000)) as sandbox:
        code = f"import sys\nsys.{stream}.write('x' * 1000)"
        fits = sandbox.exec(code, timeout_s=PATIENCE_S)
        assert (fits.status, len(getattr(fits, stream))) == ("ok", 1000)
        too_much = sandbox.exec(f"{code}\nsys.{stream}.write('y')", timeout_s=PATIENCE_S)
        assert (too_much.status, getattr(too_much, stream)) == ("output_limit", "x" * 1000)


def test_large_inputs_reach_the_code(sandbox):
    code = "import sys\nprint(len(sys.stdin.read()))" + "\n# padding" * 200_000
    result = sandbox.exec(code, stdin="x" * 3_000_000, timeout_s=PATIENCE_S)
    assert result.stdout == "3000000\n", result
    assert sandbox.exec("print('did not read')", stdin="x" * 3_000_000, timeout_s=PATIENCE_S).ok


def test_stdin_that_is_not_given_is_empty(sandbox):
    assert sandbox.exec("import sys\nprint(repr(sys.stdin.read()))", timeout_s=PATIENCE_S).stdout == "''\n"


def test_arguments_that_make_no_sense(sandbox):
    for wrong in ({"timeout_s": 0}, {"arguments": "ab"}, {"arguments": ["a\0b"]}):
        with pytest.raises(ValueError):
            sandbox.exec("pass", **wrong)


def test_reset_empties_the_sandbox(sandbox):
    sandbox.exec("x = 1\nopen('file', 'w').close()\nopen('/tmp/file', 'w').close()", fresh=False)
    sandbox.reset()
    assert sandbox.alive()
    result = sandbox.exec(
        "import os\nprint(os.listdir('.'), os.listdir('/tmp'), 'x' in globals())", fresh=False
    )
    assert result.stdout == "[] [] False\n"


def test_a_closed_sandbox_says_so(backend):
    sandbox = backend.create()
    sandbox.close()
    sandbox.close()
    assert not sandbox.alive()
    for use in (lambda: sandbox.exec("pass"), lambda: sandbox.read_file("x"), sandbox.reset):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_sandboxes_do_not_see_each_other(backend):
    with backend.create() as one, backend.create() as other:
        one.write_file("mine", b"secret")
        one.exec("open('/tmp/mine', 'w').close(); open('/dev/shm/mine', 'w').close()", timeout_s=PATIENCE_S)
        code = "import os\nprint([os.listdir(f) for f in ('.', '/tmp', '/dev/shm')])"
        assert other.exec(code, timeout_s=PATIENCE_S).stdout == "[[], [], []]\n"
        with pytest.raises(FileNotFoundError):
            other.read_file("mine")


def test_sixteen_threads_at_a_time(backend):
    failures = []

    def play(number):
        with backend.create() as sandbox:
            for turn in range(3):
                result = sandbox.exec(f"print({number} * 1000 + {turn})", timeout_s=60)
                if result.stdout != f"{number * 1000 + turn}\n":
                    failures.append(result)

    threads = [threading.Thread(target=play, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_threads_that_share_a_sandbox_take_turns(sandbox):
    results = []

    def count():
        results.append(
            sandbox.exec("n = globals().get('n', 0) + 1\nprint(n)", fresh=False, timeout_s=60).stdout
        )

    threads = [threading.Thread(target=count) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted(f"{number}\n" for number in range(1, 17))


def test_unknown_backends_are_named():
    with pytest.raises(ValueError, match="'nothing'"):
        make_backend("nothing")


@pytest.mark.parametrize("field", ["wall_s", "memory_bytes", "num_processes"])
def test_limits_must_be_positive(field):
    with pytest.raises(ValueError, match=field):
        Limits(**{field: 0})
