"""Run generated Python where it can do no harm, and learn whether its tests pass.

    from distill.tasks.codegen_sandbox import run_sandboxed
    run_sandboxed("def f(x): return x + 1", "assert f(1) == 2")  # {"kind": "passed", "detail": "", "seconds": 0.04}

This is the parent; codegen_sandbox_child.py is the child, run as `python -I -S` with a job on standard input:
parent -> warden (new user, network, process, IPC and mount namespaces) -> the code, as process 1 of its own process
namespace, under Landlock, a system call filter and rlimits. When it ends, the kernel ends whatever it started. Where
the machine forbids namespaces or has no Landlock, what is left is used and isolation() says so.

A verdict counts only with the nonce of the job, so leaving early (`os._exit(0)`), printing or writing to every open
file proves nothing. The code and its tests share one interpreter, as the tests must call the code: code that searches
the interpreter's own frames can find the nonce. The score trusts the model not to; the isolation does not.
"""

import functools
import marshal
import os
import resource
import secrets
import selectors
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from glob import glob

from tqdm import tqdm

from distill.files import UserError
from distill.tasks import codegen_sandbox_child
from distill.tasks.codegen_sandbox_child import CPU_EXCEEDED, MEMORY, NOBODY, SYSCALLS

KINDS = ("passed", "syntax", "wrong answer", "timeout", "exception")
TIMEOUT = 4  # CPU seconds; the wall limit is WALL_FACTOR times that, so that a busy machine does not change a verdict
WALL_FACTOR = 3
LOOK = 0.03  # seconds between two looks at the memory of a sample; a core can fill some 100 MB meanwhile
OUTPUT = 1 << 20  # bytes that may be printed


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
    isolation()  # probe before the threads do
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        verdicts = pool.map(lambda job: run_sandboxed(*job, timeout=timeout), jobs)
        return list(tqdm(verdicts, total=len(jobs), desc=desc, disable=not sys.stderr.isatty()))


@functools.cache
def isolation():
    """(namespaces, landlock): what this machine allows, found by trying it once, strongest first.

    Error: UserError where not even the weakest works. Without namespaces that includes a process limit that holds.
    """
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
    nonce, start = secrets.token_hex(16), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="codegen_", ignore_cleanup_errors=True) as folder:
        if os.getuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", codegen_sandbox_child.__file__],
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
