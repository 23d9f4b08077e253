"""Hostile snippets that reach out for the host's files and secrets."""

from tests.support.hostile.kernel import NETWORK, PRIVILEGES
from tests.support.hostile.snippet import SECRET_PATTERN, SYSTEM_CALLS, Hostile

FILES = [
    Hostile(
        name="reads the password file",
        code="""
try:
    print("BREACH", open("/etc/shadow").read()[:20])
except OSError as error:
    print("refused", error.errno)
""",
        says="refused",
    ),
    Hostile(
        name="reads files and devices of the host",
        code="""
paths = ("@CANARY_FILE@", "/proc/1/root@CANARY_FILE@", "/proc/1/cwd/etc/shadow", "/proc/self/cwd/../..@CANARY_FILE@",
         "/proc/1/root/etc/shadow", "/proc/1/environ", "/dev/vda", "/dev/sda", "/dev/mem", "/dev/kmsg", "/proc/kcore",
         "/proc/kmsg", "/root/.ssh/id_rsa", "/root/.bashrc", "/sys/firmware/dmi/tables/DMI", "/proc/sysrq-trigger",
         "/proc/1/maps", "/dev/kvm", "/dev/fuse", "/dev/loop0")
for path in paths:
    try:
        got = open(path, "rb").read(10)
        print(f"BREACH {path} {got}" if got else f"empty {path}")
    except OSError as error:
        print("refused", path, error.errno)
""",
        says="refused",
    ),
    Hostile(
        name="follows symbolic links out",
        code="""
import os
os.symlink("@CANARY_FILE@", "a")
os.symlink("../../../../../../etc/shadow", "b")
os.symlink("/proc/1/root/etc/shadow", "c")
for path in "abc":
    try:
        print("BREACH", path, open(path).read()[:10])
    except OSError as error:
        print("refused", path, error.errno)
""",
        says="refused",
    ),
    Hostile(
        name="plants links for the host to read",
        code="""
import os
os.symlink("/etc/passwd", "link")
os.symlink("link", "link-to-link")
os.symlink("/etc", "folder")
os.symlink("/proc/self/root/etc/passwd", "magic")
os.symlink("../" * 12 + "etc/passwd", "relative")
print("planted")
""",
        says="planted",
        plants=("link", "link-to-link", "folder/passwd", "magic", "relative", "../etc/passwd", "/etc/passwd"),
    ),
    Hostile(
        name="plants files that never end or never answer",
        code="""
import os, socket
os.mkfifo("pipe")
socket.socket(socket.AF_UNIX).bind("socket")
os.symlink("/dev/zero", "zero")
with open("large", "wb") as file:
    file.truncate(4 << 20)
print("planted")
""",
        says="planted",
        plants=("pipe", "socket", "zero", "large"),
    ),
    Hostile(
        name="hard links to files outside",
        code="""
import os
for number, path in enumerate(("/etc/passwd", "@CANARY_FILE@", "/proc/1/environ", "/proc/self/environ", os.__file__)):
    try:
        os.link(path, f"hard{number}")
        print("BREACH", path)
    except OSError as error:
        print("refused", path, error.errno)
""",
        says="refused",
    ),
    Hostile(
        name="writes beside the work folder",
        code="""
import os, sys
places = {*sys.path, "/", "/etc", "/usr", "/usr/bin", "/lib", "/root", "/home", "/var", "/boot", "/proc/self", "/sys",
          os.path.dirname(sys.executable), "@CANARY_FOLDER@", os.path.dirname(os.__file__)}
for place in places:
    if not place or os.path.realpath(place).startswith((os.getcwd(), "/tmp/")) and "@" not in place:
        continue
    try:
        with open(f"{place}/escaped", "w") as file:
            file.write("x")
        print("BREACH wrote in", place)
    except OSError as error:
        print("refused", place, error.errno)
""",
        says="refused",
    ),
    Hostile(
        name="changes the interpreter's own files",
        code="""
import os, sys
for path in (os.__file__, sys.executable, "/usr/bin/python3", "/etc/passwd", "/etc/ld.so.preload"):
    try:
        os.chmod(path, 0o777) if os.path.exists(path) else None
        open(path, "ab").write(b"#")
        print("BREACH", path)
    except OSError as error:
        print("refused", path, error.errno)
""",
        says="refused",
    ),
    Hostile(
        name="a set-uid interpreter",
        code="""
import os, shutil, subprocess, sys
try:
    shutil.copy(os.path.realpath(sys.executable), "python")
    os.chmod("python", 0o6755)
    command = ["./python", "-I", "-S", "-c", "import os; print(os.geteuid())"]
    answer = subprocess.run(command, capture_output=True, text=True)
    print("BREACH" if answer.stdout.strip() == "0" else "no root")
except OSError as error:
    print("no root", error.errno)
""",
        says="no root",
    ),
    Hostile(
        name="makes devices",
        code="""
import os, stat
for name, number in (("disk", os.makedev(254, 0)), ("mem", os.makedev(1, 1)), ("tty", os.makedev(5, 0))):
    try:
        os.mknod(name, stat.S_IFBLK | 0o666 if name == "disk" else stat.S_IFCHR | 0o666, number)
        print("BREACH", name)
    except OSError as error:
        print("refused", error.errno)
""",
        says="refused",
    ),
    Hostile(
        name="looks what devices there are",
        code="""
import os
harmless = {"null", "zero", "full", "random", "urandom", "tty", "fd", "stdin", "stdout", "stderr", "core", "shm", "pts",
            "ptmx", "console", "mqueue"}
print("BREACH" if set(os.listdir("/dev")) - harmless else "harmless", sorted(os.listdir("/dev")))
""",
        says="harmless",
    ),
    Hostile(
        name="opens files by handle",
        code=SYSTEM_CALLS
        + """
handle = (ctypes.c_char * 16).from_buffer_copy((8).to_bytes(4, "little") + (1).to_bytes(4, "little")
                                               + (2).to_bytes(4, "little") + bytes(4))
for folder in ("/", "/usr", ".", "/tmp"):
    try:
        mount = os.open(folder, os.O_RDONLY)
    except OSError as error:
        print("refused", folder, error.errno)
        continue
    must_fail(open_by_handle_at=(304, mount, ctypes.byref(handle), 0))
""",
        says="open_by_handle_at",
        x86_64_only=True,
    ),
]

SECRETS = [
    Hostile(
        name="secrets in the environment",
        code="""
import os
names = {"HOME", "PATH", "LANG", "LC_CTYPE", "LC_ALL", "USER", "LOGNAME", "PWD", "HOSTNAME", "TMPDIR", "SHELL", "TERM",
         "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"}
others = [name for name in os.environ if name not in names and not name.startswith("PYTHON")]
print("BREACH" if others else "clean", others)
""",
        says="clean",
    ),
    Hostile(
        name="secrets in the environment of every process",
        code=f"""
import os, re
seen = 0
for number in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "cmdline", "maps"):
        try:
            content = open(f"/proc/{{number}}/{{name}}", "rb").read()
        except OSError:
            continue
        seen += 1
        if re.search(rb"{SECRET_PATTERN}", content):
            print("BREACH", number, name)
print("read", seen)
""",
        says="read",
    ),
    Hostile(
        name="secrets in the memory it was forked with",
        code=f"""
import re
found = 0
for line in open("/proc/self/maps"):
    span, access = line.split()[:2]
    if access.startswith("r") and "[v" not in line:
        start, end = (int(part, 16) for part in span.split("-"))
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            memory.seek(start)
            try:
                found += len(re.findall(rb"{SECRET_PATTERN}", memory.read(min(end - start, 64 << 20)) or b""))
            except (OSError, OverflowError):
                pass
print("BREACH" if found else "none", found)
""",
        says="none",
        timeout_s=10.0,
    ),
    Hostile(
        name="open descriptors of others",
        code="""
import os, stat
for name in sorted(os.listdir("/proc/self/fd"), key=int):
    try:
        target, kind = os.readlink(f"/proc/self/fd/{name}"), os.fstat(int(name))
    except OSError:
        continue
    harmless = target.startswith("/proc/") or (int(name) < 3 and (stat.S_ISFIFO(kind.st_mode) or target == "/dev/null"))
    print("harmless" if harmless else "BREACH", name, target)
""",
        says="harmless",
    ),
    Hostile(
        name="objects of the program that started it",
        code=f"""
import gc, os, re, sys
names = [n for n in sys.modules if n.startswith("polyturn.") and not n.startswith("polyturn.tools.sandbox")]
texts = []
for item in gc.get_objects():
    if isinstance(item, (dict, list, tuple)) and re.search("{SECRET_PATTERN}", repr(item)[:10**5]):
        texts.append(item)
frame, outer = sys._getframe(), []
while frame := frame.f_back:
    outer.append(frame.f_code.co_filename)
    for value in frame.f_locals.values():
        try:
            number = value.fileno()
            os.fstat(number)
        except (AttributeError, OSError, ValueError, TypeError):
            continue
        print("BREACH an open file in a caller's frame", value)
print("BREACH" if names or texts else "nothing", names, len(texts), outer)
""",
        says="nothing",
        timeout_s=10.0,
    ),
    Hostile(
        name="keys of the kernel's key ring",
        code=SYSTEM_CALLS
        + """
must_fail(
    add_key=(248, ctypes.c_char_p(b"user"), ctypes.c_char_p(b"name"), ctypes.c_char_p(b"x"), 1, -3),
    request_key=(249, ctypes.c_char_p(b"user"), ctypes.c_char_p(b"name"), None, 0),
    keyctl=(250, 0, -3, 1),
)
""",
        says="keyctl",
        x86_64_only=True,
    ),
    Hostile(
        name="types on the terminal of the host",
        code="""
import fcntl, os, termios
for path in (0, 1, 2, "/dev/tty", "/dev/console", "/dev/pts/0"):
    try:
        file = path if isinstance(path, int) else os.open(path, os.O_RDWR)
        fcntl.ioctl(file, termios.TIOCSTI, b"x")
        print("BREACH", path)
    except OSError as error:
        print("refused", path, error.errno)
""",
        says="refused",
    ),
]

ESCAPES = [*FILES, *SECRETS, *NETWORK, *PRIVILEGES]
