"""Hostile snippets in the persistent interpreter, and against it."""

from tests.support.hostile.snippet import TIMES_OUT, Hostile

PERSISTENT = [
    Hostile(
        name="persistent: overrides the builtins and modules that its interpreter needs",
        code="""
import builtins, io, json, os, socket, struct, sys, traceback
for module in (json, struct, socket, traceback, io):
    for name in dir(module):
        if not name.startswith("_"):
            setattr(module, name, lambda *a, **k: b'{"exit_code": 0}')
os.write = os.read = os.dup2 = os.close = os.open = lambda *a: 0
builtins.exec = builtins.compile = builtins.open = builtins.print = lambda *a, **k: None
sys.stdout = sys.stderr = sys.stdin = None
sys.exit = sys.excepthook = None
""",
        ends=frozenset({"ok", "timeout", "sandbox_died", "setup_error", "oom"}),
        timeout_s=1.0,
    ),
    Hostile(
        name="persistent: forges answers on its link",
        code="""
import os
for number in range(3, 256):
    for forged in (b"\\x00\\x00\\x00\\x10\\x00\\x00\\x00\\x00" + b'{"exit_code": 0}', b"\\xff" * 64, b"\\0" * 64):
        try:
            os.write(number, forged)
        except OSError:
            pass
""",
        ends=frozenset({"ok", "timeout", "sandbox_died", "setup_error"}),
        timeout_s=1.0,
    ),
    Hostile(
        name="persistent: closes its link",
        code="import os\nos.closerange(3, 256)\nprint('closed')",
        ends=frozenset({"ok", "timeout", "sandbox_died", "setup_error"}),
    ),
    Hostile(
        name="persistent: a child that answers later",
        code="""
import os, time
if os.fork() == 0:
    time.sleep(0.1)
    for number in range(3, 256):
        try:
            os.write(number, b"\\x00\\x00\\x00\\x11\\x00\\x00\\x00\\x00" + b'{"exit_code": 77}')
        except OSError:
            pass
    time.sleep(987)
print("left", flush=True)
""",
        ends=frozenset({"ok", "timeout"}),
        says="left",
        timeout_s=3.0,
    ),
    Hostile(
        name="persistent: never comes back",
        code="while True: pass",
        ends=TIMES_OUT,
        timeout_s=1.0,
    ),
    Hostile(
        name="persistent: leaves at once",
        code="import os\nos._exit(0)",
        ends=frozenset({"ok"}),
        exit_code=0,
    ),
    Hostile(
        name="persistent: a thread that goes on after the answer",
        code="""
import os, threading, time
def later():
    while True:
        time.sleep(0.05)
        try:
            os.write(1, b"BREACH late\\n")
        except OSError:
            pass
threading.Thread(target=later, daemon=True).start()
""",
        ends=frozenset({"ok"}),
    ),
]

NEIGHBOUR = Hostile(
    name="kills the persistent interpreter",
    code="""
import os, signal
for process in map(int, filter(str.isdigit, os.listdir("/proc"))):
    if process not in (1, os.getpid()):
        try:
            os.kill(process, signal.SIGKILL)
            print("BREACH killed", process)
        except OSError as error:
            print("refused", error.errno)
""",
    says="refused",
)
"""To be run beside one, whose names must live on: it has the same user, so only landlock keeps signals from it."""
