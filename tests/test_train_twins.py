import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import evaluate_twins
import net
import train_twins
from align import read_id_to_images, read_pairs
from tests.synthetic import write_photos
from triplet_dataset import TwinTripletDataset, load_crops
from triplet_loss import TripletLoss

FAMILIES = [[3, 2], [2, 2, 2], [2, 3], [3, 3], [1, 1]]


@pytest.fixture
def run(tmp_path, write_crops, tiny_model):
    """run("--epochs 2", ...) -> (exit code, content of training_log.json), of a tiny network on tiny data."""
    aligned, pairs = write_crops(FAMILIES)
    net.save_checkpoint(tmp_path / "start.pth", tiny_model)

    def start(flags="", name="run"):
        command = (
            f"--train_pairs {pairs} --skip_alignment --aligned_json {aligned} --arch ir_tiny "
            f"--pretrained {tmp_path}/start.pth --output_dir {tmp_path}/models --log_dir {tmp_path}/logs "
            f"--validation_split 0.3 --device cpu --epochs 2 --keep 0 --run_name {name} {flags}"
            f"{'' if 'grouped' in flags or '--batch_size' in flags else ' --batch_size 24'}"
        )
        code = train_twins.main(command.split())
        path = tmp_path / "logs" / name / "training_log.json"
        return code, json.loads(path.read_text()) if path.exists() else None

    return start


def states(tmp_path, name="run"):
    """(network before training, network after) as state dicts."""
    after = torch.load(tmp_path / "logs" / name / "last.pth", weights_only=True)["state_dict"]
    return net.load_checkpoint(tmp_path / "start.pth").state_dict(), {k[6:]: v for k, v in after.items()}


# ---- what the modes mean


def test_frozen_backbone_is_bitwise_unchanged(tmp_path, run):
    assert run("--freeze_backbone True --learning_rate 0.01")[0] == 0
    before, after = states(tmp_path)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {
        "output_layer.0.weight",
        "output_layer.0.bias",
        "output_layer.3.weight",
        "output_layer.3.bias",
    }


def test_full_mode_trains_every_parameter_and_no_statistic(tmp_path, run):
    assert run("--learning_rate 0.01")[0] == 0
    before, after = states(tmp_path)
    parameters = {name for name, _ in net.build_model("ir_tiny").named_parameters()}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == parameters
    assert any("running_mean" in key for key in before.keys() - changed)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("across", [0, 0.7])
def test_dedup_equals_the_naive_three_forward_computation(write_crops, tiny_model, frozen, across):
    aligned, pairs = write_crops([[3, 3], [2, 2]])
    dataset = TwinTripletDataset(read_id_to_images(aligned), read_pairs(pairs))
    flags = f"--train_pairs {pairs} --skip_alignment --device cpu --pretrained none --keep 0 --across {across}"
    trainer = train_twins.TwinTrainer(train_twins.parse_args(flags.split()))
    reference = net.build_model("ir_tiny").eval()
    reference.load_state_dict(tiny_model.state_dict())
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(not frozen or name.startswith("output_layer."))
    trainer.model, trainer.train_set = tiny_model, dataset
    data = dataset.load()
    trainer.trained = trainer.part = train_twins.TrainedPart(tiny_model, frozen)
    if frozen:
        data = train_twins.backbone_features(tiny_model, data, trainer.device, trainer.ranks)

    def naive_embeddings(rows):
        """Through the whole network, what a frozen backbone gives rounded as it is on the disk."""
        features = reference.features(net.to_input(dataset.load()[torch.from_numpy(rows)]))
        return reference.head(features.half().float() if frozen else features)[0]

    trainer.images = train_twins.Images(data, trainer.trained, trainer.device, trainer.ranks)
    trainer.rows = [np.arange(len(data))]
    trainer.optimizer = torch.optim.SGD([p for p in tiny_model.parameters() if p.requires_grad], lr=0.1)
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=False)
    naive = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.1)
    for triplets in list(dataset.epoch(1, 8))[:4]:
        # Each step from equal weights: one that rounding sends across a PReLU's kink has another slope from there on.
        reference.load_state_dict(tiny_model.state_dict())
        _, statistics = trainer._step(triplets, len(triplets), 0.1)
        parts = [naive_embeddings(triplets[:, i]) for i in range(3)]
        loss = TripletLoss(0.3)(*parts)
        near, far = ((1 - (parts[0] * other).sum(1)) for other in parts[1:])
        everyone = (near[:, None] - far[None, :] + 0.3).clamp_min(0).mean()
        naive.zero_grad()
        ((1 - across) * loss + across * everyone).backward()
        naive.step()
        assert statistics[0].item() == pytest.approx(loss.item(), abs=1e-6)
        for a, b in zip(tiny_model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def count_images(monkeypatch, method):
    """Counter of images that pass through Backbone.<method> from now on, as a one-element list."""
    seen, original = [0], getattr(net.Backbone, method)

    def counted(self, x, *rest):
        seen[0] += len(x)
        return original(self, x, *rest)

    monkeypatch.setattr(net.Backbone, method, counted)
    return seen


def test_a_frozen_backbone_runs_once_per_image_for_the_whole_run(run, monkeypatch):
    seen = count_images(monkeypatch, "features")
    code, log = run("--freeze_backbone --epochs 3")
    assert code == 0
    config = log["config"]
    validated = sum(len(v) for k, v in read_id_to_images(config["aligned_json"]).items() if k in config["val_ids"])
    assert seen[0] == config["n_train_images"] + validated


def test_an_image_is_embedded_once_per_step(run, monkeypatch):
    steps, original = [], train_twins.TrainedPart.forward

    def recorded(self, data):
        if torch.is_grad_enabled():
            steps.append(data)
        return original(self, data)

    monkeypatch.setattr(train_twins.TrainedPart, "forward", recorded)
    _, log = run("--epochs 1 --batch_size 64")
    assert all(len(torch.unique(data, dim=0)) == len(data) for data in steps)
    assert all(len(data) <= log["config"]["n_train_images"] for data in steps)
    assert len(steps) == math.ceil(log["config"]["n_train_triplets"] / 64)


def test_weight_decay_spares_batchnorm_prelu_and_biases(tiny_model):
    decayed, spared = train_twins.make_optimizer(tiny_model, 1e-3, 0.1).param_groups
    names = {id(p): name for name, p in tiny_model.named_parameters()}
    modules = dict(tiny_model.named_modules())
    for p in decayed["params"]:
        assert isinstance(modules[names[id(p)].rpartition(".")[0]], nn.Conv2d | nn.Linear)
    for p in spared["params"]:
        module, _, kind = names[id(p)].rpartition(".")
        assert kind == "bias" or isinstance(modules[module], nn.BatchNorm2d | nn.PReLU)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_batchnorm_statistics_of_a_random_network_are_those_of_its_crops(write_crops):
    aligned, _ = write_crops([[5, 4]])
    crops = load_crops([p for paths in read_id_to_images(aligned).values() for p in paths])
    model = net.build_model("ir_tiny")
    weights = {name: p.clone() for name, p in model.named_parameters()}
    train_twins.set_batchnorm_statistics(model, crops, torch.device("cpu"))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        after_convolution = model.input_layer[0](net.to_input(crops))
    torch.testing.assert_close(
        model.input_layer[1].running_mean, after_convolution.mean((0, 2, 3)), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(model.input_layer[1].running_var, after_convolution.var((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert not any(module.training for module in model.modules())
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_random_start_trains_and_differs_by_seed(tmp_path, run):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(f"--pretrained none --epochs 1 --freeze_backbone --seed {seed}", name)[0] == 0
    a, b, c = (states(tmp_path, name)[1] for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["input_layer.0.weight"], c["input_layer.0.weight"])
    assert not torch.equal(a["input_layer.1.running_mean"], torch.zeros(64))  # it got statistics of its own


# ---- what is written


def test_log_config_and_checkpoint_say_what_the_design_says(tmp_path, run):
    code, log = run("--train_percentage 50")
    assert code == 0
    config = json.loads((tmp_path / "logs" / "run" / "config.json").read_text())
    assert log["config"] == config
    assert config["n_train_pairs"] + config["n_val_pairs"] == 6
    assert config["n_skipped_pairs"] == 1
    assert not set(config["train_ids"]) & set(config["val_ids"])
    images = read_id_to_images(config["aligned_json"])
    pairs = [p for p in read_pairs(config["train_pairs"]) if set(p) <= set(config["train_ids"])]
    maxima = [(n := len(images[a])) * (n - 1) * (m := len(images[b])) + m * (m - 1) * n for a, b in pairs]
    assert config["n_train_triplets"] == sum((50 * maximum + 99) // 100 for maximum in maxima)
    assert config["n_possible_train_triplets"] == sum(maxima)
    images_of = {name: len(paths) for name, paths in images.items()}
    validated = [p for p in read_pairs(config["train_pairs"]) if set(p) <= set(config["val_ids"])]
    counts = [(images_of[a], images_of[b]) for a, b in validated]
    assert config["n_val_triplets"] == sum(n * (n - 1) * m + m * (m - 1) * n for n, m in counts)  # all of them
    assert config["n_train_images"] == sum(len(images[i]) for i in config["train_ids"])
    assert config["trainable_parameters"] == [name for name, _ in net.build_model("ir_tiny").named_parameters()]
    assert config["versions"]["torch"] == torch.__version__.split("+")[0]
    assert config["used_device"] == "cpu"
    assert [entry["epoch"] for entry in log["epochs"]] == [0, 1, 2]
    for entry in log["epochs"]:
        assert {"train_loss", "val_loss", "val_eer", "val_auc", "active_triplets", "timing"} <= set(entry)
        assert entry["timing"]["seconds"] > 0
    best = min(log["epochs"][1:], key=lambda entry: entry["val_loss"])
    assert log["best_epoch"] == best["epoch"]
    assert log["stopped"] == "epochs"
    path = Path(log["best_checkpoint"])
    assert path.name == f"twin_tuned_irtiny_run_epoch{best['epoch']}.pth"
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # one per run
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["arch"] == "ir_tiny"
    assert checkpoint["epoch"] == best["epoch"]
    assert checkpoint["config"]["val_ids"] == config["val_ids"]
    assert checkpoint["metrics"]["val_loss"] == best["val_loss"]
    last = torch.load(tmp_path / "logs" / "run" / "last.pth", weights_only=True)
    assert last["epoch"] == 2
    assert last["state_dict"].keys() == checkpoint["state_dict"].keys()
    for name in ("loss_curves.png", "validation_curves.png"):
        assert (tmp_path / "logs" / "run" / name).read_bytes().startswith(b"\x89PNG")


def test_trained_checkpoint_is_read_by_upstreams_five_lines(run):
    _, log = run()
    statedict = torch.load(log["best_checkpoint"], weights_only=True)["state_dict"]
    model_statedict = {key[6:]: val for key, val in statedict.items() if key.startswith("model.")}
    model = net.build_model("ir_tiny")
    model.load_state_dict(model_statedict)
    model.eval()
    x = net.to_input(np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8))
    torch.testing.assert_close(model(x), net.load_checkpoint(log["best_checkpoint"])(x))


def test_logged_figures_are_those_of_the_saved_network(run):
    """Epoch 0 and validation, against three separate forward passes and scikit-learn."""
    from sklearn.metrics import roc_auc_score

    code, log = run("--epochs 1 --distance euclidean")
    assert code == 0
    images, config = read_id_to_images(log["config"]["aligned_json"]), log["config"]
    pairs = read_pairs(config["train_pairs"])

    def expected(checkpoint, ids):
        model = net.load_checkpoint(checkpoint)
        dataset = TwinTripletDataset(images, [p for p in pairs if set(p) <= set(ids)])
        with torch.no_grad():
            parts = [torch.stack(x) for x in zip(*(dataset[i] for i in range(len(dataset))), strict=True)]
            loss = TripletLoss(0.3, "euclidean")(*(model(x)[0] for x in parts)).item()
            e = model(net.to_input(dataset.load()))[0]
        genuine, twin = evaluate_twins.image_pairs(dataset.images)
        rows = np.concatenate([genuine, twin])
        truth = [1] * len(genuine) + [0] * len(twin)
        return loss, roc_auc_score(truth, (e[rows[:, 0]] * e[rows[:, 1]]).sum(1).numpy())

    start, end = log["epochs"]
    assert start["train_loss"] == pytest.approx(expected(config["pretrained"], config["train_ids"])[0], abs=1e-5)
    got = expected(config["pretrained"], config["val_ids"])
    assert (start["val_loss"], start["val_auc"]) == pytest.approx(got, abs=1e-5)
    got = expected(log["best_checkpoint"], config["val_ids"])
    assert (end["val_loss"], end["val_auc"]) == pytest.approx(got, abs=1e-5)


def test_training_reduces_the_training_loss(run):
    for flags, name in (("--freeze_backbone", "frozen"), ("--learning_rate 1e-3", "full")):
        _, log = run(f"{flags} --epochs 4 --batch_size 8", name)
        assert log["epochs"][-1]["train_loss"] < 0.7 * log["epochs"][0]["train_loss"]


def test_default_run_names(tmp_path):
    def name(flags):
        return train_twins.TwinTrainer(
            train_twins.parse_args(f"--train_pairs x --skip_alignment --pretrained none {flags}".split())
        ).run_name

    assert name("") == "full_100pct_margin0.3"
    assert name("--freeze_backbone --train_percentage 75 --margin 0.50") == "frozen_75pct_margin0.5"


def test_patience_stops(run):
    # A rate of almost nothing: no epoch changes anything, so epoch 1 stays the best one.
    _, log = run("--learning_rate 1e-30 --weight_decay 0 --epochs 9 --patience 2")
    assert log["best_epoch"] == 1
    assert log["stopped"] == "patience"
    assert len(log["epochs"]) == 4


@pytest.mark.parametrize(("monitor", "best"), [("val_loss", 3), ("val_eer", 2), ("val_auc", 4)])
def test_monitor_chooses_the_best_epoch(run, monkeypatch, monitor, best):
    figures = {"val_loss": [0.1, 0.3, 0.2, 0.1, 0.1], "val_eer": [0.3, 0.3, 0.1, 0.2, 0.2]}
    figures["val_auc"] = [0.7, 0.8, 0.5, 0.7, 0.9]
    entry = train_twins.TwinTrainer._entry

    def given(self, epoch, *rest):
        return entry(self, epoch, *rest) | {name: values[epoch] for name, values in figures.items()}

    bootstraps, against_start = [], train_twins.TwinTrainer._against_start
    monkeypatch.setattr(train_twins.TwinTrainer, "_entry", given)
    monkeypatch.setattr(
        train_twins.TwinTrainer, "_against_start", lambda self: bootstraps.append(1) or against_start(self)
    )
    _, log = run(f"--monitor {monitor} --epochs 4")
    assert log["best_epoch"] == best
    assert log["best_checkpoint"].endswith(f"epoch{best}.pth")
    # At the end, and for a best epoch whose figure is no better than the start's: here each loss, and the first EER.
    assert len(bootstraps) == {"val_loss": 4, "val_eer": 2, "val_auc": 1}[monitor]
    if monitor != "val_loss":
        assert log["improved"]


def test_no_better_than_the_start_is_said_loudly(run, capsys):
    _, log = run("--learning_rate 1e-30 --weight_decay 0 --epochs 1")
    assert "WARNING: no epoch is better than the network before training" in capsys.readouterr().out
    assert Path(log["best_checkpoint"]).exists()


def test_a_single_family_keeps_the_last_epoch(tmp_path, write_crops, run, capsys):
    aligned, pairs = write_crops([[3, 3, 2]], "single")
    code, log = run(f"--train_pairs {pairs} --aligned_json {aligned} --patience 1 --epochs 3")
    assert code == 0
    assert "warning: no validation" in capsys.readouterr().out
    assert log["best_epoch"] == 3
    assert {entry["val_loss"] for entry in log["epochs"]} == {None}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precision_of_steps_does_not_touch_reported_figures(run, precision):
    _, log = run(f"--precision {precision} --learning_rate 1e-30 --weight_decay 0 --epochs 1")
    start, end = log["epochs"]
    assert log["config"]["used_precision"] == precision
    assert start["val_loss"] == pytest.approx(end["val_loss"], abs=1e-7)
    assert abs(start["train_loss"] - end["train_loss"]) < (2e-2 if precision == "bf16" else 1e-6)
    assert (start["train_loss"] == end["train_loss"]) is False or precision == "fp32"


@pytest.mark.parametrize("mode", ["", "--freeze_backbone"])
def test_a_compiled_step_is_the_same_step(run, monkeypatch, mode):
    # Traced as the real compiler does, but run by PyTorch's own kernels: no C compiler, no minutes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    _, plain = run(f"{mode} --epochs 1", "plain")
    _, compiled = run(f"{mode} --epochs 1 --compile", "compiled")
    for a, b in zip(plain["epochs"], compiled["epochs"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5)


# ---- going on, starting over


def without_timing(log):
    log = {key: value for key, value in log.items() if key != "config"}
    return {**log, "epochs": [{k: v for k, v in e.items() if k != "timing"} for e in log["epochs"]]}


@pytest.mark.parametrize("mode", ["False", "True"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, run, mode):
    flags = f"--freeze_backbone {mode} --schedule constant"  # the cosine's length is --epochs
    _, whole = run(f"{flags} --epochs 3", "whole")
    run(f"{flags} --epochs 1", "parts")
    code, parts = run(f"{flags} --epochs 3 --resume", "parts")
    assert code == 0
    text = json.dumps(without_timing(parts)).replace("parts", "whole")
    assert json.loads(text) == without_timing(whole)
    a, b = (states(tmp_path, name)[1] for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert len(list((tmp_path / "models").iterdir())) == 2


def test_resume_starts_goes_on_and_says_when_finished(tmp_path, run, capsys):
    assert run("--resume --epochs 1")[0] == 0
    for name in ("training_log.json", "loss_curves.png"):  # as if killed between the last files
        (tmp_path / "logs" / "run" / name).unlink()
    capsys.readouterr()
    code, log = run("--resume --epochs 1")
    assert code == 0
    assert "run is finished (epochs)" in capsys.readouterr().out
    assert len(log["epochs"]) == 2
    assert (tmp_path / "logs" / "run" / "loss_curves.png").exists()


def test_resume_with_other_settings_is_refused_with_the_list(run, capsys):
    run("--epochs 1")
    assert run("--epochs 2 --resume --margin 0.2 --seed 1 --freeze_backbone --learning_rate 1e-4")[0] == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "margin was 0.3, is 0.2" in error
    assert "seed was 42, is 1" in error
    assert "freeze_backbone was False, is True" in error


def test_resume_keeps_the_precision_that_the_run_began_with(run):
    run("--epochs 1 --precision bf16")
    code, log = run("--epochs 2 --resume --precision auto")
    assert code == 0
    assert log["config"]["used_precision"] == "bf16"


def test_resume_needs_the_state_of_a_run(tmp_path, run, tiny_model, capsys):
    run("--epochs 1")
    last = tmp_path / "logs" / "run" / "last.pth"
    net.save_checkpoint(last, tiny_model)
    assert run("--epochs 2 --resume")[0] == 2
    assert "not the state of a run" in capsys.readouterr().err
    last.unlink()
    assert run("--epochs 2 --resume")[0] == 2
    assert "its last.pth is gone" in capsys.readouterr().err


def test_another_runs_checkpoint_of_the_same_name_is_kept(tmp_path, run, capsys):
    _, log = run("--epochs 1")
    assert run(f"--epochs 1 --log_dir {tmp_path}/elsewhere")[0] == 2
    assert "a run of this name is there" in capsys.readouterr().err
    assert Path(log["best_checkpoint"]).exists()


def test_a_finished_run_is_not_overwritten_without_the_flag(tmp_path, run, capsys):
    run("--epochs 2")
    before = (tmp_path / "logs" / "run" / "last.pth").read_bytes()
    assert run("--epochs 1")[0] == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "logs" / "run" / "last.pth").read_bytes() == before
    code, log = run("--epochs 1 --overwrite")
    assert code == 0
    assert [p.name for p in (tmp_path / "models").iterdir()] == [Path(log["best_checkpoint"]).name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_keeps_the_last_epoch_and_exits_130(tmp_path, write_crops, number):
    aligned, pairs = write_crops([[4, 4], [4, 4], [4, 4]])
    net.save_checkpoint(tmp_path / "start.pth", net.build_model("ir_18"))
    command = (
        f"--train_pairs {pairs} --skip_alignment --aligned_json {aligned} --arch ir_18 --freeze_backbone --epochs 500 "
        f"--pretrained {tmp_path}/start.pth --output_dir {tmp_path}/m --log_dir {tmp_path}/l --patience 500"
    )
    script = Path(train_twins.__file__)
    process = subprocess.Popen(
        [sys.executable, script, *command.split()],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    log = tmp_path / "l" / "frozen_100pct_margin0.3" / "training_log.json"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) == 130
    assert "--resume" in process.stderr.read().splitlines()[-1]
    assert json.loads(log.read_text())["epochs"]
    assert torch.load(log.parent / "last.pth", weights_only=True)["log"]["epochs"]


def test_an_interruption_in_the_last_step_of_an_epoch_is_not_lost(tmp_path, run, monkeypatch):
    factor, steps = train_twins.rate_factor, []

    def interrupt(*args):
        steps.append(args)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return factor(*args)

    monkeypatch.setattr(train_twins, "rate_factor", interrupt)
    assert run("--batch_size 1000 --epochs 5")[0] == 130
    assert len(steps) == 2
    state = torch.load(tmp_path / "logs" / "run" / "last.pth", weights_only=True)
    assert state["progress"]["epoch"] == 3
    assert [entry["epoch"] for entry in state["log"]["epochs"]] == [0, 1, 2]


# ---- grouped batching


def test_a_grouped_steps_gradient_is_that_of_the_naive_computation(write_crops, tiny_model):
    aligned, pairs = write_crops([[3, 3], [2, 2, 2], [4, 3]])
    flags = (
        f"--train_pairs {pairs} --skip_alignment --aligned_json {aligned} --device cpu --pretrained none --no_cache "
    )
    flags += "--keep 0 --across 0 --arch ir_tiny --validation_split 0 "
    flags += "--batching grouped --images_per_batch 7 --train_percentage 60"
    trainer = train_twins.TwinTrainer(train_twins.parse_args(flags.split()))
    trainer._prepare_data()
    trainer.model = tiny_model
    crops = trainer._load_crops()
    trainer.trained = trainer.part = train_twins.TrainedPart(tiny_model, False)
    trainer.images = train_twins.Images(crops, trainer.trained, trainer.device, trainer.ranks)
    trainer.optimizer = torch.optim.SGD(tiny_model.parameters(), lr=0.0)
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=False)
    dataset = trainer.train_set
    n_steps, steps = trainer._steps(1, 0)
    seen = 0
    for triplets, count in steps:
        rows, _ = trainer._step(triplets, count, 0.0)
        assert len(rows) <= 7
        got = [p.grad.clone() for p in tiny_model.parameters()]
        tiny_model.zero_grad()
        inputs = [net.to_input(dataset.load()[torch.from_numpy(triplets[:, i])]) for i in range(3)]
        loss = TripletLoss(0.3)(*(tiny_model(x)[0] for x in inputs)) * len(triplets) / (len(dataset) / n_steps)
        loss.backward()
        for a, p in zip(got, tiny_model.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-3)
        seen += len(triplets)
    assert seen == len(dataset)


@pytest.mark.parametrize("mode", ["--freeze_backbone", ""])
def test_grouped_training_learns(run, mode):
    _, log = run(f"{mode} --batching grouped --images_per_batch 8 --learning_rate 1e-3 --epochs 4")
    assert log["epochs"][-1]["train_loss"] < 0.8 * log["epochs"][0]["train_loss"]
    assert log["config"]["batching"] == "grouped"


# ---- what is kept on the disk


def test_features_and_crops_are_kept_for_the_next_run(tmp_path, run, monkeypatch):
    run("--freeze_backbone --epochs 1", "first")
    kept = sorted(p.name.split("-")[0] for p in tmp_path.glob("train.json.*"))
    assert kept == ["train.json.crops", "train.json.features"]
    seen = count_images(monkeypatch, "features")
    monkeypatch.setattr("triplet_dataset.read_crop", None)  # no crop is read again
    assert run("--freeze_backbone --epochs 1 --train_percentage 50 --margin 0.2 --seed 3", "second")[0] == 0
    assert seen[0] == 0


def test_no_cache_leaves_nothing_and_gives_the_same(tmp_path, run):
    _, a = run("--freeze_backbone --no_cache", "a")
    assert not list(tmp_path.glob("train.json.*"))
    _, b = run("--freeze_backbone", "b")
    for x, y in zip(a["epochs"], b["epochs"], strict=True):
        assert {k: v for k, v in x.items() if k != "timing"} == {k: v for k, v in y.items() if k != "timing"}


def test_another_checkpoint_or_changed_crops_get_features_of_their_own(tmp_path, run, tiny_model):
    run("--freeze_backbone --epochs 1", "first")
    tiny_model.input_layer[0].weight.data[0, 0, 0, 0] += 0.1
    net.save_checkpoint(tmp_path / "start.pth", tiny_model)
    run("--freeze_backbone --epochs 1", "second")
    assert len(list(tmp_path.glob("*.features-*"))) == 2
    assert len(list(tmp_path.glob("*.crops-*"))) == 1
    crop = tmp_path / "train_aligned" / "train0a" / "0.png"
    Image.new("RGB", (112, 112), (1, 2, 3)).save(crop)
    run("--freeze_backbone --epochs 1", "third")
    assert len(list(tmp_path.glob("*.features-*"))) == 3
    assert len(list(tmp_path.glob("*.crops-*"))) == 2


def test_a_damaged_cache_is_named(tmp_path, run, capsys):
    run("--freeze_backbone --epochs 1", "first")
    (path,) = tmp_path.glob("*.features-*")
    path.write_bytes(path.read_bytes()[:1000])
    assert run("--freeze_backbone --epochs 1", "second")[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert path.name in line
    assert "delete it" in line


def test_half_precision_features_move_cosines_and_the_loss_by_less_than_a_thousandth(write_crops, tiny_model):
    aligned, _ = write_crops([[4, 4]])
    crops = load_crops([p for paths in read_id_to_images(aligned).values() for p in paths])
    features = train_twins.backbone_features(tiny_model, crops, torch.device("cpu"), net.Ranks())
    with torch.no_grad():
        exact, rounded = tiny_model(net.to_input(crops))[0], tiny_model.head(features.float())[0]
    assert features.dtype == torch.float16
    assert (exact @ exact.T - rounded @ rounded.T).abs().max() < 1e-3
    triplets = torch.tensor([(i, j, k) for i in range(4) for j in range(4) if i != j for k in range(4, 8)])
    loss = TripletLoss(0.3)
    losses = [loss.loss(*loss.distances(embeddings, triplets)).item() for embeddings in (exact, rounded)]
    assert losses[0] > 0
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_keep_holds_the_embeddings(run):
    flags = "--freeze_backbone --learning_rate 1e-3 --epochs 3 --across 0"
    moved = []
    for keep in (0, 100):
        _, log = run(f"{flags} --keep {keep}", f"keep{keep}")
        moved.append(log["epochs"][0]["val_loss"] - log["epochs"][-1]["val_loss"])
    assert abs(moved[1]) < 0.3 * abs(moved[0])


def test_the_end_says_how_it_went_on_twins_and_on_everyone_else(run, capsys):
    _, log = run("--epochs 1")
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("On the validation people"))
    assert re.fullmatch(r".* against the start: [a-z ]+ on twins, [a-z ]+ on everyone else\.", line)
    assert {"auc", "eer"} <= set(log["against_start"])
    facts = net.load_checkpoint(log["best_checkpoint"]).facts
    lower = log["epochs"][1]["val_loss"] < log["epochs"][0]["val_loss"]
    verdicts = [log["against_start"][name]["verdict"] for name in ("auc", "eer")]
    assert facts["improved"] == (lower or ("better" in verdicts and "worse" not in verdicts))
    assert log["epochs"][1]["loss_gap"] == pytest.approx(log["epochs"][1]["val_loss"] - log["epochs"][1]["train_loss"])


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (("better", "not distinguishable", "worse", "worse"), "better on twins, worse on everyone else"),
        (("worse", "better", "better", "not distinguishable"), "better and worse on twins, better on everyone else"),
        (("not distinguishable",) * 4, "not distinguishable on twins, not distinguishable on everyone else"),
    ],
)
def test_the_verdict_in_words(verdicts, words):
    names = ("auc", "eer", "general_auc", "fnmr_0.001")
    change = {name: {"verdict": value} for name, value in zip(names, verdicts, strict=True)}
    assert words in evaluate_twins.verdict(change)


def test_the_rate_rises_over_a_tenth_and_falls_to_zero():
    rates = [train_twins.rate_factor(progress, "cosine") for progress in (0, 0.05, 0.1, 0.55, 1)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert train_twins.rate_factor(0.9, "constant") == 1


# ---- numbers that go wrong


def test_collapse_is_recognised_and_the_last_good_state_is_kept(tmp_path, run, capsys):
    assert run("--learning_rate 100 --schedule constant --epochs 5")[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "collapsed" in line or "not finite" in line
    assert "--learning_rate" in line
    state = torch.load(tmp_path / "logs" / "run" / "last.pth", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())


def test_embeddings_that_coincide_are_a_collapse(run, capsys, monkeypatch):
    forward = train_twins.TrainedPart.forward

    def constant(self, data):
        embeddings = forward(self, data)
        return embeddings * 0 + torch.eye(512)[0] if torch.is_grad_enabled() else embeddings

    monkeypatch.setattr(train_twins.TrainedPart, "forward", constant)
    assert run("--epochs 1")[0] == 2
    assert "the embeddings have collapsed" in capsys.readouterr().err


# ---- killed and resumed


@pytest.mark.parametrize("flags", ["--freeze_backbone", "--batching grouped --images_per_batch 8"])
def test_a_run_killed_within_an_epoch_and_resumed_is_the_same_bit_for_bit(tmp_path, run, monkeypatch, flags):
    flags += "" if "grouped" in flags else " --batch_size 8"
    _, whole = run(f"{flags} --epochs 2", "whole")
    save, killing = train_twins.TwinTrainer._save, [True]

    def save_and_die(self, progress):
        save(self, progress)
        if killing[0] and progress["epoch"] == 2 and progress["step"] > 0:
            raise SystemExit(9)

    monkeypatch.setattr(train_twins.TwinTrainer, "_save", save_and_die)
    with pytest.raises(SystemExit):
        run(f"{flags} --epochs 2 --save_every 1e-9", "parts")
    killing[0] = False
    saved = torch.load(tmp_path / "logs" / "parts" / "last.pth", weights_only=True)["progress"]
    assert saved["epoch"] == 2
    assert saved["step"] > 0
    code, parts = run(f"{flags} --epochs 2 --resume", "parts")
    assert code == 0
    assert json.loads(json.dumps(without_timing(parts)).replace("parts", "whole")) == without_timing(whole)
    a, b = (states(tmp_path, name)[1] for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_second_process_on_one_run_is_refused_and_a_dead_ones_lock_is_not(tmp_path, run, capsys):
    import fcntl

    folder = tmp_path / "logs" / "run"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run()[0] == 2
        assert "another process works on this run" in capsys.readouterr().err
        assert [p.name for p in folder.iterdir()] == [".lock"]
    assert run("--epochs 1")[0] == 0  # the file is still there, its holder is gone


def test_changed_crops_are_refused_on_resume(tmp_path, run, capsys):
    run("--epochs 1")
    crop = tmp_path / "train_aligned" / "train0a" / "0.png"
    Image.new("RGB", (112, 112), (1, 2, 3)).save(crop)
    assert run("--epochs 2 --resume")[0] == 2
    assert "crops_sha256 was" in capsys.readouterr().err


# ---- both stages


def test_photographs_to_checkpoint(tmp_path, tiny_model, capsys):
    write_photos(tmp_path, 3, 2, seed=1)
    net.save_checkpoint(tmp_path / "start.pth", tiny_model)
    command = (
        f"--id_to_images {tmp_path}/id_to_images.json --train_pairs {tmp_path}/pairs.json "
        f"--landmarks {tmp_path}/landmarks.json --aligned_folder {tmp_path}/crops --aligned_json {tmp_path}/a.json "
        f"--arch ir_tiny --pretrained {tmp_path}/start.pth --output_dir {tmp_path}/m --log_dir {tmp_path}/l "
        "--epochs 1 --device cpu --max_workers 2"
    )
    assert train_twins.main(command.split()) == 0
    assert "12 photographs of 6 people: 12 aligned" in capsys.readouterr().out
    assert len(list((tmp_path / "m").glob("twin_tuned_irtiny_full_100pct_margin0.3_epoch1.pth"))) == 1
    assert train_twins.main([*command.split(), "--overwrite"]) == 0
    assert "12 already done" in capsys.readouterr().out


# ---- flags and wrong input


def test_help_lists_every_documented_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        train_twins.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flags = """id_to_images train_pairs aligned_folder aligned_json skip_alignment train_percentage freeze_backbone
        margin batch_size epochs learning_rate validation_split output_dir log_dir device max_workers arch pretrained
        distance weight_decay monitor patience seed precision landmarks realign resume run_name overwrite"""
    for flag in flags.split():
        assert re.search(rf"^  --{flag}\b", text, re.MULTILINE), flag


def test_defaults_are_the_plans_or_measured():
    args = train_twins.parse_args(["--train_pairs", "x", "--id_to_images", "y"])
    plan = {"train_percentage": 100, "freeze_backbone": False, "margin": 0.3, "batch_size": 16, "epochs": 20}
    plan |= {"learning_rate": 1e-4, "weight_decay": 1e-4, "validation_split": 0.15, "device": "auto", "patience": 5}
    plan |= {"arch": "ir_50", "pretrained": "pretrained/adaface_ir50_ms1mv2.ckpt", "distance": "cosine"}
    plan |= {"output_dir": "models", "log_dir": "training_logs", "monitor": "val_loss", "precision": "auto"}
    assert {key: vars(args)[key] for key in plan} == plan
    assert (args.schedule, args.keep, args.across, args.batching) == ("cosine", 3, 1, "shuffled")
    frozen = train_twins.parse_args(["--train_pairs", "x", "--skip_alignment", "--freeze_backbone"])
    assert (frozen.learning_rate, frozen.keep, frozen.across) == (1e-4, 3, 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("True", True),
        ("true", True),
        ("1", True),
        ("yes", True),
        ("False", False),
        ("f", False),
        ("0", False),
        ("No", False),
    ],
)
def test_freeze_backbone_takes_usual_spellings(text, value):
    flags = ["--train_pairs", "x", "--skip_alignment", "--freeze_backbone", text]
    assert train_twins.parse_args(flags).freeze_backbone is value
    assert train_twins.parse_args(flags[:-1]).freeze_backbone is True


@pytest.mark.parametrize(
    "flags",
    [
        *(
            f"--{f} {v}"
            for f in ("batch_size", "epochs", "patience", "max_workers")
            for v in ("0", "-1", "nan", "x", "1.5")
        ),
        *(f"--{f} {v}" for f in ("keep", "save_every") for v in ("-1", "nan", "inf", "x")),
        *(f"--across {v}" for v in ("-0.1", "1.1", "nan")),
        "--images_per_batch 96",
        "--batching random",
        "--schedule linear",
        *(f"--{f} {v}" for f in ("margin", "learning_rate") for v in ("0", "-1", "nan", "inf", "x")),
        *(f"--weight_decay {v}" for v in ("-1", "nan", "inf", "x")),
        *(f"--validation_split {v}" for v in ("-0.1", "1", "nan", "x")),
        *(f"--train_percentage {v}" for v in ("0", "101", "-5", "nan", "50.5", "x")),
        "--freeze_backbone maybe",
        "--precision fp8",
        "--precision fp16",
        "--distance l1",
        "--arch ir_51",
        "--monitor loss",
        "--device tpu",
        "--device cuda:77",
        "--seed x",
        "--run_name ../x",
        "--resume --overwrite",
        "--unknown x",
        "--pretrained missing.ckpt",
        "--aligned_json missing.json",
        "--train_pairs missing.json",
    ],
)
def test_wrong_flags_are_one_line_with_the_name_and_write_nothing(tmp_path, run, capsys, flags):
    assert run(flags)[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train_twins.py: ")
    flag, value = flags.split()
    assert (value if value.startswith("missing") or flag == "--device" else flag.lstrip("-")) in line
    assert not (tmp_path / "logs").exists()
    assert not (tmp_path / "models").exists()


def test_another_architecture_is_named(run, capsys):
    assert run("--arch ir_18")[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not a whole ir_18 network" in line
    assert "its tensors fit ir_tiny" in line


def test_alignment_needs_photographs(capsys):
    assert train_twins.main(["--train_pairs", "x"]) == 2
    assert "--id_to_images is needed unless --skip_alignment" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_in_one_line(tmp_path, run, capsys, monkeypatch):
    step = train_twins.TwinTrainer._step

    def overflow(self, *arguments):
        rows, statistics = step(self, *arguments)
        return rows, statistics * float("inf")

    monkeypatch.setattr(train_twins.TwinTrainer, "_step", overflow)
    assert run()[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "run, epoch 1, step 1: the loss is not finite, on images" in line
    assert ".png" in line
    assert "--learning_rate" in line
    assert torch.load(tmp_path / "logs" / "run" / "last.pth", weights_only=True)["epoch"] == 0


def test_precision_follows_the_device(monkeypatch):
    choose = train_twins.TwinTrainer._choose_precision
    trainer = object.__new__(train_twins.TwinTrainer)
    trainer.device = torch.device("cpu")
    assert choose(trainer, "auto") == "fp32"
    trainer.device = torch.device("cuda", 0)
    for supported, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=supported: answer)
        assert choose(trainer, "auto") == expected
