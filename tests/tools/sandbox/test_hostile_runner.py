"""Code that attacks the runner, or what comes after it, changes no result but its own."""

import pytest

from tests.support.hostile.containment import (
    PATIENCE_S,
    answer,
    assert_contained,
    breached,
    num_processes,
    run,
    signals_are_scoped,
)
from tests.support.hostile.persistent import NEIGHBOUR, PERSISTENT
from tests.support.hostile.runner import RUNNER
from tests.support.hostile.snippet import SMALL


@pytest.mark.parametrize("snippet", RUNNER, ids=lambda snippet: snippet.name.replace(" ", "-"))
def test_hostile(snippet, sandbox, baits):
    assert_contained(snippet, sandbox, baits)


@pytest.mark.parametrize("snippet", PERSISTENT, ids=lambda snippet: snippet.name.replace(" ", "-"))
def test_hostile_in_the_persistent_interpreter(snippet, sandbox, baits):
    before = num_processes(sandbox)
    result = run(snippet, sandbox, baits, fresh=False)
    assert not breached(result), result
    assert result.status in snippet.ends, result
    assert snippet.says in result.stdout, result
    # What it did to its interpreter is its own business; nobody else's result is changed.
    assert answer(sandbox, "print(6 * 7)") == "42"
    later = sandbox.exec("import sys; sys.exit(3)", timeout_s=PATIENCE_S)
    assert (later.status, later.exit_code) == ("ok", 3)
    assert not breached(later)
    # One that is left in peace may be there.
    assert num_processes(sandbox) <= before + 1
    baits.assert_untouched()
    sandbox.reset()
    assert answer(sandbox, "print(6 * 7)", fresh=False) == "42"


def test_the_persistent_interpreter_outlives_an_attack_from_beside_it(sandbox, baits):
    assert answer(sandbox, "name = 42; print(name)", fresh=False) == "42"
    if not signals_are_scoped():
        pytest.skip("the kernel's landlock has no scope of signals (Linux 6.12)")
    result = run(NEIGHBOUR, sandbox, baits)
    assert not breached(result), result
    assert NEIGHBOUR.says in result.stdout
    assert answer(sandbox, "print(name)", fresh=False) == "42"


def test_late_answers_are_not_taken_for_the_next_ones(sandbox, baits):
    (snippet,) = [snippet for snippet in PERSISTENT if "answers later" in snippet.name]
    run(snippet, sandbox, baits, fresh=False)
    for status in range(3):
        result = sandbox.exec(f"import time, sys; time.sleep(0.1); sys.exit({status})", fresh=False)
        assert result.status != "ok" or result.exit_code == status


def test_nothing_of_an_episode_is_left_after_a_reset(sandbox):
    write = """
import os
for folder in (os.getcwd(), "/tmp", "/dev/shm"):
    try:
        open(f"{folder}/leak", "w").write("x")
    except OSError as error:
        print(folder, error.errno)
name = 1
"""
    read = """
import os
print([f for f in (os.getcwd(), "/tmp", "/dev/shm") if os.path.exists(f"{f}/leak")], "name" in globals())
"""
    assert sandbox.exec(write, fresh=False).ok
    assert answer(sandbox, read, fresh=False).endswith("True")
    sandbox.reset()
    assert answer(sandbox, read, fresh=False) == "[] False"


def test_sandboxes_do_not_see_each_other(backend):
    with backend.create(SMALL) as one, backend.create(SMALL) as other:
        for folder in (".", "/tmp", "/dev/shm"):
            one.exec(f"open('{folder}/leak', 'w').write('x')")
        looks = "import os; print([f for f in ('.', '/tmp', '/dev/shm') if os.path.exists(f + '/leak')])"
        assert answer(other, looks) == "[]"
        listens = """
import socket, time
server = socket.socket(socket.AF_UNIX)
server.bind("\\0neighbour")
server.listen()
print("listening", flush=True)
server.settimeout(0.5)
try:
    server.accept()
    print("BREACH")
except TimeoutError:
    pass
"""
        connects = """
import socket
try:
    socket.socket(socket.AF_UNIX).connect("\\0neighbour")
    print("BREACH")
except OSError:
    pass
"""
        import threading

        results = []
        thread = threading.Thread(target=lambda: results.append(one.exec(listens)))
        thread.start()
        for _ in range(5):
            results.append(other.exec(connects))
        thread.join()
        assert not any(breached(result) for result in results)
        # Killing all there is ends nobody else's processes.
        other.exec("import os; os.kill(-1, 9)")
        assert one.alive()
        assert answer(one, "print(6 * 7)") == "42"
