"""The sandbox of generated code: every escape named in the design is tried for real and must be contained."""

import os
import socket
import textwrap
import time
from pathlib import Path

import pytest

from distill.tasks import codegen_sandbox
from distill.tasks.codegen_sandbox import describe_isolation, isolation, run_many, run_sandboxed
from distill.tasks.codegen_sandbox_child import FILE_SIZE, NOBODY

DEFINES = "def f():\n    return 1\n"
CHECK = "assert f() == 1"
EVERY_FD = "import os\nfor fd in range(32):\n    try:\n        os.write(fd, {})\n    except OSError:\n        pass\n"
needs_namespaces = pytest.mark.skipif(not isolation()[0], reason=describe_isolation())
needs_landlock = pytest.mark.skipif(not isolation()[1], reason=describe_isolation())


def run(code, tests=CHECK, **options):
    verdict = run_sandboxed(code, tests, **options)
    return verdict["kind"], verdict["detail"]


def processes_with(marker):
    """Process ids whose command line or name holds the marker."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if marker in Path("/proc", pid, "comm").read_text():
                found.append(int(pid))
        except OSError:
            continue
    return found


# Verdicts


def test_sandbox_level_is_reported():
    assert describe_isolation().startswith("sandbox: ")
    assert describe_isolation().endswith("rlimits") or "(weak: " in describe_isolation()


@pytest.mark.parametrize("features", [(True, True), (True, False), (False, True), (False, False)])
def test_sandbox_weaker_levels_still_judge(features):
    if any(want and not have for want, have in zip(features, isolation(), strict=True)):
        pytest.skip(describe_isolation())
    assert codegen_sandbox.run_once(DEFINES, CHECK, 4, *features)["kind"] == "passed"
    assert (
        codegen_sandbox.run_once("import os\nos.fork()\n" + DEFINES, CHECK, 4, False, features[1])["kind"] != "passed"
    )


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
        verdict = codegen_sandbox.run_once(code, CHECK, 4, True, landlock and isolation()[1])
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


needs_filter = pytest.mark.skipif("seccomp" not in describe_isolation(), reason=describe_isolation())


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
    assert codegen_sandbox.run_once(code, CHECK, 4, *features)["kind"] == "exception"
    assert (victim.stat().st_mode, victim.stat().st_mtime) == (before.st_mode, before.st_mtime)


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
