"""What runs in the child process of the sandbox: isolate, execute code and tests, report a verdict.

codegen_sandbox.py starts this file as `python -I -S` with a job on standard input, once per sample. It imports nothing
of the project and little of the standard library, since every import adds to the start-up time of each sample.
"""

import ctypes
import marshal
import os
import resource
import sys

MEMORY = 512 << 20  # address space of a process, and what all processes of a sample may hold together
FILE_SIZE = 16 << 20  # of one file; all files together fit a tmpfs of FILES where mounting is allowed
FILES = 64 << 20
PROCESSES = 16  # processes and threads
NOBODY = 65534  # root is never limited in its processes and may read everything, so root's code runs as nobody
# What neither namespaces nor Landlock nor rlimits hold: UNIX sockets by path (docker.sock), memory beside the address
# space, privileges and rings. Numbers of linux/audit.h and unistd.h: (architecture, {name: number}).
SYSCALLS = {
    "x86_64": (0xC000003E, {
        "socketpair": 53, "socket": 41, "connect": 42, "shmget": 29, "msgget": 68, "memfd_create": 319,
        "memfd_secret": 447, "io_uring_setup": 425, "ptrace": 101, "bpf": 321, "userfaultfd": 323,
        "perf_event_open": 298, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272, "setns": 308,
        "mount": 165,
    }),
    "aarch64": (0xC00000B7, {
        "socketpair": 199, "socket": 198, "connect": 203, "shmget": 194, "msgget": 186, "memfd_create": 279,
        "memfd_secret": 447, "io_uring_setup": 425, "ptrace": 117, "bpf": 280, "userfaultfd": 282,
        "perf_event_open": 241, "add_key": 217, "request_key": 218, "keyctl": 219, "unshare": 97, "setns": 268,
        "mount": 40,
    }),
}  # fmt: skip
# modes, owners, times and attributes of files: where the file system cannot be made read-only
METADATA = {
    "x86_64": [90, 91, 268, 452, 92, 93, 94, 260, 132, 235, 261, 280, 188, 189, 190, 197, 198, 199, 463, 466],
    "aarch64": [52, 53, 452, 54, 55, 88, 5, 6, 7, 14, 15, 16, 463, 466],
}
CPU_EXCEEDED = 124  # exit code of the warden, as timeout(1) has it


def child():
    nonce, code, tests, folder, namespaces, landlock, cpu_seconds = marshal.loads(sys.stdin.buffer.read())
    verdict_fd = os.dup(1)
    os.dup2(2, 1)  # what the code prints goes to the bounded channel, not into the verdict's
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        with open("/proc/self/oom_score_adj", "w") as f:
            f.write("1000")  # should memory run out all the same, the kernel picks the sample
    except OSError:
        pass  # a container's /proc may be read-only
    if os.getuid() == 0:
        become_nobody(libc)
    read_only = namespaces and enter_namespaces(libc, folder)
    os.chdir(folder)
    call(libc.prctl, 1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL: no warden without a parent, no code without a warden
    gate, opener = os.pipe()
    pid = os.fork()
    if pid == 0:
        call(libc.prctl, 1, 9, 0, 0, 0)
        os.setsid()  # out of the warden's process group, which it could kill otherwise
        os.read(gate, 1)  # the parent takes the first line of the verdict channel for the process to end: it is ours
        os.closerange(gate, opener + 1)
        limit_resources(cpu_seconds, PROCESSES if namespaces else 0)
        drop_privileges(libc)
        if landlock:
            enter_landlock(libc, folder)
        filter_syscalls(libc, metadata=not read_only)
        os.write(verdict_fd, f"{nonce} ready\n".encode())
        judge(nonce, code, tests, verdict_fd)
    os.write(verdict_fd, f"pid {pid}\n".encode())
    os.write(opener, b".")
    os.close(verdict_fd)
    _, status, used = os.wait4(pid, 0)
    killed = os.waitstatus_to_exitcode(status) == -9
    os._exit(CPU_EXCEEDED if killed and used.ru_utime + used.ru_stime > 0.9 * cpu_seconds else 1 if status else 0)


def call(function, *args):
    """A libc function that answers -1 on failure; OSError then."""
    result = function(*args)
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{function.__name__}: {os.strerror(errno)}")
    return result


def become_nobody(libc):
    """Leave root for good. Python may be installed below /root: keep its library reachable through a descriptor."""
    library = os.path.dirname(os.__file__)
    door = f"/proc/self/fd/{os.open(library, os.O_PATH)}"
    sys.path[:] = [path.replace(library, door) for path in sys.path]
    for module in list(sys.modules.values()):
        if hasattr(module, "__path__"):
            module.__path__ = [path.replace(library, door) for path in module.__path__]
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    call(libc.prctl, 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: setuid took away the right to write the own uid_map


def enter_namespaces(libc, folder):
    """User, process, network (with no interface up), IPC and mount namespaces; a small tmpfs over `folder`.

    -> whether all else is read-only now: Landlock does not hold modes, owners and times of files (Linux before 5.12).
    """
    uid, gid = os.getuid(), os.getgid()
    call(libc.unshare, 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x00020000)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)
    attributes = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # MOUNT_ATTR_RDONLY on / and, AT_RECURSIVE, all below
    read_only = libc.syscall(442, -100, b"/", 0x8000, attributes, ctypes.c_size_t(32)) == 0
    options = f"size={FILES},nr_inodes=2000,mode=700".encode()
    call(libc.mount, b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(2 | 4), options)  # nosuid, nodev
    return read_only


def limit_resources(cpu_seconds, processes):
    """Without a process namespace (processes=0) nothing may be started: an orphan could not be found again."""
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def drop_privileges(libc):
    """No capability is left, not even inside the namespaces, and none can be gained."""
    call(libc.prctl, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which Landlock asks for
    call(libc.capset, (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())


def enter_landlock(libc, folder):
    """Write inside `folder` only; read the Python installation and the system's libraries; no exec, TCP or signals out.

    Source: linux/landlock.h. Access rights are bits, and each version of the interface (ABI) knows more of them.
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
    """A seccomp filter: SYSCALLS answer EPERM, with `metadata` METADATA too; of socketpair only streams remain.

    A pair of stream sockets (asyncio needs one) cannot reach a third; a datagram socket could name another's path.
    Source: linux/filter.h, linux/seccomp.h. On an architecture that is not in the table there is no filter.
    """
    machine = os.uname().machine
    if machine not in SYSCALLS:
        return
    arch, numbers = SYSCALLS[machine]
    denied = [n for name, n in numbers.items() if name != "socketpair"] + METADATA[machine] * metadata
    load, equal, at_least, mask, give = 0x20, 0x15, 0x35, 0x54, 0x06
    deny, allow = 0x00050001, 0x7FFF0000  # SECCOMP_RET_ERRNO with EPERM, SECCOMP_RET_ALLOW
    # (operation, argument, target if true, target if false); targets None go on with the next line
    program = [(load, 4, None, None), (equal, arch, None, deny), (load, 0, None, None), (at_least, 1 << 30, deny, None)]
    program += [(equal, n, deny, None) for n in denied]
    program += [(equal, numbers["socketpair"], None, allow)]
    program += [(load, 24, None, None), (mask, 15, None, None), (equal, 1, allow, deny)]  # its type: SOCK_STREAM is 1
    end = {allow: len(program), deny: len(program) + 1}
    lines = []
    for i, (operation, argument, true, false) in enumerate(program):
        jumps = (end[target] - i - 1 if target else 0 for target in (true, false))
        lines.append((operation, *jumps, argument))
    lines += [(give, 0, 0, allow), (give, 0, 0, deny)]
    code = b"".join(
        operation.to_bytes(2, sys.byteorder) + bytes(jumps) + argument.to_bytes(4, sys.byteorder)
        for operation, *jumps, argument in lines
    )

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.c_char_p)]

    call(libc.prctl, 22, 2, ctypes.byref(Program(len(lines), code)), 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def judge(nonce, code, tests, verdict_fd):
    """Execute code, then tests, in one module; write `nonce kind detail`. Never returns."""
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
    except BaseException:  # a __str__ of the code's own
        return type(error).__name__


if __name__ == "__main__":
    if len(sys.argv) > 1 or sys.stdin.isatty():
        sys.exit("not run by hand: infer_codegen.py and eval_codegen.py start it with a job on standard input")
    child()
