"""What runs in the child process of the sandbox: isolate, execute code and tests, report a verdict.

codegen_sandbox.py starts this file as `python -I -S` with a job on standard input, once per sample. It imports nothing
of the project and little of the standard library, since every import adds to the start-up time of each sample.

    warden      enters new user, process, network, IPC and mount namespaces
    process 1   of the process namespace; when it ends, the kernel kills everything in there
    the code    limited, without privileges, under Landlock and a system call filter

Each of them dies with the one above it. Without namespaces there is no process 1: the code is the warden's child and
cannot start processes or threads.
"""

import ctypes
import marshal
import os
import resource
import sys

MEMORY = 512 << 20  # bytes: address space of each process, and resident memory of all processes of a sample
FILE_SIZE = 16 << 20  # bytes of one file; with namespaces, all files together fit a tmpfs of FILES bytes
FILES = 64 << 20
PROCESSES = 16  # processes and threads of the code
NOBODY = 65534  # root has no process limit and may read everything, so root's code runs as this user
CPU_EXCEEDED = 124  # exit code of the warden, as in timeout(1)

SIGINT, SIGKILL, SIGXCPU = 2, 9, 24
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip

# System calls by their number on x86_64 and aarch64 (None: it has no such call).
# Source: linux/audit.h, asm/unistd_64.h, asm-generic/unistd.h.
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
DENIED = {
    # UNIX sockets by path (docker.sock), memory outside the address space, privileges, rings
    "socket": (41, 198), "connect": (42, 203), "shmget": (29, 194), "msgget": (68, 186), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "io_uring_setup": (425, 425), "ptrace": (101, 117), "bpf": (321, 280),
    "userfaultfd": (323, 282), "perf_event_open": (298, 241), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "unshare": (272, 97), "setns": (308, 268),
    # mounts, through the old and the new interface
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "open_tree_attr": (467, 467),
}  # fmt: skip
METADATA = {  # modes, owners, times and attributes of files: denied where the file system cannot be made read-only
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip
BY_ARGUMENT = {"clone": (56, 220), "clone3": (435, 435), "prctl": (157, 167), "socketpair": (53, 199)}


def main():
    parent, nonce, code, tests, folder, namespaces, landlock, cpu_seconds = marshal.loads(sys.stdin.buffer.read())
    verdict_fd = os.dup(1)
    os.dup2(2, 1)  # what the code prints goes to the bounded channel, not to the verdict's
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        with open("/proc/self/oom_score_adj", "w") as f:
            f.write("1000")  # if memory runs out all the same, the kernel picks the sample
    except OSError:
        pass  # a container's /proc may be read-only
    if os.getuid() == 0:
        become_nobody(libc)
    read_only = namespaces and enter_namespaces(libc, folder)
    os.chdir(folder)
    call(libc.prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    if namespaces:
        pid = fork_bound(libc, verdict_fd)
        if pid:
            os._exit(wait_for(pid)[0] & 255)
        pid = os.fork()
        if pid:
            libc.signal(SIGINT, None)  # Python's handler would let the code interrupt process 1
    else:
        pid = fork_bound(libc, verdict_fd)
    if pid:
        exit_code, used = wait_for(pid)
        exceeded = exit_code == -SIGXCPU or (exit_code == -SIGKILL and used > 0.8 * cpu_seconds)
        os._exit(CPU_EXCEEDED if exceeded else 1 if exit_code else 0)
    os.setsid()  # leave the warden's process group, which the code could kill otherwise
    limit_resources(cpu_seconds, PROCESSES + 2 if namespaces else 0)  # the warden and process 1 count too
    drop_privileges(libc)
    if landlock:
        enter_landlock(libc, folder)
    filter_syscalls(libc, metadata=not read_only)
    os.write(verdict_fd, f"{nonce} ready\n".encode())
    judge(nonce, code, tests, verdict_fd)


def call(function, *args):
    """Call a libc function; OSError if it returns -1."""
    result = function(*args)
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{function.__name__}: {os.strerror(errno)}")
    return result


def fork_bound(libc, verdict_fd):
    """Fork a process that is killed when this one dies. Returns as os.fork does.

    The parent is sent its id, as the first line of the verdict channel, before the process goes on: what runs later
    in the process could write a line too.
    """
    wait, go = os.pipe()
    pid = os.fork()
    if pid:
        os.write(verdict_fd, f"pid {pid}\n".encode())
        os.write(go, b".")  # `go` stays open as long as this process lives
        return pid
    os.close(go)
    call(libc.prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    os.read(wait, 1)
    os.set_blocking(wait, False)
    try:
        os.read(wait, 1)
    except BlockingIOError:  # the pipe's other end is open
        os.close(wait)
        return 0
    os._exit(1)  # it died before prctl, so no signal will come


def wait_for(pid):
    """Reap children until `pid` has ended.

    Returns (its exit code, or minus the signal that ended it; its CPU seconds).
    """
    reaped = None
    while reaped != pid:
        reaped, status, used = os.wait4(-1, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def become_nobody(libc):
    """Leave root for good. Python may be installed below /root: its library stays reachable through a descriptor."""
    library = os.path.dirname(os.__file__)
    opened = f"/proc/self/fd/{os.open(library, os.O_PATH)}"
    sys.path[:] = [path.replace(library, opened) for path in sys.path]
    for module in list(sys.modules.values()):
        if hasattr(module, "__path__"):
            module.__path__ = [path.replace(library, opened) for path in module.__path__]
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    call(libc.prctl, PR_SET_DUMPABLE, 1, 0, 0, 0)  # setuid took away the right to write one's own uid_map


def enter_namespaces(libc, folder):
    """Enter user, process, network (no interface up), IPC and mount namespaces; mount a small tmpfs over `folder`.

    Returns whether everything else is read-only now (Linux 5.12 and later): Landlock does not protect modes, owners
    and times of files.
    """
    uid, gid = os.getuid(), os.getgid()
    call(libc.unshare, NEWUSER | NEWPID | NEWNET | NEWIPC | NEWNS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)
    mount_setattr, at_fdcwd, at_recursive = DENIED["mount_setattr"][0], -100, 0x8000
    attributes = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # MOUNT_ATTR_RDONLY
    read_only = libc.syscall(mount_setattr, at_fdcwd, b"/", at_recursive, attributes, ctypes.c_size_t(32)) == 0
    options = f"size={FILES},nr_inodes=2000,mode=700".encode()
    call(libc.mount, b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(2 | 4), options)  # nosuid, nodev
    return read_only


def limit_resources(cpu_seconds, processes):
    """Set the limits of the code. Without a process namespace, `processes` is 0: an orphan could not be found again.

    The kernel sends SIGXCPU at `cpu_seconds` and, if the code ignores that, SIGKILL a second later. The limit counts
    timer ticks, so on a busy machine the measured time of the process may be a tenth below or above.
    """
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def drop_privileges(libc):
    """Drop every capability, those inside the namespaces included, and the ways to gain one."""
    call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # Landlock requires it
    call(libc.capset, (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())


def enter_landlock(libc, folder):
    """Allow writing in `folder` and reading Python and the system's libraries; no exec, TCP or signals to others.

    Source: linux/landlock.h. Access rights are bits, and each version of the interface (ABI) adds some.
    """
    create_ruleset, add_rule, restrict_self = 444, 445, 446
    abi = call(libc.syscall, create_ruleset, None, ctypes.c_size_t(0), 1)
    every = (1 << (13, 14, 15, 15, 16)[min(abi, 5) - 1]) - 1
    read, read_write_file = 1 << 2 | 1 << 3, every & (1 << 1 | 1 << 2 | 1 << 14)
    inside = every & ~(1 << 0 | 1 << 6 | 1 << 11 | 1 << 15)  # not: execute, make devices, ioctl on devices
    attributes = (ctypes.c_uint64 * 3)(every, 3, 3)  # files; TCP bind and connect; abstract sockets and signals
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = call(libc.syscall, create_ruleset, attributes, ctypes.c_size_t(size), 0)
    rules = [(path, read) for path in (*sys.path, sys.base_prefix, "/usr", "/lib", "/lib64", "/etc")]
    rules += [(path, read_write_file) for path in ("/dev/null", "/dev/zero", "/dev/urandom")]
    for path, access in [*rules, (folder, inside)]:
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH)
            rule = access.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder)  # struct is packed: 12 bytes
            call(libc.syscall, add_rule, ruleset, 1, rule, 0)
            os.close(fd)
    call(libc.syscall, restrict_self, ruleset, 0)
    os.close(ruleset)


def filter_syscalls(libc, metadata):
    """Install filter_program() for this process and all that it starts; nothing on a machine not in MACHINES."""
    machine = os.uname().machine
    if machine not in MACHINES:
        return
    program = filter_program(machine, metadata)
    code = b"".join(
        operation.to_bytes(2, sys.byteorder) + bytes(jumps) + operand.to_bytes(4, sys.byteorder)
        for operation, *jumps, operand in program
    )

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

    call(libc.prctl, PR_SET_SECCOMP, 2, ctypes.byref(Program(len(program), code)), 0, 0)  # SECCOMP_MODE_FILTER


def filter_program(machine, metadata):
    """The system call filter: [(operation, jump if true, jump if false, operand)] of a seccomp BPF program.

    DENIED, with `metadata` METADATA, and calls of another architecture fail with EPERM. By argument:
    clone makes no namespace, as a new user namespace would give its creator every capability inside it.
    clone3 fails with ENOSYS, as its flags are in memory, where no filter can read them; libc falls back to clone.
    prctl cannot clear the signal at the parent's death, which is what ends the code where there is no process 1.
    socketpair makes streams (asyncio needs them); a datagram socket of a pair could send to another socket's path.

    Source: linux/filter.h, linux/bpf_common.h, linux/seccomp.h.
    """
    column = list(MACHINES).index(machine)
    denied = [numbers[column] for numbers in [*DENIED.values(), *(METADATA.values() if metadata else ())]]
    clone, clone3, prctl, socketpair = (numbers[column] for numbers in BY_ARGUMENT.values())
    load, equal, at_least, any_bit, mask, leave = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    number, architecture, arguments = 0, 4, (16, 24)  # offsets in seccomp_data; of arguments the low 32 bits
    ends = {"allow": 0x7FFF0000, "EPERM": 0x00050001, "ENOSYS": 0x00050026}
    namespaces = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
    # jumps: a number of instructions to skip, or one of the ends
    program = [
        (load, 0, 0, architecture),
        (equal, 0, "EPERM", MACHINES[machine]),
        (load, 0, 0, number),
        (at_least, "EPERM", 0, 1 << 30),  # the x32 calls of x86_64
        *((equal, "EPERM", 0, n) for n in denied if n is not None),
        (equal, "ENOSYS", 0, clone3),
        (equal, 0, 2, clone),
        (load, 0, 0, arguments[0]),
        (any_bit, "EPERM", "allow", namespaces),
        (equal, 0, 2, prctl),
        (load, 0, 0, arguments[0]),
        (equal, "EPERM", "allow", PR_SET_PDEATHSIG),
        (equal, 0, "allow", socketpair),
        (load, 0, 0, arguments[1]),
        (mask, 0, 0, 15),
        (equal, "allow", "EPERM", 1),  # SOCK_STREAM
    ]
    at = {end: len(program) + i for i, end in enumerate(ends)}
    return [
        (operation, *(at[jump] - i - 1 if jump in at else jump for jump in jumps), operand)
        for i, (operation, *jumps, operand) in enumerate(program)
    ] + [(leave, 0, 0, value) for value in ends.values()]


def judge(nonce, code, tests, verdict_fd):
    """Execute code, then tests, in one module; write the verdict as `nonce kind detail`. Never returns."""
    write, leave = os.write, os._exit  # the code may replace them
    module = type(sys)("solution")
    sys.modules["solution"] = module  # dataclasses look their module up
    kind, detail = "passed", ""
    try:
        try:
            program = compile(code, "<solution>", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as e:
            kind, detail = "syntax", describe(e)
        else:
            checks = compile(tests, "<tests>", "exec")
            exec(program, module.__dict__)
            exec(checks, module.__dict__)
    except BaseException as e:  # SystemExit and KeyboardInterrupt are failures of the code too
        kind, detail = "exception", describe(e)
        frame = e.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        if isinstance(e, AssertionError) and frame.tb_frame.f_code.co_filename == "<tests>":
            kind = "wrong answer"
            detail = tests.split("\n")[frame.tb_lineno - 1].strip()
    write(verdict_fd, f"{nonce} {kind}\t{detail[:300]}\n".encode(errors="replace"))
    leave(0)


def describe(error):
    """`Type: message` on one line."""
    try:
        return " ".join(f"{type(error).__name__}: {error}".split())
    except BaseException:  # the code's own __str__
        return type(error).__name__


if __name__ == "__main__":
    if len(sys.argv) > 1 or sys.stdin.isatty():
        sys.exit("not run by hand: infer_codegen.py and eval_codegen.py start it with a job on standard input")
    main()
