"""Run generated Python in isolation and report whether its tests pass.

    from distill.tasks.codegen_sandbox import run_sandboxed
    run_sandboxed("def f(x): return x + 1", "assert f(1) == 2")  # {"kind": "passed", "detail": "", "seconds": 0.04}

This is the parent; codegen_sandbox_child.py is the child. The code runs in its own namespaces, under Landlock, a system
call filter and resource limits, and dies with this process. Where the machine forbids namespaces or has no Landlock,
the rest is used, and describe_isolation() names what is missing.

A verdict counts only with the nonce of its job, so `os._exit(0)`, printing or writing to every open file proves
nothing. The code and its tests share one interpreter, as the tests call the code: code that searches the interpreter's
frames can find the nonce. The score trusts the model not to do that; the isolation does not.
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

from distill.files import UserError, printable
from distill.tasks import codegen_sandbox_child
from distill.tasks.codegen_sandbox_child import CPU_EXCEEDED, MACHINES, MEMORY, NOBODY

KINDS = ("passed", "syntax", "wrong answer", "timeout", "exception")
TIMEOUT = 4  # CPU seconds; the wall limit is WALL_FACTOR times that, so that a busy machine does not change a verdict
WALL_FACTOR = 3
MEMORY_INTERVAL = 0.03  # seconds between two measurements of a sample's memory; a core fills about 100 MB in that time
OUTPUT = 1 << 20  # bytes that may be printed
DETAIL = 300  # characters


class SandboxError(RuntimeError):
    """The sandbox could not be set up; none of the code has run."""


def run_sandboxed(code, tests, timeout=TIMEOUT):
    """Execute `code`, then `tests` (Python text with asserts), in the strongest isolation this machine has.

    timeout: whole CPU seconds. Returns {"kind": one of KINDS, "detail": one line, "seconds": wall time}.
    Thread-safe. Errors: UserError where not even the weakest isolation works; SandboxError when it fails later.
    """
    return run_once(code, tests, timeout, *isolation())


def run_many(jobs, timeout=TIMEOUT, desc="sandbox"):
    """Verdicts of [(code, tests), ...] in their order; one job per core at a time, with a progress bar."""
    isolation()  # probe before the threads do
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        verdicts = pool.map(lambda job: run_sandboxed(*job, timeout=timeout), jobs)
        return list(tqdm(verdicts, total=len(jobs), desc=desc, disable=not sys.stderr.isatty()))


@functools.cache
def isolation():
    """(namespaces, landlock): what this machine allows, found by trying it once, the strongest first.

    Error: UserError if nothing works. Without namespaces, a process limit that holds is required.
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


def weaknesses():
    """What this machine's isolation lacks, as phrases; empty if it is full."""
    namespaces, landlock = isolation()
    has_children = os.path.exists(f"/proc/self/task/{os.getpid()}/children")
    missing = {
        "other processes are reachable": not namespaces,
        "sockets are reachable": os.uname().machine not in MACHINES,
        "memory is limited per process, not per sample": namespaces and not has_children,
        "files the user may write or read are reachable": not landlock,
    }
    return [phrase for phrase, applies in missing.items() if applies]


def describe_isolation():
    """The isolation level in one line, for the log of whoever runs code."""
    namespaces, landlock = isolation()
    parts = ["user, network, process, IPC and mount namespaces"] * namespaces + ["Landlock"] * landlock
    parts += ["seccomp"] * (os.uname().machine in MACHINES) + ["rlimits"]
    return "sandbox: " + ", ".join(parts) + (f" (weak: {'; '.join(weaknesses())})" if weaknesses() else "")


def require_isolation(level):
    """Check the isolation before code is run: "full" refuses a machine with weaknesses(), "any" accepts it.

    Returns describe_isolation(). Errors: UserError.
    """
    if level == "full" and weaknesses():
        raise UserError(f"{describe_isolation()}; expected full isolation (--require_isolation any accepts this)")
    return describe_isolation()


def add_isolation_argument(parser, default="any"):
    parser.add_argument(
        "--require_isolation",
        choices=["full", "any"],
        default=default,
        help=f"full refuses to run code on a machine whose sandbox is weak (default {default})",
    )


def run_once(code, tests, timeout, namespaces, landlock):
    """One child with exactly this isolation; SandboxError if the machine does not allow it."""
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
        reported = bytearray()
        try:
            job = marshal.dumps((os.getpid(), nonce, code, tests, folder, namespaces, landlock, timeout))
            try:
                child.stdin.write(job)
                child.stdin.close()
            except BrokenPipeError:  # the child died at start-up; its standard error says why
                pass
            stopped, printed = read_channels(child, reported, start + WALL_FACTOR * timeout)
        finally:
            kill(child, reported)
    verdict = read_verdict(nonce, reported.decode(errors="replace"), stopped, child.returncode)
    if verdict is None:
        raise SandboxError(printed.decode(errors="replace").strip().split("\n")[-1] or f"exit {child.returncode}")
    return {"kind": verdict[0], "detail": verdict[1], "seconds": round(time.monotonic() - start, 3)}


def read_channels(child, reported, deadline):
    """Read both channels until they close, `deadline`, OUTPUT bytes or MEMORY; `reported` collects the verdict's.

    Returns (why it stopped early or "", the first bytes printed).
    """
    printed, size, measure_at = bytearray(), 0, time.monotonic() + MEMORY_INTERVAL
    with selectors.DefaultSelector() as channels:
        channels.register(child.stdout, selectors.EVENT_READ)
        channels.register(child.stderr, selectors.EVENT_READ)
        while channels.get_map():
            ready = channels.select(max(min(deadline, measure_at) - time.monotonic(), 0))
            if time.monotonic() >= measure_at:
                if over_memory(child.pid):
                    return "memory", printed
                measure_at = time.monotonic() + MEMORY_INTERVAL
            if not ready and time.monotonic() >= deadline:
                return "timeout", printed
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                size += len(chunk)
                if not chunk:
                    channels.unregister(key.fileobj)
                elif key.fileobj is child.stdout:
                    reported += chunk
                elif len(printed) < 4096:
                    printed += chunk
                if size > OUTPUT:
                    return "output", printed
    return "", printed


def over_memory(warden):
    """Whether the warden's descendants hold more than MEMORY together, a sum that no rlimit limits.

    Whatever a sample starts stays a descendant: process 1 adopts its orphans, and without one nothing starts.
    """
    for exact in (False, True, True):  # exact twice: a page is counted again if a process that shares it ends meanwhile
        found = [warden]
        for pid in found:  # grows meanwhile
            found += [child for path in glob(f"/proc/{pid}/task/*/children") for child in read_proc(path).split()]
        if sum(memory_held(pid, exact) for pid in found[1:]) <= MEMORY:
            return False
    return True


def memory_held(pid, exact):
    """Resident bytes of a process, 0 if it has ended. exact: a page of k processes counts 1/k, which is slower."""
    share = read_proc(f"/proc/{pid}/smaps_rollup").partition("\nPss:")[2].split() if exact else []
    if share:
        return int(share[0]) << 10
    pages = read_proc(f"/proc/{pid}/statm").split()
    return int(pages[1]) * resource.getpagesize() if pages else 0


def read_proc(path):
    """Text of a file in /proc; "" if the process has ended or its file is unreadable."""
    try:
        with open(path) as f:
            return f.read()
    except OSError:
        return ""


def kill(child, reported):
    """End the code, then the warden; return when both are gone."""
    first = reported.partition(b"\n")[0].split()  # see fork_bound()
    if first[:1] == [b"pid"] and child.poll() is None:  # as long as the warden lives, no other process gets this id
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.kill(int(first[1]), 9)
            child.wait(2)  # the warden leaves when the code and all it started are gone
    with suppress(ProcessLookupError):
        os.killpg(child.pid, 9)
    child.wait()
    child.stdout.close()
    child.stderr.close()


def read_verdict(nonce, reported, stopped, returncode):
    """(kind, detail) from what the child reported; None if it did not get as far as the code.

    The code may have found the nonce, so kind and detail are only what a verdict can be.
    """
    lines = [line.removeprefix(f"{nonce} ") for line in reported.split("\n") if line.startswith(f"{nonce} ")]
    if "ready" not in lines:
        return None
    if len(lines) > 1 and (verdict := lines[1].partition("\t"))[0] in KINDS:
        return verdict[0], printable(verdict[2])[:DETAIL]
    if stopped == "output":
        return "exception", f"printed more than {OUTPUT >> 20} MiB"
    if stopped == "memory":
        return "exception", f"MemoryError: its processes hold more than {MEMORY >> 20} MiB together"
    if stopped == "timeout" or returncode == CPU_EXCEEDED:
        return "timeout", "wall time" if stopped else "CPU time"
    return "exception", "ended without a verdict" + " (killed or failed)" * bool(returncode)
