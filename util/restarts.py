"""The attempts of one launch: torchrun and Slurm start a run again after a failure.

A launch with `--resume none` or PATH notes in output_dir who started it, and where. A later attempt
that finds its own note continues from what this launch has saved.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from util import distributed
from util.checkpoint import write_whole
from util.errors import warn

NOTE = ".launch.json"


@dataclass
class Launch:
    """A launch of a run.

    Attributes:
        resume: `--resume`, see `find_checkpoint`.
        starters: names of what starts its processes: each torchrun, and the Slurm job.
        epoch, step: its start; the epoch is -inf for a new training. The launch renamed the
            checkpoints that were newer than its start. So those that are newer now are its own.
    """

    resume: str
    starters: list[str]
    epoch: float = -math.inf
    step: int = 0

    def note(self, output_dir: Path) -> None:
        """Let later attempts know of this launch. If that fails, they start as `resume` says."""
        try:
            write_whole(output_dir / NOTE, json.dumps(asdict(self)).encode())
        except OSError as error:
            warn(f"{error}; if this run is restarted, --resume {self.resume} is done again")


def begun(output_dir: Path, resume: str) -> tuple[Launch, bool]:
    """This launch, and whether an earlier attempt has begun it; the same in all processes.

    A count of restarts is no sign: each torchrun has its own, which stays 0 where another machine's
    torchrun was started anew. The folder of its logs, which has a random name, is one torchrun's.
    """
    errors = os.environ.get("TORCHELASTIC_ERROR_FILE")  # LOGS/attempt_0/LOCAL_RANK/error.json
    job = os.environ.get("SLURM_JOB_ID")
    here = [str(Path(errors).parents[2]) if errors else None, f"Slurm job {job}" if job else None]
    starters = {name for names in distributed.gather(here) for name in names if name}
    earlier = distributed.gather(_noted(output_dir))[0]
    known = set(starters)
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        known.discard(f"Slurm job {job}")  # a job may launch several runs
    if earlier is None or earlier.resume != resume or known.isdisjoint(earlier.starters):
        return Launch(resume, sorted(starters)), False
    earlier.starters = sorted(starters.union(earlier.starters))
    return earlier, True


def _noted(output_dir: Path) -> Launch | None:
    try:
        return Launch(**json.loads((output_dir / NOTE).read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        warn(f"{output_dir / NOTE} can't be read ({error}): this run doesn't know its restarts")
        return None
