"""The commands on a GPU that isn't there: devices and types fit, and no step waits for it."""

from collections import Counter

import fake_gpu
import pytest
import torch
from helpers import CPU

from util import knn, training

pytestmark = [
    pytest.mark.skipif(bool(fake_gpu.REASON), reason=fake_gpu.REASON),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set"),
]

# Where a run may wait for the GPU, and how many waits that makes at a time; any number for None.
ONCE_A_RUN = {"fake_gpu.to": None, "data._channel_statistics": 1, "training.restore": None}
ONCE_A_RUN |= dict.fromkeys(["optim.load_state", "checkpoint.save_safetensors"])
ONCE_A_LINE = {"logs.flush": 1}
ONCE_AN_EPOCH = {"engine_pretrain.evaluate": 1, "engine_finetune.evaluate": 3}  # of one tensor
PICTURES = dict.fromkeys(["main_pretrain.pretrain", "visualize.reconstruct", "visualize._shown"])
ONCE_A_SAVE = {"training._save": 3}  # is the model finite, is the optimizer, the copies are done
SAVES = 2  # an epoch: before its evaluation and after
SCALER = {"training._save": SAVES * 5}  # and two values of the scaler that fp16 needs
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
FLAGS = {"device": "cuda", "batch_size": 6, "log_every": 2, "epochs": 1, "warmup_epochs": 0}
LINES = 2  # of the three steps of an epoch


def check(gpu, *, lines=LINES, saves=SAVES, also=()):
    """No function waits but those above, and none more often than it may; all copies are done."""
    waits = Counter(gpu.waits)
    allowed = ONCE_A_RUN | ONCE_AN_EPOCH | PICTURES | dict(also)
    allowed |= {name: lines * each for name, each in ONCE_A_LINE.items()}
    allowed |= {name: saves * each for name, each in ONCE_A_SAVE.items()} | dict(also)
    assert not waits.keys() - allowed.keys()
    for name, count in waits.items():
        assert allowed[name] in (None, count), name
    assert waits["logs.flush"] == lines
    assert gpu.unfinished == 0


@pytest.mark.parametrize(
    "amp, options",
    [
        ("bf16", {"clip_grad": 1, "accum_iter": 2, "grad_checkpointing": True}),
        ("fp16", {"norm_pix_loss": True, "clip_grad": 1}),
        ("off", {}),
    ],
)
def test_pretraining_waits_only_for_log_lines(amp, options, pretrain, pretrain_flags):
    with fake_gpu.running() as gpu:
        pretrain(pretrain_flags | FLAGS | options | {"amp": amp})
    check(gpu, also=SCALER if amp == "fp16" else {})
    assert gpu.linear_types == {TYPES[amp]}


def test_features_are_compared_on_the_gpu(pretrain, pretrain_flags, monkeypatch):
    """k-NN waits for the answers to a block of queries, not for a batch."""
    neighbours = knn.neighbours  # ones from the GPU stand for numbers that no image has
    monkeypatch.setattr(knn, "neighbours", lambda found: neighbours(found.fill_(2**32 - 1)))
    waits = {"knn.accuracy": 5, "spread.rankme": 2, "spread.feature_std": 1}
    with fake_gpu.running() as gpu:
        pretrain(pretrain_flags | FLAGS | {"amp": "bf16", "knn_every": 1})
    check(gpu, also=waits)
    assert gpu.linear_types == {torch.bfloat16, torch.float64}


def test_a_resumed_run_does_too(pretrain, pretrain_flags, monkeypatch):
    """With the optimizer's state from a file, written on a CPU."""
    flags = pretrain_flags | FLAGS | {"epochs": 2, "amp": "bf16", "save_every": 1}
    pretrain(flags | {"device": "cpu"})
    for name in ("checkpoint-last.pth", "checkpoint-1.pth"):
        (flags["output_dir"] / name).unlink()
    mapped, load = [], training.find_checkpoint
    monkeypatch.setattr(training, "find_checkpoint", lambda *a: mapped.append(a[2]) or load(*a))
    with fake_gpu.running() as gpu:
        pretrain(flags)
    check(gpu)
    assert "training.restore" in gpu.waits
    assert mapped == [True]  # processes of a machine share its pages


@pytest.mark.parametrize(
    "amp, options, also",
    [
        ("bf16", {"mixup": 0.8, "cutmix": 1, "reprob": 1, "drop_path": 0.5}, {}),
        ("fp16", {"clip_grad": 1, "grad_checkpointing": True, "cls_token": True}, {}),
        ("off", {}, {}),
        # timm sends the weights of these modes to the GPU in every step.
        ("bf16", {"mixup": 1, "mixup_mode": "elem"}, {"engine_finetune.train_one_epoch": 3}),
    ],
)
def test_finetuning_waits_only_for_log_lines(amp, options, also, finetune, classify_flags):
    with fake_gpu.running() as gpu:
        finetune(classify_flags | FLAGS | options | {"amp": amp})
    check(gpu, also=SCALER if amp == "fp16" else also)
    assert gpu.linear_types == {TYPES[amp]}


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_probing_waits_only_for_log_lines(amp, linprobe, classify_flags):
    with fake_gpu.running() as gpu:
        linprobe(classify_flags | FLAGS | {"amp": amp})
    check(gpu)
    assert gpu.linear_types == {TYPES[amp], torch.float32}  # the encoder, the head


@pytest.mark.parametrize("command", ["finetune", "linprobe"])
def test_an_evaluation_waits_only_for_its_figures(command, request, classify_flags):
    main = request.getfixturevalue(command)
    main(classify_flags | FLAGS | {"device": "cpu"})
    resume = classify_flags["output_dir"] / "checkpoint-best.pth"
    if command == "finetune":
        del classify_flags["finetune"]
    with fake_gpu.running() as gpu:
        main(classify_flags | FLAGS | {"eval": True, "resume": resume, "amp": "bf16"})
    check(gpu, lines=0, saves=0)
    assert torch.bfloat16 in gpu.linear_types


def test_files_of_a_gpu_s_run_hold_tensors_of_the_cpu(pretrain, pretrain_flags):
    """They load where there is no GPU, by torch.load without map_location."""
    with fake_gpu.running():
        pretrain(pretrain_flags | FLAGS | {"amp": "off"})
    contents = torch.load(pretrain_flags["output_dir"] / "checkpoint-last.pth", weights_only=True)
    tensors = [t for state in contents["optimizer"]["state"].values() for t in state.values()]
    assert {t.device for t in [*contents["model"].values(), *tensors]} == {CPU}


def test_the_guard_sees_a_wait():
    with fake_gpu.running() as gpu:
        torch.ones(3, device=fake_gpu.GPU).sum().item()
        torch.ones(3).to(fake_gpu.GPU)
        torch.ones(3).to(fake_gpu.GPU, non_blocking=True)
        with pytest.raises(RuntimeError, match="device"):
            torch.ones(3) + torch.ones(3, device=fake_gpu.GPU)
    assert gpu.waits == ["test_fake_gpu.test_the_guard_sees_a_wait"] * 2
