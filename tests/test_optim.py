"""Optimizers, their groups and their steps against the figures of the original and by hand."""

import copy
import io
from functools import partial

import numpy as np
import pytest
import torch
from reference_figures import FIGURES, assert_statistics
from torch import nn

import models_vit
from util.lars import LARS
from util.lr_sched import make_schedule, set_lr
from util.optim import adamw, clip_and_step, layer_decay_groups
from util.pos_embed import interpolate_pos_embed

CLASSIFIER = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


# ---- groups and learning rates


@pytest.mark.parametrize("global_pool", [True, False])
def test_layer_decay_equals_the_reference(global_pool):
    figures = FIGURES["layer_decay"]
    model = models_vit.build_model("vit_base_patch16", global_pool=global_pool)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = layer_decay_groups(model, figures["weight_decay"], figures["layer_decay"])
    optimizer = torch.optim.SGD(groups, lr=0.0)
    set_lr(optimizer, 2.0)
    grouped = [
        (names[id(parameter)], group)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert sorted(name for name, _ in grouped) == sorted(names.values())
    expected = figures["params"]
    unknown = set() if global_pool else {"norm.weight", "norm.bias"}  # to the figures
    assert set(names.values()) - expected.keys() == unknown
    for name, group in grouped:
        if name in expected:
            pair = [group["lr_scale"], group["weight_decay"]]
            assert pair == pytest.approx(expected[name]), name
            assert group["lr"] == pytest.approx(2 * expected[name][0]), name
        else:
            assert group["weight_decay"] == 0, name


def lr_scales(model, layer_decay):
    """The lr_scale of every grouped parameter, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: group["lr_scale"]
        for group in layer_decay_groups(model, 0.05, layer_decay)
        for parameter in group["params"]
    }


def test_layer_decay_knows_the_depth_and_leaves_frozen_parameters_out():
    model = models_vit.vision_transformer(img_size=8, **CLASSIFIER)
    model.blocks[0].requires_grad_(False)
    scales = lr_scales(model, 0.5)
    layers = {"head": 1, "fc_norm": 1, "blocks.1": 0.5, "blocks.0": None}  # else: 0.125
    for name, _ in model.named_parameters():
        layer = next((layer for layer in layers if name.startswith(layer)), None)
        assert scales.get(name) == layers.get(layer, 0.125), name


def test_the_norm_of_the_class_token_learns_as_fast_as_the_head():
    """As in BEiT, the source of layer-wise decay; no figure tells."""
    scales = lr_scales(models_vit.vision_transformer(False, img_size=8, **CLASSIFIER), 0.5)
    assert scales["norm.weight"] == scales["norm.bias"] == scales["head.weight"] == 1


@pytest.mark.parametrize(
    ("lr", "warmup_epochs", "expected", "warns"),
    [(None, 5, 8e-3, False), (0.25, 5, 0.25, False), (0.0, 9, 0.0, False), (None, 10, 8e-3, True)],
)
def test_the_schedule_takes_lr_or_else_scales_blr(lr, warmup_epochs, expected, warns, capsys):
    given = {"min_lr": 1e-6, "warmup_epochs": warmup_epochs, "epochs": 10}
    schedule = make_schedule(2048, lr=lr, blr=1e-3, **given)
    assert schedule == {"lr": pytest.approx(expected), **given}
    warning = "warning: warmup_epochs 10 is not below epochs 10: no decay\n"
    assert capsys.readouterr().err == (warning if warns else "")


# ---- LARS


def test_lars_equals_the_reference():
    figures = FIGURES["lars"]
    weight = nn.Parameter(normal(figures["seed_weight"], 1, 1, 4, 6)[0, 0])
    bias = nn.Parameter(normal(figures["seed_bias"], 1, 1, 1, 4)[0, 0, 0])
    hyper = "lr weight_decay momentum trust_coefficient".split()
    optimizer = LARS([weight, bias], **{name: figures[name] for name in hyper})
    for step, (length, expected_bias, expected_row) in enumerate(figures["steps"]):
        weight.grad = normal(figures["seed_weight_grad"] + step, 1, 1, 4, 6)[0, 0]
        bias.grad = normal(figures["seed_bias_grad"] + step, 1, 1, 1, 4)[0, 0, 0]
        optimizer.step()
        assert weight.norm().item() == pytest.approx(length, rel=1e-5)
        assert bias.tolist() == pytest.approx(expected_bias, rel=1e-4, abs=1e-6)
        assert weight[0].tolist() == pytest.approx(expected_row, rel=1e-4, abs=1e-6)


def test_lars_equals_a_loop_in_numpy():
    """With weight decay, which vectors are spared, and groups of their own hyper-parameters."""
    shapes = [(4, 6), (4,), (3, 2, 2), (5,)]
    parameters = [nn.Parameter(normal(i, *shape)) for i, shape in enumerate(shapes)]
    hyper = [dict(lr=0.4, weight_decay=0.1, momentum=0.9, trust_coefficient=0.001)] * 2
    hyper += [dict(lr=3.0, weight_decay=0.5, momentum=0.5, trust_coefficient=0.02)] * 2
    groups = [{"params": parameters[:2], **hyper[0]}, {"params": parameters[2:], **hyper[2]}]
    optimizer = LARS(groups, lr=1.0)
    weights = [parameter.detach().double().numpy().copy() for parameter in parameters]
    momenta = [np.zeros(shape) for shape in shapes]
    for step in range(5):
        for i, parameter in enumerate(parameters):
            parameter.grad = normal(100 * step + i, *shapes[i])
            update = parameter.grad.double().numpy().copy()
            if update.ndim > 1:
                update += hyper[i]["weight_decay"] * weights[i]
                lengths = np.linalg.norm(weights[i]), np.linalg.norm(update)
                update *= hyper[i]["trust_coefficient"] * lengths[0] / lengths[1]
            momenta[i] = hyper[i]["momentum"] * momenta[i] + update
            weights[i] = weights[i] - hyper[i]["lr"] * momenta[i]
        optimizer.step()
        for i, parameter in enumerate(parameters):  # a step leaves the gradients as they were
            assert torch.equal(parameter.grad, normal(100 * step + i, *shapes[i]))
    for parameter, weight in zip(parameters, weights, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-5, atol=1e-6)


def test_lars_of_zeros_and_without_gradients():
    start, gradient, zeros = normal(0, 2, 3), normal(1, 2, 3), torch.zeros(2, 3)
    cases = [  # weight, gradient, weight after a step
        (zeros, gradient, -0.5 * gradient),  # a trust of 1
        (start, zeros, start),
        (zeros, zeros, zeros),
        (start, None, start),
    ]
    parameters = [nn.Parameter(weight.clone()) for weight, _, _ in cases]
    optimizer = LARS(parameters, lr=0.5)
    for parameter, (_, grad, _) in zip(parameters, cases, strict=True):
        parameter.grad = None if grad is None else grad.clone()
    assert optimizer.step(lambda: 7.0) == 7.0
    for parameter, (_, _, expected) in zip(parameters, cases, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


# ---- steps


@pytest.mark.parametrize(
    "make",
    [
        lambda model: LARS(model.parameters(), lr=0.1, weight_decay=0.01),
        lambda model: adamw(layer_decay_groups(model, 0.05, 0.75), betas=(0.9, 0.999)),
    ],
    ids=["lars", "adamw"],
)
def test_a_saved_optimizer_continues_with_equal_bits(make):
    def train(model, optimizer, steps):
        for step in steps:
            set_lr(optimizer, 0.1 / (1 + step))
            model(normal(step, 2, 3, 8, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    model = models_vit.vision_transformer(img_size=8, **CLASSIFIER)
    optimizer = make(model)
    train(model, optimizer, range(3))
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = make(twin)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(3, 6))
    train(twin, resumed, range(3, 6))
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
        assert not torch.equal(value, before[name]), name


OPTIMIZERS = {
    "sgd": (partial(torch.optim.SGD, lr=0.1),) * 2,
    "lars": (partial(LARS, lr=0.1),) * 2,
    "adamw": (
        lambda parameters: adamw([{"params": parameters}], betas=(0.9, 0.95)),
        partial(torch.optim.AdamW, betas=(0.9, 0.95), fused=False),
    ),
}


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("measure", [False, True], ids=["", "measured"])
@pytest.mark.parametrize("clip_grad", [None, 0.5, 1e3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clip_and_step_equals_clipping_by_hand(name, clip_grad, measure, scaled):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    twin = copy.deepcopy(model)
    ours, theirs = (
        make(list(m.parameters())) for make, m in zip(OPTIMIZERS[name], (model, twin), strict=True)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    for step in range(4):
        for optimizer in (ours, theirs):
            set_lr(optimizer, 0.05)
        imgs = (step + 1) * normal(step, 5, 6)
        scaler.scale(model(imgs).square().sum()).backward()
        norm = clip_and_step(model, ours, scaler, clip_grad, measure)
        assert all(parameter.grad is None for parameter in model.parameters())

        twin.zero_grad()
        twin(imgs).square().sum().backward()
        length = sum(p.grad.square().sum() for p in twin.parameters()).sqrt().item()
        assert 0.5 < length < 1e3
        if measure or clip_grad is not None:
            assert norm.item() == pytest.approx(length, rel=1e-5)
        else:
            assert norm is None
        for parameter in twin.parameters():
            parameter.grad *= 1.0 if clip_grad is None else min(1.0, clip_grad / length)
        theirs.step()
        for value, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("clip_grad", "measure"), [(None, False), (None, True), (0.5, False)])
def test_a_step_whose_scaled_gradients_overflow_is_skipped(clip_grad, measure):
    model = nn.Linear(6, 3)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (scaler.scale(model(torch.ones(1, 6)).sum()) * float("inf")).backward()
    norm = clip_and_step(model, optimizer, scaler, clip_grad, measure)
    assert norm is None or not norm.isfinite()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert scaler.get_scale() == 512
    assert model.weight.grad is None


# ---- positions


@pytest.mark.parametrize("case", FIGURES["interpolate_pos_embed"], ids=lambda case: case["seed"])
def test_resampled_positions_equal_the_reference(case):
    table = normal(case["seed"], 1, 1, case["old"] ** 2 + 1, case["dim"])[0]
    grid = (case["new"], case["new"])
    assert_statistics(interpolate_pos_embed(table, grid), case["out"])
    assert torch.equal(
        interpolate_pos_embed(table, case["new"]), interpolate_pos_embed(table, grid)
    )
    assert interpolate_pos_embed(table, case["old"]) is table


@pytest.mark.parametrize("prefix", [0, 3])
def test_resampling_keeps_any_number_of_prefix_rows(prefix):
    table = normal(0, 1, 1 + 16, 8)
    first = table[:, :1].expand(-1, prefix, -1) * torch.arange(1.0, prefix + 1)[:, None]
    resampled = interpolate_pos_embed(torch.cat([first, table[:, 1:]], dim=1), 5, prefix)
    assert torch.equal(resampled[:, :prefix], first)
    assert torch.equal(resampled[:, prefix:], interpolate_pos_embed(table, 5)[:, 1:])
