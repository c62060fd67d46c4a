"""Run generated Python where it can do no harm, and learn whether its tests pass.

    from distill.codegen_sandbox import run_sandboxed
    run_sandboxed("def f(x): return x + 1", "assert f(1) == 2")  # {"kind": "passed", "detail": "", "seconds": 0.04}

The file is both sides: imported, it is the parent; run as `python -I -S` with a job on standard input, it is the child:
parent -> warden (new user, network, process, IPC and mount namespaces) -> the code, as process 1 of its own process
namespace, under Landlock, a system call filter and rlimits. When it ends, the kernel ends whatever it started. Where
the machine forbids namespaces or has no Landlock, what is left is used and isolation() says so.

A verdict counts only with the nonce of the job, so leaving early (`os._exit(0)`), printing or writing to every open
file proves nothing. The code and its tests share one interpreter, as the tests must call the code: code that searches
the interpreter's own frames can find the nonce. The score trusts the model not to; the isolation does not.
"""

import ctypes
import functools
import marshal
import os
import resource
import sys
import time

KINDS = ("passed", "syntax", "wrong answer", "timeout", "exception")
TIMEOUT = 4  # CPU seconds; the wall limit is WALL_FACTOR times that, so that a busy machine does not change a verdict
WALL_FACTOR = 3
MEMORY = 512 << 20  # address space of a process, and what all processes of a sample may hold together
LOOK = 0.03  # seconds between two looks at that sum; a core can fill some 100 MB meanwhile
FILE_SIZE = 16 << 20  # of one file; all files together fit a tmpfs of FILES where mounting is allowed
FILES = 64 << 20
PROCESSES = 16  # processes and threads
OUTPUT = 1 << 20  # bytes that may be printed
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

# ---------------------------------------------------------------------------------------------------------------------
# The child. It starts once a sample, so it imports next to nothing: what the parent needs beyond that would double its
# start-up time, and is imported in the parent's functions.


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


# ---------------------------------------------------------------------------------------------------------------------
# The parent


class SandboxError(RuntimeError):
    """The sandbox could not be set up; nothing of the code has run."""


def run_sandboxed(code, tests, timeout=TIMEOUT):
    """Execute `code`, then `tests` (Python text with asserts), in the strongest isolation this machine has.

    timeout: whole CPU seconds. Returns {"kind": one of KINDS, "detail": one line, "seconds": wall time}.
    Thread-safe. Errors: UserError where not even the weakest isolation works; SandboxError when it fails later.
    """
    return run_once(code, tests, timeout, *isolation())


def run_many(jobs, timeout=TIMEOUT, desc="sandbox"):
    """Verdicts of [(code, tests), ...] in their order, as many at a time as there are cores, under a progress bar."""
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    isolation()  # probe before the threads do
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        verdicts = pool.map(lambda job: run_sandboxed(*job, timeout=timeout), jobs)
        return list(tqdm(verdicts, total=len(jobs), desc=desc, disable=not sys.stderr.isatty()))


@functools.cache
def isolation():
    """(namespaces, landlock): what this machine allows, found by trying it once, strongest first.

    Error: UserError where not even the weakest works. Without namespaces that includes a process limit that holds.
    """
    from common import UserError

    no_fork = "import os\ntry:\n    os.fork()\nexcept OSError:\n    contained = True\n"
    for features in ((True, True), (True, False), (False, True), (False, False)):
        try:
            verdict = run_once("contained = True" if features[0] else no_fork, "assert contained", TIMEOUT, *features)
            reason = verdict["detail"]
            if verdict["kind"] == "passed":
                return features
        except SandboxError as e:
            reason = e
    raise UserError(f"generated code cannot be run safely on this machine: {reason}")


def describe_isolation():
    """The isolation level in one line, for the log of whoever runs code."""
    namespaces, landlock = isolation()
    filtered = os.uname().machine in SYSCALLS
    have = ["user, network, process, IPC and mount namespaces"] * namespaces + ["Landlock"] * landlock
    have += ["seccomp"] * filtered + ["rlimits"]
    lost = ["other processes are reachable"] * (not namespaces)
    lost += ["sockets are reachable"] * (not filtered)
    known = os.path.exists(f"/proc/self/task/{os.getpid()}/children")
    lost += ["memory is limited a process, not a sample"] * (namespaces and not known)
    lost += ["files the user may write or read are reachable"] * (not landlock)
    return "sandbox: " + ", ".join(have) + (f" (weak: {'; '.join(lost)})" if lost else "")


def run_once(code, tests, timeout, namespaces, landlock):
    """One child with exactly the isolation asked for; SandboxError if it cannot have it."""
    import secrets
    import subprocess
    import tempfile

    nonce, start = secrets.token_hex(16), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="codegen_", ignore_cleanup_errors=True) as folder:
        if os.getuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        said = bytearray()
        try:
            job = marshal.dumps((nonce, code, tests, folder, namespaces, landlock, timeout))
            try:
                child.stdin.write(job)
                child.stdin.close()
            except BrokenPipeError:  # the child died at start-up; listen() hears why
                pass
            stopped, printed = listen(child, said, start + WALL_FACTOR * timeout)
        finally:
            kill(child, said)
    verdict = verdict_of(nonce, said.decode(errors="replace"), stopped, child.returncode)
    if verdict is None:
        raise SandboxError(printed.decode(errors="replace").strip().split("\n")[-1] or f"exit {child.returncode}")
    return {"kind": verdict[0], "detail": verdict[1], "seconds": round(time.monotonic() - start, 3)}


def listen(child, said, deadline):
    """Read both channels until they close, `deadline`, OUTPUT bytes or MEMORY; `said` collects the verdict's.

    Returns (why it stopped early or "", the first bytes printed).
    """
    import selectors

    printed, size, look = bytearray(), 0, time.monotonic() + LOOK
    with selectors.DefaultSelector() as channels:
        channels.register(child.stdout, selectors.EVENT_READ)
        channels.register(child.stderr, selectors.EVENT_READ)
        while channels.get_map():
            ready = channels.select(max(min(deadline, look) - time.monotonic(), 0))
            if time.monotonic() >= look:
                if over_memory(child.pid):
                    return "memory", printed
                look = time.monotonic() + LOOK
            if not ready and time.monotonic() >= deadline:
                return "timeout", printed
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                size += len(chunk)
                if not chunk:
                    channels.unregister(key.fileobj)
                elif key.fileobj is child.stdout:
                    said += chunk
                elif len(printed) < 4096:
                    printed += chunk
                if size > OUTPUT:
                    return "output", printed
    return "", printed


def over_memory(warden):
    """Whether the processes below the warden hold more than MEMORY together, a sum that no rlimit knows.

    Whatever a sample starts stays below its warden: the process namespace sees to it, and without one nothing starts.
    """
    from glob import glob

    for exact in (False, True, True):  # twice: what a process shares counts again if it ends while the sum is taken
        found = [warden]
        for pid in found:  # grows meanwhile
            found += [p for path in glob(f"/proc/{pid}/task/*/children") for p in of_process(path).split()]
        if sum(memory_held(pid, exact) for pid in found[1:]) <= MEMORY:
            return False
    return True


def memory_held(pid, exact):
    """Bytes of a process, 0 when it is gone. exact: a page of k processes counts 1/k; takes the kernel longer."""
    share = of_process(f"/proc/{pid}/smaps_rollup").partition("\nPss:")[2].split() if exact else []
    if share:
        return int(share[0]) << 10
    pages = of_process(f"/proc/{pid}/statm").split()
    return int(pages[1]) * resource.getpagesize() if pages else 0


def of_process(path):
    """Text of a file in /proc; "" when the process is gone or keeps it to itself."""
    try:
        with open(path) as f:
            return f.read()
    except OSError:
        return ""


def kill(child, said):
    """End the code by its own process id (it may have left the group), then the warden; return when both are gone."""
    import subprocess
    from contextlib import suppress

    first = said.partition(b"\n")[0].split()
    if first[:1] == [b"pid"] and child.poll() is None:  # while the warden lives the id is still the code's
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.kill(int(first[1]), 9)
            child.wait(2)  # the warden leaves when the code and all it started are gone
    with suppress(ProcessLookupError):
        os.killpg(child.pid, 9)
    child.wait()
    child.stdout.close()
    child.stderr.close()


def verdict_of(nonce, said, stopped, returncode):
    """(kind, detail) from what the child said; None where it never came as far as the code."""
    lines = [line.removeprefix(f"{nonce} ") for line in said.split("\n") if line.startswith(f"{nonce} ")]
    if "ready" not in lines:
        return None
    if len(lines) > 1:
        kind, _, detail = lines[1].partition("\t")
        return kind, detail
    if stopped == "output":
        return "exception", f"printed more than {OUTPUT >> 20} MiB"
    if stopped == "memory":
        return "exception", f"MemoryError: its processes hold more than {MEMORY >> 20} MiB together"
    if stopped == "timeout" or returncode == CPU_EXCEEDED:
        return "timeout", "wall time" if stopped else "CPU time"
    return "exception", "ended without a verdict" + " (killed or failed)" * bool(returncode)


if __name__ == "__main__":
    if len(sys.argv) > 1 or sys.stdin.isatty():
        sys.exit("not run by hand: infer_codegen.py and eval_codegen.py start it with a job on standard input")
    child()
