"""The filter's program, run by an interpreter of BPF in this file, for both kinds of machine."""

import errno
import struct

import pytest

from polyturn.tools.sandbox.runner import kernel

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
ALLOWED = {
    "read": (0, 63),
    "openat": (257, 56),
    "execve": (59, 221),
    "futex": (202, 98),
    "mmap": (9, 222),
    "kill": (62, 129),
    "prlimit64": (302, 261),
    "memfd_create": (319, 279),
}


def run(program, number, audit, arguments=()):
    """What the filter says of one system call: seccomp_data is number, architecture, pointer, six arguments."""
    arguments = (*arguments, *(0 for _ in range(6 - len(arguments))))
    data = struct.pack("=IIQ6Q", number, audit, 0, *arguments)
    instructions = list(struct.iter_unpack("=HBBI", program))
    counter, accumulator = 0, 0
    while True:
        code, if_true, if_false, value = instructions[counter]
        counter += 1
        if code == 0x06:
            return value
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
            continue
        taken = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[
            code
        ]
        counter += if_true if taken else if_false


@pytest.fixture(params=sorted(MACHINES))
def machine(request):
    return request.param


@pytest.fixture
def ask(machine):
    column, audit = MACHINES[machine]
    program = kernel.build_filter(machine)
    return lambda numbers, *arguments: run(program, numbers[column], audit, arguments)


def fails_with(code):
    return 0x00050000 | code


def test_ordinary_calls_are_allowed(ask):
    for name, numbers in ALLOWED.items():
        assert ask(numbers) == 0x7FFF0000, name


def test_every_call_of_the_list_is_refused(machine, ask):
    column = MACHINES[machine][0]
    for name, numbers in kernel.DENIED.items():
        if numbers[column] is not None:
            assert ask(numbers) == fails_with(errno.EPERM), name


def test_numbers_are_used_once(machine):
    column = MACHINES[machine][0]
    numbers = [numbers[column] for numbers in kernel.DENIED.values() if numbers[column] is not None]
    assert len(set(numbers)) == len(numbers)


def test_new_processes_but_no_new_namespaces(ask):
    sigchld = 17
    assert ask(kernel.CLONE, sigchld) == 0x7FFF0000
    assert ask(kernel.CLONE, 0x003D0F00) == 0x7FFF0000  # a thread
    for flag in (0x10000000, 0x00020000, 0x20000000, 0x40000000, 0x08000000, 0x04000000, 0x02000000):
        assert ask(kernel.CLONE, flag | sigchld) == fails_with(errno.EPERM)
    assert ask(kernel.CLONE3) == fails_with(errno.ENOSYS)


def test_sockets_of_unix_alone(ask):
    for call in (kernel.SOCKET, kernel.SOCKETPAIR):
        assert ask(call, 1) == 0x7FFF0000
        for family in (0, 2, 10, 16, 17, 40):
            assert ask(call, family) == fails_with(errno.EACCES)


def test_no_keystrokes_for_others(ask):
    assert ask(kernel.IOCTL, 1, 0x5401) == 0x7FFF0000
    assert ask(kernel.IOCTL, 1, 0x5412) == fails_with(errno.EPERM)
    assert ask(kernel.IOCTL, 1, 0x541C) == fails_with(errno.EPERM)


def test_limits_and_priorities_of_its_own_alone(ask):
    for name, numbers in kernel.OF_PROCESSES.items():
        assert ask(numbers, 0) == 0x7FFF0000, name
        for process in (1, 7):
            assert ask(numbers, process) == fails_with(errno.EPERM), name
    for name, numbers in kernel.OF_MANY.items():
        mine = kernel.KIND_PROCESS[name]
        assert ask(numbers, mine, 0) == 0x7FFF0000, name
        for kind, which in ((mine, 1), (mine + 1, 0), (mine + 2, 0), (mine + 1, 1)):
            assert ask(numbers, kind, which) == fails_with(errno.EPERM), name


def test_no_watching_of_files_that_others_use(ask):
    for command in range(50):
        assert ask(kernel.FCNTL, 3, command) == 0x7FFF0000
    for command in (1024, 1026):
        assert ask(kernel.FCNTL, 3, command) == fails_with(errno.EPERM)


def test_other_architectures_of_the_same_processor_are_killed(machine):
    audit = MACHINES[machine][1]
    program = kernel.build_filter(machine)
    assert run(program, 0, 0x40000003) == 0x80000000  # i386
    assert run(program, 0, 0x40000028) == 0x80000000  # arm
    if machine == "x86_64":
        assert run(program, 0x40000000, audit) == 0x80000000  # x32


def test_memfd_can_be_refused(machine):
    column, audit = MACHINES[machine]
    program = kernel.build_filter(machine, deny_memfd=True)
    assert run(program, kernel.MEMFD_CREATE[column], audit) == fails_with(errno.EPERM)


def test_unknown_machines_are_named():
    with pytest.raises(ValueError, match="riscv64"):
        kernel.build_filter("riscv64")
