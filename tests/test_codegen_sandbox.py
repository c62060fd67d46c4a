"""The sandbox of generated code: each escape is tried for real and must be contained."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from distill.files import ROOT, UserError
from distill.tasks import codegen_sandbox, codegen_sandbox_child
from distill.tasks.codegen_sandbox import (
    KINDS,
    describe_isolation,
    isolation,
    require_isolation,
    run_many,
    run_once,
    run_sandboxed,
)
from distill.tasks.codegen_sandbox_child import BY_ARGUMENT, DENIED, FILE_SIZE, MACHINES, METADATA, NOBODY

DEFINES = "def f():\n    return 1\n"
CHECK = "assert f() == 1"
EVERY_FD = "import os\nfor fd in range(32):\n    try:\n        os.write(fd, {})\n    except OSError:\n        pass\n"
needs_namespaces = pytest.mark.skipif(not isolation()[0], reason=describe_isolation())
needs_landlock = pytest.mark.skipif(not isolation()[1], reason=describe_isolation())
needs_filter = pytest.mark.skipif("seccomp" not in describe_isolation(), reason=describe_isolation())
LEVELS = [(True, True), (True, False), (False, True), (False, False)]  # namespaces, Landlock


def run(code, tests=CHECK, **options):
    verdict = run_sandboxed(code, tests, **options)
    return verdict["kind"], verdict["detail"]


def skip_unless_allowed(features):
    if any(want and not have for want, have in zip(features, isolation(), strict=True)):
        pytest.skip(describe_isolation())


def processes_with(marker):
    """Ids of the processes whose name contains the marker, without those that have ended and wait to be reaped."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if (
                marker in Path("/proc", pid, "comm").read_text()
                and "zombie" not in Path("/proc", pid, "status").read_text()
            ):
                found.append(int(pid))
        except OSError:
            continue
    return found


# Verdicts


def test_sandbox_level_is_described():
    assert describe_isolation().startswith("sandbox: ")
    assert describe_isolation().endswith("rlimits") or "(weak: " in describe_isolation()


@pytest.mark.parametrize("features", LEVELS)
def test_sandbox_weaker_levels_still_judge(features):
    skip_unless_allowed(features)
    assert run_once(DEFINES, CHECK, 4, *features)["kind"] == "passed"
    assert run_once("import os\nos.fork()\n" + DEFINES, CHECK, 4, False, features[1])["kind"] != "passed"


@pytest.mark.parametrize(
    ("code", "kind", "detail"),
    [
        (DEFINES, "passed", ""),
        ("def f():\n    return 2\n", "wrong answer", "assert f() == 1"),
        ("def f(:\n", "syntax", "SyntaxError"),
        ("x = '\0'", "syntax", "null byte"),
        ("x = '\ud800'", "syntax", "UnicodeEncodeError"),
        ("(" * 5000, "syntax", ""),
        ("def f():\n    return 1 / 0\n", "exception", "ZeroDivisionError: division by zero"),
        ("def f():\n    assert False, 'mine'\n", "exception", "AssertionError: mine"),
        ("def f():\n    return f()\n", "exception", "RecursionError"),
        ("def f():\n    return input()\n", "exception", "EOFError"),
        ("", "exception", "NameError: name 'f' is not defined"),
        ("class E(Exception):\n    def __str__(self):\n        raise self\ndef f():\n    raise E", "exception", "E"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\n" + DEFINES, "passed", ""),
        ("import json, re, datetime, decimal, sqlite3, encodings.idna\n" + DEFINES, "passed", ""),
        ("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\n" + DEFINES, None, ""),
    ],
)
def test_sandbox_verdict(code, kind, detail):
    if kind is None:  # without a process namespace nothing may be started, threads included
        kind = "passed" if isolation()[0] else "exception"
    got = run(code)
    assert got[0] == kind
    assert detail in got[1]


def test_sandbox_verdicts_keep_their_order():
    jobs = [(f"def f():\n    return {i % 2}\n", CHECK) for i in range(8)]
    assert [v["kind"] for v in run_many(jobs)] == ["wrong answer", "passed"] * 4


# A verdict cannot be forged by leaving or writing


@pytest.mark.parametrize(
    "code",
    [
        "import os\ndef f():\n    os._exit(0)\n",
        "import os\nos._exit(0)\n",
        "import os\nos._exit(124)\n",
        "import sys\ndef f():\n    sys.exit(0)\n",
        "raise SystemExit(0)",
        "print('passed')\nimport os\nos._exit(0)",
        EVERY_FD.format("b'passed\\tx\\n'") + "os._exit(0)",
        EVERY_FD.format("b'pid 1\\n0 ready\\n0 passed\\t\\n'") + "os._exit(0)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\nos._exit(0)",
        "import ctypes\nctypes.string_at(0)",
    ],
)
def test_sandbox_os_exit_and_fake_verdicts_do_not_pass(code):
    assert run(code)[0] in ("exception", "timeout")


FORGE = """
import os, sys
def f():
    frame = sys._getframe()
    while "nonce" not in frame.f_locals:
        frame = frame.f_back
    nonce, channel = frame.f_locals["nonce"], frame.f_locals["verdict_fd"]
    os.write(channel, f"{nonce} KIND\\tDETAIL\\n".encode())
    os._exit(0)
"""


def test_sandbox_verdict_of_code_that_found_the_nonce_is_still_a_verdict():
    """The score trusts the model not to look for the nonce; who prints a verdict does not."""
    kind, detail = run(FORGE.replace("KIND", r"\x1b[2J").replace("DETAIL", "x"))
    assert (kind, detail) == ("exception", "ended without a verdict")
    kind, detail = run(FORGE.replace("KIND", "passed").replace("DETAIL", "x" * 1000 + r"\x1b[2J" * 1000))
    assert kind in KINDS
    assert len(detail) <= 300


@pytest.mark.parametrize("escape", ["\x1b[2J", "\x9b2J", "\x07", "\u202e", "\x7f"])
def test_sandbox_details_hold_no_terminal_escapes(escape):
    kind, detail = run(f"raise ValueError('a' + chr({ord(escape[0])}) + {escape[1:]!r} + 'b')\n")
    assert kind == "exception"
    assert detail.isprintable()
    assert "ValueError: a" in detail
    kind, detail = run(DEFINES, f"assert f() == 2  # {escape}")
    assert kind == "wrong answer"
    assert detail.isprintable()


# Time, output, memory, files


@pytest.mark.parametrize(
    "code",
    [
        "while True:\n    pass\n",
        "import time\ntime.sleep(60)\n",
        "import os, time\nos.closerange(0, 64)\ntime.sleep(60)\n",
        "from signal import *\nfor s in valid_signals() - {9, 19}:\n    signal(s, SIG_IGN)\nwhile True:\n    pass\n",
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass\n",
    ],
)
def test_sandbox_infinite_loop(code):
    assert run(code, timeout=1)[0] == "timeout"


def test_sandbox_cpu_limit_is_known_by_its_signal():
    """On a busy machine the kernel's limit may end code whose measured time is below it."""
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGXCPU)\n"
    assert run(code) == ("timeout", "CPU time")


@pytest.mark.parametrize(
    "code",
    [
        "while True:\n    print('x' * 1000)\n",
        "import sys\nwhile True:\n    sys.stderr.write('x' * 1000)\n",
        "while True:\n" + textwrap.indent(EVERY_FD.format("b'x' * 4096"), "    "),
    ],
)
def test_sandbox_output_flood(code):
    assert run(code) == ("exception", "printed more than 1 MiB")


def test_sandbox_some_output_is_fine():
    assert run("print('x' * 100_000)\n" + DEFINES) == ("passed", "")


def test_sandbox_3_gb_allocation():
    assert run("x = bytearray(3 << 30)\n" + DEFINES) == ("exception", "MemoryError:")
    assert run("x = []\nwhile True:\n    x.append(bytearray(1 << 20))\n")[1].startswith("MemoryError")


FORKS = "import os, time\nfor _ in range({}):\n    if os.fork() == 0:\n        {}\n        os._exit(0)\n"


@needs_namespaces
@pytest.mark.parametrize("landlock", [True, False])
def test_sandbox_memory_of_all_processes_together(landlock):
    """Each is far below its own limit. Without namespaces nothing starts: test_sandbox_weaker_levels_still_judge."""
    fill = FORKS.format(14, "os.setsid(); x = b'x' * (100 << 20); time.sleep(60)")
    threaded = "import threading\ndef g():\n" + textwrap.indent(fill, "    ") + "threading.Thread(target=g).start()\n"
    for code in (fill + "os.wait()\n", threaded + "import time\ntime.sleep(60)\n"):
        verdict = run_once(code, CHECK, 4, True, landlock and isolation()[1])
        assert verdict["kind"] == "exception"
        assert verdict["detail"] == "MemoryError: its processes hold more than 512 MiB together"


@needs_namespaces
def test_sandbox_memory_that_processes_share_counts_once():
    code = "x = b'x' * (200 << 20)\n" + FORKS.format(8, "time.sleep(0.3)") + "for _ in range(8):\n    os.wait()\n"
    assert run(code + DEFINES) == ("passed", "")


def test_sandbox_1_gb_file():
    code = "with open('big', 'wb') as f:\n    for _ in range(1024):\n        f.write(bytes(1 << 20))\n"
    kind, detail = run(code + DEFINES)
    assert kind == "exception"
    assert "File too large" in detail
    assert run(f"import os\nos.truncate(os.open('a', os.O_CREAT | os.O_RDWR), {FILE_SIZE + 1})")[0] == "exception"


@needs_namespaces
def test_sandbox_many_files_fill_only_their_own_disk():
    code = "for i in range(64):\n    with open(str(i), 'wb') as f:\n        f.write(bytes(15 << 20))\n"
    kind, detail = run(code)
    assert kind == "exception"
    assert "No space left" in detail


def test_sandbox_writes_inside_the_folder_work_and_vanish():
    code = (
        "import os, tempfile\nos.mkdir('d')\nopen('d/a', 'w').write('1')\nhome = os.environ['HOME']\n"
        "def f():\n    with tempfile.NamedTemporaryFile() as t:\n"
        "        return int(open(os.path.join(home, 'd', 'a')).read()) if t.name.startswith(home) else 0\n"
    )
    before = set(Path("/tmp").glob("codegen_*"))
    assert run(code) == ("passed", "")
    assert set(Path("/tmp").glob("codegen_*")) <= before


@needs_landlock
@pytest.mark.parametrize("where", ["/tmp", "/dev/shm", "/var/tmp", str(Path(__file__).parent), str(Path.home())])
def test_sandbox_writes_outside(where, tmp_path):
    target = Path(where, f"sandbox_escape_{os.getpid()}")
    kind, detail = run(f"open({str(target)!r}, 'w').write('x')\n" + DEFINES)
    assert kind == "exception"
    assert "PermissionError" in detail or "FileNotFoundError" in detail or "OSError" in detail
    assert not target.exists()
    victim = tmp_path / "victim"
    victim.write_text("kept")
    victim.chmod(0o666)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o777)
    assert run(f"import os\nos.remove({str(victim)!r})\n" + DEFINES)[0] == "exception"
    assert run(f"import os\nos.symlink({str(victim)!r}, 'l')\nopen('l', 'w')\n" + DEFINES)[0] == "exception"
    assert victim.read_text() == "kept"


@needs_landlock
@pytest.mark.parametrize("path", ["/etc/shadow", "/proc/1/environ", str(Path(__file__)), str(Path.home())])
def test_sandbox_reads_of_private_files(path):
    assert run(f"import os\nos.listdir({path!r}) if os.path.isdir({path!r}) else open({path!r})\n")[0] == "exception"


def test_sandbox_environment_is_scrubbed(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    code = "import os\ndef f():\n    return sorted(os.environ)\n"
    assert run(code, "assert set(f()) <= {'HOME', 'LANG', 'PATH', 'TMPDIR', 'LC_CTYPE'}") == ("passed", "")


def test_sandbox_does_not_run_as_root():
    assert run("import os\ndef f():\n    return os.getuid()\n", "assert f() != 0")[0] == "passed" or os.getuid() != 0


@needs_landlock
def test_sandbox_starts_no_programs():
    assert run("import os\nos.execv('/bin/true', ['true'])\n")[0] == "exception"


# Network and processes


@needs_namespaces
def test_sandbox_connections():
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        udp.settimeout(0.2)
        port = tcp.getsockname()[1]
        assert run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\n")[0] == "exception"
        code = "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', %d))\n"
        run(code % udp.getsockname()[1])
        with pytest.raises(TimeoutError):
            udp.recv(1)


@needs_filter
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_sandbox_unix_sockets(tmp_path, kind):
    path = str(tmp_path / "door")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o777)
    with socket.socket(socket.AF_UNIX, kind) as door:
        door.bind(path)
        os.chmod(path, 0o777)
        door.settimeout(0.2)
        if kind == socket.SOCK_STREAM:
            door.listen()
            knock = f"s = socket.socket(socket.AF_UNIX)\ns.connect({path!r})\ns.sendall(b'x')\n"
        else:  # a pair is connected already, but a datagram may name another address
            knock = f"s = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]\ns.sendto(b'x', {path!r})\n"
        assert run("import socket\n" + knock + DEFINES)[0] == "exception"
        with pytest.raises(TimeoutError):
            door.accept() if kind == socket.SOCK_STREAM else door.recv(1)


@needs_filter
def test_sandbox_memory_beside_the_address_space():
    assert run("import os\nos.memfd_create('m')\n" + DEFINES)[0] == "exception"
    code = "import ctypes\ndef f():\n    return ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600)\n"
    assert run(code, "assert f() == -1") == ("passed", "")


def test_sandbox_has_asyncio_and_threads():
    code = "import asyncio\nasync def g():\n    return 1\ndef f():\n    return asyncio.run(g())\n"
    assert run(code) == ("passed", "")
    pool = "from concurrent.futures import ThreadPoolExecutor\n"
    code = pool + "def f():\n    return max(ThreadPoolExecutor(2).map(int, '01'))\n"
    assert run(code) == ("passed", "")


@needs_filter
@pytest.mark.parametrize("namespaces", [True, False])
@pytest.mark.parametrize("change", ["chmod({!r}, 0o777)", "utime({!r}, (1, 1))", "setxattr({!r}, 'user.a', b'1')"])
def test_sandbox_modes_and_times_of_files_outside(tmp_path, namespaces, change):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    if os.getuid() == 0:  # the code runs as nobody, who may change only what is its own
        os.chown(victim, NOBODY, NOBODY)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o777)
    before = victim.stat()
    features = (namespaces and isolation()[0], isolation()[1])
    code = f"import os\nos.{change.format(str(victim))}\n" + DEFINES
    assert run_once(code, CHECK, 4, *features)["kind"] == "exception"
    assert (victim.stat().st_mode, victim.stat().st_mtime) == (before.st_mode, before.st_mtime)


@pytest.mark.parametrize("features", LEVELS)
def test_sandbox_code_does_not_outlive_a_killed_parent(features):
    skip_unless_allowed(features)
    name = f"sbx_killed_{features[0]:d}{features[1]:d}"
    code = (
        f"import ctypes, time\nlibc = ctypes.CDLL(None)\nlibc.prctl(15, b'{name}', 0, 0, 0)\n"
        "libc.prctl(1, 0, 0, 0, 0)\ntime.sleep(60)\n"  # PR_SET_PDEATHSIG: no signal when the parent dies
    )
    start = f"from distill.tasks.codegen_sandbox import run_once\nrun_once({code!r}, 'pass', 30, *{features})"
    with subprocess.Popen([sys.executable, "-c", start], cwd=ROOT) as parent:
        wait_until(lambda: processes_with(name))
        parent.kill()
    wait_until(lambda: not processes_with(name))


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@needs_namespaces
@pytest.mark.parametrize("landlock", [True, False])
def test_sandbox_process_1_is_not_the_code(landlock):
    """And the code can neither end it nor read its memory."""
    code = (
        "import ctypes, os, signal, time\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def f():\n"
        "    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):\n"
        "        try:\n            os.kill(1, s)\n        except PermissionError:\n            pass\n"
        "    time.sleep(0.3)\n"
        "    here = (ctypes.c_size_t * 2)(id(f), 8)\n"
        f"    read = libc.syscall({PROCESS_VM_READV}, 1, here, 1, here, 1, 0)\n"
        "    return os.getppid(), os.getpid() != 1, read, ctypes.get_errno()\n"
    )
    skip_unless_allowed((True, landlock))
    verdict = run_once(code, f"assert f() == (1, True, -1, {errno.EPERM}), f()", 4, True, landlock)
    assert verdict["kind"] == "passed", verdict


PROCESS_VM_READV = {"x86_64": 310, "aarch64": 270}.get(os.uname().machine, 0)
CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    ctypes.set_errno(0)
    result = libc.syscall(*args)
    if result == 0 and args[0] in (CLONE, CLONE3):
        os._exit(0)
    return result, ctypes.get_errno()
"""


def numbers():
    column = list(MACHINES).index(os.uname().machine)
    return {name: pair[column] for name, pair in (DENIED | BY_ARGUMENT).items()}


def calls():
    return CALL.replace("CLONE3", str(numbers()["clone3"])).replace("CLONE", str(numbers()["clone"]))


@needs_filter
@pytest.mark.parametrize("features", LEVELS)
@pytest.mark.parametrize("also", [0, 0x00020000])  # and mount
def test_sandbox_clone_makes_no_user_namespace(features, also):
    """In a new one the code would have every capability, and could mount."""
    skip_unless_allowed(features)
    code = (
        f"{calls()}def f():\n    return call({numbers()['clone']}, {0x10000000 | also | signal.SIGCHLD}, 0, 0, 0, 0)\n"
    )
    verdict = run_once(code, f"assert f() == (-1, {errno.EPERM}), f()", 4, *features)
    assert verdict["kind"] == "passed", verdict


@needs_filter
@pytest.mark.parametrize("features", LEVELS)
def test_sandbox_clone3_is_unknown(features):
    """Not forbidden: libc then falls back to clone, whose flags a filter can read."""
    skip_unless_allowed(features)
    clone_args = f"(ctypes.c_uint64 * 11)({0x10000000 | 0x00020000}, 0, 0, 0, {signal.SIGCHLD:d})"
    code = f"{calls()}def f():\n    return call({numbers()['clone3']}, {clone_args}, 88)\n"
    verdict = run_once(code, f"assert f() == (-1, {errno.ENOSYS}), f()", 4, *features)
    assert verdict["kind"] == "passed", verdict


@needs_filter
@pytest.mark.parametrize("features", LEVELS)
def test_sandbox_mount_calls(features):
    """Two of them need no capability (the first) or look at their arguments first (the second)."""
    skip_unless_allowed(features)
    n = numbers()
    code = (
        f"{calls()}def f():\n    return call({n['open_tree']}, -100, b'.', 0), call({n['fsconfig']}, -1, 0, 0, 0, 0)\n"
    )
    verdict = run_once(code, f"assert f() == ((-1, {errno.EPERM}), (-1, {errno.EPERM})), f()", 4, *features)
    assert verdict["kind"] == "passed", verdict


def filtered(program, arch, number, *arguments):
    """What the kernel would answer: the seccomp program, interpreted."""
    words = [number, arch, 0, 0]
    for argument in (*arguments, *[0] * (6 - len(arguments))):
        words += [argument & 0xFFFFFFFF, argument >> 32]
    value, at = 0, 0
    while True:
        operation, if_true, if_false, operand = program[at]
        at += 1
        if operation == 0x20:
            value = words[operand // 4]
        elif operation == 0x54:
            value &= operand
        elif operation == 0x06:
            return {0x7FFF0000: "allow", 0x00050001: "EPERM", 0x00050026: "ENOSYS"}[operand]
        else:
            true = {0x15: value == operand, 0x35: value >= operand, 0x45: value & operand}[operation]
            at += if_true if true else if_false


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("metadata", [True, False])
def test_sandbox_filter(machine, metadata):
    """On both architectures, whichever this machine has."""
    program, column = codegen_sandbox_child.filter_program(machine, metadata), list(MACHINES).index(machine)
    assert all(0 <= jump < 256 for _, *jumps, _ in program for jump in jumps)

    def answer(number, *arguments):
        return filtered(program, MACHINES[machine], number, *arguments)

    clone, clone3, prctl, socketpair = (pair[column] for pair in BY_ARGUMENT.values())
    assert {answer(pair[column]) for pair in DENIED.values()} == {"EPERM"}
    assert {answer(pair[column]) for pair in METADATA.values() if pair[column]} == {"EPERM" if metadata else "allow"}
    assert answer(clone3) == "ENOSYS"
    assert answer(clone, signal.SIGCHLD) == answer(clone, 0x003D0F00) == "allow"  # fork, a thread
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert answer(clone, signal.SIGCHLD | flag) == "EPERM"
    assert (answer(prctl, 1), answer(prctl, 15)) == ("EPERM", "allow")
    assert answer(socketpair, 1, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) == "allow"
    assert answer(socketpair, 1, socket.SOCK_DGRAM) == "EPERM"
    allowed = {"read": (0, 63), "write": (1, 64), "exit_group": (231, 94), "futex": (202, 98), "execve": (59, 221)}
    assert {answer(pair[column]) for pair in allowed.values()} == {"allow"}
    assert filtered(program, 0x40000003, 1) == "EPERM"  # i386
    assert answer(1 << 30) == "EPERM"  # x32


@pytest.mark.parametrize(("column", "header"), enumerate(["x86_64-linux-gnu/asm/unistd_64.h", "asm-generic/unistd.h"]))
def test_sandbox_numbers_are_those_of_the_kernel(column, header):
    path = Path("/usr/include", header)
    if not path.is_file():
        pytest.skip(f"no {path}")
    known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)$", path.read_text(), flags=re.MULTILINE))
    ours = {name: pair[column] for name, pair in (DENIED | METADATA | BY_ARGUMENT).items()}
    newer = {"fchmodat2", "setxattrat", "removexattrat", "file_setattr", "open_tree_attr"}
    for name, number in ours.items():
        if name in known:
            assert number == int(known[name]), name
        else:
            assert number is None or name in newer, name


def test_sandbox_fork_bomb():
    code = "import ctypes, os\nctypes.CDLL(None).prctl(15, b'sbx_bomb', 0, 0, 0)\nwhile True:\n    os.fork()\n"
    kind, detail = run(code, timeout=1)
    assert kind in ("exception", "timeout")
    assert not processes_with("sbx_bomb"), detail


@pytest.mark.parametrize("forget_parent", [False, True])
def test_sandbox_orphans(forget_parent):
    code = (
        "import ctypes, os, time\nlibc = ctypes.CDLL(None)\nlibc.prctl(15, b'sbx_orphan', 0, 0, 0)\n"
        + "libc.prctl(1, 0, 0, 0, 0)\n" * forget_parent
        + "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.closerange(0, 64)\n"
        + "        time.sleep(60)\n    os._exit(0)\n"
        + DEFINES
    )
    kind, detail = run(code)
    assert kind == ("passed" if isolation()[0] else "exception"), detail
    time.sleep(0.1)
    assert not processes_with("sbx_orphan")


def test_sandbox_code_that_ignores_its_parents_death_is_ended():
    code = (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nlibc.prctl(15, b'sbx_loop', 0, 0, 0)\n"
        "libc.prctl(1, 0, 0, 0, 0)\nimport time\ntime.sleep(60)\n"
    )
    assert run(code, timeout=1)[0] == "timeout"
    assert not processes_with("sbx_loop")


@pytest.mark.skipif(not any(isolation()), reason=describe_isolation())
def test_sandbox_signals_stay_inside():
    for target in (-1, 0, os.getpid()):
        kind, detail = run(f"import os\nos.kill({target}, 9)\n" + DEFINES)
        assert kind in ("passed", "exception"), detail


# The level that is required


@pytest.mark.parametrize("features", [(False, True), (True, False), (False, False)])
def test_sandbox_required_level(monkeypatch, features):
    monkeypatch.setattr(codegen_sandbox, "isolation", lambda: features)
    assert "(weak: " in require_isolation("any")
    with pytest.raises(UserError, match=r"weak: .*; expected full isolation \(--require_isolation any accepts this\)"):
        require_isolation("full")


def test_sandbox_full_level(monkeypatch):
    monkeypatch.setattr(codegen_sandbox, "isolation", lambda: (True, True))
    monkeypatch.setattr(codegen_sandbox.os.path, "exists", lambda path: True)
    monkeypatch.setattr(codegen_sandbox, "MACHINES", {os.uname().machine: 0})
    assert require_isolation("full") == require_isolation("any")
    monkeypatch.setattr(codegen_sandbox, "MACHINES", {})
    with pytest.raises(UserError, match="sockets are reachable"):
        require_isolation("full")
