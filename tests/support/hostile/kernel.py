"""Hostile snippets that reach out for the network, for privileges and for the kernel."""

from tests.support.hostile.snippet import SYSTEM_CALLS, Hostile

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
