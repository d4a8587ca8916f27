"""The LARS optimizer of the linear probe (paper, table 10; You et al., arXiv 1708.03888)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum that scales a matrix's update to the matrix's norm.

    The update g of a weight w, its decayed gradient, is multiplied by
    trust_coefficient x |w| / |g|, or by 1 where either norm is 0. 1-D tensors, such as biases, are
    neither scaled nor decayed.

    Args:
        params: tensors or groups of them.
        lr: learning rate.
        weight_decay: this multiple of a weight is added to its gradient.
        momentum: momentum factor.
        trust_coefficient: ratio of update norm to weight norm at learning rate 1.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, trust_coefficient=trust_coefficient
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; returns the loss of `closure`, where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        update = weight.grad
        if weight.ndim > 1:
            update = update.add(weight, alpha=group["weight_decay"])
            weight_norm, update_norm = weight.norm(), update.norm()
            trust = group["trust_coefficient"] * weight_norm / update_norm
            usable = (weight_norm > 0) & (update_norm > 0)
            update = update * torch.where(usable, trust, 1.0)  # no wait for the device
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].mul_(group["momentum"]).add_(update)
        weight.add_(state["momentum"], alpha=-group["lr"])
