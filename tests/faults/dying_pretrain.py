"""tiny_pretrain.py whose ranks kill themselves, once each, at places of DEATHS: "RANK:PLACE ...".

What is killed at "step" or "evaluation" has at least one checkpoint behind it.
"""

import os
import signal
from pathlib import Path

import tiny_pretrain  # noqa: F401, for its model
import torch
import torch.distributed as dist

import main_pretrain
from util import cli, launching, training

parser = main_pretrain.get_args_parser()
deaths = Path(parser.parse_args().output_dir).with_name("deaths")


def die(place):
    death = f"{os.environ['RANK']}:{place}"
    note = deaths / death.replace(":", "-")
    if death in os.environ["DEATHS"].split() and not note.exists():
        note.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def dying(owner, name, place, *, after=False, skip=0):
    """Let this process die in its call number `skip` of a function, at its begin or end."""
    function, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(name)
        if not after and len(calls) > skip:
            die(place)
        result = function(*args, **kwargs)
        if after and len(calls) > skip:
            die(place)
        return result

    setattr(owner, name, wrapper)


if __name__ == "__main__":
    deaths.mkdir(parents=True, exist_ok=True)
    die("imported")
    dying(dist, "PrefixStore", "store")  # it knows torchrun's store, and has not written to it
    dying(launching, "store_of_this_attempt", "met", after=True)
    dying(dist, "init_process_group", "connected", after=True)
    dying(training.Checkpoints, "save_if_due", "step", skip=4)
    dying(torch, "save", "save", after=True, skip=6)  # written, and not renamed yet
    dying(main_pretrain, "evaluate", "evaluation", skip=1)
    dying(training.Checkpoints, "finish", "finished", after=True)
    dying(dist, "destroy_process_group", "left", after=True)
    cli.run(main_pretrain.main, parser)
