"""Hostile snippets that use up descriptors, time and output. They run under `hostile.SMALL`."""

from tests.support.hostile.snippet import FLOODS, SYSTEM_CALLS, TIMES_OUT, WAIT_S, Hostile

DESCRIPTORS = [
    Hostile(
        name="open files without end",
        code="""
import os
count = 0
try:
    while count < 800:
        os.open("/dev/null", os.O_RDONLY)
        count += 1
    print("BREACH", count)
except OSError as error:
    print("stopped at", count, error.errno)
""",
        says="stopped at",
    ),
    Hostile(
        name="inotify instances and watches without end",
        code="""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
instances = []
while len(instances) < 5000 and (new := libc.inotify_init1(0)) >= 0:
    instances.append(new)
watches = 0
for number in range(2000):
    try:
        os.mkdir(f"w{number}")
    except OSError:
        break
    watches += sum(libc.inotify_add_watch(i, f"w{number}".encode(), 2) >= 0 for i in instances[:8])
print("BREACH" if len(instances) > 256 else "stopped at", len(instances), watches)
""",
        says="stopped at",
    ),
    Hostile(
        name="epoll, eventfd and timerfd without end",
        code=SYSTEM_CALLS
        + """
import select
polls = []
try:
    while len(polls) < 5000:
        polls.append(select.epoll())
except OSError:
    pass
count = len(polls)
del polls
files = 0
while files < 5000 and call(290, 0, 0)[0] >= 0 and call(283, 1, 0)[0] >= 0:
    files += 2
print("BREACH" if count > 256 or files > 256 else "stopped at", count, files)
""",
        says="stopped at",
        x86_64_only=True,
    ),
    Hostile(
        name="POSIX message queues",
        code=SYSTEM_CALLS
        + """
made = 0
for number in range(1000):
    if call(240, ctypes.c_char_p(f"q{number}".encode()), 0o102, 0o600, 0)[0] < 0:
        break
    made += 1
print("BREACH" if made > 256 else "stopped at", made)
""",
        says="stopped at",
        x86_64_only=True,
    ),
    Hostile(
        name="System V shared memory",
        code=SYSTEM_CALLS
        + """
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
kept = 0
for number in range(40):
    identifier = libc.shmget(0, 50 << 20, 0o1600)
    if identifier < 0:
        break
    address = libc.shmat(identifier, None, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        break
    ctypes.memset(address, 1, 50 << 20)
    libc.shmdt(ctypes.c_void_p(address))
    kept += 1
print("BREACH" if kept > 6 else "stopped at", kept)
""",
        ends=frozenset({"ok", "oom"}),
    ),
]

TIME = [
    Hostile(name="endless loop", code="while True: pass", ends=TIMES_OUT, timeout_s=WAIT_S),
    Hostile(
        name="ignores every signal, swallows every exception",
        code="""
import signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    try:
        time.sleep(100)
    except BaseException:
        pass
""",
        ends=TIMES_OUT,
        timeout_s=WAIT_S,
    ),
    Hostile(
        name="blocks every signal and waits for a child that does the same",
        code="""
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
if os.fork() == 0:
    while True:
        signal.sigtimedwait([], 100)
os.wait()
""",
        ends=TIMES_OUT,
        timeout_s=WAIT_S,
    ),
    Hostile(name="a number too large to compute", code="print(9**9**9)", ends=TIMES_OUT, timeout_s=WAIT_S),
    Hostile(
        name="a regular expression that backtracks for ever",
        code="import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
        ends=TIMES_OUT,
        timeout_s=WAIT_S,
    ),
    Hostile(
        name="never ends in its exit handler",
        code="import atexit\natexit.register(lambda: [None for _ in iter(int, 1)])\nprint('exits', flush=True)",
        ends=frozenset({"ok", "timeout", "oom"}),
        says="exits",
        timeout_s=WAIT_S,
    ),
    Hostile(
        name="a storm of timer signals",
        code="""
import signal
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 1e-5, 1e-5)
while True:
    pass
""",
        ends=TIMES_OUT,
        timeout_s=WAIT_S,
    ),
    Hostile(
        name="timers without end",
        code=SYSTEM_CALLS
        + """
made, identifier = 0, ctypes.c_int()
while made < 5000 and call(222, 1, ctypes.c_long(0), ctypes.byref(identifier))[0] >= 0:
    made += 1
print("BREACH" if made >= 5000 else "stopped at", made)
""",
        says="stopped at",
        x86_64_only=True,
    ),
    Hostile(
        name="real-time priority",
        code="""
import os
try:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    print("BREACH")
except OSError as error:
    print("refused", error.errno)
""",
        says="refused",
    ),
    Hostile(
        name="stops itself",
        code="import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        ends=TIMES_OUT,
        timeout_s=WAIT_S,
    ),
    Hostile(name="waits for input", code="import sys\nprint(repr(sys.stdin.read(10)))", says="''"),
]

OUTPUT = [
    Hostile(
        name="a gigabyte on stdout",
        code="import os\nfor _ in range(1024):\n    os.write(1, b'x' * (1 << 20))\nprint('BREACH')",
        ends=FLOODS,
    ),
    Hostile(
        name="a flood on stderr",
        code="import os\nwhile True:\n    os.write(2, b'x' * (1 << 20))",
        ends=FLOODS,
    ),
    Hostile(
        name="a flood on both by many threads, in single bytes",
        code="""
import os, threading
def flood(file):
    while True:
        os.write(file, b"x")
for file in (1, 2, 1, 2):
    threading.Thread(target=flood, args=(file,)).start()
""",
        ends=frozenset({"output_limit", "timeout"}),
        timeout_s=WAIT_S,
    ),
    Hostile(
        name="bytes that are no text",
        code="import os\nos.write(1, bytes(range(256)) * 40 + b'\\xff\\xfe\\x00\\x1b[2J')",
        says="\x00\x01",
    ),
    Hostile(
        name="NUL, half a character, lone surrogates",
        code="""
import os, sys
os.write(1, b"\\0" * 100 + "\\u20ac".encode()[:2])
sys.stdout.buffer.write("\\ud800".encode("utf-8", "surrogatepass"))
print("end")
""",
        says="end",
    ),
    Hostile(
        name="an exception of ten megabytes",
        code="raise ValueError('x' * (10 << 20))",
        ends=frozenset({"output_limit"}),
    ),
    Hostile(
        name="an exception that fails while it is printed",
        code="""
class Hostile(Exception):
    def __str__(self):
        raise SystemExit(0)
    __repr__ = __str__
raise Hostile
""",
    ),
    Hostile(
        name="closes its output and goes on",
        code="import os, time\nprint('before', flush=True)\nos.closerange(0, 3)\ntime.sleep(0.2)\nos._exit(3)",
        says="before",
        exit_code=3,
    ),
]
