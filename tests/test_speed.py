"""The faster form of attention computes what the other does."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import models_mae
import models_vit
from util import speed

CPU = torch.device("cpu")


@pytest.fixture
def fused_calls(monkeypatch):
    calls = []

    def spy(*args, **kwargs):
        calls.append(args)
        return scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize(
    "build",
    [
        lambda: models_mae.build_model("mae_vit_nano_patch4", img_size=16),
        lambda: models_vit.build_model("vit_nano_patch4", img_size=16, num_classes=3),
    ],
)
@pytest.mark.parametrize("dtype, fused", [(torch.bfloat16, False), (None, True)])
def test_only_bf16_on_a_cpu_avoids_the_fused_kernel(build, dtype, fused, fused_calls):
    model = build()
    speed.prepare(model, CPU, dtype)
    model(torch.randn(2, 3, 16, 16))
    assert bool(fused_calls) == fused


def test_both_forms_have_equal_loss_and_gradients():
    losses, gradients = [], []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        model = models_mae.build_model("mae_vit_nano_patch4", img_size=16)
        speed.prepare(model, CPU, dtype)
        loss, _, _ = model(torch.randn(2, 3, 16, 16), noise=torch.rand(2, 16))
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
