"""Hostile snippets against the runner: its life, its memory, its channel to the host, and what comes after."""

from tests.support.hostile.snippet import MEMORY_ENDS, SYSTEM_CALLS, Hostile

KILLING = [
    Hostile(
        name="kills its parent, the first process and everybody",
        code="""
import os
for process in (os.getppid(), 1, -1, 0x7ffffff0):
    try:
        os.kill(process, 9)
        print("sent to", process, flush=True)
    except OSError as error:
        print("refused", process, error.errno, flush=True)
""",
    ),
    Hostile(
        name="kills everybody and works on",
        code="""
import os
try:
    os.kill(-1, 9)
except OSError as error:
    print(error.errno)
print("works on")
""",
        says="works on",
    ),
    Hostile(
        name="sends its parent every signal there is",
        code="""
import os
for number in range(1, 65):
    for process in (os.getppid(), 1):
        try:
            os.kill(process, number)
        except OSError:
            pass
print("sent")
""",
        says="sent",
    ),
    Hostile(
        name="stops its parent",
        code="""
import os, signal
for process in (os.getppid(), 1, -1):
    try:
        os.kill(process, signal.SIGSTOP)
    except OSError:
        pass
print("sent")
""",
        says="sent",
    ),
    Hostile(
        name="signals its parent by a pidfd",
        code="""
import os, signal
for process in (os.getppid(), 1):
    try:
        signal.pidfd_send_signal(os.pidfd_open(process), signal.SIGKILL)
        print("sent")
    except OSError as error:
        print("refused", error.errno)
""",
    ),
    Hostile(
        name="kills its own process group",
        code="import os\nprint('before', flush=True)\nos.killpg(0, 9)",
        says="before",
        exit_code=-9,
    ),
    Hostile(name="reads where nothing is", code="import ctypes\nctypes.string_at(0)", exit_code=-11),
    Hostile(
        name="recurses without end",
        code="""
import sys
sys.setrecursionlimit(10**9)
def f(n):
    return f(n + 1) + 1
f(0)
""",
        ends=frozenset({"ok", "oom", "timeout"}),
        timeout_s=2.0,
    ),
    Hostile(name="aborts, with a core dump", code="import os\nos.abort()", exit_code=-6),
    Hostile(
        name="closes every descriptor and leaves",
        code="import os\nos.closerange(0, 256)\nos._exit(7)",
        exit_code=7,
    ),
    Hostile(
        name="starves the runner of CPU, files and processors",
        code=SYSTEM_CALLS
        + """
import resource
for process in (os.getppid(), 1):
    for name in ("CPU", "NOFILE", "NPROC", "AS", "FSIZE"):
        try:
            resource.prlimit(process, getattr(resource, f"RLIMIT_{name}"), (1, 1))
            print("BREACH set", name)
        except (OSError, ValueError) as error:
            print("refused", name, error)
    for change in (
        lambda: os.setpriority(os.PRIO_PROCESS, process, 19),
        lambda: os.setpriority(os.PRIO_USER, 0, 19),
        lambda: os.setpriority(os.PRIO_PGRP, 0, 19),
        lambda: os.sched_setaffinity(process, {min(os.sched_getaffinity(0))}),
        lambda: os.sched_setscheduler(process, os.SCHED_IDLE, os.sched_param(0)),
        lambda: call(251, 1, process, (3 << 13)),
    ):
        try:
            if change() in (None, 0):
                print("BREACH a priority, or processors")
        except OSError as error:
            print("refused", error)
print("done")
""",
        says="done",
    ),
]

REMAINS = [
    Hostile(
        name="a daemon that closed everything",
        code="""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 256)
        time.sleep(987)
    os._exit(0)
print("left")
""",
        says="left",
    ),
    Hostile(
        name="a daemon that holds stdout",
        code="""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(987)
    os._exit(0)
print("left")
""",
        says="left",
    ),
    Hostile(
        name="a daemon that ignores signals and has many children",
        code="""
import os, signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
if os.fork() == 0:
    for _ in range(6):
        try:
            os.setsid() if os.fork() == 0 else None
        except OSError:
            pass
    time.sleep(987)
print("left", flush=True)
os._exit(0)
""",
        says="left",
    ),
    Hostile(
        name="a child that is its sibling",
        code=SYSTEM_CALLS
        + """
import time
for status in (0, 1, 2):
    result, error = call(56, 0x8000 | 17, 0, 0, 0, 0)
    if result == 0:
        os._exit(status)
time.sleep(0.2)
os._exit(5)
""",
        exit_code=5,
        x86_64_only=True,
    ),
    Hostile(
        name="adopts orphans",
        code="""
import ctypes, os, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
if os.fork() == 0:
    if os.fork() == 0:
        time.sleep(987)
    os._exit(0)
os.wait()
print("left")
""",
        says="left",
    ),
    Hostile(
        name="modules that shadow the standard library",
        code="""
import os
for name in ("json", "os", "re", "traceback", "socket", "struct", "encodings", "sitecustomize", "usercustomize"):
    with open(f"{name}.py", "w") as file:
        file.write("import os\\nos.write(1, b'BREACH')\\nos._exit(0)\\n")
print("planted")
raise ValueError("to have it print a traceback")
""",
        says="planted",
        exit_code=1,
    ),
]

TAMPERING = [
    Hostile(
        name="traces its parent",
        code=SYSTEM_CALLS
        + """
for process in (os.getppid(), 1):
    for name, request in (("attach", 16), ("seize", 0x4206)):
        must_fail(**{f"ptrace_{name}": (101, request, process, 0, 0)})
    for name in ("mem", "maps", "auxv", "syscall", "stack"):
        try:
            open(f"/proc/{process}/{name}", "rb").read(1) if name != "mem" else open(f"/proc/{process}/mem", "r+b")
            print("BREACH", process, name)
        except OSError as error:
            print("refused", process, name, error.errno)
""",
        says="refused",
        x86_64_only=True,
    ),
    Hostile(
        name="reads and writes its parent's memory",
        code=SYSTEM_CALLS
        + """
buffer = ctypes.create_string_buffer(8)
class Span(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
here, there = Span(ctypes.addressof(buffer), 8), Span(id(os), 8)
for process in (os.getppid(), 1):
    must_fail(
        process_vm_readv=(310, process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0),
        process_vm_writev=(311, process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0),
        kcmp=(312, os.getpid(), process, 0, 0, 0),
        move_pages=(279, process, 0, None, None, None, 0),
    )
""",
        says="move_pages",
        x86_64_only=True,
    ),
    Hostile(
        name="takes its parent's descriptors",
        code=SYSTEM_CALLS
        + """
for process in (os.getppid(), 1):
    result, _ = call(434, process, 0)
    if result >= 0:
        for number in range(10):
            must_fail(**{f"pidfd_getfd_{number}": (438, result, number, 0)})
    try:
        print("BREACH", os.listdir(f"/proc/{process}/fd"))
    except OSError as error:
        print("refused", error.errno)
    for number in range(10):
        try:
            os.write(os.open(f"/proc/{process}/fd/{number}", os.O_WRONLY), b"BREACH")
            print("BREACH", process, number)
        except OSError as error:
            pass
""",
        says="refused",
        x86_64_only=True,
    ),
    Hostile(
        name="forges results on every descriptor",
        code="""
import json, os, struct
body = b"FORGED"
header = json.dumps({"status": "ok", "exit_code": 0, "seconds": 0.0, "detail": "", "stdout": 6, "stderr": 0}).encode()
frame = struct.pack(">II", len(header), len(body)) + header + body
for number in [1, 2, *range(3, 256)]:
    try:
        os.write(number, frame)
    except OSError:
        pass
os._exit(3)
""",
        says="FORGED",  # on its own stdout, where anybody may write what they like
        exit_code=3,
    ),
    Hostile(
        name="writes a frame's length and no frame",
        code="""
import os
for number in (1, 2, *range(3, 256)):
    try:
        os.write(number, b"\\x7f\\xff\\xff\\xff" * 4)
    except OSError:
        pass
os._exit(4)
""",
        exit_code=4,
    ),
    Hostile(
        name="reads the runner's questions",
        code="""
import os, select
for number in range(3, 256):
    try:
        if select.select([number], [], [], 0)[0]:
            print("BREACH", number, os.read(number, 100))
    except (OSError, ValueError):
        pass
print("nothing there")
""",
        says="nothing there",
    ),
    Hostile(
        name="returns into the runner that forked it",
        code="""
import sys
def attack():
    frame, found = sys._getframe(), []
    while frame := frame.f_back:
        found.extend(frame.f_locals.values())
        found.append(frame.f_globals)
    for value in found:
        if isinstance(value, (dict, list)):
            value.clear()
        elif callable(getattr(value, "close", None)):
            value.close()
    sys.settrace(lambda *_: 1 / 0)
    sys.setprofile(lambda *_: 1 / 0)
attack()
raise GeneratorExit
""",
        ends=frozenset({"ok"}),
    ),
    Hostile(
        name="overrides what a runner needs, in its own interpreter",
        code="""
import builtins, gc, io, json, os, select, signal, socket, struct, sys
real = os._exit
for module in (os, io, json, select, signal, socket, struct):
    for name in dir(module):
        if not name.startswith("_"):
            try:
                setattr(module, name, None)
            except (AttributeError, TypeError):
                pass
for name in ("open", "print", "len", "isinstance", "Exception", "BaseException", "exec", "compile"):
    setattr(builtins, name, None)
real(0)
""",
        exit_code=0,
    ),
    Hostile(
        name="memory that only the kernel can take back, then everything else",
        code="""
import os, threading
blocks = []
def eat():
    while len(blocks) < 100:
        blocks.append(bytearray(b"1") * (8 << 20))
try:
    threads = [threading.Thread(target=eat) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
finally:
    print("BREACH" if len(blocks) > 60 else "ended", flush=True)
raise MemoryError
""",
        ends=MEMORY_ENDS,
    ),
]

RUNNER = [*KILLING, *REMAINS, *TAMPERING]
