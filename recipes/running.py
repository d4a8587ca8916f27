"""Run a table's cells: each is a few commands with an output folder of its own.

A cell that has its JSON file in recipes/results is done and skipped. One that was interrupted goes
on where it was, because its commands do. Cells are independent, but for those that they need.
"""

import concurrent.futures
import contextlib
import fcntl
import fnmatch
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))  # for util and benchmarks, also in `python recipes/NAME.py`

import torch  # noqa: E402

from benchmarks import report  # noqa: E402
from util import cli, precision  # noqa: E402
from util.checkpoint import write_whole  # noqa: E402
from util.errors import UserError, say  # noqa: E402

RESULTS = ROOT / "recipes" / "results"
OUTPUT = ROOT / "recipes" / "output"
ATTEMPTS = "attempts.json"  # in a cell's output folder
RECORD = {  # the entries of a done cell's JSON
    *("table", "cell", "about", "seed", "commands", "started", "wall_s", "cpu_s", "parts"),
    *("attempts_without_times", "commit", "hardware", "amp_auto", "versions", "outputs"),
}


@dataclass
class Cell:
    """One run of a table.

    Attributes:
        name: of its folder and its file, unique in the table.
        commands: argument lists that are run one after the other in the project's folder.
        about: what it is, as the table's rows and columns call it; JSON.
        seed: of all its commands.
        needs: names of the table's cells that must be done before.
    """

    name: str
    commands: list[list[str]]
    about: dict
    seed: int = 0
    needs: list[str] = field(default_factory=list)


class Table:
    """A table's name and cells, and where their files are."""

    def __init__(self, name, cells):
        self.name = name
        self.cells = {cell.name: cell for cell in cells}
        assert len(self.cells) == len(cells), "two cells of one name"

    def result(self, cell):
        """The JSON file of a done cell."""
        return RESULTS / self.name / f"{cell.name}.json"

    def output(self, cell):
        """The folder that the cell's commands write to."""
        return output(self.name, cell.name)


def output(table, cell):
    """A cell's output folder, as its commands name it."""
    return shown(OUTPUT) / table / cell


def shown(path):
    """A path as commands in the project's folder and messages name it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def write_below(folder):
    """Have outputs and results below `folder`, so that tables are run anew.

    Raises:
        UserError: it can't be written, is the project's own, or there are results that were
            finished by another commit.
    """
    global OUTPUT, RESULTS
    check_not_own(folder, "--into")
    OUTPUT, RESULTS = folder.resolve() / OUTPUT.name, folder.resolve() / RESULTS.name
    for part in (OUTPUT, RESULTS):
        cli.make_writable(part, "--into")
    for path in sorted(RESULTS.glob("*/*.json")):
        commit = record(path)["commit"]
        if commit.split(", ")[-1] != report.COMMIT:
            raise UserError(
                f"{folder} holds results of commit {commit}, this is {report.COMMIT}: delete its "
                f"{RESULTS.name} and {OUTPUT.name}, or take another folder"
            )


def check_not_own(folder, name):
    """Refuse, with a UserError, the folder of the project's results as a table's that is new."""
    recipes = Path(__file__).resolve().parent
    if folder.resolve() == recipes or folder.resolve().is_relative_to(recipes / "results"):
        raise UserError(f"{name} {folder} holds the project's results: take another folder")


def record(path):
    """A done cell's JSON.

    Raises:
        UserError: it is damaged, or of a cell of another name.
    """
    try:
        found = json.loads(path.read_bytes())
        is_whole = found.keys() >= RECORD
    except (ValueError, AttributeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{shown(path)} is damaged: delete it and run its cell again")
    if found["cell"] != path.stem:
        raise UserError(f"{shown(path)} is the result of {found['cell']}: delete or rename it")
    return found


def flags(settings):
    """{flag: value} as a command's arguments; True is a flag without a value, False is none."""
    words = []
    for name, value in settings.items():
        if value is not False:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *([] if value is True else map(str, values))]
    return words


def main(description, make_cells, table, add_flags=None, prepare=lambda: None):
    """The command line of a table's script.

    Args:
        description: of the script.
        make_cells: the table's cells, in the order to run them, of the parsed flags.
        table: its name.
        add_flags: adds the script's own flags to the parser.
        prepare: called before cells are run.
    """
    parser = cli.ArgumentParser(description=description)
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        metavar="NAME",
        help="run these cells and what they need; * stands for any letters",
    )
    parser.add_argument(
        "--jobs",
        type=cli.integer(1),
        default=cli.cores(),
        help="cells at a time, a computing thread each",
    )
    parser.add_argument("--list", action="store_true", help="list these cells, run none")
    parser.add_argument(
        "--into",
        type=cli.path,
        metavar="DIR",
        help="run the table anew: outputs and results below DIR, for recipes/compare.py",
    )
    if add_flags:
        add_flags(parser)
    cli.run(lambda args: start(args, make_cells, table, prepare), parser)


def start(args, make_cells, table, prepare):
    """Run or list a table's cells; the arguments are `main`'s and its flags."""
    # A shell starts what runs in the background with Ctrl-C ignored, and jobs are ended by TERM.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    if args.into:
        write_below(Path(args.into))
    table = Table(table, make_cells(args))
    chosen = choose(table, args.only)
    if args.list:
        for cell in [cell for cell in table.cells.values() if cell.name in chosen]:
            done = "done   " if table.result(cell).exists() else "not run"
            say(f"{done} {cell.name}", sys.stdout)
        return
    try:
        prepare()
        if not run(table, chosen, args.jobs):
            sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted: the same command goes on", sys.stderr)
        raise


def choose(table, patterns):
    """The names of the cells that match one of the patterns, and of those that they need."""
    chosen = set()
    for pattern in patterns:
        found = fnmatch.filter(table.cells, pattern)
        if not found:
            raise UserError(f"{table.name} has no cell {pattern}: see --list")
        while found:
            name = found.pop()
            if name not in chosen:
                chosen.add(name)
                found += table.cells[name].needs
    return chosen


def run(table, chosen, jobs):
    """Run the chosen cells that aren't done, `jobs` at a time; whether all are done."""
    cells = [cell for cell in table.cells.values() if cell.name in chosen]
    check_unchanged(table, cells)
    waiting = [cell for cell in cells if not table.result(cell).exists()]
    for cell in waiting:  # and what others need of a done cell, if its output is gone
        needed = [table.cells[name] for name in cell.needs]
        waiting += [n for n in needed if n not in waiting and not is_whole(table, n)]
    waiting.sort(key=cells.index)
    done = {cell.name for cell in cells if cell not in waiting}
    total = len(waiting)
    say(f"{len(done)} of {len(cells)} cells are done, {total} to run", sys.stdout)
    running, failed = {}, []
    runner = Runner(table)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            while True:
                ready = [cell for cell in waiting if done.issuperset(cell.needs)]
                for cell in ready[: jobs - len(running)]:
                    waiting.remove(cell)
                    running[pool.submit(runner.run, cell)] = cell
                if not running:
                    break
                finished, _ = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in finished:
                    cell = running.pop(future)
                    (done.add if future.result() else failed.append)(cell.name)
                    ended = total - len(waiting) - len(running)
                    say(f"{ended} of {total} cells, {len(failed)} failed", sys.stdout)
        except BaseException:
            runner.stop()
            raise
    for cell in waiting:
        say(f"not run: {cell.name}, which needs {', '.join(cell.needs)}", sys.stdout)
    return not failed and not waiting


def is_whole(table, cell):
    """Whether all commands of a cell have ended well and left their output."""
    path = ROOT / table.output(cell) / ATTEMPTS
    return path.exists() and Attempts(path, lines(cell)).kept.get("finished", False)


def check_unchanged(table, cells):
    """Refuse, with a UserError, results of other commands than the cells'."""
    for cell in cells:
        path = table.result(cell)
        if path.exists() and record(path)["commands"] != lines(cell):
            raise UserError(
                f"{shown(path)} was made by other commands than this script's: delete "
                f"it and {table.output(cell)} to run the cell again"
            )


def lines(cell):
    """A cell's commands as one would type them."""
    return [shlex.join(["python", *command]) for command in cell.commands]


class Runner:
    """Runs cells, each in a thread, and ends their commands when asked to stop."""

    def __init__(self, table):
        self.table = table
        self.processes = set()
        self.stopped = False
        self.lock = threading.Lock()

    def stop(self):
        """Have all commands save and end."""
        with self.lock:
            self.stopped = True
            for process in self.processes:
                # Not its send_signal, which may take its end from os.wait4.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGINT)

    def run(self, cell):
        """Run a cell and write its JSON; whether it succeeded."""
        try:
            folder = ROOT / self.table.output(cell)
            with cell_folder(folder) as lock:
                return self.run_in(folder, cell, lock)
        except UserError as error:
            say(f"failed: {cell.name}: {error}", sys.stdout)
        except Exception:
            traceback.print_exc()
            say(f"failed: {cell.name}", sys.stdout)
        return False

    def run_in(self, folder, cell, lock):
        """Run a cell, whose folder is locked by an open file; whether it succeeded."""
        attempts = Attempts(folder / ATTEMPTS, lines(cell))
        path = self.table.result(cell)
        if path.exists() and is_whole(self.table, cell):
            say(f"{cell.name}: done by another runner", sys.stdout)
            return True
        for number, command in enumerate(cell.commands):
            say(f"{cell.name}: python {shlex.join(command)}", sys.stdout)
            code = self.execute(number, command, folder / "console.txt", attempts, lock)
            if code:
                if not self.stopped:
                    say(f"failed: {cell.name}, see {folder / 'console.txt'}", sys.stdout)
                return False
        attempts.finish()
        if path.exists():
            line = f"{cell.name}: done again, as its output was gone; {shown(path)} stays"
            say(line, sys.stdout)
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        made = {
            "table": self.table.name,
            "cell": cell.name,
            "about": cell.about,
            "seed": cell.seed,
            "commands": lines(cell),
            **attempts.totals(),
            "hardware": report.hardware(threads=1),
            "amp_auto": computing_type(),
            "versions": {"python": platform.python_version()} | report.versions(),
            "outputs": collect(folder),
        }
        write_whole(path, f"{json.dumps(made, indent=1)}\n".encode())
        return True

    def execute(self, number, command, console, attempts, lock):
        """Run a cell's command on a CPU's core, its output at the end of a file; its exit code."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        started = time.time()
        with open(console, "ab") as file, self.lock:
            if self.stopped:
                return 130
            attempts.begin(number, started)
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches it through us, once
                pass_fds=[lock.fileno()],  # if we are killed, it keeps other runners away
            )
            self.processes.add(process)
        # Also counts the processes that it has waited for, such as those that load images.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        with self.lock:
            self.processes.discard(process)
        attempts.end(time.time() - started, usage.ru_utime + usage.ru_stime)
        return process.returncode


def computing_type():
    """The type that `--amp auto` computes in on this CPU."""
    return precision.dtype_name(precision.resolve_amp("auto", torch.device("cpu")))


@contextlib.contextmanager
def cell_folder(folder):
    """Keep other runners from a cell's folder within this context; the open file that does."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".cell.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another runner, or a command that one left behind, is using {folder}"
            ) from None
        yield file


class Attempts:
    """The times of all attempts of a cell's commands, kept in a file with these commands."""

    def __init__(self, path, commands):
        self.path = path
        self.kept = {"commands": commands, "attempts": []}
        if path.exists():
            try:
                self.kept = json.loads(path.read_bytes())
                begun_by, _ = self.kept["commands"], self.kept["attempts"]
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path} is damaged: delete {path.parent}") from error
            if begun_by != commands:
                raise UserError(f"{path.parent} was begun by other commands: delete it")

    @property
    def all(self):
        return self.kept["attempts"]

    def write(self):
        write_whole(self.path, json.dumps(self.kept).encode())

    def begin(self, number, started):
        """A command, the cell's `number`-th, starts; `started` in seconds since 1970."""
        time_of_day = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started))
        self.all.append({"command": number, "started": time_of_day, "commit": report.COMMIT})
        self.write()

    def end(self, wall_s, cpu_s):
        """It has ended, after so many seconds, and so many of a core."""
        self.all[-1] |= {"wall_s": wall_s, "cpu_s": cpu_s}
        self.write()

    def finish(self):
        """All commands have ended well."""
        self.kept["finished"] = True
        self.write()

    def totals(self):
        """For the JSON; attempts that were killed with us have no times, and are counted."""
        known = [attempt for attempt in self.all if "wall_s" in attempt]

        def total(name, number=None):
            chosen = [a[name] for a in known if number in (None, a["command"])]
            return round(sum(chosen), 1)

        numbers = sorted({attempt["command"] for attempt in known})
        return {
            "started": self.all[0]["started"],
            "wall_s": total("wall_s"),
            "cpu_s": total("cpu_s"),
            "parts": [{"wall_s": total("wall_s", n), "cpu_s": total("cpu_s", n)} for n in numbers],
            "attempts_without_times": len(self.all) - len(known),
            "commit": ", ".join(dict.fromkeys(attempt["commit"] for attempt in self.all)),
        }


def collect(folder):
    """What the commands left: {path in the folder: its entries} of log.txt and .json files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "log.txt":
            found[name] = [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".json" and not path.name.startswith(".") and name != ATTEMPTS:
            found[name] = json.loads(path.read_text())
    return found
