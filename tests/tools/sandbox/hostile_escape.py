"""Hostile snippets that reach out: for the host's files, secrets and network, and for privileges and the kernel."""

from hostile import SECRET_PATTERN, SYSTEM_CALLS, Hostile

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

NETWORK = [
    Hostile(
        name="connects to the internet",
        code="""
import socket
try:
    client = socket.socket()
    client.settimeout(1)
    client.connect(("1.1.1.1", 53))
    print("BREACH")
except OSError as error:
    print("refused", error)
""",
        says="refused",
    ),
    Hostile(
        name="sends a datagram",
        code="""
import socket
for address in (("8.8.8.8", 53), ("127.0.0.1", @UDP_PORT@)):
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", address)
        print("sent", address)
    except OSError as error:
        print("refused", error)
""",
    ),
    Hostile(
        name="connects to a server of the host",
        code="""
import socket
for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET, "@HOST_ADDRESS@")):
    try:
        client = socket.socket(family)
        client.settimeout(1)
        client.connect((address, @TCP_PORT@))
        print("BREACH", address)
    except OSError as error:
        print("refused", error)
""",
        says="refused",
    ),
    Hostile(
        name="resolves a name",
        code="""
import socket
try:
    print("BREACH", socket.getaddrinfo("localhost.example.com", 80))
except OSError as error:
    print("refused", error)
""",
        says="refused",
    ),
    Hostile(
        name="connects to Unix sockets of the host",
        code="""
import socket
for path in ("@UNIX_SOCKET@", "/proc/1/root@UNIX_SOCKET@", "/var/run/docker.sock", "/run/docker.sock",
             "/run/containerd/containerd.sock", "/run/systemd/private", "/run/dbus/system_bus_socket", "/dev/log"):
    try:
        socket.socket(socket.AF_UNIX).connect(path)
        print("BREACH", path)
    except OSError as error:
        print("refused", path, error)
""",
        says="refused",
    ),
    Hostile(
        name="connects to an abstract Unix socket of the host",
        code="""
import socket
try:
    socket.socket(socket.AF_UNIX).connect("\\0@ABSTRACT@")
    print("BREACH")
except OSError as error:
    print("refused", error)
""",
        says="refused",
    ),
    Hostile(
        name="sockets of every family",
        code="""
import socket
for name in ("INET", "INET6", "NETLINK", "PACKET", "VSOCK", "ALG", "BLUETOOTH", "CAN", "TIPC", "RDS", "QIPCRTR"):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        try:
            made = socket.socket(getattr(socket, f"AF_{name}"), kind)
        except (OSError, AttributeError) as error:
            print("refused", name, error)
            continue
        if name not in ("INET", "INET6", "NETLINK") or kind == socket.SOCK_RAW:
            print("BREACH", name, kind)
""",
        says="refused",
    ),
    Hostile(
        name="lists interfaces and routes",
        code="""
try:
    lines = open("/proc/net/dev").read().splitlines()[2:]
except OSError:
    lines = []
names = {line.split(":")[0].strip() for line in lines}
# What the kernel puts into every new network namespace.
idle = {"lo", "sit0", "tunl0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "ip6gre0"}
print("BREACH" if names - idle else "alone", names)
""",
        says="alone",
    ),
]

PRIVILEGES = [
    Hostile(
        name="becomes root",
        code="""
import os
for attempt in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgid(0), lambda: os.setgroups([0])):
    try:
        attempt()
        print("BREACH" if 0 in (os.getuid(), os.getgid(), *os.getgroups()) else "no effect")
    except OSError as error:
        print("refused", error.errno)
print("BREACH" if os.getuid() == 0 else "uid", os.getuid())
""",
        says="uid",
    ),
    Hostile(
        name="has capabilities or may gain them",
        code="""
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
    print("BREACH" if int(status[name], 16) else "none", name)
print("BREACH may gain" if status["NoNewPrivs"].strip() != "1" else "no new privileges")
""",
        says="no new privileges",
    ),
    Hostile(
        name="makes namespaces",
        code=SYSTEM_CALLS
        + """
for name, flag in dict(user=0x10000000, mount=0x20000, pid=0x20000000, net=0x40000000, ipc=0x8000000, uts=0x4000000,
                       cgroup=0x2000000, time=0x80).items():
    must_fail(**{f"unshare_{name}": (272, flag)})
    if name != "time":
        result, error = call(56, flag | 17, 0, 0, 0, 0)
        if result == 0:
            os._exit(0)
        print(f"BREACH clone {name}" if result > 0 else f"clone {name}: {error}")
arguments = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)
result, error = call(435, ctypes.byref(arguments), 88)
if result == 0:
    os._exit(0)
print("BREACH clone3" if result > 0 else f"clone3: {error}")
""",
        says="clone3",
        x86_64_only=True,
    ),
    Hostile(
        name="joins namespaces of others",
        code=SYSTEM_CALLS
        + """
for process in (1, os.getppid()):
    for name in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup"):
        try:
            file = os.open(f"/proc/{process}/ns/{name}", os.O_RDONLY)
        except OSError as error:
            print("refused", error.errno)
            continue
        must_fail(setns=(308, file, 0))
result, _ = call(434, 1, 0)
if result >= 0:
    must_fail(setns_by_pidfd=(308, result, 0x20000))
print("done")
""",
        says="done",
        x86_64_only=True,
    ),
    Hostile(
        name="mounts",
        code=SYSTEM_CALLS
        + """
text = ctypes.c_char_p
must_fail(
    mount=(165, text(b"tmpfs"), text(b"."), text(b"tmpfs"), 0, None),
    remount=(165, None, text(b"/"), None, 0x20, None),
    bind=(165, text(b"/proc"), text(b"."), None, 0x1000, None),
    umount=(166, text(b"/proc"), 2),
    pivot_root=(155, text(b"."), text(b".")),
    chroot=(161, text(b".")),
    fsopen=(430, text(b"tmpfs"), 0),
    open_tree=(428, -100, text(b"/"), 1),
    fspick=(433, -100, text(b"/"), 0),
    move_mount=(429, -100, text(b"/"), -100, text(b"."), 0),
    mount_setattr=(442, -100, text(b"/"), 0, (ctypes.c_uint64 * 4)(), 32),
)
""",
        says="mount_setattr",
        x86_64_only=True,
    ),
    Hostile(
        name="parts of the kernel with a history",
        code=SYSTEM_CALLS
        + """
buffer = ctypes.create_string_buffer(4096)
must_fail(
    bpf=(321, 0, ctypes.byref(buffer), 72),
    perf_event_open=(298, ctypes.byref(buffer), 0, -1, -1, 0),
    userfaultfd=(323, 1),
    io_uring_setup=(425, 8, ctypes.byref(buffer)),
    fanotify_init=(300, 0, 0),
    name_to_handle_at=(303, -100, ctypes.c_char_p(b"/"), ctypes.byref(buffer), ctypes.byref(buffer), 0),
    memfd_secret=(447, 0),
    personality=(135, 0x0040000),
)
""",
        says="personality",
        x86_64_only=True,
    ),
    Hostile(
        name="commands the machine",
        # Each would do no harm where it works: the time that it is, the name that it has, a module that is not there.
        code=SYSTEM_CALLS
        + """
import time
text = ctypes.c_char_p
now = (ctypes.c_long * 2)(*divmod(time.time_ns() // 1000, 1_000_000))
exact = (ctypes.c_long * 2)(*divmod(time.time_ns(), 1_000_000_000))
must_fail(
    reboot=(169, 0xFEE1DEAD, 672274793, 0, None),
    kexec_load=(246, 0, 0, None, 0),
    kexec_file_load=(320, -1, -1, 0, None, 0),
    init_module=(175, None, 0, text(b"")),
    finit_module=(313, 0, text(b""), 0),
    delete_module=(176, text(b"no-such-module"), 0),
    swapon=(167, text(b"/"), 0),
    acct=(163, text(b"acct")),
    settimeofday=(164, ctypes.byref(now), None),
    clock_settime=(227, 0, ctypes.byref(exact)),
    syslog=(103, 3, ctypes.create_string_buffer(100), 100),
    iopl=(172, 3),
    ioperm=(173, 0, 8, 1),
    quotactl=(179, 0, None, 0, None),
)
""",
        says="quotactl",
        x86_64_only=True,
    ),
    Hostile(
        name="renames the machine",
        code=SYSTEM_CALLS
        + """
name = os.uname().nodename.encode()
must_fail(
    sethostname=(170, ctypes.c_char_p(name), len(name)),
    setdomainname=(171, ctypes.c_char_p(b"(none)"), 6),
)
""",
        says="setdomainname",
        x86_64_only=True,
    ),
    Hostile(
        name="system calls of other architectures",
        code=SYSTEM_CALLS
        + """
import mmap
result, error = call(0x40000000 | 41, 2, 1, 0)
print("BREACH x32" if result >= 0 else f"x32: {error}", flush=True)
# socket(AF_INET, SOCK_STREAM, 0) as a 32-bit program calls it
machine = bytes.fromhex("53bb02000000b90100000031d2b867010000cd805bc3")
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(machine)
function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print("BREACH i386" if function() >= 0 else "i386 refused")
""",
        x86_64_only=True,
    ),
    Hostile(
        name="writes to the kernel's settings and cgroups",
        code="""
import os
# What is there already, so that no harm is done where it works.
for path in ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sys/vm/overcommit_memory",
             "/proc/sys/kernel/domainname", "/proc/sys/vm/swappiness", "/proc/sys/user/max_user_namespaces"):
    try:
        with open(path, "r+") as file:
            value = file.read()
            file.seek(0)
            file.write(value)
        print("BREACH", path)
    except OSError as error:
        print("refused", path, error.errno)
for path, value in {"/proc/sysrq-trigger": "h", "/proc/self/oom_score_adj": "-1000", "/proc/self/uid_map": "0 0 1",
                    "/proc/1/oom_score_adj": "1000", "/proc/sys/vm/drop_caches": "1"}.items():
    try:
        with open(path, "w") as file:
            file.write(value)
        print("BREACH", path)
    except OSError as error:
        print("refused", path, error.errno)
for folder, _, names in os.walk("/sys/fs/cgroup"):
    for name in {"cgroup.procs", "tasks", "memory.limit_in_bytes", "memory.max", "pids.max", "release_agent",
                 "notify_on_release", "devices.allow"} & set(names):
        try:
            with open(f"{folder}/{name}", "w") as file:
                file.write("1")
            print("BREACH", folder, name)
        except OSError:
            pass
    try:
        os.mkdir(f"{folder}/escaped")
        print("BREACH made a cgroup in", folder)
    except OSError:
        pass
print("done")
""",
        says="done",
    ),
    Hostile(
        name="raises its own limits",
        code="""
import resource
for name in ("AS", "CPU", "FSIZE", "NOFILE", "NPROC", "CORE", "MEMLOCK", "STACK", "SIGPENDING", "MSGQUEUE"):
    kind = getattr(resource, f"RLIMIT_{name}", None)
    if kind is None:
        continue
    soft, hard = resource.getrlimit(kind)
    if hard == resource.RLIM_INFINITY:
        print("no limit", name)
        continue
    try:
        resource.setrlimit(kind, (hard + 1, hard + 1))
        print("BREACH", name)
    except (ValueError, OSError):
        print("refused", name)
""",
        says="refused",
    ),
    Hostile(
        name="takes off its confinement by starting another program",
        code="""
import os, sys
code = '''
import socket
try:
    socket.socket(socket.AF_INET6, socket.SOCK_RAW)
    print("BREACH a raw socket")
except OSError:
    print("still confined")
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
print("BREACH no filter" if status.get("Seccomp", "2").strip() != "2" else "filtered")
try:
    print("BREACH", open("@CANARY_FILE@").read())
except OSError:
    print("no canary")
'''
os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", code])
""",
        says="filtered",
    ),
    Hostile(
        name="runs a program from memory",
        code="""
import os, sys
code = "import socket\\ntry: socket.socket(socket.AF_PACKET, 3); print('BREACH')\\nexcept OSError: print('confined')"
try:
    program = os.memfd_create("program")
    with open(os.path.realpath(sys.executable), "rb") as source:
        os.sendfile(program, source.fileno(), 0, os.fstat(source.fileno()).st_size)
    os.execve(program, [sys.executable, "-I", "-S", "-c", code], {})
except OSError as error:
    print("confined", error.errno)
""",
        says="confined",
    ),
]

ESCAPES = [*FILES, *SECRETS, *NETWORK, *PRIVILEGES]
