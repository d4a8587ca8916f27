"""Mixed precision: which type a device can compute in, and the pieces autocast needs."""

import torch

from util.errors import UserError


def resolve_amp(amp, device):
    """The autocast type for `--amp`, or None for float32.

    Args:
        amp: auto, bf16, fp16 or off; auto is bf16 where CUDA supports it, fp16 on other CUDA
            devices and float32 on a CPU.
        device: a torch.device.

    Raises:
        UserError: the device can't compute in the type asked for.
    """
    if amp == "off" or (amp == "auto" and device.type == "cpu"):
        return None
    if device.type == "cpu":
        if amp == "fp16":
            raise UserError(
                "--amp fp16 needs a CUDA device, this run is on the CPU: use bf16 or off"
            )
        return torch.bfloat16
    supports_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if amp == "bf16" and not supports_bf16:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--amp bf16 is not supported by {name}: use fp16 or off")
    return torch.bfloat16 if supports_bf16 and amp != "fp16" else torch.float16


def autocast(device, dtype):
    """The autocast context of a `resolve_amp` type; does nothing for None."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def grad_scaler(device, dtype):
    """The gradient scaler that fp16 needs; passes everything through for other types."""
    return torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
