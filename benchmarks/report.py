"""What the benchmarks share: pairs of timings, and results written with what they were made on."""

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

from util.errors import UserError

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "timm", "transformers", "lightly", "pillow", "numpy")


def commit():
    """The commit that is checked out, with a + if files that git knows have changed since."""
    git = ["git", "-C", str(RESULTS)]
    name = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":/*.py"]).returncode
    return f"{name}+" if changed else name


# At the start: a benchmark may set the threads, and files be edited while it runs.
COMMIT, THREADS = commit(), torch.get_num_threads()


def write(name, results, **settings):
    """Write benchmarks/results/NAME.json: command, commit, hardware, versions, figures."""
    module = Path(sys.argv[0]).stem
    report = {
        "command": shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]]),
        "commit": COMMIT,
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | versions(),
        **settings,
        "results": results,
    }
    path = RESULTS / f"{name}.json"
    try:
        path.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from error
    print(f"written to {path}")


def take_turns(sides, rounds):
    """What every side measures in `rounds` rounds of turns, after one that warms up.

    Args:
        sides: functions without arguments, by name, that return what they measured.
        rounds: number of them.

    Returns:
        lists of it, by name.
    """
    speeds = {name: [] for name in sides}
    for _ in range(1 + rounds):
        for name, side in sides.items():
            speeds[name].append(side())
    return {name: measured[1:] for name, measured in speeds.items()}


def ratio(own, other):
    """Of the turns of one round each: the median of their ratios, the lowest and the highest."""
    return median_and_range([a / b for a, b in zip(own, other, strict=True)])


def median_and_range(values, digits=2):
    """The median of `values`, their lowest and their highest."""
    return {
        "median": round(statistics.median(values), digits),
        "lowest": round(min(values), digits),
        "highest": round(max(values), digits),
    }


def hardware():
    """CPU, its family and instructions, threads, and the GPU if there is one."""
    text = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    core = dict(re.findall(r"^(\S.*?)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    instructions = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & {*core.get("flags", "").split()}
    words = [core.get("model name", platform.machine())]
    if "cpu family" in core:
        words += [f"family {core['cpu family']} model {core['model']}"]
    found = {"cpu": ", ".join([*words, f"{THREADS} threads", " ".join(sorted(instructions))])}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions():
    """Versions of the packages of `PACKAGES` that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
