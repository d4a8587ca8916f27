"""What a run that has no memory left can do."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from util.errors import UserError

RUNNING_OUT = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
COUNTED = Path(__file__).parent.parent / "benchmarks" / "results" / "memory.json"


@contextlib.contextmanager
def explain_running_out(
    batch_size: int,
    model: str | None = None,
    input_size: int | tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    grad_checkpointing: bool = False,
    *,
    trains: bool = False,
    fixed_by: str = "",
) -> Iterator[None]:
    """Turn an allocation that fails, on a GPU or a CPU, into a UserError that says what helps.

    Args:
        batch_size: images per process and step.
        model: name of a model that is trained as a whole; None for others.
        input_size: size of its images, in pixels, an int or (height, width).
        dtype: a `resolve_amp` type.
        grad_checkpointing: whether it is on.
        trains: whether there may be a checkpoint to go on from.
        fixed_by: the flag that determines `batch_size`, if it is not --batch_size.
    """
    try:
        yield
    except RuntimeError as error:
        if not has_run_out(error):
            raise
        if fixed_by:
            raise UserError(
                f"out of memory with {batch_size} images at a time, as {fixed_by} takes them: "
                "leave it out and lower --batch_size, or compute with --device cpu"
            ) from error
        problem = f"out of memory with --batch_size {batch_size}"
        if model is None:
            go_on = " and add --accept_changes to go on from the last checkpoint"
            raise UserError(f"{problem}: lower it{go_on if trains else ''}") from error
        is_counted = dtype is torch.bfloat16 and "allocate memory" not in str(error)
        if is_counted and (gib := counted_gib(batch_size, model, input_size)):
            problem += f", which takes about {gib[0]:.1f} GiB, or {gib[1]:.1f} with "
            problem += "--grad_checkpointing"
        advice = (
            "--accept_changes with a lower --batch_size and a higher --accum_iter (docs/memory.md "
            "says what fits)"
        )
        if not grad_checkpointing:
            advice = f"--grad_checkpointing, or {advice}"
        raise UserError(
            f"{problem}: add to the same command, which then continues from the last checkpoint, "
            f"{advice}"
        ) from error


def has_run_out(error: RuntimeError) -> bool:
    """Whether the error says that an allocation failed."""
    return any(text in str(error) for text in RUNNING_OUT)


def counted_gib(
    batch_size: int, model: str, input_size: int | tuple[int, int] | None
) -> list[float]:
    """What `benchmarks.memory` has counted for a training step in bf16.

    Returns:
        GiB without and with --grad_checkpointing; nothing where this was not counted.
    """
    try:
        results = json.loads(COUNTED.read_text())["results"]
    except OSError:
        return []
    counted = (results["pretrain"] | results["finetune"]).get(model, {})
    if counted.get("input_size") != input_size:
        return []
    lines = (counted["plain"], counted["grad_checkpointing"])
    return [line["fixed_gib"] + batch_size * line["mib_per_image"] / 1024 for line in lines]
