"""read_file and write_file reach the work folder and nothing else, whatever the code put there."""

import pytest

PATIENCE_S = 20.0
OUTSIDE = ("/etc/passwd", "../etc/passwd", "a/../../etc/passwd", "/work/x", "", ".", "a\0b")


def run(sandbox, code):
    result = sandbox.exec(code, timeout_s=PATIENCE_S)
    assert result.ok, result


def test_files_go_in_and_out(sandbox):
    data = bytes(range(256)) * 1000
    sandbox.write_file("a/b/c.bin", data)
    assert sandbox.read_file("a/b/c.bin") == data
    assert sandbox.read_file("./a//b/c.bin") == data
    run(sandbox, "import pathlib\np = pathlib.Path('a/b/c.bin')\np.write_bytes(p.read_bytes()[:10])")
    assert sandbox.read_file("a/b/c.bin") == data[:10]
    sandbox.write_file("a/b/c.bin", b"short")
    assert sandbox.read_file("a/b/c.bin") == b"short"
    sandbox.write_file("empty", b"")
    assert sandbox.read_file("empty") == b""


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_that_leave_are_refused(sandbox, path):
    with pytest.raises(ValueError):
        sandbox.read_file(path)
    with pytest.raises(ValueError):
        sandbox.write_file(path, b"x")


def test_symbolic_links_are_not_followed(sandbox):
    run(
        sandbox,
        "import os\n"
        "os.symlink('/etc/passwd', 'file')\n"
        "os.symlink('/etc', 'folder')\n"
        "os.symlink('.', 'here')\n"
        "os.symlink('nowhere', 'dangling')\n"
        "os.mkdir('real')\n"
        "os.symlink('../file', 'real/deep')",
    )
    for path in ("file", "folder/passwd", "here/file", "dangling", "real/deep", "here/real/new"):
        with pytest.raises(ValueError):
            sandbox.read_file(path)
        with pytest.raises(ValueError):
            sandbox.write_file(path, b"x")
    run(sandbox, "import os\nassert not os.path.lexists('nowhere') and os.listdir('real') == ['deep']")


def test_what_is_not_a_regular_file(sandbox):
    run(
        sandbox,
        "import os, socket\nos.mkfifo('pipe')\nos.mkdir('folder')\nsocket.socket(socket.AF_UNIX).bind('socket')",
    )
    for path in ("pipe", "socket"):
        with pytest.raises(ValueError):
            sandbox.read_file(path)
        with pytest.raises(ValueError):
            sandbox.write_file(path, b"x")
    with pytest.raises(IsADirectoryError):
        sandbox.read_file("folder")
    with pytest.raises(OSError):
        sandbox.write_file("folder", b"x")


def test_missing_and_forbidden_files(sandbox):
    with pytest.raises(FileNotFoundError):
        sandbox.read_file("missing")
    run(
        sandbox,
        "import os\nopen('secret', 'w').write('x')\nos.chmod('secret', 0)\nos.mkdir('shut')\nos.chmod('shut', 0)",
    )
    with pytest.raises(PermissionError):
        sandbox.read_file("secret")
    with pytest.raises(PermissionError):
        sandbox.write_file("shut/file", b"x")


def test_reading_is_bounded(sandbox):
    sandbox.write_file("file", b"x" * 1001)
    assert len(sandbox.read_file("file", max_bytes=1001)) == 1001
    with pytest.raises(ValueError, match="1001"):
        sandbox.read_file("file", max_bytes=1000)
    run(sandbox, "import os\nos.truncate('file', 8 << 20)")  # as large as a file may be
    with pytest.raises(ValueError):
        sandbox.read_file("file")


def test_writing_more_than_the_folder_holds(sandbox):
    with pytest.raises(OSError):
        sandbox.write_file("large", b"x" * (17 << 20))
    sandbox.write_file("small", b"x")
    assert sandbox.alive()


WATCHES = """
import ctypes, fcntl, os
from pathlib import Path
shared = next(path for path in (os.__file__, os.__file__ + "c") if os.path.exists(path))
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, call):
    try:
        result = call()
    except OSError as error:
        print(name, "refused", error.errno)
    else:
        print(name, "refused" if result == -1 else "BREACH")
with open(shared) as file, open("own", "w") as own:
    attempt("inotify", lambda: libc.inotify_init())
    attempt("inotify1", lambda: libc.inotify_init1(0))
    attempt("flock", lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
    attempt("shared flock", lambda: fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB))
    attempt("lockf", lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
    attempt("lease", lambda: fcntl.fcntl(file, 1024, 0))
    folder = os.open(os.path.dirname(shared), os.O_RDONLY)
    attempt("dnotify", lambda: fcntl.fcntl(folder, 1026, 0x1F))
    fcntl.lockf(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    import sqlite3
    with sqlite3.connect("data.db") as data:
        data.execute("create table t (x)")
        data.execute("insert into t values (1)")
    print(sqlite3.connect("data.db").execute("select x from t").fetchall())
"""


def test_nothing_is_watched_or_locked_that_others_use(sandbox):
    told = sandbox.exec(WATCHES, timeout_s=20)
    assert told.ok, told
    lines = told.stdout.splitlines()
    assert lines[-1] == "[(1,)]"
    assert len(lines) == 8
    assert all("refused" in line for line in lines[:-1]), lines


def test_later_executions_have_their_own_priority_and_processors(sandbox):
    shows = "import os\nprint(os.nice(0), sorted(os.sched_getaffinity(0)))"
    before = sandbox.exec(shows, timeout_s=20).stdout
    changes = """
import os
os.nice(5)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for process in (1, os.getppid()):
    for change in (
        lambda: os.setpriority(os.PRIO_PROCESS, process, 10),
        lambda: os.setpriority(os.PRIO_USER, 0, 10),
        lambda: os.sched_setaffinity(process, {max(os.sched_getaffinity(0))}),
    ):
        try:
            change()
            print("BREACH")
        except OSError:
            pass
"""
    assert sandbox.exec(changes, timeout_s=20).stdout == ""
    assert sandbox.exec(shows, timeout_s=20).stdout == before
