"""Pre-trained weights into classifiers: formats of files, resampled positions, refusals."""

import argparse
import os
import pickle
import urllib.error
import zlib

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

import models_vit
from models_mae import MaskedAutoencoderViT
from util.checkpoint import load_checkpoint
from util.pos_embed import sincos_pos_embed_2d
from util.pretrained import fingerprint, load_classifier, load_encoder, start_from

ADDRESS = "https://example.invalid/models/released.pth"
CACHED = f"{zlib.crc32(ADDRESS.encode()):08x}-released.pth"
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 4}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


def autoencoder_weights(img_size=16, patch_size=4, seed=1, **config):
    """The state dict of an autoencoder whose norms, too, are not what a new model has."""
    torch.manual_seed(seed)
    model = MaskedAutoencoderViT(img_size, patch_size, **{**SMALL, **DECODER, **config})
    return with_random_vectors(model)


def with_random_vectors(model):
    weights = model.state_dict()
    return {k: torch.randn_like(v) if v.ndim == 1 else v for k, v in weights.items()}


def classifier(img_size=16, global_pool=True, num_classes=5, seed=2):
    torch.manual_seed(seed)
    return models_vit.vision_transformer(
        global_pool, img_size=img_size, patch_size=4, num_classes=num_classes, **SMALL
    )


def copy_of(state_dict):
    return {key: value.clone() for key, value in state_dict.items()}


def assert_loaded(model, weights, before, kept=("head.", "fc_norm.")):
    """The model has these weights and, under the names that start as in `kept`, those of before."""
    for key, value in model.state_dict().items():
        expected = before if key.startswith(kept) else weights
        assert torch.equal(value, expected[key].to(value.dtype)), key


# ---- files


def released(weights, folder):
    args = argparse.Namespace(model="mae_vit_base_patch16", lr=None)
    torch.save({"model": weights, "args": args}, folder / "released.pth")
    return folder / "released.pth"


def ours(weights, folder):
    contents = {"model": weights, "optimizer": {"state": {}}, "epoch": 3, "args": {"lr": 1.0}}
    torch.save(contents, folder / "checkpoint-3.pth")
    return folder / "checkpoint-3.pth"


def bare(weights, folder):
    torch.save(weights, folder / "bare.pth")
    return folder / "bare.pth"


def encoder_alone(weights, folder):
    parts = ("decoder_", "mask_token")
    return released({k: v for k, v in weights.items() if not k.startswith(parts)}, folder)


def as_safetensors(weights, folder):
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    return folder / "model.safetensors"


def address(weights, folder):
    """An address whose file torch.hub has downloaded before."""
    cache = folder / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    released(weights, cache).rename(cache / CACHED)
    return ADDRESS


FORMATS = [released, ours, bare, encoder_alone, as_safetensors, address]


@pytest.mark.parametrize("global_pool", [False, True])
@pytest.mark.parametrize("save", FORMATS, ids=lambda save: save.__name__)
def test_every_format_loads_the_same_weights(save, global_pool, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = autoencoder_weights()
    model = classifier(global_pool=global_pool)
    before = copy_of(model.state_dict())
    load_encoder(model, load_checkpoint(save(weights, tmp_path))["model"])
    assert_loaded(model, weights, before)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (urllib.error.URLError("name not known"), "name not known"),
        (urllib.error.HTTPError(ADDRESS, 404, "Not Found", {}, None), "Not Found"),
    ],
)
def test_a_failing_download_is_an_error_of_one_line(
    error, reason, tmp_path, monkeypatch, user_error
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", fail)
    message = user_error(lambda: load_checkpoint(ADDRESS))
    assert message == f"{ADDRESS} can't be downloaded: {reason}"


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, pickle.dump], ids=["zip", "pickle"])
@pytest.mark.parametrize("name", ["model.safetensors", f"hub/checkpoints/{CACHED}"])
def test_code_is_not_run_from_a_safetensors_name_or_a_download(
    save, name, tmp_path, monkeypatch, user_error
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    with open(name, "wb") as file:
        save({"model": autoencoder_weights(), "extra": RunsCode()}, file)
    path = ADDRESS if name.startswith("hub") else name
    assert f"{path} is torn or not a checkpoint" in user_error(lambda: load_checkpoint(path))
    assert not os.path.exists("executed")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_load_as_float32(dtype, tmp_path):
    weights = {k: v.to(dtype) for k, v in autoencoder_weights().items()}
    model = classifier()
    before = copy_of(model.state_dict())
    load_encoder(model, load_checkpoint(as_safetensors(weights, tmp_path))["model"])
    assert_loaded(model, weights, before)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    load_encoder(rectangle := classifier((8, 32)), weights)
    expected = resampled_by_hand(weights["pos_embed"].float(), (4, 4), (2, 8))
    error = torch.finfo(dtype).eps  # of one rounding, at the end
    torch.testing.assert_close(rectangle.pos_embed.detach(), expected, rtol=error, atol=1e-6)


# ---- classifiers as a start


@pytest.mark.parametrize("classes", [5, 7])
@pytest.mark.parametrize(
    ("theirs", "ours", "kept"),
    [
        (True, True, ("head.",)),
        (False, False, ("head.",)),
        (False, True, ("head.", "fc_norm.")),
    ],
    ids=lambda value: str(value) if isinstance(value, bool) else "",
)
def test_a_classifier_as_a_start_leaves_the_head_alone(theirs, ours, kept, classes):
    weights = with_random_vectors(classifier(global_pool=theirs, num_classes=classes, seed=3))
    model = classifier(global_pool=ours)
    before = copy_of(model.state_dict())
    load_encoder(model, weights)
    assert_loaded(model, weights, before, kept)


def test_the_norm_of_the_tokens_is_no_start_for_the_class_token(user_error):
    weights = classifier(global_pool=True).state_dict()
    message = user_error(lambda: load_encoder(classifier(global_pool=False), weights))
    assert "missing norm.weight, norm.bias; unexpected fc_norm.weight, fc_norm.bias" in message


# ---- refusals


@pytest.mark.parametrize("global_pool", [False, True])
def test_missing_and_unexpected_keys_are_all_listed(global_pool, user_error):
    weights = autoencoder_weights()
    missing = ["cls_token", "pos_embed", "blocks.0.norm1.bias", "blocks.1.mlp.fc2.weight"]
    missing += [] if global_pool else ["norm.weight", "norm.bias"]
    for key in missing + (["norm.weight", "norm.bias"] if global_pool else []):
        weights.pop(key, None)
    weights["blocks.1.attn.qkv.bias"] = torch.zeros(7)
    weights |= {"extra.weight": torch.zeros(1), "blocks.1.extra.gamma": torch.zeros(32)}
    model = classifier(global_pool=global_pool)
    before = copy_of(model.state_dict())
    message = user_error(lambda: load_encoder(model, weights, "file.pth"))
    reason = message.partition(" (a classifier has fc_norm")[0]
    assert reason == (
        f"file.pth does not fit the model: missing {', '.join(missing)}; "
        "unexpected extra.weight, blocks.1.extra.gamma; of another shape blocks.1.attn.qkv.bias"
    )
    assert_loaded(model, before, before)


@pytest.mark.parametrize(
    ("config", "theirs", "ours"),
    [
        ({"patch_size": 8}, "patches of 8 x 8 pixels", "patches of 4 x 4 pixels"),
        ({"patch_size": (8, 2)}, "patches of 8 x 2 pixels", "patches of 4 x 4 pixels"),
        ({"in_chans": 1}, "1 channels", "3 channels"),
        ({"embed_dim": 16}, "width 16", "width 32"),
        ({"depth": 3}, "3 blocks", "2 blocks"),
        ({"depth": 1}, "1 blocks", "2 blocks"),
        ({"embed_dim": 64, "depth": 12}, "width 64 and 12 blocks", "width 32 and 2 blocks"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_an_encoder_of_another_size_is_refused_by_that_reason(config, theirs, ours, user_error):
    weights = autoencoder_weights(**config)
    message = user_error(lambda: load_encoder(classifier(), weights, "file.pth"))
    assert message == f"file.pth has {theirs}, the model {ours}: choose another --model"


@pytest.mark.parametrize("img_size", [16, (8, 24)])
@pytest.mark.parametrize("global_pool", [False, True])
def test_a_whole_classifier_loads_whole(global_pool, img_size):
    weights = with_random_vectors(classifier(global_pool=global_pool, seed=3))
    weights["pos_embed"] = autoencoder_weights()["pos_embed"]
    model = classifier(img_size, global_pool)
    load_classifier(model, weights)
    expected = resampled_by_hand(weights["pos_embed"], (4, 4), model.patch_embed.grid_size)
    assert_loaded(model, weights | {"pos_embed": model.pos_embed}, before={}, kept=("none",))
    torch.testing.assert_close(model.pos_embed, expected, rtol=1e-5, atol=1e-6)


def test_what_is_no_classifier_of_the_same_kind_is_refused(user_error):
    def refusal(weights, **config):
        return user_error(lambda: load_classifier(classifier(**config), weights, "file.pth"))

    message = refusal(autoencoder_weights())
    assert "file.pth has no classifier's head" in message
    assert "fine-tune it" in message
    message = refusal(classifier(num_classes=7).state_dict())
    assert "a classifier of 7 classes, not 5" in message
    assert "--nb_classes 7" in message
    for pooled in (False, True):
        weights = classifier(global_pool=pooled).state_dict()
        message = refusal(weights, global_pool=not pooled)
        theirs, ours = ("fc_norm", "norm") if pooled else ("norm", "fc_norm")
        assert f"missing {ours}.weight, {ours}.bias" in message
        assert f"unexpected {theirs}.weight, {theirs}.bias" in message
        assert "fc_norm with --global_pool and norm with --cls_token" in message
    weights = classifier().state_dict()
    del weights["head.bias"]
    assert "missing head.bias" in refusal(weights)
    weights = classifier().state_dict() | {"decoder_embed.bias": torch.zeros(16)}
    assert "unexpected decoder_embed.bias" in refusal(weights)


# ---- positions


def resampled_by_hand(table, old, new):
    """A table [1, 1 + L, D] of the grid `old`, each (height, width), on the grid `new`."""
    grid = torch.empty(1, table.shape[2], *old)
    for row in range(old[0]):
        for column in range(old[1]):
            grid[0, :, row, column] = table[0, 1 + row * old[1] + column]
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=False)
    rows = [grid[0, :, row, column] for row in range(new[0]) for column in range(new[1])]
    return torch.cat([table[:, :1], torch.stack(rows)[None]], dim=1)


def sincos(table):
    return table


def trained(table):
    return table + 0.1 * torch.randn(table.shape)


def random(table):
    return torch.randn(table.shape)


@pytest.mark.parametrize("change", [sincos, trained, random])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((4, 4), (6, 6)),
        ((6, 6), (4, 4)),
        ((4, 4), (4, 4)),
        ((4, 4), (3, 5)),
        ((4, 4), (2, 8)),
        ((3, 5), (3, 5)),
        ((2, 8), (4, 4)),
        ((8, 2), (2, 8)),
        ((3, 5), (6, 2)),
        ((3, 4), (4, 4)),
        ((1, 6), (2, 3)),
    ],
    ids=str,
)
def test_positions_are_resampled_to_the_grid_of_the_model(old, new, change, user_error):
    """Random tables can't tell their grid: it is the model's if that is as large, or a square."""
    weights = autoencoder_weights((4 * old[0], 4 * old[1]))
    weights["pos_embed"] = table = change(weights["pos_embed"])
    model = classifier((4 * new[0], 4 * new[1]))
    if change is random and old[0] * old[1] == new[0] * new[1]:
        expected = table
    elif change is random and old[0] != old[1]:
        message = user_error(lambda: load_encoder(model, weights, "file.pth"))
        assert message.startswith("file.pth has positions that can't be resampled")
        assert f"{old[0] * old[1]} positions" in message
        return
    else:
        expected = table if old == new else resampled_by_hand(table, old, new)
    load_encoder(model, weights)
    exact = 0 if expected is table else 1e-6
    torch.testing.assert_close(model.pos_embed.detach(), expected, rtol=exact, atol=exact)


@pytest.mark.parametrize(
    ("old", "new"),
    [((2, 8), (4, 4)), ((4, 4), (2, 8)), ((3, 5), (6, 2)), ((2, 8), (2, 8))],
    ids=str,
)
def test_a_file_that_says_its_input_size_is_believed(old, new, tmp_path, capsys):
    """Also about tables that look like another grid's or like none; nothing is guessed aloud."""
    config = {"img_size": (4 * old[0], 4 * old[1])}
    weights = autoencoder_weights(**config)
    weights["pos_embed"] = table = torch.randn(weights["pos_embed"].shape)
    contents = {"model": weights, "args": argparse.Namespace(input_size=config["img_size"])}
    torch.save(contents, tmp_path / "file.pth")
    model = classifier((4 * new[0], 4 * new[1]))
    start_from(model, tmp_path / "file.pth")
    expected = table if old == new else resampled_by_hand(table, old, new)
    torch.testing.assert_close(model.pos_embed.detach(), expected, rtol=1e-6, atol=1e-6)
    assert not capsys.readouterr().err


def test_a_guessed_grid_is_said(tmp_path, capsys):
    torch.save(autoencoder_weights((8, 32)), tmp_path / "bare.pth")
    start_from(classifier((16, 16)), tmp_path / "bare.pth")
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {tmp_path}/bare.pth doesn't say its input_size")
    start_from(classifier((8, 32)), tmp_path / "bare.pth")
    assert not capsys.readouterr().err


def test_an_input_size_that_the_positions_contradict_is_refused(user_error):
    weights = autoencoder_weights(16)
    message = user_error(lambda: load_encoder(classifier(16), weights, "file.pth", input_size=24))
    assert message.startswith("file.pth has 16 positions, but says that it was trained on images")


# ---- fingerprints


def test_the_fingerprint_is_that_of_names_and_bits():
    weights = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.tensor(2)}
    original = fingerprint(weights)
    assert fingerprint({key: value.clone() for key, value in weights.items()}) == original
    strided = weights["a"].T.contiguous().T
    assert fingerprint(weights | {"a": strided}) == original
    others = [{("d" if key == "c" else key): value for key, value in weights.items()}]
    others += [{k: v for k, v in weights.items() if k != key} for key in weights]
    for key, value in weights.items():
        for bit in range(8 * value.nbytes):
            changed = value.clone()
            changed.view(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8
            others.append(weights | {key: changed})
    assert original not in map(fingerprint, others)
    assert len(set(map(fingerprint, others))) == len(others)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cls_token", torch.zeros(5), "has 1, not 3 axes in cls_token"),
        ("patch_embed.proj.weight", torch.zeros(5), "has 1, not 4 axes in patch_embed.proj"),
        (
            "pos_embed",
            sincos_pos_embed_2d(32, 14)[None],
            "195 positions, which is not a square",
        ),
    ],
)
def test_malformed_weights_are_the_users_error(user_error, key, value, message):
    """Also a position table without the class token's row."""
    model = models_vit.factory(4, 32, 2, 4)(img_size=8)
    weights = dict(model.state_dict(), **{key: value})
    assert message in user_error(lambda: load_encoder(model, weights))


@pytest.mark.parametrize("weights", [{"cls_token": [1.0]}, {3: torch.zeros(1)}])
def test_a_model_of_other_things_than_tensors_is_refused(tmp_path, user_error, weights):
    torch.save({"model": weights, "args": {}}, tmp_path / "odd.pth")
    assert "values that are not tensors" in user_error(
        lambda: load_checkpoint(tmp_path / "odd.pth")
    )


def test_the_same_encoder_in_another_file_is_the_same(tmp_path):
    """Bare, in another order and without its decoder, the start of a training is no other."""
    weights = autoencoder_weights()
    encoder = {k: v for k, v in reversed(weights.items()) if not k.startswith("decoder_")}
    torch.save({"model": weights}, tmp_path / "whole.pth")
    torch.save(encoder, tmp_path / "encoder.pth")
    torch.save(encoder | {"cls_token": encoder["cls_token"] + 1}, tmp_path / "other.pth")
    whole, same, other = (
        start_from(classifier(), tmp_path / f"{name}.pth") for name in ("whole", "encoder", "other")
    )
    assert whole == same != other


def test_a_reset_connection_is_no_torn_file_and_a_torn_download_can_be_removed(
    tmp_path, monkeypatch, user_error
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / CACHED).write_bytes(b"torn")
    assert f"remove it from {cache}" in user_error(lambda: load_checkpoint(ADDRESS))
    (cache / CACHED).unlink()

    def reset(*_, **__):
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr("torch.hub.download_url_to_file", reset)
    message = user_error(lambda: load_checkpoint(ADDRESS))
    assert message == f"{ADDRESS} can't be downloaded: reset by peer"


@pytest.mark.parametrize(
    ("name", "is_shared"),
    [("model.pth", False), ("model-v2.pth", False), ("model.bin", False), ("a-0123abcd.pth", True)],
)
def test_only_a_name_with_a_hash_is_one_file_at_every_address(
    name, is_shared, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    downloads = []

    def download(address, file):
        downloads.append(address)
        torch.save({"weight": torch.full((1,), len(downloads))}, file)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    addresses = [f"https://{host}.invalid/{name}" for host in ("one", "two")]
    found = [load_checkpoint(address)["model"]["weight"].item() for address in addresses * 2]
    assert found == ([1, 1, 1, 1] if is_shared else [1, 2, 1, 2])
