"""Position tables, learning rates and parameter groups against the figures of the original."""

import pytest
import torch
from reference_figures import FIGURES, assert_statistics

from models_mae import MaskedAutoencoderViT
from util.lr_sched import set_lr, warmup_cosine_lr
from util.optim import adamw, weight_decay_groups
from util.pos_embed import sincos_pos_embed_2d


@pytest.mark.parametrize("case", FIGURES["sincos"], ids=lambda case: case["embed_dim"])
def test_position_table_equals_the_reference(case):
    table = sincos_pos_embed_2d(case["embed_dim"], case["grid_size"], cls_token=case["cls_token"])
    assert_statistics(table, case["values"], rtol=1e-6)
    for row in (1, 2):
        expected = torch.tensor(case[f"row{row}"])
        torch.testing.assert_close(table[row, : len(expected)], expected, rtol=0, atol=1e-7)


def test_position_table_of_a_grid_that_is_not_square():
    table = sincos_pos_embed_2d(8, (2, 3)).view(2, 3, 8)
    column, row = table[..., :4], table[..., 4:]
    assert torch.equal(column[0], column[1])
    assert torch.equal(row[:, 0], row[:, 2])
    square = sincos_pos_embed_2d(8, 3).view(3, 3, 8)
    assert torch.equal(table, square[:2])
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_pos_embed_2d(6, 2)


@pytest.mark.parametrize("case", FIGURES["lr_schedule"], ids=lambda case: case["args"]["lr"])
def test_learning_rate_equals_the_reference(case):
    rates = [warmup_cosine_lr(epoch, **case["args"]) for epoch in case["epochs"]]
    assert rates == pytest.approx(case["lr"], rel=1e-9)


def test_learning_rate_without_warmup_and_with_warmup_to_the_end():
    assert warmup_cosine_lr(0, lr=1.0, min_lr=0.0, warmup_epochs=0, epochs=10) == 1.0
    assert warmup_cosine_lr(5, lr=1.0, min_lr=0.0, warmup_epochs=10, epochs=10) == 0.5


def test_groups_scale_their_learning_rate():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[0]}, {"params": parameters[1], "lr_scale": 0.25}]
    optimizer = adamw(groups, betas=(0.9, 0.95))
    set_lr(optimizer, 2.0)
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 0.5]


def test_weight_decay_spares_vectors_biases_and_fixed_tables():
    model = MaskedAutoencoderViT(8, 4, embed_dim=16, depth=1, decoder_embed_dim=16)
    decay = {
        id(parameter): group["weight_decay"]
        for group in weight_decay_groups(model, 0.05)
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        expected = None if "pos_embed" in name else 0.05 * (parameter.ndim > 1)
        assert decay.get(id(parameter)) == expected, name
