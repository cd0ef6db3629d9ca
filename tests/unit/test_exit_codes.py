"""How commands end: Ctrl-C, a closed pipe, a closed terminal; with real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunetv2_dycon import commands
from nnunetv2_dycon.exit_codes import exit_code
from tests.processes import hear_ctrl_c
from tests.unit.test_commands import REQUIRED

INTERRUPTED = "stopped by Ctrl-C; to go on, type the same command again\n"
FOLDER = Path(__file__).parents[2]

# A verb whose function is stood in for: {body} is its body.
VERB = """
import importlib.util, sys, time, types
from pathlib import Path
from nnunetv2_dycon import commands
verb = {verb!r}
module, name = commands.VERBS[verb].function.split(":")
fake = types.ModuleType(module)
fake.__spec__ = importlib.util.find_spec(module)
def function(**arguments):
    {body}
setattr(fake, name, function)
sys.modules[module] = fake
show = lambda result: print(result) or 0
commands.VERBS[verb] = commands.VERBS[verb]._replace(show=show, next=lambda typed, result: None)
sys.exit(commands.main([*verb.split(), *{arguments!r}]))
"""


def launch(script: str, **how) -> subprocess.Popen:
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": hear_ctrl_c} | how
    return subprocess.Popen([sys.executable, "-c", script], text=True, cwd=FOLDER, start_new_session=True, **how)


def of_verb(verb: str, body: str) -> str:
    return VERB.format(verb=verb, body=body, arguments=REQUIRED[verb])


def wait_until(there: Callable[[], object], process: subprocess.Popen) -> None:
    end = time.monotonic() + 900
    while not there():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)


def living(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # ended meanwhile
            continue
        if int(its_session) == session and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def all_end(session: int, seconds: float = 30) -> bool:
    """Whether all processes of a session end within some seconds: a terminated one takes a moment to go."""
    end = time.monotonic() + seconds
    while living(session) and time.monotonic() < end:
        time.sleep(0.02)
    return not living(session)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")


# ---- a closed pipe -------------------------------------------------------------------------------------------


def into_a_closed_pipe(script: str, *streams: str) -> subprocess.Popen:
    read, write = os.pipe()
    os.close(read)
    process = launch(script, **dict.fromkeys(streams, write))
    os.close(write)
    return process


@pytest.mark.parametrize("verb", commands.VERBS)
def test_a_verb_whose_output_nobody_reads_ends_quietly(verb: str) -> None:
    process = into_a_closed_pipe(of_verb(verb, "return 'x' * 100_000"), "stdout")
    _, said = process.communicate()
    assert (process.returncode, said) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], {0, 141}),  # argparse passes over what it cannot print from Python 3.11.4 on
        (["compare", "--help"], {0, 141}),
        (["convert", "LA", "--help"], {0, 141}),
        (["trainers"], {141}),
    ],
)
def test_help_and_a_real_list_into_a_closed_pipe_end_quietly(arguments: list[str], code: set[int]) -> None:
    script = f"import sys; from nnunetv2_dycon.commands import main; sys.exit(main({arguments}))"
    process = into_a_closed_pipe(script, "stdout")
    _, said = process.communicate()
    assert said == ""
    assert process.returncode in code


def test_a_short_output_that_waits_in_a_buffer_ends_quietly_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    script = "import sys; from nnunetv2_dycon.exit_codes import exit_code; sys.exit(exit_code(lambda: print('x') or 0))"
    process = into_a_closed_pipe(script, "stdout")
    _, said = process.communicate()
    assert (process.returncode, said) == (141, "")


def test_errors_that_nobody_reads_end_quietly_too() -> None:
    body = "from nnunetv2_dycon.errors import DataError; raise DataError('x')"
    process = into_a_closed_pipe(of_verb("check", body), "stdout", "stderr")
    assert process.wait() == 141


def test_a_broken_pipe_of_another_kind_is_an_error_of_ours() -> None:
    process = launch(of_verb("check", "raise BrokenPipeError('of a worker')"))
    _, said = process.communicate()
    assert process.returncode == 1
    assert "BrokenPipeError: of a worker" in said


# ---- Ctrl-C --------------------------------------------------------------------------------------------------


def test_a_command_gives_ctrl_c_back_to_python_however_it_ends() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for ends, code in ((lambda: 0, 0), (lambda: os.kill(os.getpid(), signal.SIGINT) or 0, 130)):
            assert exit_code(ends) == code
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("verb", commands.VERBS)
def test_ctrl_c_ends_a_verb_in_one_line(verb: str, tmp_path: Path) -> None:
    process = launch(of_verb(verb, f"Path({str(tmp_path / 'there')!r}).touch(); time.sleep(100)"))
    wait_until((tmp_path / "there").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate() == ("", INTERRUPTED)
    assert process.returncode == 130


@pytest.mark.parametrize("error", ["ImportError('numpy')", "DataError('cut short')", "RuntimeError('of C')"])
def test_an_error_that_ctrl_c_turned_into_is_ctrl_c(tmp_path: Path, error: str) -> None:
    body = f"""
    from nnunetv2_dycon.errors import DataError
    Path({str(tmp_path / "there")!r}).touch()
    try:
        time.sleep(1000)
    except KeyboardInterrupt:
        raise {error}
"""
    process = launch(of_verb("check", body))
    wait_until((tmp_path / "there").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate() == ("", INTERRUPTED)
    assert process.returncode == 130


def test_a_job_in_the_background_goes_on_through_ctrl_c(tmp_path: Path) -> None:
    body = f"Path({str(tmp_path / 'there')!r}).touch(); sys.stdin.readline(); return 'done'"
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), "stdin": subprocess.PIPE}
    process = launch(of_verb("check", body), **ignored)
    wait_until((tmp_path / "there").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate("\n") == ("done\n", "")
    assert process.returncode == 0


POOL = """
import sys
from pathlib import Path
from nnunetv2_dycon import parallel
from nnunetv2_dycon.exit_codes import exit_code
from tests.datasets import stay
def work():
    for _ in parallel.run(stay, [Path({folder!r}, name) for name in "ab"], 2):
        pass
    return 0
if __name__ == "__main__":
    sys.exit(exit_code(work))
"""


@needs_proc
@pytest.mark.parametrize("delay", [None, 0.0, 0.1, 0.3])
def test_ctrl_c_ends_worker_processes_at_once_and_they_say_nothing(tmp_path: Path, delay: float | None) -> None:
    process = launch(POOL.format(folder=str(tmp_path)))
    if delay is None:  # both work
        wait_until(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists(), process)
    else:  # they import
        wait_until(lambda: len(living(process.pid)) > 2, process)
        time.sleep(delay)
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate() == ("", INTERRUPTED)
    assert process.returncode == 130
    assert all_end(process.pid)
    assert time.monotonic() - start < 500  # the work takes 1000 s


# ---- commands of others --------------------------------------------------------------------------------------

COMMAND = """
import os, sys
from nnunetv2_dycon import parallel
from nnunetv2_dycon.exit_codes import exit_code
child = "import subprocess; p = subprocess.Popen(['sleep', '100']); open({path!r}, 'w').write(str(p.pid)); p.wait()"
sys.exit(exit_code(lambda: parallel.run_command([sys.executable, "-c", child])))
"""


@needs_proc
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, INTERRUPTED), (signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, "")],
)
def test_a_command_ends_with_all_that_it_started_when_its_user_ends_us(tmp_path: Path, number, code, said) -> None:
    path = tmp_path / "grandchild"
    process = launch(COMMAND.format(path=str(path)))
    wait_until(lambda: path.exists() and path.read_text(), process)
    grandchild = Path("/proc", path.read_text())
    assert grandchild.exists()
    os.kill(process.pid, number)  # alone, so that nothing else ends the rest
    assert process.communicate() == ("", said)
    assert process.returncode == code
    assert not grandchild.exists() or "Z" in (grandchild / "stat").read_text()


def test_the_code_of_a_command_is_given_back() -> None:
    script = (
        "import sys; from nnunetv2_dycon.parallel import run_command; sys.exit(run_command(['sh', '-c', 'exit 7']))"
    )
    assert launch(script).wait() == 7
