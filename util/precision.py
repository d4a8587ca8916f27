"""Mixed precision: which type a device can compute in, and the pieces autocast needs."""

import torch

from util.errors import UserError

RESUMED = ", with --accept_changes if a training goes on from another type"


def cpu_computes_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively, by AVX512-BF16 or AMX; others emulate it."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for `--amp`, or None for float32.

    Args:
        amp: auto, bf16, fp16 or off; auto is bf16 where the device computes it natively (CUDA from
            Ampere on, CPUs with AVX512-BF16 or AMX), fp16 on other CUDA devices, and float32 on
            other CPUs.
        device: the device to compute on.

    Raises:
        UserError: the device can't compute in the type asked for.
    """
    if amp == "off":
        return None
    if device.type == "cpu":
        if amp == "fp16":
            raise UserError(
                f"--amp fp16 needs a CUDA device, this run is on the CPU: use bf16 or off{RESUMED}"
            )
        return torch.bfloat16 if amp == "bf16" or cpu_computes_bf16() else None
    supports_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if amp == "bf16" and not supports_bf16:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--amp bf16 is not supported by {name}: use fp16 or off{RESUMED}")
    return torch.bfloat16 if supports_bf16 and amp != "fp16" else torch.float16


def dtype_name(dtype: torch.dtype | None) -> str:
    """A `resolve_amp` type's name, such as "bfloat16"."""
    return str(dtype or torch.float32).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """The autocast context of a `resolve_amp` type; does nothing for None."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def grad_scaler(device: torch.device, dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """The gradient scaler that fp16 needs; passes everything through for other types."""
    return torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
