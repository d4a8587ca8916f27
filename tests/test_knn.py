"""Does it learn? k-NN accuracy and the spread of features, by hand and in a pre-training."""

import json
import math
import os
import signal
import sys

import numpy as np
import pytest
import torch
from helpers import (
    assert_same_bits,
    events,
    final_state,
    kill_and_resume,
    pretrain_kill_flags,
    run,
    write_images,
)

import models_mae
from engine_pretrain import evaluate_features
from util import features, image_files, knn, loading, spread
from util.checkpoint import load_checkpoint
from util.distributed import Process

SCRIPT = "tests/tiny_pretrain.py"
ALONE = Process(0, 1, torch.device("cpu"))


def normal(seed, *shape):
    """Features that are far from the origin, as those of a network."""
    values = np.random.default_rng(seed).normal(size=shape) + 0.5
    return torch.from_numpy(values.astype(np.float32))


def cosine(queries, bank):
    queries, bank = (x.numpy().astype(np.float64) for x in (queries, bank))
    norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(bank, axis=1)
    return queries @ bank.T / norms


# ---- the mathematics


@pytest.mark.parametrize(("block", "k"), [(4096, 20), (7, 20), (7, 3), (7, 1), (4096, 200)])
def test_the_nearest_are_those_of_brute_force(monkeypatch, block, k):
    monkeypatch.setattr(knn, "_BANK", block)
    queries, bank = normal(1, 30, 8), normal(2, 100, 8)
    bank[50:80] = bank[20:50]  # each is as near as its copy: the lower number comes first
    numbers = torch.arange(100)
    shuffled = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    found = knn.nearest(queries, bank[shuffled], numbers[shuffled], k)
    similarity, nearby = knn.neighbours(found)
    expected = cosine(queries, bank)
    order = np.lexsort((np.arange(100) * np.ones((30, 1)), -expected.round(9)))[:, :k]
    assert np.array_equal(nearby, order)
    assert np.abs(similarity - np.take_along_axis(expected, order, 1)).max() < 2e-9


def test_shards_merge_to_the_whole():
    queries, bank, numbers = normal(1, 30, 8), normal(2, 100, 8), torch.arange(100)
    whole = knn.nearest(queries, bank, numbers, 20)
    for shards in (2, 3, 150):  # some of 150 are empty
        parts = [slice(rank, None, shards) for rank in range(shards)]
        found = [knn.nearest(queries, bank[part], numbers[part], 20) for part in parts]
        assert torch.equal(knn.merge(found, 20), whole)


def test_negative_similarities_and_the_largest_numbers():
    bank, numbers = torch.tensor([[-1.0], [1.0], [-2.0]]), torch.tensor([0, 2**32 - 1, 5])
    similarity, nearby = knn.neighbours(knn.nearest(torch.ones(1, 1), bank, numbers, 5))
    assert similarity.tolist() == [[1, -1, -1]]
    assert nearby.tolist() == [[2**32 - 1, 0, 5]]


def test_a_vote_by_hand():
    """Two that are less near outvote one, unless it is so near that it outweighs them."""
    labels = torch.tensor([[3, 1, 1]])
    assert knn.vote(torch.tensor([[0.9, 0.88, 0.87]]).double(), labels).tolist() == [1]
    assert knn.vote(torch.tensor([[0.9, 0.80, 0.79]]).double(), labels).tolist() == [3]
    one_each = torch.tensor([[7, 2]])
    assert knn.vote(torch.tensor([[0.5, 0.5]]).double(), one_each).tolist() == [7]


@pytest.mark.parametrize("k", [1, 5, 20])
def test_accuracy_equals_sklearn(k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    queries, bank = normal(1, 200, 6), normal(2, 700, 6)
    generator = np.random.default_rng(3)
    for x in (queries, bank):  # classes that overlap
        x += torch.from_numpy(generator.integers(0, 4, (len(x), 1)) / 4).float()
    labels, bank_labels = (
        torch.from_numpy(generator.integers(0, 5, len(x)) + (x[:, 0] > 0.8).numpy())
        for x in (queries, bank)
    )
    classifier = neighbors.KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),
    )
    classifier.fit(bank.double().numpy(), bank_labels.numpy())
    predicted = classifier.predict(queries.double().numpy())
    expected = 100 * np.mean(predicted == labels.numpy())
    assert 15 < expected < 90
    found = knn.accuracy(queries, labels, bank, torch.arange(700), bank_labels, k)
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shape", [(300, 12), (5, 12), (5000, 3)])
def test_spread_equals_numpy(shape):
    x = normal(4, *shape) * torch.arange(1, shape[1] + 1)
    exact = x.numpy().astype(np.float64)
    singular_values = np.linalg.svd(exact, compute_uv=False)
    share = singular_values / singular_values.sum()
    rank = np.exp(-(share * np.log(share)).sum())
    assert 1 < rank < min(shape)
    assert spread.rankme(x) == pytest.approx(rank, rel=1e-6)
    unit = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    assert spread.feature_std(x) == pytest.approx(unit.std(axis=0).mean(), rel=1e-6)


def test_spread_of_a_collapse_and_of_the_ideal():
    direction = normal(5, 1, 16)
    assert spread.rankme(direction.expand(100, -1)) == pytest.approx(1)
    assert spread.feature_std(direction.expand(100, -1)) == pytest.approx(0, abs=1e-9)
    everywhere = torch.cat([torch.eye(16), -torch.eye(16)])
    assert spread.rankme(everywhere) == pytest.approx(16)
    assert spread.feature_std(everywhere) == pytest.approx(1 / math.sqrt(16))
    assert math.isnan(spread.rankme(torch.full((4, 3), math.inf)))


@pytest.mark.parametrize(("count", "most"), [(10, 4), (10, 9), (10, 10), (3, 8), (5, 1), (7, None)])
def test_images_are_spread_evenly(count, most):
    chosen = list(loading.evenly_spread(count, most))
    assert len(chosen) == len(set(chosen)) == min(count, most or count)
    if len(chosen) > 1:
        gaps = np.diff(chosen)
        assert chosen[0] == 0 and chosen[-1] == count - 1 and gaps.max() - gaps.min() <= 1


# ---- features of a model


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two classes that colours tell apart, with an unreadable image in each split."""
    root = tmp_path_factory.mktemp("labelled")
    for split, count in (("train", 10), ("val", 4)):
        for label in "ab":
            write_images(root / split / label, count, seed=ord(label) + count)
        (root / split / "a" / "torn.png").write_bytes(b"\x89PNG")
    return root


def features_by_hand(model, paths):
    """Features and labels of a folder's readable images, one image at a time, in float64."""
    dataset = loading.ImageDataset(paths, loading.data.eval_transform(8), seed=0)
    rows, labels = [], []
    for index in range(len(paths)):
        image, label, _, problem = dataset[0, index]
        if not problem:
            imgs = loading.data.normalize(image[None])
            with torch.no_grad():
                rows.append(features.tokens(model, imgs, -2)[0, 1:].mean(dim=0))
            labels.append(label.item())
    return torch.stack(rows), np.array(labels)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_model_s_figures_equal_brute_force(labelled, batch_size, capfd):
    torch.manual_seed(0)
    model = models_mae.build_model("tiny_test_model", img_size=8).train()
    train, val = (image_files.ImagePaths(labelled / split) for split in ("train", "val"))
    loaders = [
        loading.eval_loader(
            paths, 8, ALONE, batch_size=batch_size, seed=0, num_workers=0, pin_mem=False
        )
        for paths in (val, train)
    ]
    figures = evaluate_features(model, *loaders, k=5, layer=-2, amp_dtype=None)
    assert model.training
    (queries, labels), (bank, bank_labels) = (
        features_by_hand(model.eval(), paths) for paths in (val, train)
    )
    assert (len(queries), len(bank)) == (8, 20)  # without the unreadable ones
    similarity = cosine(queries, bank)
    hits = 0
    for row, label in zip(similarity, labels, strict=True):
        votes = np.zeros(2)
        for index in np.argsort(-row)[:5]:
            votes[bank_labels[index]] += np.exp(row[index] / 0.07)
        hits += votes.argmax() == label
    assert figures["knn_acc1"] == 100 * hits / 8
    assert figures["feature_std"] == pytest.approx(spread.feature_std(queries), rel=1e-4)
    assert figures["rankme"] == pytest.approx(spread.rankme(queries), rel=1e-4)
    assert "torn.png" in capfd.readouterr().err


# ---- a pre-training


def log_of(output_dir, *names):
    records = [json.loads(line) for line in (output_dir / "log.txt").read_text().splitlines()]
    return [{name: record[name] for name in names if name in record} for record in records]


FIGURES = ("knn_acc1", "feature_std", "rankme")


def test_a_run_with_it_ends_in_the_same_bits(image_folder, pretrain_flags, pretrain, capsys):
    flags = pretrain_flags | {"epochs": 3, "log_every": 4}
    without, with_it = (pretrain_flags["output_dir"] / name for name in ("without", "with"))
    pretrain(flags | {"output_dir": without})
    assert not any(log_of(without, *FIGURES))
    capsys.readouterr()
    pretrain(flags | {"output_dir": with_it, "knn_every": 2, "knn_images": 9, "num_workers": 1})
    assert_same_bits(final_state(with_it), final_state(without))

    logged = log_of(with_it, *FIGURES)
    assert [len(record) for record in logged] == [0, 3, 3]  # every second, and the last
    out = capsys.readouterr().out
    assert (
        f"every 2 epochs: k-NN accuracy of 5 images in {image_folder}/val, by 9 images in "
        f"{image_folder}/train (all of which vote, as --knn_k is 20) of 2 classes; feature_std, "
        "rankme\n"
    ) in out
    for record in logged[1:]:
        assert (
            "* k-NN Acc@1 {knn_acc1:.3f} feature_std {feature_std:.4f} rankme {rankme:.2f}\n"
        ).format(**record) in out
    scalars, _ = events(with_it)
    for name in FIGURES:
        drawn = scalars[f"perf/{name}"]
        assert list(drawn) == [2000, 3000]
        assert list(drawn.values()) == pytest.approx([r[name] for r in logged[1:]], rel=1e-6)


def test_processes_and_batches_do_not_change_the_figures(labelled, tmp_path, pretrain):
    """At a learning rate of 0, so that both runs have the weights of the start."""
    flags = pretrain_kill_flags(labelled, tmp_path / "1") | {"lr": 0, "epochs": 1, "knn_every": 9}
    pretrain(flags)
    code, _, err = run(SCRIPT, flags | {"output_dir": tmp_path / "2", "batch_size": 3}, processes=2)
    assert code == 0, err
    (alone,), (shared,) = (log_of(tmp_path / name, *FIGURES) for name in "12")
    assert alone["knn_acc1"] == shared["knn_acc1"]
    assert alone == pytest.approx(shared, rel=1e-5)


def test_a_killed_run_logs_the_same(image_folder, tmp_path):
    flags = pretrain_kill_flags(image_folder, tmp_path / "killed") | {"knn_every": 2}
    kill_and_resume(SCRIPT, flags, signal.SIGKILL, 14)
    assert run(SCRIPT, flags | {"output_dir": tmp_path / "whole"})[0] == 0
    names = ("epoch", "train_loss", "val_loss", "grad_norm", *FIGURES)
    assert log_of(tmp_path / "killed", *names) == log_of(tmp_path / "whole", *names)
    assert_same_bits(final_state(tmp_path / "killed"), final_state(tmp_path / "whole"))


def test_a_signal_is_answered_after_it(pretrain_flags, pretrain, monkeypatch):
    module = sys.modules["main_pretrain"]

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_features(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate_features", signalled)
    with pytest.raises(SystemExit) as stopped:
        pretrain(pretrain_flags | {"knn_every": 1})
    assert stopped.value.code == 128 + signal.SIGTERM
    contents = load_checkpoint(pretrain_flags["output_dir"] / "checkpoint-last.pth")
    assert (contents["epoch"], contents["totals"]) == (0, None)
    assert len(log_of(pretrain_flags["output_dir"], *FIGURES)) == 1


@pytest.mark.parametrize(
    ("folders", "reason"),
    [
        (["train/a", "train/b"], "train has no held-out images beside it"),
        (["a", "b"], "has no held-out images beside it"),
        (["train/a", "val/a"], "train has fewer than two classes"),
        (["train", "val"], "train has images in no class folder"),
        (["train/a", "train/b", "val"], "val has images in no class folder"),
        (["train/a", "train/b", "val/a", "val/c"], "they lack b and add c"),
    ],
)
def test_without_classes_it_says_why(folders, reason, tmp_path, pretrain_flags, pretrain, capsys):
    for number, folder in enumerate(folders):
        write_images(tmp_path / "images" / folder, 4, seed=number)
    flags = {"data_path": tmp_path / "images", "knn_every": 1, "epochs": 1}
    pretrain(pretrain_flags | flags)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("every epoch")]
    assert "but no k-NN accuracy, as " in line
    assert line.endswith(reason)
    (record,) = log_of(pretrain_flags["output_dir"], *FIGURES)
    assert record.keys() == {"feature_std", "rankme"}


def test_a_block_that_does_not_exist_is_refused(pretrain_flags, pretrain, user_error):
    flags = pretrain_flags | {"knn_every": 1, "knn_layer": 7}
    assert "layer 7 does not exist" in user_error(lambda: pretrain(flags))


def test_features_that_are_not_finite_are_said(pretrain, pretrain_flags, monkeypatch, capsys):
    broken = features.pool

    def with_a_nan(*args):
        pooled = broken(*args).clone()
        pooled[0, 0] = float("nan")
        return pooled

    monkeypatch.setattr(features, "pool", with_a_nan)
    pretrain(pretrain_flags | {"knn_every": 1, "epochs": 1})
    assert "features not finite" in capsys.readouterr().err
    (record,) = log_of(pretrain_flags["output_dir"], *FIGURES)
    assert not record.keys() & set(FIGURES)


def test_one_image_has_no_spread():
    assert np.isnan(spread.feature_std(normal(1, 1, 8)))
    assert np.isnan(spread.rankme(normal(1, 1, 8)))
