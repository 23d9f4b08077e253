"""Hostile snippets that use up processes, memory and files. They run under `hostile.SMALL`."""

from tests.support.hostile.snippet import MEMORY_ENDS, SYSTEM_CALLS, TIMES_OUT, WAIT_S, Hostile
from tests.support.hostile.time import DESCRIPTORS, OUTPUT, TIME

PROCESSES = [
    Hostile(
        name="fork bomb",
        code="""
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
        ends=TIMES_OUT,
        timeout_s=WAIT_S,
    ),
    Hostile(
        name="fork bomb whose processes leave session, group and parent",
        code="""
import os
print("forking", flush=True)
while True:
    try:
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
    except OSError:
        pass
""",
        # So many processes may fill the memory before the time is over.
        ends=TIMES_OUT | {"oom"},
        says="forking",
        timeout_s=WAIT_S,
    ),
    Hostile(
        name="thread bomb",
        code="""
import threading, time
count = 0
try:
    while count < 200:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        count += 1
except (RuntimeError, MemoryError):
    pass
print("BREACH" if count >= 64 else "stopped at", count, flush=True)
import os; os._exit(0)
""",
        says="stopped at",
    ),
    Hostile(
        name="process that hops from parent to child",
        code="""
import os
if os.fork() == 0:
    while True:
        try:
            if os.fork():
                os._exit(0)
        except OSError:
            pass
print("left one hopping")
""",
        says="left one hopping",
    ),
    Hostile(
        name="eight processes that burn CPU",
        code="""
import os, time
for _ in range(8):
    if os.fork() == 0:
        while True:
            pass
time.sleep(60)
""",
        ends=TIMES_OUT,
        timeout_s=WAIT_S,
    ),
]

MEMORY = [
    Hostile(
        name="memory bomb",
        code="""
blocks = []
while len(blocks) < 200:
    blocks.append(bytearray(10 << 20))
print("BREACH got 2 GB")
""",
        ends=MEMORY_ENDS,
    ),
    Hostile(
        name="memory of many children",
        code="""
import os, time
ready, told = os.pipe()
os.set_blocking(ready, False)
children = 0
for _ in range(12):
    if os.fork() == 0:
        try:
            block = bytearray(80 << 20)
            block[::4096] = b"1" * len(block[::4096])
            os.write(told, b"1")
            time.sleep(60)
        finally:
            os._exit(0)
    children += 1
alive, hold = children, 0
end = time.monotonic() + 15
while time.monotonic() < end and hold + (children - alive) < children:
    time.sleep(0.05)
    while alive and os.waitpid(-1, os.WNOHANG)[0]:
        alive -= 1
    try:
        hold += len(os.read(ready, 100))
    except BlockingIOError:
        pass
hold = min(hold, alive)
print("BREACH" if hold >= 5 else "bounded:", hold, "of", children, "children hold 80 MB each")
""",
        ends=frozenset({"ok", "oom"}),
        timeout_s=20.0,
    ),
    Hostile(
        name="shared anonymous memory",
        code="""
import mmap
blocks = []
try:
    while len(blocks) < 10:
        block = mmap.mmap(-1, 50 << 20)
        block.write(b"1" * (50 << 20))
        blocks.append(block)
except (MemoryError, OSError):
    pass
print("BREACH" if len(blocks) > 8 else "stopped at", len(blocks), "blocks of 50 MB")
""",
        ends=frozenset({"ok", "oom"}),
    ),
    Hostile(
        name="memfd bomb",
        code="""
import os
written = 0
try:
    for _ in range(12):
        file = os.memfd_create("bomb")
        for _ in range(64):
            written += os.write(file, b"1" * (1 << 20)) >> 20
except OSError:
    pass
print("BREACH" if written > 400 else "stopped at", written, "MB")
""",
        ends=frozenset({"ok", "oom"}),
    ),
    Hostile(
        name="memfd bomb behind limits of its own: many files under the file size limit",
        code="""
import os
written = 0
try:
    while written < 1000:
        file = os.memfd_create("bomb")
        written += os.write(file, b"1" * (4 << 20)) >> 20
except (OSError, MemoryError):
    pass
print("BREACH" if written > 400 else "stopped at", written, "MB")
""",
        ends=frozenset({"ok", "oom"}),
    ),
    Hostile(
        name="a terabyte of address space",
        code="""
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
address = libc.mmap(None, 1 << 40, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, -1, 0)
print("refused" if address == ctypes.c_void_p(-1).value else "BREACH")
""",
        says="refused",
    ),
    Hostile(
        name="decompression bomb",
        code="""
import zlib
squeezer = zlib.compressobj(9)
small = b"".join(squeezer.compress(bytes(1 << 20)) for _ in range(500)) + squeezer.flush()
print("BREACH", len(zlib.decompress(small)))
""",
        ends=frozenset({"oom", "timeout"}),
        timeout_s=4.0,
    ),
    Hostile(
        name="locked memory",
        code=SYSTEM_CALLS
        + """
import resource
print("limit", resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
block = ctypes.create_string_buffer(16 << 20)
must_fail(mlock=(149, ctypes.byref(block), len(block)))
""",
        says="mlock",
        x86_64_only=True,
    ),
    Hostile(
        name="pipes with large buffers",
        code="""
import fcntl, os
pairs = []
try:
    while len(pairs) < 2000:
        pairs.append(os.pipe())
        fcntl.fcntl(pairs[-1][1], 1031, 1 << 20)
except OSError:
    pass
print("BREACH" if len(pairs) > 256 else "stopped at", len(pairs))
""",
        says="stopped at",
    ),
    Hostile(
        name="descriptors in flight between sockets",
        code="""
import os, socket
file = os.open("/dev/null", os.O_RDONLY)
sent, pairs = 0, []
try:
    while sent < 100_000:
        pairs.append(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
        pairs[-1][0].setblocking(False)
        while True:
            try:
                socket.send_fds(pairs[-1][0], [b"x"], [file] * 200)
            except BlockingIOError:
                break
            sent += 200
except OSError:
    pass
print("BREACH" if sent >= 100_000 else "stopped at", sent)
""",
        says="stopped at",
    ),
]

FILES = [
    Hostile(
        name="fill the disk",
        code="""
written = 0
try:
    for number in range(30):
        with open(f"f{number}", "wb") as file:
            written += file.write(b"x" * (4 << 20)) >> 20
except OSError:
    pass
print("BREACH" if written > 64 else "stopped at", written, "MB")
""",
        says="stopped at",
    ),
    Hostile(
        name="fill every folder that can be written",
        code="""
import os
total = 0
for top in ("/", "/dev/shm", "/tmp", "/var/tmp", "/run", "/dev/mqueue", os.environ.get("HOME", "/"), os.getcwd()):
    for folder, folders, _ in os.walk(top):
        folders[:] = [name for name in folders if name not in ("proc", "sys") and folder.count("/") < 3]
        try:
            for number in range(100):
                with open(f"{folder}/fill{number}", "wb") as file:
                    total += file.write(b"x" * (4 << 20)) >> 20
        except OSError:
            pass
print("BREACH" if total > 128 else "stopped at", total, "MB")
""",
        ends=frozenset({"ok", "oom"}),
        timeout_s=10.0,
    ),
    Hostile(
        name="fill /dev/shm",
        code="""
written = 0
try:
    for number in range(30):
        with open(f"/dev/shm/f{number}", "wb") as file:
            written += file.write(b"x" * (4 << 20)) >> 20
except OSError as error:
    print(error.errno)
print("BREACH" if written > 64 else "stopped at", written, "MB")
""",
        says="stopped at",
    ),
    Hostile(
        name="a hundred thousand files",
        code="""
count = 0
try:
    for count in range(100_000):
        open(str(count), "w").close()
    print("BREACH", count)
except OSError as error:
    print("stopped at", count, error.errno)
""",
        says="stopped at",
    ),
    Hostile(
        name="a sparse file of a terabyte",
        code="""
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with open("sparse", "wb") as file:
        file.truncate(1 << 40)
    print("BREACH")
except OSError as error:
    print("refused", error.errno)
""",
        says="refused",
    ),
    Hostile(
        name="a folder deeper than a path is long, closed to its owner",
        code="""
import os
for depth in range(1500):
    try:
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    except OSError:
        break
os.chmod(".", 0)
print("made", depth)
""",
        says="made",
    ),
    Hostile(
        name="names as long as names can be",
        code="""
import os
made = 0
try:
    for number in range(3000):
        os.mkdir(f"{number:04}" + "n" * 251)
        made += 1
except OSError as error:
    print("stopped at", made, error.errno)
try:
    os.mkdir("n" * 256)
    print("BREACH")
except OSError as error:
    print("too long", error.errno)
""",
        says="stopped at",
    ),
    Hostile(
        name="names that are no text",
        code="""
import os
for name in (b"\\xff\\xfe", b"a\\nb", b"-rf", b"\\x1b[2J"):
    os.mkdir(name)
print(len(os.listdir(b".")))
""",
        says="4",
    ),
    Hostile(
        name="extended attributes",
        code="""
import os
open("file", "w").close()
stored = 0
try:
    for number in range(20_000):
        os.setxattr("file", f"user.a{number}", b"x" * 32_000)
        stored += 32_000
except OSError as error:
    print(error.errno)
print("BREACH" if stored > 200 << 20 else "stopped at", stored)
""",
        ends=frozenset({"ok", "oom"}),
    ),
    Hostile(
        name="moves, removes and closes the work folder",
        code="""
import os
for attempt in (lambda: os.rename(os.getcwd(), "/tmp/elsewhere"), lambda: os.rmdir(os.getcwd()),
                lambda: os.chmod(os.getcwd(), 0)):
    try:
        attempt()
        print("done")
    except OSError as error:
        print("refused", error.errno)
""",
        says="refused",
    ),
]

RESOURCES = [*PROCESSES, *MEMORY, *FILES, *DESCRIPTORS, *TIME, *OUTPUT]
