"""What can go wrong around a sweep: kill -9, full and read-only disks, damage, jumping clocks, absurd values.

Each is met at the command line. A fault ends in a correct result or in one line and an exit status.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib.experiments import __main__ as sweeps
from lib.experiments import runs, sweep
from lib.experiments.config import LIMITS, ConfigError, FacesConfig, RunConfig, parse_parameters
from lib.experiments.processes import in_processes
from lib.experiments.profiles import faces_config, grid, profile_config
from lib.experiments.runs import run_folder, run_key
from lib.experiments.store import REPOSITORY, read_sealed, remove_leftovers, set_aside, write_atomic
from lib.experiments.trainer import Trainer, read_checkpoint
from lib.pages import notebooks

VALUES: dict[str, Any] = {
    "task": ["inpainting", "denoising"],
    "sigma": ["relu", "identity"],
    "noise": [0.1, 0.5],
    "tau": [0.5, 2.1],
    "solver": "plain",
    "train_images": 20,
    "test_images": 10,
    "batch_size": 10,
    "epochs": 5,
}
"""Eight stacks of four small images' runs, some of which diverge."""

CONFIGS = grid("smoke", **VALUES)
RUN = ["run", "--profile", "smoke"]
RUN += [text for name, value in VALUES.items() for text in ("-p", name, str(value))]
STATUS = ["status", *RUN[1:]]

WHO = ["group", "parent", "worker"]
KILLED = "sweep: a training process was killed; run again to resume it"
NEVER = 10**6
"""Epochs that no test lives to see the end of."""

SERVER = """
import functools, itertools, json, os, signal, sys, tempfile, time, traceback, warnings
from pathlib import Path
from lib.experiments import __main__ as sweeps, data, processes, runs, sweep

# The threads beside the one that forks are those of numerical libraries, and idle: nothing of them is needed.
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

data.mnist = functools.cache(data.mnist)
start = processes.start

class Logged(runs.Trainer):
    def tell(self, what):
        lines = [f"{what} {runs.run_key(self.members[i].config)} {self.epoch}\\n" for i in self.alive]
        with open(LOG, "a") as file:
            file.write("".join(lines))

    def train(self, on_epoch, on_step):
        def then(trainer):
            on_epoch(trainer)
            # The last epoch is stored with the run, after this.
            if self.epoch < self.config.epochs:
                self.tell("end")
        self.tell("begin")
        return super().train(then, counted(on_step))

class Forked:
    def __init__(self, descriptor):
        self.pid = os.fork()
        if not self.pid:
            # Other connections of the parent would outlive it here.
            os.closerange(3, descriptor)
            os.closerange(descriptor + 1, 1000)
            os.fsync, Path.replace, Path.unlink = map(counted, (os.fsync, Path.replace, Path.unlink))
            tempfile.mkstemp = counted(tempfile.mkstemp)
            processes.serve(descriptor)

    def __enter__(self):
        return self

    def wait(self, seconds):
        deadline = time.monotonic() + seconds
        while self.pid and time.monotonic() < deadline:
            if os.waitpid(self.pid, os.WNOHANG) != (0, 0):
                self.pid = 0
            time.sleep(0.001)

    def kill(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)

    def __exit__(self, *raised):
        if self.pid:
            os.waitpid(self.pid, 0)

def moment():
    if next(MOMENTS) == KILL[1]:
        if KILL[0] == "group":
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getppid() if KILL[0] == "parent" else os.getpid(), signal.SIGKILL)
        time.sleep(10**6)

def counted(function):
    def call(*arguments, **options):
        moment()
        result = function(*arguments, **options)
        moment()
        return result
    return call

def jumping(clock, unit):
    calls = iter(range(10**9))
    return lambda: clock() + (-1) ** next(calls) * 36_000 * unit

def command(arguments, results, out, err, log, clock=False, forked=True, kill=("nobody", -1), every=0):
    global LOG, KILL, MOMENTS
    LOG, KILL, MOMENTS = log, kill, itertools.count()
    os.setsid()
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    runs.RESULTS = sweep.RESULTS = Path(results)
    runs.Trainer = Logged
    processes.start = Forked if forked else start
    runs.CHECKPOINT_SECONDS, processes.END_SECONDS = every, 1
    if clock:
        time.time, time.time_ns = jumping(time.time, 1), jumping(time.time_ns, 10**9)
    return sweeps.main(arguments)

runs.code_version()
for config in sweep.grid("smoke", **json.loads(sys.argv[1])):
    runs.load_images(config)
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if isinstance(request, int):
        print(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    status = 99
    try:
        status = command(**request)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
"""
"""A process that has imported everything and forks for each command, whose training processes are forked as
well unless something else is said, and kill themselves, their parent or all at one of their moments: steps,
and what is done to files. A log tells what was trained."""


@dataclass
class Command:
    """`python -m lib.experiments`, forked from the server.

    Attributes:
        server: the process that started it.
        pid: of its process, which leads a group of its own.
        folder: with its `out`, `err` and `log`.
    """

    server: subprocess.Popen[str]
    pid: int
    folder: Path

    def wait(self) -> int:
        return int(ask(self.server, self.pid))

    def log(self) -> list[tuple[str, str, int]]:
        """What was trained: `begin` or `end`, key and epoch."""
        lines = [line.split() for line in self.read("log").splitlines()]
        return [(what, key, int(epoch)) for what, key, epoch in lines]

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def error_line(self) -> str:
        """The one line on standard error."""
        (line,) = self.read("err").splitlines()
        return line


@dataclass
class Commands:
    server: subprocess.Popen[str]
    folder: Path
    count: int = field(default=0)

    def start(self, arguments: list[str], results: Path, **how: Any) -> Command:
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        request = {name: str(folder / name) for name in ("out", "err", "log")}
        pid = ask(self.server, request | how | {"results": str(results), "arguments": arguments})
        return Command(self.server, int(pid), folder)

    def run(self, arguments: list[str], results: Path, **how: Any) -> tuple[int, Command]:
        """The exit status of a command, and the command."""
        command = self.start(arguments, results, **how)
        return command.wait(), command


def ask(server: subprocess.Popen[str], request: object) -> str:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return server.stdout.readline()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, json.dumps(VALUES)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield Commands(server, tmp_path_factory.mktemp("commands"))
        assert server.stdin is not None
        server.stdin.close()
        assert server.wait() == 0


@pytest.fixture(scope="module")
def undisturbed(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the sweep to which nothing happened."""
    results = tmp_path_factory.mktemp("undisturbed")
    status, command = commands.run(RUN, results)
    assert (status, command.read("err")) == (0, "")
    return results


@pytest.fixture
def results(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of the results, to be damaged."""
    return shutil.copytree(undisturbed, tmp_path / "results")


def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory at a folder, or a skipped test where mounting is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        mount(folder, options)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a disk is not permitted here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 kB, a fraction of what the sweep needs."""
    yield from mounted(tmp_path / "disk", "size=300k")


def without_seconds(path: Path) -> str:
    """A table of a sweep, as it was written, without its times."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    kept = [i for i, name in enumerate(rows[0]) if "seconds" not in name and "time" not in name]
    text = io.StringIO()
    csv.writer(text).writerows([[row[i] for i in kept] for row in rows])
    return text.getvalue()


def assert_same_sweep(results: Path, undisturbed: Path) -> None:
    """Tables and weights are those of the undisturbed sweep, and nothing else is left of the trainings."""
    for name in ("sweep_runs.csv", "sweep_epochs.csv"):
        table = without_seconds(results / "smoke" / name)
        assert table == without_seconds(undisturbed / "smoke" / name)
        assert len(table.splitlines()) > len(CONFIGS)
    for config in CONFIGS:
        folder, other = run_folder(config, results), run_folder(config, undisturbed)
        assert (folder / "weights.pt").read_bytes() == (other / "weights.pt").read_bytes()
        found = {path.name for path in folder.iterdir() if ".damaged-" not in path.name}
        assert found == {"run.json", "weights.pt", "lock"}


def keys_begun(command: Command) -> Counter[str]:
    return Counter(key for what, key, _ in command.log() if what == "begin")


def histories(results: Path) -> dict[str, tuple[bool, list[Any]]]:
    """Of each run that the store knows, whether it has ended, and its rows."""
    found: dict[str, tuple[bool, list[Any]]] = {}
    for config in CONFIGS:
        folder = run_folder(config, results)
        if (folder / "run.json").exists():
            record = json.loads((folder / "run.json").read_bytes())["run"]
            found[folder.name] = True, record["history"]
        elif (folder / "checkpoint.pt").exists():
            content = read_sealed(folder / "checkpoint.pt")
            found[folder.name] = False, read_checkpoint(content)["history"]
    return found


def wait_for(condition: Callable[[], object], seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def living(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def test_a_sweep_survives_kill_9_at_any_moment(commands: Commands, undisturbed: Path, tmp_path: Path) -> None:
    """Killed again and again, alone, with or by its training processes, whatever they do then: no epoch that
    was kept is trained again, and no process is left."""
    draws = random.Random(0)
    kills: list[tuple[str, int]] = [(WHO[k % 3], draws.randrange(30)) for k in range(12)]
    epochs_ended = Counter[tuple[str, int]]()
    for who, moment in [*kills, ("nobody", -1)]:
        before = histories(tmp_path)
        status, command = commands.run(RUN, tmp_path, kill=(who, moment))
        wait_for(lambda c=command: not living(c.pid))  # type: ignore[misc]
        after = histories(tmp_path)
        for key, (ended, history) in before.items():
            assert after[key][1][: len(history)] == history
            assert after[key] == (ended, history) or not ended
        for what, key, epoch in command.log():
            if what == "begin":
                known = before.get(key, (False, []))
                assert not known[0]
                assert epoch == max(0, len(known[1]) - 1)
            else:
                epochs_ended[key, epoch] += 1
        told = {"worker": KILLED + "\n"}.get(who, "")
        assert command.read("err") == told
        assert status == {"nobody": 0, "worker": 1}.get(who, -signal.SIGKILL)
    assert set(epochs_ended.values()) == {1}
    assert_same_sweep(tmp_path, undisturbed)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_training_processes_end_without_a_word_whenever_their_parent_goes(
    commands: Commands, tmp_path: Path, sent: signal.Signals
) -> None:
    """While they start, import, unpickle or train: not one is left, and nothing is said but by the parent."""
    draws = random.Random(sent)
    for delay in (0.0, *(draws.uniform(k, k + 1) for k in (0, 0, 1, 3))):
        command = commands.start([*RUN, "-p", "epochs", str(NEVER)], tmp_path, forked=False)
        parent = psutil.Process(command.pid)
        wait_for(lambda p=parent: p.status() == psutil.STATUS_ZOMBIE or len(living(p.pid)) > 1)  # type: ignore[misc]
        time.sleep(delay)
        if sent == signal.SIGINT:
            os.killpg(command.pid, sent)
        else:
            os.kill(command.pid, sent)
        interrupted = sent == signal.SIGINT
        assert command.wait() == (130 if interrupted else -sent)
        wait_for(lambda c=command: not living(c.pid))  # type: ignore[misc]
        said = "stopped; the same command goes on from here\n" if interrupted else ""
        assert command.read("err") == said
        assert bool(command.read("out")) == interrupted


def last_words(tell: Callable[[str], None]) -> None:
    tell("the last words")
    os._exit(3)


def test_what_a_process_says_comes_before_its_end() -> None:
    """However little time is between them."""
    heard = list[str]()
    with pytest.raises(RuntimeError, match=r"^a training process was killed; run again to resume it$"):
        in_processes([last_words], 1, heard.append)
    assert heard == ["the last words"]


def test_two_sweeps_at_once_share_the_work(commands: Commands, undisturbed: Path, tmp_path: Path) -> None:
    """Both end well, with the same tables, and each run was trained by one of them."""
    both = [commands.start(RUN, tmp_path) for _ in range(2)]
    assert [command.wait() for command in both] == [0, 0]
    assert [command.read("err") for command in both] == ["", ""]
    begun = keys_begun(both[0]) + keys_begun(both[1])
    assert begun == Counter(run_key(config) for config in CONFIGS)
    assert_same_sweep(tmp_path, undisturbed)


def test_a_clock_that_jumps_by_hours_changes_nothing(
    commands: Commands, undisturbed: Path, tmp_path: Path
) -> None:
    """Forth and back by ten hours at every look: no budget of an hour is spent, no time is negative."""
    start = time.perf_counter()
    status, command = commands.run(RUN, tmp_path, clock=True)
    elapsed = time.perf_counter() - start
    assert (status, command.read("err")) == (0, "")
    assert_same_sweep(tmp_path, undisturbed)
    for config in CONFIGS:
        record = json.loads((run_folder(config, tmp_path) / "run.json").read_bytes())["run"]
        assert 0 < record["provenance"]["seconds"] < elapsed


def test_a_full_disk_ends_a_sweep_in_one_line(commands: Commands, undisturbed: Path, disk: Path) -> None:
    """The line names the file; with more room the same command goes on to the same tables."""
    status, command = commands.run(RUN, disk)
    assert status == 1
    assert command.error_line().startswith("sweep: ")
    assert f"No space left on device: '{disk}" in command.error_line()
    kept = histories(disk)
    mount(disk, "remount,size=64m")
    status, command = commands.run(RUN, disk)
    assert (status, command.read("err")) == (0, "")
    assert not keys_begun(command).keys() & {key for key, (ended, _) in kept.items() if ended}
    assert_same_sweep(disk, undisturbed)


def test_tables_that_do_not_fit_are_told_in_one_line(commands: Commands, disk: Path) -> None:
    """When the disk is full but for nothing to train, the line is that of the table."""
    mount(disk, "remount,size=64m")
    assert commands.run(RUN, disk)[0] == 0
    before = {path: path.read_bytes() for path in (disk / "smoke").iterdir()}
    used = shutil.disk_usage(disk).used
    mount(disk, f"remount,size={used // 1024 + 4}k")
    status, command = commands.run(RUN, disk)
    assert status == 1
    assert f"No space left on device: '{disk}/smoke/" in command.error_line()
    assert {path: path.read_bytes() for path in (disk / "smoke").iterdir()} == before


def test_results_that_cannot_be_written_are_told_in_one_line(commands: Commands, disk: Path) -> None:
    """A sweep stops at a read-only disk; what is done can still be asked."""
    mount(disk, "remount,ro")
    status, command = commands.run(RUN, disk)
    assert status == 1
    assert command.error_line().startswith("sweep: ")
    assert f"Read-only file system: '{disk}" in command.error_line()
    status, command = commands.run(STATUS, disk)
    assert (status, command.read("err")) == (0, "")
    assert command.read("out").splitlines()[-1].split() == ["all", "0", "0", "0", "0", "32", "32"]


def test_damage_is_told_in_a_line_and_repaired(commands: Commands, undisturbed: Path, results: Path) -> None:
    """A flipped bit in a record and a cut checkpoint: both are kept aside, both runs are made again."""
    flipped, cut = (run_folder(config, results) for config in (CONFIGS[0], CONFIGS[-1]))
    content = bytearray((flipped / "run.json").read_bytes())
    content[len(content) // 2] ^= 1
    (flipped / "run.json").write_bytes(content)
    (cut / "run.json").unlink()
    (cut / "checkpoint.pt").write_bytes((cut / "weights.pt").read_bytes()[:-100])
    status, command = commands.run(RUN, results)
    assert status == 0
    assert keys_begun(command) == {flipped.name: 1, cut.name: 1}
    first, second = command.read("err").splitlines()
    assert first.startswith(f"set aside {flipped / 'run.json'} as run.json.damaged-")
    assert second.startswith(f"set aside {cut / 'checkpoint.pt'} as checkpoint.pt.damaged-")
    (aside,) = flipped.glob("run.json.damaged-*")
    assert aside.read_bytes() == content
    assert_same_sweep(results, undisturbed)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the repository's code and notebooks, with the data of this one."""
    for name in ("lib", "nbs"):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(REPOSITORY / name, tmp_path / "checkout" / name, ignore=ignored)
    (REPOSITORY / "data").mkdir(exist_ok=True)
    (tmp_path / "checkout" / "data").symlink_to(REPOSITORY / "data")
    return tmp_path / "checkout"


def call(checkout: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and error of `python -m` in a checkout."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout), "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_runs_of_other_code_are_not_run(checkout: Path, undisturbed: Path) -> None:
    """After a change of the code that can change results, what it did not make is not counted as done."""
    shutil.copytree(undisturbed, checkout / "results")
    status, told, error = call(checkout, "lib.experiments", *STATUS)
    assert (status, error) == (0, "")
    assert told.splitlines()[-1].split()[-2:] == ["0", "32"]
    path = checkout / "lib" / "operators.py"
    path.write_text(path.read_text() + "\nNEW = 1\n")
    status, told, error = call(checkout, "lib.experiments", *STATUS)
    assert (status, error) == (0, "")
    assert told.splitlines()[-1].split() == ["all", "0", "0", "0", "0", "32", "32"]


@pytest.fixture
def small_results(checkout: Path) -> Iterator[Path]:
    """A disk of 100 kB in the place of a checkout's results."""
    yield from mounted(checkout / "results", "size=100k")


@pytest.mark.parametrize(
    ("options", "reason"), [("size=100k", "No space left on device"), ("ro", "Read-only file system")]
)
def test_a_notebook_whose_results_cannot_be_written(
    checkout: Path, small_results: Path, options: str, reason: str
) -> None:
    """On a full or a read-only disk its last line says why and names the place, and it leaves no folder."""
    mount(small_results, f"remount,{options}")
    status, told, error = call(checkout, "lib.pages.notebooks", "run", "fig02", "--profile", "smoke")
    assert (status, told) == (1, "")
    line = error.splitlines()[-1]
    assert "Traceback" not in error
    assert line.startswith("fig02 failed, its old result is as it was: ")
    assert reason in line
    assert str(small_results) in line
    assert not (small_results / "smoke" / "fig02").exists()
    assert not [path for path in small_results.rglob(".*") if path.is_file()]


def test_a_notebook_whose_process_is_killed_is_told_in_one_line(checkout: Path) -> None:
    """As when the system is short of memory."""
    source = json.loads((checkout / "nbs" / "theory_special_case.ipynb").read_text())
    source["cells"] = [cell for cell in source["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    (dying,) = json.loads(json.dumps(source["cells"]))
    dying |= {"id": "dying", "source": "import os\nos.kill(os.getpid(), 9)", "metadata": {}}
    source["cells"] = [dying]
    (checkout / "nbs" / "dying.ipynb").write_text(json.dumps(source))
    status, told, error = call(checkout, "lib.pages.notebooks", "run", "dying", "--profile", "smoke")
    assert (status, told) == (1, "")
    assert error.splitlines()[-1] == "dying failed, its old result is as it was: Kernel died"
    assert "Traceback" not in error


WRITE = """
import os, signal, sys
from pathlib import Path
from lib.experiments.store import write_atomic
if sys.argv[2] == "killed":
    os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
for k in range(20):
    write_atomic(Path(sys.argv[1]), bytes([k]) * 2_000_000)
"""


def writer(path: Path, fate: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITE, str(path), fate], cwd=REPOSITORY)


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    """Writers that are killed in the middle of a write leave a file each, which the next write removes."""
    path = tmp_path / "file"
    for _ in range(3):
        with writer(path, "killed") as process:
            assert process.wait() == -signal.SIGKILL
        (leftover,) = tmp_path.iterdir()
        assert leftover.name.startswith(".file.")
    write_atomic(path, b"whole")
    assert list(tmp_path.iterdir()) == [path]


def test_living_writers_keep_their_files(tmp_path: Path) -> None:
    """Several writers of one file, each of which looks for leftovers, never take each other's."""
    path = tmp_path / "file"
    writers = [writer(path, "alive") for _ in range(4)]
    while any(process.poll() is None for process in writers):
        remove_leftovers(path)
    assert [process.wait() for process in writers] == [0] * 4
    assert list(tmp_path.iterdir()) == [path]


def test_only_unlocked_temporary_files_of_the_same_file_are_leftovers(tmp_path: Path) -> None:
    """Neither a locked one, nor those of other files, nor what only looks like one."""
    path = tmp_path / "file"
    dead, living = tmp_path / ".file.abcdefgh", tmp_path / ".file.01234567"
    others = [tmp_path / name for name in (".file.txt.abcdefgh", ".file.backup", ".files.abcdefgh", "file.a")]
    for other in (dead, living, *others):
        other.touch()
    with living.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_atomic(path, b"content")
        assert sorted(tmp_path.iterdir()) == sorted([path, living, *others])
    write_atomic(path, b"content")
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_damaged_files_are_all_kept_when_the_clock_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that are set aside in the same nanosecond have two names."""
    monkeypatch.setattr(time, "time_ns", lambda: 5)
    kept = []
    for content in (b"first", b"second"):
        (tmp_path / "file").write_bytes(content)
        kept.append(set_aside(tmp_path / "file", "it is broken"))
    assert [path.read_bytes() for path in kept] == [b"first", b"second"]


TINY: dict[str, Any] = {"size": 4, "train_images": 4, "test_images": 2, "batch_size": 4, "epochs": 1}
TINY |= {"final_learning_rate": 0.0, "max_steps": 20, "model": "deq"}


@pytest.mark.parametrize("name", sorted(LIMITS.keys() & RunConfig.model_fields.keys()))
def test_the_largest_and_the_smallest_values_can_be_trained(name: str) -> None:
    """They end as runs do, without an error; one that is larger is refused by its name."""
    for value in (LIMITS[name], 1 if name == "memory" else 5e-324):
        (member,) = Trainer([RunConfig(**TINY | {name: value})]).train()
        assert member.status in ("completed", "diverged", "out of time")
    above = LIMITS[name] + 1 if name == "memory" else math.nextafter(LIMITS[name], math.inf)
    for config in (RunConfig, FacesConfig):
        with pytest.raises(ConfigError, match=rf"^{name}: got .*, allowed: at most "):
            config(**{name: above})


def test_noise_alone_is_no_divergence() -> None:
    """With the most noise that is allowed, the loss is large but is not called a divergence."""
    for model in ("bilevel", "deq"):
        (member,) = Trainer([RunConfig(**TINY | {"model": model, "noise": LIMITS["noise"]})]).train()
        assert (member.status, member.reason) == ("completed", "")


ABSURD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([1e300, -1e300, 1e39, 5e-324, 10**400, math.nan, math.inf, -math.inf]),
    st.text(),
    st.text("\0\x1b\r\n\x85\u2028a", min_size=1),
    st.text("ab", min_size=1).map(lambda text: text * 3000),
    st.binary(),
    st.recursive(st.floats(), st.lists, max_leaves=5),
    st.sets(st.integers()),
    st.dictionaries(st.text(), st.integers()),
)
"""What nobody means: other types, nests, control characters, numbers beyond any sense."""

NAMES = st.one_of(
    st.sampled_from(sorted(RunConfig.model_fields.keys() | FacesConfig.model_fields.keys())), st.text()
)


def assert_one_line(message: str) -> None:
    """A terminal shows it as one line of a length that one can read."""
    assert message.isprintable()
    assert 0 < len(message) < 1500


@given(values=st.dictionaries(NAMES, ABSURD, min_size=1, max_size=3), profile=ABSURD, task=ABSURD)
@settings(max_examples=150)
@example(values={"dataset": "a\0b"}, profile="smoke", task="denoising")
@example(values={"tau": 0.5}, profile=["smoke"], task="denoising")
@example(values={"initial": "denoising"}, profile="smoke", task=["denoising"])
@example(values={"a\rb": 1, "c" * 5000: 2}, profile="smoke", task="denoising")
def test_absurd_values_are_refused_in_one_line(values: dict[str, Any], profile: Any, task: Any) -> None:
    """By everything that makes a configuration, which are values that sense can be made of otherwise."""
    positional = {key: value for key, value in values.items() if key not in ("task", "profile")}
    for make in (
        lambda: RunConfig(**values),
        lambda: FacesConfig(**values),
        lambda: grid(profile, **values),
        lambda: grid("smoke", **values),
        lambda: profile_config(profile, "denoising", **positional),
        lambda: profile_config("smoke", task, **positional),
        lambda: faces_config(profile, "denoising", **positional),
        lambda: faces_config("smoke", task, **positional),
    ):
        try:
            made = make()
        except ConfigError as error:
            assert_one_line(str(error))
        else:
            assert isinstance(made, RunConfig | FacesConfig) or made


TEXTS = st.one_of(
    st.text(),
    st.text("[]{}&*a:!-\"'#|>%@`, 01.e", max_size=30),
    ABSURD.map(repr),
    st.sampled_from(
        (
            *("!!bool x", "!!int ''", "!!timestamp x", "!!float ''", "!!binary é", "&a [*a]", "[" * 3000),
            *("{1: 2}", "? [1]\n: 2", "{[1]: 2}", "2020-01-01", "!!set {a}", "1" * 5000, "1e999"),
            "'\ud800'",
        )
    ),
)


@given(name=NAMES, text=TEXTS)
@settings(max_examples=300)
@example(name="tau", text="!!bool x")
@example(name="tau", text="!!int ''")
@example(name="tau", text="!!timestamp x")
@example(name="tau", text="&a [*a]")
@example(name="tau", text="[" * 3000)
@example(name="\x1b[2J", text="[")
def test_any_text_is_parsed_or_refused_in_one_line(name: str, text: str) -> None:
    """Whatever YAML makes of it."""
    try:
        assert parse_parameters([[name, text]]).keys() == {name}
    except ConfigError as error:
        assert_one_line(str(error))


@pytest.fixture(scope="module")
def no_work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Empty results, with commands that do no more than to check their arguments and to count."""
    results = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "RESULTS", results)
        patch.setattr(sweep, "RESULTS", results)
        patch.setattr(sweeps, "train", lambda *arguments: 0)
        patch.setattr(sweeps, "print_plan", lambda configs: None)
        yield results


@pytest.mark.parametrize("command", ["run", "plan", "status"])
@given(
    pairs=st.lists(st.tuples(NAMES, TEXTS), min_size=1, max_size=2),
    profile=st.sampled_from(["smoke"] * 3 + ["", "\r", "a" * 5000]),
)
@settings(max_examples=60)
def test_a_command_refuses_in_one_line_before_any_work(
    no_work: Path, command: str, pairs: list[tuple[str, str]], profile: str
) -> None:
    """Exit status 2 and one line, or a valid sweep; a text that looks like an option is argparse's."""
    arguments = [command, f"--profile={profile}", *(text for pair in pairs for text in ("-p", *pair))]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            status = sweeps.main(arguments)
        except SystemExit as ended:
            assert any(text.startswith("-") for pair in pairs for text in pair)
            status = ended.code
    if status == 0:
        assert err.getvalue() == ""
    else:
        assert status == 2
        assert out.getvalue() == ""
        if err.getvalue().startswith("sweep: "):
            assert err.getvalue().endswith("\n")
            assert_one_line(err.getvalue()[:-1])
        else:
            assert err.getvalue().startswith("usage: ")
    assert list(no_work.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "**", "[", "../nbs", "fig0", "fig\0", "fig\r01", "a" * 999]
)
def test_a_notebook_that_does_not_exist_is_refused_in_one_line(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the name would be a pattern or a path."""
    assert notebooks.main(["run", name, "--profile", "smoke"]) == 2
    assert_one_line(capsys.readouterr().err.removesuffix("\n"))
