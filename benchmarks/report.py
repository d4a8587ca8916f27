"""What the benchmarks share: flags, turns, and results written with what they were measured on."""

import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from util import cli
from util.errors import UserError

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "timm", "transformers", "lightly", "pillow", "numpy")


def commit():
    """The commit that is checked out; `+` marks uncommitted changes of tracked Python files."""
    git = ["git", "-C", str(RESULTS)]
    head = [*git, "rev-parse", "--short", "HEAD"]
    try:
        name = subprocess.check_output(head, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):  # a copy without its history, or no git
        return "an unknown commit"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":/*.py"]).returncode
    return f"{name}+" if changed else name


# Read at the start: a benchmark may set the threads, and files may be edited while it runs.
COMMIT, THREADS = commit(), torch.get_num_threads()


def parser(description, pairs):
    """A parser with the flags of every benchmark."""
    made = cli.ArgumentParser(description=description)
    made.add_argument("--device", default="auto", help="auto (CUDA if available), cuda or cpu")
    made.add_argument("--pairs", type=cli.integer(1), default=pairs, help="rounds of turns")
    return made


def on(device):
    """What the names of results measured on a GPU end in."""
    return "_cuda" if device.type == "cuda" else ""


def write(name, results, **settings):
    """Write benchmarks/results/NAME.json: results, and what they were measured with and on."""
    report = {
        **about(),
        **settings,
        "results": results,
    }
    path = RESULTS / f"{name}.json"
    try:
        path.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from error
    print(f"written to {path}")
    return report


def about():
    """What a benchmark's results were made with and on."""
    module = f"benchmarks.{Path(sys.argv[0]).stem}"
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": COMMIT,
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | versions(),
    }


def take_turns(sides, rounds, may_fail=False):
    """What each side, a function without arguments, returns in `rounds` rounds of turns.

    A round before them warms up. Sides and what they measured are dicts with the same keys. With
    `may_fail` a side's UserError is printed, and leaves out this side only.
    """
    measured = {name: [] for name in sides}
    for _ in range(1 + rounds):
        for name in [*measured]:
            try:
                measured[name].append(sides[name]())
            except UserError as error:
                if not may_fail:
                    raise
                print(error, flush=True)
                del measured[name]
    return {name: values[1:] for name, values in measured.items()}


def ratio(own, other, digits=2):
    """The ratios of two sides' turns, round by round: median, lowest and highest."""
    return median_and_range([a / b for a, b in zip(own, other, strict=True)], digits)


def median_and_range(values, digits=2):
    """Median, lowest and highest of `values`."""
    return {
        "median": round(statistics.median(values), digits),
        "lowest": round(min(values), digits),
        "highest": round(max(values), digits),
    }


def hardware(threads=THREADS):
    """The CPU with its family, threads and instructions, and the GPU if there is one."""
    text = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    core = dict(re.findall(r"^(\S.*?)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    words = [core.get("model name", platform.machine())]
    if "cpu family" in core:
        words += [f"family {core['cpu family']} model {core['model']}"]
    instructions = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & {*core.get("flags", "").split()}
    found = {
        "cpu": ", ".join(
            [*words, f"{threads} thread{'s' * (threads != 1)}", " ".join(sorted(instructions))]
        )
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def versions():
    """Versions of the installed ones of `PACKAGES`."""
    installed = {found.name.lower(): found.version for found in metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}
