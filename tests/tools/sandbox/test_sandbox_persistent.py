"""The persistent interpreter: names live on, and when they do not, the result says so."""

import pytest

from polyturn.tools.sandbox import Limits

PATIENCE_S = 20.0


def run(sandbox, code, **options):
    return sandbox.exec(code, fresh=False, **{"timeout_s": PATIENCE_S, **options})


def test_names_live_on(sandbox):
    assert run(sandbox, "x = 20\ndef double(): return 2 * x").ok
    assert run(sandbox, "x += 1").ok
    assert run(sandbox, "print(double())").stdout == "42\n"


def test_an_exception_and_an_exit_lose_nothing(sandbox):
    run(sandbox, "x = 1")
    failed = run(sandbox, "x += 1\nundefined")
    assert (failed.status, failed.exit_code) == ("ok", 1)
    assert 'File "exec_2.py", line 2' in failed.stderr
    assert run(sandbox, "import sys\nsys.exit(4)").exit_code == 4
    assert run(sandbox, "print(x)").stdout == "2\n"


def test_each_execution_has_its_own_streams_and_arguments(sandbox):
    first = run(sandbox, "import sys\nprint(input(), sys.argv[1:])", stdin="one\nrest", arguments=["1"])
    assert first.stdout == "one ['1']\n"
    second = run(sandbox, "print(sys.stdin.read(), sys.argv[1:])", stdin="two", arguments=["2"])
    assert second.stdout == "two ['2']\n"


def test_fresh_executions_leave_it_alone(sandbox):
    run(sandbox, "x = 1")
    assert sandbox.exec("print('x' in globals())", timeout_s=PATIENCE_S).stdout == "False\n"
    leaves_a_daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)"
    assert sandbox.exec(leaves_a_daemon, timeout_s=PATIENCE_S).status == "ok"
    assert sandbox.exec("while True: pass", timeout_s=0.3).status == "timeout"
    assert run(sandbox, "print(x)").stdout == "1\n"


def test_a_timeout_loses_the_names_and_says_so(sandbox):
    run(sandbox, "x = 1")
    late = run(sandbox, "print('before')\nwhile True: pass", timeout_s=0.5)
    assert (late.status, late.stdout) == ("timeout", "before\n")
    assert "names are lost" in late.detail
    assert "NameError" in run(sandbox, "x").stderr
    assert sandbox.alive()


def test_too_much_output_loses_the_names_and_says_so(sandbox):
    run(sandbox, "x = 1")
    flood = run(sandbox, "while True: print('x' * 1000)")
    assert flood.status == "output_limit"
    assert "names are lost" in flood.detail
    assert "NameError" in run(sandbox, "x").stderr


def test_an_interpreter_that_ends_itself_says_so(sandbox):
    run(sandbox, "x = 1")
    ended = run(sandbox, "import os\nprint('last', flush=True)\nos._exit(3)")
    assert (ended.status, ended.exit_code, ended.stdout) == ("ok", 3, "last\n")
    assert "names are lost" in ended.detail
    again = run(sandbox, "print('x' in globals())")
    assert (again.stdout, again.detail) == ("False\n", "")


def test_one_that_dies_between_executions_says_so(sandbox):
    pid = run(sandbox, "import os\nprint(os.getpid())").stdout.strip()
    # Landlock keeps other executions from signalling it where the kernel can; then it lives.
    killed = sandbox.exec(f"import os\nos.kill({pid}, 9)", timeout_s=PATIENCE_S)
    after = run(sandbox, "print('os' in globals())")
    if killed.ok:
        assert after.stdout == "False\n"
        assert "names" in killed.detail + after.detail
    else:
        assert (after.stdout, after.detail) == ("True\n", "")


def test_memory_errors_are_told_and_lose_nothing(sandbox):
    run(sandbox, "x = 1")
    assert run(sandbox, "y = bytearray(1 << 40)").status == "oom"
    assert run(sandbox, "print(x)").stdout == "1\n"


def test_forks_do_not_answer_in_its_place(sandbox):
    forked = run(sandbox, "import os\npid = os.fork()\nprint('child' if pid == 0 else 'parent')")
    assert forked.status == "ok"
    assert "parent\n" in forked.stdout
    assert run(sandbox, "print(pid != 0)").stdout == "True\n"


def test_its_children_end_with_the_execution(sandbox):
    run(sandbox, "import subprocess\np = subprocess.Popen(['sleep', '1000'])")
    assert run(sandbox, "print(p.poll())").stdout == "-9\n"


def test_it_does_not_run_between_executions(sandbox):
    run(sandbox, "import threading\nn = 0\ndef count():\n    global n\n    while True: n += 1")
    run(
        sandbox,
        "threading.Thread(target=count, daemon=True).start()\nimport time\nfirst = time.process_time()",
    )
    before = float(run(sandbox, "print(time.process_time())").stdout)
    sandbox.exec("import time\ntime.sleep(0.7)", timeout_s=PATIENCE_S)
    after = float(run(sandbox, "print(time.process_time())").stdout)
    assert after - before < 0.6


def test_background_processes_see_no_later_stdin(sandbox):
    run(sandbox, "import subprocess\nsubprocess.Popen(['cat'])")
    assert run(sandbox, "print(input())", stdin="for me\n").stdout == "for me\n"


IGNORES = """
import resource, signal
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
for limits in ((-1, -1), (10**6, resource.getrlimit(resource.RLIMIT_CPU)[1])):
    try:
        resource.setrlimit(resource.RLIMIT_CPU, limits)
    except (OSError, ValueError):
        pass
print("burning", flush=True)
"""
BURNS = "while True: pass"
FORKS = "import os\nif os.fork():\n    os.wait()\nwhile True: pass"


@pytest.mark.parametrize("fresh", [True, False])
def test_no_code_has_more_cpu_seconds_than_it_may(backend, fresh):
    with backend.create(Limits(cpu_s=1)) as sandbox:
        for burning in (FORKS,) if fresh else (BURNS, FORKS):
            result = sandbox.exec(f"{IGNORES}{burning}", timeout_s=60, fresh=fresh)
            assert (result.status, result.stdout) == ("timeout", "burning\n")
            assert "CPU" in result.detail
        # What was used before does not count.
        for _ in range(0 if fresh else 2):
            code = "import time\nend = time.process_time() + 0.6\nwhile time.process_time() < end: pass"
            assert sandbox.exec(code, timeout_s=60, fresh=False).ok
