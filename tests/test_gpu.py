"""What only a GPU can show: `make gpu` runs these tests there, they skip elsewhere.

Tolerances are relative errors of whole tensors, ten to five times those of the same steps on a CPU
with products in that type: 1e-3 in fp16 and TF32, whose mantissas are equally long, 1e-2 in bf16.
"""

import json

import pytest
import torch
from reference_figures import FIGURES, reference_inputs, reference_mae

import models_mae
import models_vit
from benchmarks.sides import Setting, ours
from util import knn, optim, speed, spread
from util.checkpoint import load_checkpoint
from util.logs import Meter
from util.memory import counted_gib
from util.precision import autocast, grad_scaler, resolve_amp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def float32_products(monkeypatch):
    """No TF32: torch's convolutions use it by default. What a test changes is restored."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    torch.set_float32_matmul_precision("highest")


def relative_error(found, expected):
    """The norm of the difference between two tensors, over that of `expected`, on the CPU."""
    return ((found.cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "case", FIGURES["mae"] + FIGURES["mae_base"], ids=lambda case: f"seed{case['seed']}"
)
def test_float32_equals_the_reference(case):
    model = reference_mae(case)
    imgs, noise = (inputs.to(GPU) for inputs in reference_inputs(case, model))
    loss, _, mask = model.to(GPU)(imgs, case["mask_ratio"], noise)
    loss.backward()
    assert mask[0].tolist() == case["mask_row0"]
    assert loss.item() == pytest.approx(case["loss"], rel=1e-4)
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.requires_grad}
    if "grad_l2" in case:
        assert norms == pytest.approx(case["grad_l2"], rel=1e-3)


def pretraining_loss(device):
    """A small model on `device`, and a function that computes its loss on fixed images."""
    torch.manual_seed(0)
    model = models_mae.build_model("mae_vit_tiny_patch16", img_size=224, norm_pix_loss=True)
    imgs, noise = torch.randn(4, 3, 224, 224).to(device), torch.rand(4, 196).to(device)
    return model.to(device), lambda: model(imgs, 0.75, noise)[0]


def classification_loss(device):
    """The same of a classifier. Its head starts larger than in training, so that errors show."""
    torch.manual_seed(0)
    model = models_vit.build_model("vit_tiny_patch16", img_size=224, num_classes=10)
    torch.nn.init.normal_(model.head.weight, std=0.01)
    imgs, labels = torch.randn(4, 3, 224, 224).to(device), torch.arange(4).to(device)
    criterion = torch.nn.CrossEntropyLoss()
    return model.to(device), lambda: criterion(model(imgs).float(), labels)


def train_once(build, device, dtype, tf32=False):
    """An update in `dtype`; returns its loss, its gradients, and the next update's scale."""
    model, compute_loss = build(device)
    speed.prepare(model, device, dtype)
    torch.backends.cudnn.allow_tf32 = tf32
    optimizer = optim.adamw(optim.weight_decay_groups(model, 0.05), betas=(0.9, 0.95))
    scaler = grad_scaler(device, dtype)
    with autocast(device, dtype):
        loss = compute_loss()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    scaler.step(optimizer)
    scaler.update()
    assert all(p.isfinite().all() for p in model.parameters())
    return loss.detach(), gradients, scaler.get_scale()


@pytest.mark.parametrize("build", [pretraining_loss, classification_loss])
@pytest.mark.parametrize(
    "amp, products, tolerance",
    [
        ("off", "highest", 1e-4),
        ("off", "high", 1e-2),
        ("bf16", "highest", 5e-2),
        ("fp16", "highest", 1e-2),
    ],
    ids=["float32", "TF32", "bf16", "fp16"],
)
def test_a_step_equals_the_cpu_s(build, amp, products, tolerance):
    if amp == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16")
    expected_loss, expected, _ = train_once(build, CPU, None)
    torch.set_float32_matmul_precision(products)
    dtype = resolve_amp(amp, GPU)
    loss, gradients, scale = train_once(build, GPU, dtype, tf32=products == "high")
    assert scale == (2**16 if amp == "fp16" else 1)  # no gradient overflowed
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance / 10)
    errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, max(errors, key=errors.get)


@pytest.fixture
def gpu_flags(pretrain_flags):
    """Nine steps an epoch of a model whose attention is large enough for the fast kernels."""
    model = {"model": "mae_vit_nano_patch4", "input_size": 28, "lr": 1e-3}
    return pretrain_flags | model | {"device": "cuda"}


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_run_in_two_halves_equals_one_run(amp, pretrain, gpu_flags, capsys):
    """Nearly: the order of the sums in attention's backward pass differs from run to run."""
    flags = gpu_flags | {"amp": amp, "save_every": 1}
    out_dir, runs = flags["output_dir"], []
    for _ in range(2):
        pretrain(flags)
        contents = load_checkpoint(out_dir / "checkpoint-1.pth")
        records = [json.loads(line) for line in (out_dir / "log.txt").read_text().splitlines()]
        losses = [r[name] for r in records for name in ("train_loss", "val_loss")]
        moments = [moment["exp_avg_sq"] for moment in contents["optimizer"]["state"].values()]
        runs.append((losses, sum(m.sum().item() for m in moments), contents["scaler"]))
        for name in ("checkpoint-1.pth", "checkpoint-last.pth"):
            (out_dir / name).unlink()
    assert "resuming" in capsys.readouterr().out
    (losses, moments, scaler), (resumed_losses, resumed_moments, resumed_scaler) = runs
    assert resumed_losses == pytest.approx(losses, rel=1e-3)
    assert resumed_moments == pytest.approx(moments, rel=1e-2)
    assert resumed_scaler == scaler


def test_compiled_training_is_eager_training(pretrain, gpu_flags):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    losses = []
    for name, choice in (("eager", {}), ("compiled", {"compile": True})):
        out_dir = gpu_flags["output_dir"] / name
        pretrain(gpu_flags | choice | {"amp": "auto", "epochs": 1, "output_dir": out_dir})
        losses.append(json.loads((out_dir / "log.txt").read_text())["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of encoder and decoder


@pytest.mark.parametrize("grad_checkpointing", [False, True])
@pytest.mark.parametrize(
    "task, model", [("pretrain", "mae_vit_small_patch16"), ("finetune", "vit_small_patch16")]
)
def test_memory_is_what_was_counted(task, model, grad_checkpointing):
    """In docs/memory.md; kernels' workspaces and the last update's gradients move it a little."""
    if resolve_amp("auto", GPU) is not torch.bfloat16:
        pytest.skip("this GPU has no bf16, in which memory was counted")
    train = ours(Setting(task, model, 224, 128, GPU, "auto", False, grad_checkpointing))
    train(2)
    torch.cuda.reset_peak_memory_stats()
    train(2)
    counted = counted_gib(128, model, 224)[grad_checkpointing]
    assert torch.cuda.max_memory_allocated() / 2**30 == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("amp", ["auto", "fp16", "off"])
@pytest.mark.parametrize(
    "task, model", [("pretrain", "mae_vit_nano_patch4"), ("finetune", "vit_nano_patch4")]
)
def test_steps_do_not_wait_for_the_gpu(task, model, amp, monkeypatch):
    """Between log lines, which fetch the losses."""
    train = ours(Setting(task, model, 28, 8, GPU, amp, False))
    train(2)
    monkeypatch.setattr(Meter, "flush", lambda self: None)
    monkeypatch.setattr(Meter, "summary", lambda self: {})
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_neighbours_and_spread_equal_those_of_the_cpu():
    """To the same bits: similarities are rounded from float64, and no two neighbours are equal."""
    torch.manual_seed(0)
    queries, bank, numbers = torch.randn(600, 192), torch.randn(9000, 192), torch.arange(9000)
    bank[5000:6000] = bank[:1000]
    expected = knn.nearest(queries, bank, numbers, 20)
    found = knn.nearest(queries.to(GPU), bank.to(GPU), numbers.to(GPU), 20)
    assert torch.equal(found.cpu(), expected)
    labels = numbers % 7
    figures = [
        (
            knn.accuracy(queries.to(device), labels[:600], bank.to(device), numbers, labels, 20),
            spread.feature_std(queries.to(device)),
            spread.rankme(queries.to(device)),
        )
        for device in (CPU, GPU)
    ]
    assert figures[1] == pytest.approx(figures[0], rel=1e-9)
