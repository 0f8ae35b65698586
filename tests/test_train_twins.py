"""Fine-tuning: what a step computes, what a run writes, and how it starts, goes on and ends.

All of it on a tiny network.
"""

import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_metric_learning.losses import ArcFaceLoss
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn

import evaluate_twins
import net
import train_twins
import triplet_dataset
from evaluate_twins import TwinEvaluator
from tests.conftest import (
    FAMILIES,
    GROUPED,
    SHUFFLED,
    Experiment,
    assert_equal_weights,
    quick_features,
    sgd,
    without_timing,
)
from tests.synthetic import write_photos
from train_twins import (
    RECIPE,
    RunFolder,
    TwinTrainer,
    ValidatedRun,
    choose_precision,
    parse_runs,
    plot_curves,
)
from triplet_dataset import TwinImages, load_crops
from triplet_loss import TripletLoss

N_IMAGES = sum(sum(sizes) for sizes in FAMILIES)


def make_trainer(experiment, flags="", name="run", people=None):
    (args,) = parse_runs(experiment.flags(flags, name))
    return TwinTrainer(args, people)


def prepare(experiment, flags):
    """A trainer that has loaded its start and its data, and not begun."""
    trainer = make_trainer(experiment, flags)
    trainer.load_network()
    trainer.load_data()
    return trainer


def all_crops(experiment):
    """All crops of an experiment as network inputs."""
    paths = [path for paths in experiment.images.values() for path in paths]
    return net.to_input(load_crops(paths).pixels)


def files_in(folder):
    """The files of a folder, but for the locks of runs."""
    return {path for path in folder.iterdir() if not path.name.endswith(".lock")}


@pytest.fixture
def no_average(monkeypatch):
    """The average of the weights is the last of them: a few steps move it as they move those."""
    monkeypatch.setattr(train_twins, "AVERAGE_DECAY", 0.0)


# ---- what is trained -----------------------------------------------------------------------------
def changed_keys(experiment):
    before = net.load_checkpoint(experiment.start).state_dict()
    after = experiment.weights()
    return {key for key, value in before.items() if not torch.equal(value, after[key])}


@pytest.mark.parametrize("steps", [SHUFFLED, GROUPED])
def test_frozen_backbone_is_bitwise_unchanged_and_only_the_output_layer_trained(
    experiment, run, steps
):
    code, _ = run(f"--freeze_backbone {steps} --validation_split 0")
    assert code == 0
    assert changed_keys(experiment) == {
        "output_layer.0.weight",
        "output_layer.0.bias",
        "output_layer.3.weight",
        "output_layer.3.bias",
    }


def test_full_mode_trains_every_parameter_and_no_batchnorm_statistic(experiment, run):
    code, _ = run(f"{SHUFFLED} --validation_split 0")
    assert code == 0
    parameters = net.build_model("ir_tiny").named_parameters()
    assert changed_keys(experiment) == {name for name, _ in parameters}


def embed_one_by_one(model, crops):
    """The embedding of each crop, from a forward pass of its own."""
    return [model(crop[None])[0][0] for crop in crops]


def mean_directions(embeddings, person):
    """For each person, the mean of its embeddings, of unit length."""
    means = []
    for number in sorted(set(person.tolist())):
        own = [e for e, p in zip(embeddings, person, strict=True) if p == number]
        means.append(nn.functional.normalize(torch.stack(own).mean(0), dim=0))
    return torch.stack(means)


def naive_loss(args, model, at_start, margin_softmax, person, crops, triplets):
    """(loss of a step, its plain triplet loss) by the formulas.

    There are three forward passes, all pairs of triplets, and a list of images. at_start: the
    embeddings of the crops before training. margin_softmax: of another library. person: of each
    crop, a number.
    """
    anchor, positive, negative = (model(crops[triplets[:, i]])[0] for i in range(3))
    plain = TripletLoss(args.margin, args.distance)(anchor, positive, negative)
    if args.distance == "cosine":
        to_positive = 1 - (anchor * positive).sum(1)
        to_negative = 1 - (anchor * negative).sum(1)
    else:
        to_positive = (anchor - positive).norm(dim=1)
        to_negative = (anchor - negative).norm(dim=1)
    differences = to_positive[:, None] - to_negative[None, :]
    quadruplets = (differences + args.margin).clamp_min(0).mean()

    images = sorted({int(row) for triplet in triplets for row in triplet})
    embeddings = embed_one_by_one(model, crops[images])
    drifts = [1 - e @ at_start[row] for row, e in zip(images, embeddings, strict=True)]
    drift = torch.stack(drifts).mean()
    identity = margin_softmax(torch.stack(embeddings), torch.from_numpy(person[images]))

    w = args.quadruplet_weight
    triplet_terms = (1 - w) * plain + w * quadruplets
    return triplet_terms + args.drift_weight * drift + args.identity_weight * identity, plain


@pytest.mark.parametrize("mode", ["True", "False --distance euclidean", "False"])
@pytest.mark.parametrize("steps", [SHUFFLED, GROUPED])
@pytest.mark.parametrize(
    "terms", ["", "--quadruplet_weight 0.7 --drift_weight 2", "--identity_weight 0.5"]
)
def test_a_step_equals_the_naive_three_forward_computation(
    experiment, monkeypatch, mode, steps, terms
):
    # With this seed, no activation lies so near a PReLU's kink that rounding sends it across.
    flags = f"--freeze_backbone {mode} {steps} {terms} --learning_rate 0.1 --epochs 1 --seed 1"
    trainer = prepare(experiment, flags)
    crops = net.to_input(load_crops(trainer.train_set.images.paths).pixels)
    reference = net.load_checkpoint(experiment.start)
    with torch.no_grad():
        at_start = embed_one_by_one(reference, crops)
    images = trainer.train_set.images
    margin = math.degrees(0.3)
    arcface = ArcFaceLoss(len(images.ids), 512, margin=margin, scale=30)
    arcface.W.data = mean_directions(at_start, images.person).T
    step = trainer.step
    sizes = []

    def compared_step(triplets):
        # Each step is taken from equal weights: one that rounding sends across a PReLU's kink has
        # another slope from there on.
        reference.load_state_dict(trainer.model.state_dict())
        reference.zero_grad()
        arcface.zero_grad()
        statistics = step(triplets)
        loss, plain = naive_loss(
            trainer.args, reference, at_start, arcface, images.person, crops, triplets
        )
        loss.backward()
        assert statistics[0].item() == pytest.approx(plain.item(), abs=1e-6)
        parameters = trainer.model.named_parameters()
        for (name, p), q in zip(parameters, reference.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(p.grad, q.grad, atol=2e-5, rtol=1e-4, msg=name)
                stepped = q - 0.1 * q.grad
                torch.testing.assert_close(p, stepped, atol=2e-6, rtol=1e-5, msg=name)
        if trainer.args.identity_weight:
            centres = trainer.identity_loss.centres
            torch.testing.assert_close(centres.grad.T, arcface.W.grad, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(centres.T, arcface.W - arcface.W.grad, atol=2e-5, rtol=1e-5)
            arcface.W.data = centres.detach().T.clone()
        sizes.append(len(triplets))
        return statistics

    monkeypatch.setattr(train_twins, "make_optimizer", sgd)
    trainer.step = compared_step
    log = trainer.train()
    assert len(sizes) == log["epochs"][1]["steps"] >= 2
    if steps == SHUFFLED:
        assert sum(sizes) == log["config"]["n_train_triplets"]


@pytest.fixture
def passes():
    """{"backbone", "head": [images of each pass through it]}.

    They are counted by hooks on a network's first and last weights.
    """
    seen = {"backbone": [], "head": []}

    def note(module, inputs, output):
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            seen["backbone"].append(len(output))
        elif isinstance(module, nn.Linear):
            seen["head"].append(len(output))

    hook = nn.modules.module.register_module_forward_hook(note)
    yield seen
    hook.remove()


@pytest.mark.parametrize("mode", ["--freeze_backbone", ""])
@pytest.mark.parametrize("steps", [SHUFFLED, GROUPED])
def test_an_image_is_embedded_once_per_step(experiment, passes, mode, steps):
    trainer = make_trainer(experiment, f"{mode} {steps} --epochs 1")
    step = trainer.step
    n_images = []

    def counted_step(triplets):
        passes["head"].clear()
        statistics = step(triplets)
        assert sum(passes["head"]) == len(np.unique(triplets))
        n_images.append(sum(passes["head"]))
        return statistics

    trainer.step = counted_step
    trainer.train()
    assert max(n_images) <= len(trainer.train_set.images.paths) < 3 * 8


@pytest.fixture
def frozen_trainer(experiment, passes):
    """A trainer whose run with a frozen backbone is finished."""
    trainer = make_trainer(experiment, "--freeze_backbone --epochs 3", "first")
    trainer.train()
    return trainer


@pytest.mark.usefixtures("frozen_trainer")
def test_a_frozen_backbone_runs_once_per_image(passes):
    assert sum(passes["backbone"]) == N_IMAGES


def test_a_frozen_backbone_does_not_run_again_for_the_same_people(
    experiment, frozen_trainer, passes
):
    passes["backbone"].clear()
    flags = "--freeze_backbone --train_percentage 50 --margin 0.2 --seed 3 --split_seed 5"
    make_trainer(experiment, flags, "second", frozen_trainer.people).train()
    assert passes["backbone"] == []


def test_another_frozen_backbone_has_features_of_its_own(experiment, frozen_trainer, passes):
    passes["backbone"].clear()
    model = net.load_checkpoint(experiment.start)
    model.input_layer[0].weight.data[0, 0, 0, 0] += 0.1
    net.save_checkpoint(experiment.start, model)
    make_trainer(experiment, "--freeze_backbone", "third", frozen_trainer.people).train()
    assert sum(passes["backbone"]) == N_IMAGES


def test_weight_decay_spares_batchnorm_prelu_and_biases(tiny_model):
    decayed, spared = train_twins.make_optimizer(tiny_model, 1e-3, 0.1).param_groups
    names = {id(p): name for name, p in tiny_model.named_parameters()}
    modules = dict(tiny_model.named_modules())
    for p in decayed["params"]:
        module, _, _ = names[id(p)].rpartition(".")
        assert isinstance(modules[module], nn.Conv2d | nn.Linear)
    for p in spared["params"]:
        module, _, kind = names[id(p)].rpartition(".")
        assert kind == "bias" or isinstance(modules[module], nn.BatchNorm2d | nn.PReLU)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


@pytest.mark.parametrize("mode", ["--freeze_backbone", ""])
@pytest.mark.parametrize("steps", [SHUFFLED, GROUPED])
def test_training_reduces_the_training_loss(run, mode, steps):
    _, log = run(f"{mode} {steps} --learning_rate 1e-3 --quadruplet_weight 1 --epochs 4")
    assert log["epochs"][-1]["train_loss"] < 0.5 * log["epochs"][0]["train_loss"]


@pytest.mark.usefixtures("no_average")
def test_drift_weight_holds_the_embeddings(experiment, run):
    crops = all_crops(experiment)
    before, _ = net.load_checkpoint(experiment.start)(crops)
    drifts = {}
    for weight in (0, 100):
        run(f"--drift_weight {weight} --learning_rate 1e-3 --validation_split 0", f"drift{weight}")
        model = net.build_model("ir_tiny").eval()
        model.load_state_dict(experiment.weights(f"drift{weight}"))
        after, _ = model(crops)
        drifts[weight] = (1 - (after * before).sum(1)).mean().item()
    assert drifts[100] < 0.3 * drifts[0]


# ---- steps, their rates, the average of the weights ----------------------------------------------
class Step(NamedTuple):
    """What a training step did."""

    rates: set  # of all groups of parameters
    weights: dict  # the state dict after the step
    triplets: set  # of rows, as tuples


@pytest.fixture
def steps(monkeypatch):
    """A list that every training step, from now on, adds its Step to."""
    step = TwinTrainer.step
    made = []

    def recorded_step(self, triplets):
        statistics = step(self, triplets)
        rates = {group["lr"] for group in self.optimizer.param_groups}
        weights = {key: value.clone() for key, value in self.model.state_dict().items()}
        made.append(Step(rates, weights, set(map(tuple, triplets.tolist()))))
        return statistics

    monkeypatch.setattr(TwinTrainer, "step", recorded_step)
    return made


def slow_averages(experiment, steps):
    """The exponential average of the weights after each step, which the start is part of."""
    decay = train_twins.AVERAGE_DECAY
    start = net.load_checkpoint(experiment.start).state_dict()
    average = {key: value.double() for key, value in start.items()}
    averages = []
    for step in steps:
        for key, value in step.weights.items():
            average[key] = decay * average[key] + (1 - decay) * value.double()
        averages.append({key: value.to(start[key].dtype) for key, value in average.items()})
    return averages


def count_steps(log, last_epoch):
    """How many steps a run had made by the end of an epoch."""
    return sum(entry["steps"] for entry in log["epochs"][: last_epoch + 1])


def distance(weights, others):
    """The largest difference of two networks' embedding layers."""
    key = "output_layer.3.weight"
    return (weights[key] - others[key]).abs().max().item()


@pytest.mark.parametrize("mode", ["--freeze_backbone", ""])
@pytest.mark.parametrize("kind", [SHUFFLED, GROUPED])
def test_the_checkpoint_is_the_average_of_the_weights_after_each_step_and_the_start(
    experiment, run, steps, mode, kind
):
    _, log = run(f"{mode} {kind} --learning_rate 1e-2 --epochs 3")
    n_steps = count_steps(log, log["best_epoch"])
    expected = slow_averages(experiment, steps)[n_steps - 1]
    assert_equal_weights(experiment.weights(), expected, 1e-6)
    start = net.load_checkpoint(experiment.start).state_dict()
    assert distance(expected, start) > 1e-4
    assert distance(expected, steps[n_steps - 1].weights) > 1e-4


@pytest.mark.parametrize("mode", ["--freeze_backbone", ""])
def test_the_state_holds_the_trained_weights_and_their_average(experiment, run, steps, mode):
    run(f"{mode} {SHUFFLED} --validation_split 0")  # so the checkpoint is that of the last epoch
    state = experiment.state()
    trained = {key.removeprefix("model."): value for key, value in state["state_dict"].items()}
    assert_equal_weights(trained, steps[-1].weights)
    average = {key.removeprefix("module."): value for key, value in state["average"].items()}
    average.pop("n_averaged", None)
    weights = experiment.weights()
    if mode:
        weights = {
            key.removeprefix("output_layer."): value
            for key, value in weights.items()
            if key.startswith("output_layer.")
        }
    assert_equal_weights(average, weights)


def assert_rates(steps, first, warm_up, rate):
    """The rates of consecutive steps, of which the first one is number `first` of the run."""
    for number, step in enumerate(steps, first):
        (used,) = step.rates
        assert used == pytest.approx(min(1, number / warm_up) * rate, rel=1e-12)


RATES = f"--freeze_backbone {SHUFFLED} --learning_rate 0.01 --epochs 3"
WARM_UP = 10  # steps, more than an epoch of RATES has


@pytest.fixture
def long_warm_up(experiment, monkeypatch):
    """In place of the experiment's own, of a single step."""
    monkeypatch.setattr(train_twins, "WARM_UP_STEPS", WARM_UP)


@pytest.mark.usefixtures("long_warm_up")
def test_the_rate_rises_over_the_first_steps_and_stays(run, steps):
    _, log = run(RATES)
    n_steps = log["epochs"][1]["steps"]
    assert 1 < n_steps < WARM_UP < 2 * n_steps
    assert len(steps) == 3 * n_steps
    assert_rates(steps, 1, WARM_UP, 0.01)


@pytest.mark.usefixtures("long_warm_up")
def test_the_rate_goes_on_rising_after_an_interruption(run, interrupt, steps):
    interrupt(RATES, 8)
    steps.clear()
    _, log = run(f"{RATES} --resume")
    n_steps = log["epochs"][1]["steps"]
    assert n_steps < 8 < 2 * n_steps  # the interrupted epoch was the second, which begins again
    assert len(steps) == 2 * n_steps
    assert_rates(steps, n_steps + 1, WARM_UP, 0.01)


@pytest.mark.usefixtures("long_warm_up")
def test_the_rate_goes_on_rising_when_more_epochs_are_asked_for(run, steps):
    _, log = run(f"{RATES} --epochs 1")
    run(f"{RATES} --resume --epochs 3")
    assert len(steps) == 3 * log["epochs"][1]["steps"]
    assert_rates(steps, 1, WARM_UP, 0.01)


def distinct_triplets(log, steps):
    """For each entry of a log, how many different triplets all steps until then have used."""
    used = set()
    counts = [0]
    steps = iter(steps)
    for entry in log["epochs"][1:]:
        for step in itertools.islice(steps, entry["steps"]):
            used |= step.triplets
        counts.append(len(used))
    return counts


@pytest.mark.parametrize("percentage", [60, 100])
@pytest.mark.parametrize("kind", ["--batch_size 200", "--images_per_batch 16"])
def test_the_log_counts_the_distinct_triplets_used_also_after_resume(
    experiment, steps, capsys, percentage, kind
):
    # Two of these people have more images than a group, so an epoch uses some triplets only.
    folder = experiment.folder / "large"
    folder.mkdir()
    large = Experiment(folder, [[10, 11], [3, 2], [2, 2, 2]])
    flags = f"--freeze_backbone {kind} --train_percentage {percentage} --validation_split 0"
    assert train_twins.main(large.flags(f"{flags} --epochs 2")) == 0
    assert train_twins.main(large.flags(f"{flags} --epochs 4 --resume")) == 0
    log = large.log()
    assert len(steps) == count_steps(log, 4)
    counts = [entry["distinct_triplets_used"] for entry in log["epochs"]]
    assert counts == distinct_triplets(log, steps)

    n_sampled = log["config"]["n_train_triplets"]
    if "batch_size" in kind:
        assert counts[1:] == [n_sampled] * 4
    else:
        assert 0 < counts[1] < counts[2] < counts[4] < n_sampled
    share = f"{counts[4]} distinct triplets of {n_sampled} ({counts[4] / n_sampled:.0%})"
    assert f"The run has used {share}." in capsys.readouterr().out


# ---- random start --------------------------------------------------------------------------------
def test_a_random_start_of_the_same_seed_gives_the_same_run(experiment, run):
    _, log = run("--pretrained none --seed 1", "a")
    _, again = run("--pretrained none --seed 1", "b")
    assert_equal_weights(experiment.weights("a"), experiment.weights("b"))
    assert without_timing(log) == without_timing(again)  # all that the clock decides is "timing"


def test_a_random_start_of_another_seed_is_another_network(experiment, run):
    run("--pretrained none --seed 1", "a")
    run("--pretrained none --seed 2", "b")
    key = "input_layer.0.weight"
    assert not torch.equal(experiment.weights("a")[key], experiment.weights("b")[key])


# ---- figures -------------------------------------------------------------------------------------
def measure(experiment, checkpoint, ids, distance):
    """{figure: value} of a network on people, by brute force and scikit-learn."""
    images = [(name, path) for name in ids for path in experiment.images[name]]
    owner = [name for name, _ in images]
    crops = np.stack([np.array(Image.open(path)) for _, path in images])
    with torch.no_grad():
        embeddings, _ = net.load_checkpoint(checkpoint)(net.to_input(crops))
    twins = {frozenset(pair) for pair in json.loads(experiment.pairs.read_text())}

    triplets = []
    for a, p in itertools.permutations(range(len(images)), 2):
        for n in range(len(images)):
            if owner[a] == owner[p] and {owner[a], owner[n]} in twins:
                triplets.append((a, p, n))
    anchor, positive, negative = embeddings[torch.tensor(triplets)].unbind(1)
    loss = TripletLoss(0.3, distance)(anchor, positive, negative)

    genuine, twin, general = [], [], []
    for a, b in itertools.combinations(range(len(images)), 2):
        score = float(embeddings[a] @ embeddings[b])
        if owner[a] == owner[b]:
            genuine.append(score)
        elif {owner[a], owner[b]} in twins:
            twin.append(score)
        elif owner[a][:-1] != owner[b][:-1]:  # of two families
            general.append(score)
    against_twins = [1] * len(genuine) + [0] * len(twin)
    against_general = [1] * len(genuine) + [0] * len(general)
    fmr, tar, _ = roc_curve(against_twins, genuine + twin, drop_intermediate=False)
    gap = np.abs(fmr - (1 - tar)).round(12)
    at = len(gap) - 1 - np.argmin(gap[::-1])  # the lower threshold on a tie
    return {
        "loss": loss.item(),
        "eer": (fmr[at] + 1 - tar[at]) / 2,
        "auc": roc_auc_score(against_twins, genuine + twin),
        "general_auc": roc_auc_score(against_general, genuine + general),
    }


@pytest.mark.parametrize(
    "flags",
    [
        "--distance euclidean",
        "--precision bf16",
        "--freeze_backbone",
        "--freeze_backbone --precision bf16",
    ],
)
def test_logged_figures_are_those_of_the_saved_network_in_fp32(experiment, run, flags):
    code, log = run(f"{flags} --validation_split 0.5 --split_seed 1 --epochs 1")
    assert code == 0
    config = log["config"]
    start, end = log["epochs"]
    distance = config["distance"]
    expected = measure(experiment, experiment.start, config["train_ids"], distance)
    assert start["train_loss"] == pytest.approx(expected["loss"], abs=1e-6)
    for entry, checkpoint in ((start, experiment.start), (end, log["best_checkpoint"])):
        figures = measure(experiment, checkpoint, config["val_ids"], distance)
        logged = {name: entry[f"val_{name}"] for name in figures}
        assert logged == pytest.approx(figures, abs=1e-6)
    assert start["val_loss"] != end["val_loss"]


# ---- precision -----------------------------------------------------------------------------------
def test_precision_is_that_of_the_steps_alone(run):
    differences = {}
    for precision in ("fp32", "bf16"):
        _, log = run(f"--precision {precision} --learning_rate 0 --epochs 1", precision)
        assert log["config"]["recipe"]["precision"] == precision
        start, end = log["epochs"]
        assert start["val_loss"] == end["val_loss"]
        differences[precision] = abs(end["train_loss"] - start["train_loss"])
    assert differences["fp32"] < 1e-6
    assert 1e-6 < differences["bf16"] < 2e-2


@pytest.fixture
def has_bf16(monkeypatch):
    """has_bf16(True): from now on, CPU and GPU say that they have bf16."""

    def pretend(value):
        capabilities = {"avx512_bf16": value}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: value)

    return pretend


@pytest.mark.parametrize(("value", "precision"), [(True, "bf16"), (False, "fp32")])
def test_the_precision_of_a_run_follows_the_cpu(experiment, has_bf16, value, precision):
    has_bf16(value)
    assert make_trainer(experiment, "--precision auto --device cpu").precision == precision


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("value", "precision"), [(True, "bf16"), (False, "fp16")])
def test_the_precision_follows_the_gpu(has_bf16, frozen, value, precision):
    has_bf16(value)
    assert choose_precision("auto", torch.device("cuda:0"), frozen) == precision


def test_steps_without_a_backbone_are_in_fp32_on_a_cpu(has_bf16):
    has_bf16(True)
    assert choose_precision("auto", torch.device("cpu"), frozen=True) == "fp32"


def test_a_pytorch_that_cannot_say_whether_the_cpu_has_bf16_computes_in_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_precision("auto", torch.device("cpu"), frozen=False) == "fp32"


# ---- what is written -----------------------------------------------------------------------------
FINISHED = "--train_percentage 50 --epochs 3"


def run_to_the_end(folder, flags):
    """An experiment in `folder` in which a run with these flags has ended."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(net.Backbone, "features", quick_features)
        patch.setattr(train_twins, "WARM_UP_STEPS", 1)
        patch.setattr(train_twins, "plot_curves", lambda folder, log: None)
        experiment = Experiment(folder)
        assert train_twins.main(experiment.flags(flags)) == 0
    return experiment


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The experiment in which a run with the flags FINISHED has ended."""
    return run_to_the_end(tmp_path_factory.mktemp("finished"), FINISHED)


def read_config(experiment):
    return json.loads((experiment.folder / "logs" / "run" / "config.json").read_text())


def pairs_among(experiment, ids):
    """The listed pairs of which both people are among `ids`."""
    pairs = json.loads(experiment.pairs.read_text())
    return [pair for pair in pairs if set(pair) <= set(ids)]


def count_triplets(experiment, pairs):
    """How many triplets each pair makes."""
    counts = []
    for pair in pairs:
        n, m = (len(experiment.images[name]) for name in pair)
        counts.append(n * (n - 1) * m + m * (m - 1) * n)
    return counts


def test_a_run_that_its_epochs_ended_leaves_its_settings_its_log_and_its_state(finished):
    names = {path.name for path in files_in(finished.folder / "logs" / "run")}
    assert names == {"config.json", "training_log.json", "last.pth"}


def test_a_run_that_patience_ended_leaves_its_settings_and_its_log_and_no_state(experiment, run):
    _, log = run("--learning_rate 0 --epochs 9 --patience 1")
    assert log["stopped"] == "patience"
    names = {path.name for path in files_in(experiment.folder / "logs" / "run")}
    assert names == {"config.json", "training_log.json"}


def test_the_log_holds_the_settings(finished):
    assert finished.log()["config"] == read_config(finished)


def test_the_settings_hold_the_value_of_every_flag(finished):
    (args,) = parse_runs(finished.flags(FINISHED))
    assert vars(args).items() <= read_config(finished).items()


def test_the_recipe_holds_the_flags_of_the_recipe_and_what_the_run_was_made_of(finished):
    recipe = read_config(finished)["recipe"]
    (args,) = parse_runs(finished.flags(FINISHED))
    flags = {flag: getattr(args, flag) for flag in RECIPE}
    hashes = {"weights_sha256", "crops_sha256", "pairs_sha256"}
    assert flags.items() <= recipe.items()
    assert recipe.keys() == flags.keys() | hashes
    assert recipe["weights_sha256"] == net.weights_sha256(net.load_checkpoint(finished.start))


@pytest.mark.parametrize("part", ["train", "val"])
def test_the_settings_count_the_pairs(finished, part):
    config = read_config(finished)
    pairs = pairs_among(finished, config[f"{part}_ids"])
    assert config[f"n_{part}_pairs"] == len(pairs)


def test_pairs_are_for_training_or_validation_or_skipped(finished):
    config = read_config(finished)
    assert config["n_train_pairs"] + config["n_val_pairs"] == 6
    assert config["n_skipped_pairs"] == 1


def test_no_family_is_on_both_sides_and_one_validates(finished):
    config = read_config(finished)
    train_families = {name[:-1] for name in config["train_ids"]}
    val_families = {name[:-1] for name in config["val_ids"]}
    assert not train_families & val_families
    assert len(val_families) == 2


def test_the_settings_count_the_sampled_training_triplets(finished):
    config = read_config(finished)
    counts = count_triplets(finished, pairs_among(finished, config["train_ids"]))
    assert config["n_train_triplets"] == sum((50 * n + 99) // 100 for n in counts)


def test_the_settings_count_all_validation_triplets(finished):
    config = read_config(finished)
    counts = count_triplets(finished, pairs_among(finished, config["val_ids"]))
    assert config["n_val_triplets"] == sum(counts)


def test_the_settings_count_the_training_images(finished):
    config = read_config(finished)
    n_images = sum(len(finished.images[name]) for name in config["train_ids"])
    assert config["n_train_images"] == n_images


def test_the_settings_name_the_trained_parameters_the_versions_and_the_device(finished):
    config = read_config(finished)
    parameters = net.build_model("ir_tiny").named_parameters()
    assert config["trainable_parameters"] == [name for name, _ in parameters]
    assert config["versions"]["torch"] == torch.__version__
    assert config["used_device"] == "cpu"


def test_the_log_has_an_entry_for_each_epoch_and_one_for_the_start(finished):
    entries = finished.log()["epochs"]
    assert [entry["epoch"] for entry in entries] == [0, 1, 2, 3]
    for entry in entries:
        assert {"train_loss", "val_loss", "val_eer", "val_auc", "active_triplets"} <= set(entry)
        assert entry["timing"]["seconds"] > 0


def entry_to_keep(log):
    """The last epoch whose AUC is within 0.002 of the highest."""
    entries = log["epochs"][1:]
    highest = max(entry["val_auc"] for entry in entries)
    return [entry for entry in entries if entry["val_auc"] >= highest - 0.002][-1]


def test_the_log_says_which_epoch_was_best_and_what_ended_the_run(finished):
    log = finished.log()
    assert (log["best_epoch"], log["stopped"]) == (entry_to_keep(log)["epoch"], "epochs")


def test_the_checkpoint_of_the_best_epoch_is_the_only_one(finished):
    log = finished.log()
    path = Path(log["best_checkpoint"])
    assert files_in(finished.folder / "models") == {path}
    assert path.name == f"twin_tuned_irtiny_run_epoch{log['best_epoch']}.pth"


def test_the_checkpoint_holds_the_settings_and_the_figures_of_its_epoch(finished):
    best = entry_to_keep(finished.log())
    checkpoint = finished.checkpoint()
    assert checkpoint["arch"] == "ir_tiny"
    assert checkpoint["epoch"] == best["epoch"]
    assert checkpoint["config"] == read_config(finished)
    assert checkpoint["metrics"].items() <= best.items()
    assert {"val_loss", "val_eer", "val_auc"} <= set(checkpoint["metrics"])


def test_the_checkpoint_is_read_by_upstreams_own_lines(finished):
    statedict = finished.checkpoint()["state_dict"]
    model_statedict = {k[6:]: v for k, v in statedict.items() if k.startswith("model.")}
    net.build_model("ir_tiny").load_state_dict(model_statedict)


@pytest.mark.parametrize("share", [0, 0.3])
def test_curves_are_drawn_with_and_without_validation(tmp_path, run, share):
    _, log = run(f"--validation_split {share}")
    folder = tmp_path / "curves"
    plot_curves(folder, log)
    for name in ("loss_curves.png", "validation_curves.png"):
        width, height = Image.open(folder / name).size
        assert width > 500
        assert height > 300


@pytest.mark.parametrize(
    ("monitor", "best", "kept"), [("val_loss", 3, 6), ("val_eer", 2, 5), ("val_auc", 4, 6)]
)
def test_the_last_of_equally_good_epochs_is_kept_and_patience_counts_from_the_first(
    experiment, monitor, best, kept
):
    (args,) = parse_runs(experiment.flags(f"--monitor {monitor} --epochs 9 --patience 3"))
    folder = RunFolder(args)
    figures = {"val_loss": "13211111", "val_eer": "03122132", "val_auc": "98579698"}
    for epoch in range(best + 4):
        entry = {name: int(values[epoch]) for name, values in figures.items()}
        is_kept = folder.record({"epoch": epoch, **entry})
        assert is_kept == (epoch > 0 and folder.log["best_epoch"] == epoch)
        expected = "patience" if epoch == best + 3 else None
        assert folder.log["stopped"] == expected
    path = folder.log["best_checkpoint"]
    assert path.endswith(f"models/twin_tuned_irtiny_run_epoch{kept}.pth")


def test_small_improvements_do_not_prolong_a_run(experiment):
    (args,) = parse_runs(experiment.flags("--patience 3 --epochs 20"))
    folder = RunFolder(args)
    figures = [0.7, 0.8, 0.801, 0.8015, 0.802, 0.9]  # the second is the last that improves by 0.002
    for epoch, figure in enumerate([0.5, *figures]):
        folder.record({"epoch": epoch, "val_auc": figure})
        if folder.log["stopped"]:
            break
    assert (epoch, folder.log["best_epoch"], folder.log["stopped"]) == (5, 5, "patience")


@pytest.mark.parametrize(
    ("monitor", "figures", "kept"),
    [
        ("val_auc", [0.8, 0.81, 0.8085, 0.8079], 3),
        ("val_auc", [0.8, 0.81, 0.805, 0.8085], 4),
        ("val_eer", [0.3, 0.25, 0.2515, 0.2525], 3),
        ("val_loss", [0.3, 0.25, 0.2501, 0.26], 2),
    ],
)
def test_an_epoch_is_kept_if_its_figure_is_near_enough_to_the_best(
    experiment, monitor, figures, kept
):
    (args,) = parse_runs(experiment.flags(f"--monitor {monitor} --patience 9"))
    folder = RunFolder(args)
    folder.record({"epoch": 0, monitor: 0.5})
    for epoch, figure in enumerate(figures, 1):
        folder.record({"epoch": epoch, monitor: figure})
    assert folder.log["best_epoch"] == kept


def test_superseded_checkpoints_go_and_those_of_other_runs_with_like_names_stay(experiment, run):
    models = experiment.folder / "models"
    code, _ = run("--epochs 1", "pilot_frozen")
    assert code == 0
    others = {models / "twin_tuned_irtiny_frozen_epoch1_epoch1.pth"}
    others.add(models / "twin_tuned_ir50_frozen_epoch1.pth")
    for path in others:
        path.touch()
    others |= files_in(models)
    with net.replacing(models / "twin_tuned_irtiny_pilot_frozen_epoch2.pth") as half_written:
        half_written.touch()
        _, log = run("--validation_split 0", "frozen")
        left = files_in(models)
    assert log["best_epoch"] == 2  # so there was one to supersede
    assert left == {*others, half_written, Path(log["best_checkpoint"])}


# ---- names of runs -------------------------------------------------------------------------------
def default_name(flags):
    (args,) = parse_runs(flags.split())
    return args.run_name


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("", "full_100pct_margin0.3"),
        ("--freeze_backbone --train_percentage 75 --margin 0.50", "frozen_75pct_margin0.5"),
    ],
)
def test_default_run_names(tmp_path, monkeypatch, flags, name):
    monkeypatch.chdir(tmp_path)
    (args,) = parse_runs(["--pretrained", "none", *flags.split()])
    assert RunFolder(args).name == name


def with_metadata(flags):
    """Flags with --metadata if they need it."""
    return f"{flags} --metadata metadata.csv" if "--cross" in flags else flags


OTHER_VALUES = {
    "distance": "euclidean",
    "images_per_batch": "48",
    "batch_size": "16",
    "quadruplet_weight": "0.25",
    "drift_weight": "2",
    "identity_weight": "0.1",
    "learning_rate": "0.001",
    "weight_decay": "0.01",
    "validation_split": "0.3",
    "split_seed": "1",
    "cross": "session",
    "monitor": "val_eer",
    "precision": "fp32",
}


def test_the_flags_whose_place_in_the_name_is_tested_are_all_of_the_recipe():
    first_parts = {"freeze_backbone", "train_percentage", "margin"}
    assert OTHER_VALUES.keys() | first_parts == RECIPE.keys()


@pytest.mark.parametrize("flag", OTHER_VALUES)
def test_a_runs_name_says_each_flag_of_the_recipe_that_is_not_the_default(flag):
    value = OTHER_VALUES[flag]
    name = default_name(with_metadata(f"--{flag} {value}"))
    assert name == f"full_100pct_margin0.3_{flag}{value}"


def test_a_runs_name_says_the_seed_after_the_recipe():
    name = default_name("--freeze_backbone --learning_rate 1e-3 --seed 2")
    assert name == "frozen_100pct_margin0.3_learning_rate0.001_seed2"


def test_a_runs_name_spells_a_large_rate_as_numbers_are_spelt():
    assert default_name("--learning_rate 1e6").endswith("_learning_rate1e+06")


def test_a_runs_name_that_is_too_long_for_a_file_is_cut_and_still_its_own():
    all_others = " ".join(f"--{flag} {value}" for flag, value in OTHER_VALUES.items())
    all_others = with_metadata(all_others)
    first, second = (default_name(f"{all_others} --seed {seed}") for seed in (1, 2))
    assert first != second
    for name in (first, second):
        assert name.startswith("full_100pct_margin0.3_")
        assert len(name) == net.LONGEST_NAME


def test_a_runs_name_does_not_depend_on_whether_a_default_is_given():
    assert default_name("--seed 42 --learning_rate 1e-4 --distance cosine") == default_name("")


def test_a_runs_name_does_not_depend_on_what_else_is_swept():
    runs = parse_runs(["--seed", "42", "3", "--learning_rate", "1e-4", "1e-3"])
    assert {run.run_name for run in runs} == {
        "full_100pct_margin0.3",
        "full_100pct_margin0.3_seed3",
        "full_100pct_margin0.3_learning_rate0.001",
        "full_100pct_margin0.3_learning_rate0.001_seed3",
    }


@pytest.mark.parametrize("flag", ["--learning_rate 1e-4", "--seed 7"])
def test_two_runs_that_differ_in_one_flag_do_not_meet_in_one_folder(experiment, flag):
    for flags in ("", flag):
        assert train_twins.main(experiment.flags(f"--epochs 1 {flags}", "")) == 0
    assert len(list((experiment.folder / "logs").iterdir())) == 2
    assert len(files_in(experiment.folder / "models")) == 2


# ---- who is trained on ---------------------------------------------------------------------------
def validated(experiment, flags):
    """The people that a run with these flags is validated on."""
    return prepare(experiment, flags).val_set.images.ids


def test_other_flags_do_not_decide_who_validates(experiment):
    flags = "--seed 1 --train_percentage 5 --margin 0.2 --freeze_backbone"
    assert validated(experiment, flags) == validated(experiment, "")


def test_split_seed_decides_who_validates(experiment):
    usual = validated(experiment, "")
    others = [validated(experiment, f"--split_seed {seed}") for seed in (1, 2, 3)]
    assert any(other != usual for other in others)


def sampled(experiment, flags):
    """The triplets that a run with these flags is trained on."""
    train_set = prepare(experiment, flags).train_set
    numbers = np.arange(len(train_set))
    return {tuple(row) for row in train_set.triplets(numbers).tolist()}


def test_a_percentage_contains_the_smaller_ones_of_its_seed(experiment):
    shares = (20, 60, 100)
    small, large, everything = (sampled(experiment, f"--train_percentage {x}") for x in shares)
    assert small < large < everything


def test_the_seed_decides_which_triplets_are_sampled(experiment):
    flags = "--train_percentage 20"
    assert sampled(experiment, f"{flags} --seed 1") != sampled(experiment, flags)


def test_a_single_family_is_warned_of_and_its_last_epoch_kept(experiment, write_crops, run, capsys):
    aligned, pairs = write_crops([[3, 3, 2]], "single")
    data = f"--train_pairs {pairs} --aligned_json {aligned}"
    code, log = run(f"{data} --patience 1 --epochs 3")
    assert code == 0
    assert "warning: no validation" in capsys.readouterr().out
    assert (log["best_epoch"], log["stopped"]) == (3, "epochs")
    assert {entry["val_loss"] for entry in log["epochs"]} == {None}
    assert len(files_in(experiment.folder / "models")) == 1


@pytest.fixture
def run_with_copies(experiment, run, capsys):
    """(log, lines printed) of a run in whose list one image stands three times."""
    images = json.loads(experiment.aligned.read_text())
    copy = experiment.folder / "copy.png"
    copy.write_bytes(experiment.images["train0a"][0].read_bytes())
    images["train0a"] += ["copy.png", "copy.png"]
    experiment.aligned.write_text(json.dumps(images))
    _, log = run("--validation_split 0")
    return log, capsys.readouterr().out.splitlines()


def test_skipped_pairs_and_repeated_images_are_counted_in_a_warning(run_with_copies):
    _, lines = run_with_copies
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert any("1 of 7 pairs are skipped" in line for line in warnings)
    repeated = re.compile(r"\b2 images are copies .*; each is used once")
    assert any(repeated.search(line) for line in warnings)


def test_repeated_images_are_used_once(run_with_copies):
    log, _ = run_with_copies
    n_images = sum(sum(sizes) for sizes in FAMILIES[:-1])
    assert log["config"]["n_train_images"] == n_images


# ---- what a checkpoint has seen ------------------------------------------------------------------
def in_other_files(experiment, families, name):
    """Write photographs of families again as JPEGs, under other IDs; (aligned JSON, pairs JSON).

    Each pair of IDs is that of the experiment, with `name` before it.
    """
    folder = experiment.folder
    pairs = pairs_of(experiment, families)
    listed = {}
    for person in dict.fromkeys(itertools.chain(*pairs)):
        listed[f"{name}{person}"] = []
        for number, path in enumerate(experiment.images[person]):
            copy = folder / name / f"{person}{number}.jpg"
            copy.parent.mkdir(exist_ok=True)
            Image.open(path).save(copy, quality=70)
            listed[f"{name}{person}"].append(str(copy))
    renamed = [[f"{name}{first}", f"{name}{second}"] for first, second in pairs]
    aligned = write_json(folder / f"{name}.json", listed)
    return aligned, write_json(folder / f"{name}_pairs.json", renamed)


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def pairs_of(experiment, families):
    """The listed pairs of families, by their numbers."""
    people = [f"train{family}{letter}" for family in families for letter in "ab"]
    return pairs_among(experiment, people)


def train_on(experiment, families, name, flags="", start=None):
    """Train a run on families, by their numbers, from another run's checkpoint; its exit code."""
    pairs = write_json(experiment.folder / f"{name}_pairs.json", pairs_of(experiment, families))
    flags = f"--freeze_backbone --epochs 1 --train_pairs {pairs} {flags}"
    if start:
        flags += f" --pretrained {experiment.log(start)['best_checkpoint']}"
    return train_twins.main(experiment.flags(flags, name))


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """An experiment with three runs, each on other people and from the checkpoint of the last.

    They are named first, second and third; each has a family to train on and one to validate on.
    """
    experiment = Experiment(tmp_path_factory.mktemp("rounds"), [[3, 2]] * 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(net.Backbone, "features", quick_features)
        patch.setattr(train_twins, "plot_curves", lambda folder, log: None)
        assert train_on(experiment, [0, 1], "first") == 0
        assert train_on(experiment, [2, 3], "second", start="first") == 0
        assert train_on(experiment, [4, 5], "third", start="second") == 0
    return experiment


ROUNDS = ("first", "second", "third")


def crops_of(experiment, people):
    paths = [path for person in people for path in experiment.images[person]]
    return load_crops(paths)


def as_set(hashes):
    return {tuple(row) for row in hashes.tolist()}


def test_a_checkpoint_carries_the_ids_of_all_rounds(rounds):
    trained = set()
    for name in ROUNDS:
        trained |= {*rounds.checkpoint(name)["config"]["train_ids"]}
    last = rounds.checkpoint("third")
    assert {*last["seen_ids"]} == {*rounds.images}
    assert {*last["trained_ids"]} == trained
    assert len(trained) == 6  # of each round, one family


def test_a_checkpoint_carries_the_hashes_of_all_images_of_all_rounds(rounds):
    last = rounds.checkpoint("third")
    seen = crops_of(rounds, rounds.images)
    trained = crops_of(rounds, last["trained_ids"])
    assert {*last["crop_sha256"]} == {*seen.sha256}
    assert as_set(last["seen_images"]) == as_set(triplet_dataset.perceptual_hashes(seen.pixels))
    hashes = triplet_dataset.perceptual_hashes(trained.pixels)
    assert as_set(last["trained_images"]) == as_set(hashes)


def evaluation_refuses(rounds, capsys, aligned, pairs):
    """The line with which evaluation refuses to test the checkpoint of the third round."""
    checkpoint = rounds.log("third")["best_checkpoint"]
    flags = f"--skip_alignment --aligned_json {aligned} --test_pairs {pairs} --device cpu"
    out = f"{rounds.folder}/results"
    flags += f" --output_dir {out} --checkpoints {checkpoint}"
    assert evaluate_twins.main(flags.split()) == 2
    assert not Path(out).exists()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"evaluate_twins.py: {checkpoint}: was trained or validated on ")
    return line


def test_evaluation_refuses_the_people_of_the_first_round_after_three(rounds, capsys):
    pairs = rounds.folder / "first_pairs.json"
    line = evaluation_refuses(rounds, capsys, rounds.aligned, pairs)
    assert "4 of the 4 test people: train0a, train0b, train1a, train1b;" in line


def test_evaluation_refuses_the_first_rounds_images_also_saved_again_under_other_ids(
    rounds, capsys
):
    line = evaluation_refuses(rounds, capsys, *in_other_files(rounds, [0, 1], "new_"))
    assert "on images of new_train0a, new_train0b, new_train1a, new_train1b;" in line


@pytest.fixture
def trained_on_three(tmp_path, experiment):
    """An experiment of seven families, with a run that has trained on the first three."""
    folder = tmp_path / "seven"
    folder.mkdir()
    seven = Experiment(folder, [[3, 2]] * 7)
    assert train_on(seven, range(3), "first", "--validation_split 0") == 0
    return seven


@pytest.mark.parametrize("split_seed", [1, 2, 3])
def test_people_that_the_start_was_trained_on_do_not_validate(trained_on_three, split_seed):
    flags = f"--validation_split 0.5 --split_seed {split_seed}"
    assert train_on(trained_on_three, range(7), "second", flags, start="first") == 0
    config = trained_on_three.checkpoint("second")["config"]
    trained_before = trained_on_three.checkpoint("first")["trained_ids"]
    assert {*trained_before} <= {*config["train_ids"]}
    assert config["n_val_pairs"] in (3, 4)  # the share that was asked for, of the other four


@pytest.mark.parametrize("split_seed", [1, 2, 3])
def test_people_whose_images_the_start_was_trained_on_do_not_validate(trained_on_three, split_seed):
    aligned, pairs = in_other_files(trained_on_three, range(7), "new_")
    start = trained_on_three.log("first")["best_checkpoint"]
    flags = f"--train_pairs {pairs} --aligned_json {aligned} --pretrained {start} --epochs 1"
    flags += f" --freeze_backbone --validation_split 0.5 --split_seed {split_seed}"
    assert train_twins.main(trained_on_three.flags(flags, "second")) == 0
    config = trained_on_three.checkpoint("second")["config"]
    trained_before = trained_on_three.checkpoint("first")["trained_ids"]
    assert {f"new_{name}" for name in trained_before} <= {*config["train_ids"]}
    assert config["n_val_pairs"] in (3, 4)


def test_training_on_from_ones_own_result_keeps_the_validation_people(many_families):
    flags = "--freeze_backbone --epochs 1"
    assert train_twins.main(many_families.flags(flags, "first")) == 0
    start = many_families.log("first")["best_checkpoint"]
    assert train_twins.main(many_families.flags(f"{flags} --pretrained {start}", "second")) == 0
    first, second = (many_families.checkpoint(name)["config"] for name in ("first", "second"))
    assert first["val_ids"] == second["val_ids"] != []


def test_there_is_no_validation_and_a_warning_if_the_start_was_trained_on_all(
    trained_on_three, capsys
):
    assert train_on(trained_on_three, range(3), "second", start="first") == 0
    log = trained_on_three.log("second")
    assert (log["config"]["n_val_pairs"], log["config"]["n_train_pairs"]) == (0, 3)
    assert {entry["val_auc"] for entry in log["epochs"]} == {None}
    out = capsys.readouterr().out
    assert re.search(
        r"^warning: no validation \(.*all were trained on before\);", out, re.MULTILINE
    )


def test_resume_keeps_what_the_start_has_seen_also_without_its_file(trained_on_three):
    flags = "--validation_split 0.5"
    assert train_on(trained_on_three, range(3, 7), "second", flags, start="first") == 0
    before = trained_on_three.checkpoint("second")
    Path(trained_on_three.log("first")["best_checkpoint"]).unlink()
    flags += " --epochs 2 --resume"
    assert train_on(trained_on_three, range(3, 7), "second", flags, start="first") == 0
    after = trained_on_three.checkpoint("second")
    assert (before["epoch"], after["epoch"]) == (1, 2)
    assert {*after["seen_ids"]} == {*trained_on_three.images}
    for name in ("seen_ids", "trained_ids", "crop_sha256"):
        assert after[name] == before[name]
    for name in ("seen_images", "trained_images"):
        assert torch.equal(after[name], before[name])


# ---- the end -------------------------------------------------------------------------------------
def test_patience_stops(run):
    # No epoch changes anything, so all are as good as the first one.
    _, log = run("--learning_rate 0 --epochs 9 --patience 2")
    assert (log["best_epoch"], log["stopped"], len(log["epochs"])) == (3, "patience", 4)


def aucs_after_epochs(experiment, log, weights):
    """The validation AUC after each epoch but the start; weights: state dicts after each step."""
    model = net.build_model("ir_tiny")
    path = experiment.folder / "measured.pth"
    values = []
    for epoch in range(1, len(log["epochs"])):
        model.load_state_dict(weights[count_steps(log, epoch) - 1])
        net.save_checkpoint(path, model)
        figures = measure(experiment, path, log["config"]["val_ids"], "cosine")
        values.append(round(figures["auc"], 9))
    return values


def epochs_with_patience(values, patience):
    """(the epoch that is kept, the last one) of a run whose epochs have these AUCs."""
    kept = 1
    reference, waiting = values[0], 0
    for epoch, value in enumerate(values, 1):
        waiting += 1
        if epoch == 1 or value - reference > 0.002:
            reference, waiting = value, 0
        if max(values[:epoch]) - value <= 0.002:
            kept = epoch
        if waiting == patience:
            return kept, epoch
    return kept, len(values)


@pytest.mark.parametrize("mode", ["--freeze_backbone", ""])
def test_patience_ends_a_run_by_the_validation_of_the_average(many_families, steps, mode):
    flags = f"{mode} --batch_size 126 --learning_rate 1e-3 --epochs 60 --patience 3"
    assert train_twins.main(many_families.flags(flags)) == 0
    log = many_families.log()
    values = aucs_after_epochs(many_families, log, slow_averages(many_families, steps))
    assert [entry["val_auc"] for entry in log["epochs"][1:]] == pytest.approx(values)
    best_epoch, last_epoch = epochs_with_patience(values, 3)
    assert (log["best_epoch"], len(log["epochs"]) - 1) == (best_epoch, last_epoch)
    assert log["stopped"] == "patience"
    # The weights as they are would have ended it at another epoch.
    of_trained = aucs_after_epochs(many_families, log, [step.weights for step in steps])
    assert epochs_with_patience(of_trained, 3) != (best_epoch, last_epoch)


def verdict_line(capsys):
    """The line that says how the best epoch compares with the start."""
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("On the validation people")]
    return line


def test_the_end_says_that_few_families_cannot_tell_the_best_epoch_from_the_start(run, capsys):
    _, log = run()
    assert verdict_line(capsys).count("too few families to say on") == 2
    assert log["against_start"]["auc"]["verdict"] == "too few families to say"


@pytest.fixture
def many_families(tmp_path, experiment):
    """Another experiment, whose validation has enough families for a verdict."""
    folder = tmp_path / "many"
    folder.mkdir()
    return Experiment(folder, [[3, 3]] * 10)


def test_the_end_says_how_the_best_epoch_compares_with_the_start(many_families, capsys):
    flags = "--validation_split 0.8 --learning_rate 1e-2"
    assert train_twins.main(many_families.flags(flags)) == 0
    log = many_families.log()
    number = r"[+-]0\.\d{4}"
    verdict = r"(better|worse|not distinguishable)"
    interval = rf"\(AUC {number} \[[+-].*, [+-].*\]\)"
    on_twins = f"{verdict} on twins {interval}"
    on_others = f"{verdict} on everyone else {interval}"
    line = rf"On the validation people, against the start: {on_twins}, {on_others}\."
    match = re.fullmatch(line, verdict_line(capsys))
    verdicts = [log["against_start"][name]["verdict"] for name in ("auc", "general_auc")]
    assert list(match.groups()) == verdicts
    best = log["epochs"][log["best_epoch"]]
    start = log["epochs"][0]
    for name in ("auc", "eer", "general_auc"):
        change = best[f"val_{name}"] - start[f"val_{name}"]
        assert log["against_start"][name]["difference"] == pytest.approx(change)


def overflow(head):
    head[3].weight.data.fill_(3e38)


def not_a_number(head):
    head[3].weight.data[0].fill_(float("nan"))


def all_alike(head):
    head[3].weight.data.zero_()
    head[3].bias.data.fill_(1)


def all_zero(head):
    head[3].weight.data.zero_()
    head[3].bias.data.copy_(head[4].running_mean)


@pytest.mark.parametrize("damage", [overflow, not_a_number, all_alike, all_zero])
@pytest.mark.parametrize("split", [0, 0.3])
def test_a_network_that_dies_ends_the_run_and_is_never_the_best(
    experiment, run, refusal, monkeypatch, damage, split
):
    step = TwinTrainer.step
    steps = []

    def damaging_step(self, triplets):
        statistics = step(self, triplets)
        steps.append(triplets)
        if len(steps) == 2:  # the second epoch's
            damage(self.model.output_layer)
            damage(self.averaged_model.output_layer)
        return statistics

    monkeypatch.setattr(TwinTrainer, "step", damaging_step)
    code, log = run(f"--epochs 5 --validation_split {split}")
    assert code == 2
    assert re.match(r"run, epoch 2\b.*--learning_rate below 0\.0003$", refusal())
    assert [entry["epoch"] for entry in log["epochs"]] == [0, 1]
    (checkpoint,) = files_in(experiment.folder / "models")
    assert checkpoint.name == "twin_tuned_irtiny_run_epoch1.pth"
    for value in experiment.weights().values():
        assert torch.isfinite(value).all()


def test_a_loss_that_is_not_finite_ends_the_run(experiment, run, refusal, monkeypatch):
    step = TwinTrainer.step
    nan = float("nan")
    monkeypatch.setattr(TwinTrainer, "step", lambda self, triplets: step(self, triplets) * nan)
    code, _ = run()
    assert code == 2
    where = r"run, epoch 1, step \d+"
    message = rf"{where}: the loss .* not finite.*--learning_rate below 0\.0003$"
    assert re.match(message, refusal())
    assert files_in(experiment.folder / "models") == set()


@pytest.mark.parametrize("rate", ["0.5", "1e6"])
def test_a_rate_far_too_high_is_named_and_leaves_no_dead_checkpoint(run, refusal, rate):
    code, log = run(f"{SHUFFLED} --learning_rate {rate} --epochs 9")
    assert code == 2
    assert f"--learning_rate below {float(rate):g}" in refusal()
    if log["best_checkpoint"]:
        model = net.load_checkpoint(log["best_checkpoint"])
        embeddings, _ = model(torch.zeros(1, 3, 112, 112))
        net.check_alive(embeddings, "the best")


# ---- start, go on, start over --------------------------------------------------------------------
def test_resume_starts_what_is_not_there(run):
    code, log = run("--resume")
    assert code == 0
    assert log["stopped"] == "epochs"


def test_resume_says_what_is_finished_and_touches_nothing(experiment, run, capsys):
    run("--resume")
    before = experiment.files()
    capsys.readouterr()
    code, _ = run("--resume")
    assert code == 0
    line = r"run is finished after 2 epochs; best: .*epoch\d\.pth"
    assert re.search(line, capsys.readouterr().out)
    assert experiment.files() == before


@pytest.mark.parametrize("finished", [False, True])
def test_resume_with_other_settings_is_refused_with_the_differences(
    experiment, run, interrupt, capsys, finished
):
    if finished:
        run(SHUFFLED)
    else:
        interrupt(SHUFFLED, 2)
    before = experiment.files()
    other = "--margin 0.2 --seed 1 --freeze_backbone --split_seed 3 --drift_weight 1 --epochs 9"
    code, _ = run(f"{SHUFFLED} --resume {other}")
    assert code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    for text in (
        "margin was 0.3, is 0.2",
        "seed was 42, is 1",
        "freeze_backbone was False, is True",
        "split_seed was 42, is 3",
        "drift_weight was 0.0, is 1.0",
    ):
        assert text in line
    assert "epochs" not in line
    assert experiment.files() == before


QUICK = f"--freeze_backbone {SHUFFLED}"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The experiment in which a run with the flags QUICK has ended."""
    return run_to_the_end(tmp_path_factory.mktemp("uninterrupted"), QUICK)


def assert_resumed_as(experiment, uninterrupted):
    """The run ended as the uninterrupted one did."""
    log, reference = without_timing(experiment.log()), without_timing(uninterrupted.log())
    assert log["epochs"] == reference["epochs"]
    assert_equal_weights(experiment.weights(), uninterrupted.weights())


def refused_resume(experiment, run, capsys, flags=QUICK):
    """The line with which --resume is refused; no file of the run is touched."""
    before = experiment.files()
    capsys.readouterr()
    code, _ = run(f"{flags} --resume")
    assert code == 2
    assert experiment.files() == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_changed_crops_are_refused_on_resume(experiment, run, interrupt, capsys):
    interrupt(QUICK, 2)
    experiment.change_a_crop()
    assert "the crops are others" in refused_resume(experiment, run, capsys)


def test_changed_pairs_of_the_same_people_are_refused_on_resume(experiment, run, interrupt, capsys):
    interrupt(QUICK, 2)
    pairs = json.loads(experiment.pairs.read_text())
    pairs.remove(["train1a", "train1c"])  # each is still in a pair with train1b
    experiment.pairs.write_text(json.dumps(pairs))
    line = refused_resume(experiment, run, capsys)
    assert "the pairs are others" in line
    assert "crops" not in line


def test_crops_that_moved_do_not_stop_resume(experiment, run, interrupt, uninterrupted):
    interrupt(QUICK, 2)
    folder = experiment.folder / "elsewhere"
    folder.mkdir()
    shutil.move(experiment.folder / "train_aligned", folder)
    aligned = shutil.move(experiment.aligned, folder)
    code, _ = run(f"{QUICK} --resume --aligned_json {aligned}")
    assert code == 0
    assert_resumed_as(experiment, uninterrupted)


def move(start):
    return start.rename(start.with_name("moved.pth"))


def copy(start):
    return Path(shutil.copy(start, start.with_name("copied.pth")))


def spell_otherwise(start):
    return f"{start.parent}/./{start.name}"


def save_again(start):
    model = net.load_checkpoint(start)
    net.save_checkpoint(start, model, epoch=7)
    return start


def delete(start):
    start.unlink()
    return start


@pytest.mark.parametrize("change", [move, copy, spell_otherwise, save_again, delete])
def test_what_became_of_the_starts_file_does_not_stop_resume(
    experiment, run, interrupt, uninterrupted, change
):
    interrupt(QUICK, 2)
    start = change(experiment.start)
    code, _ = run(f"{QUICK} --resume --pretrained {start}")
    assert code == 0
    assert_resumed_as(experiment, uninterrupted)


def test_a_finished_run_does_not_need_the_starts_file(experiment, run, capsys):
    run()
    experiment.start.unlink()
    code, _ = run("--resume")
    assert code == 0
    assert "run is finished" in capsys.readouterr().out


@pytest.mark.parametrize("finished", [False, True])
def test_another_start_at_the_same_path_is_refused_on_resume(
    experiment, run, interrupt, capsys, finished
):
    if finished:
        run(QUICK)
    else:
        interrupt(QUICK, 2)
    model = net.load_checkpoint(experiment.start)
    model.output_layer[3].bias.data[0] += 0.1
    net.save_checkpoint(experiment.start, model)
    assert "the weights are others" in refused_resume(experiment, run, capsys)


def test_a_random_start_is_refused_on_resume_of_a_run_that_had_weights(
    experiment, run, interrupt, capsys
):
    interrupt(QUICK, 2)
    line = refused_resume(experiment, run, capsys, f"{QUICK} --pretrained none")
    assert "the weights are others" in line


def test_resume_keeps_the_precision(run, interrupt):
    interrupt(f"{QUICK} --precision bf16", 2)
    code, log = run(f"{QUICK} --resume --precision auto")
    assert code == 0
    assert log["config"]["recipe"]["precision"] == "bf16"


@pytest.mark.parametrize("finished", [False, True])
def test_another_precision_is_refused_on_resume(experiment, run, interrupt, capsys, finished):
    if finished:
        run(f"{QUICK} --precision bf16")
    else:
        interrupt(f"{QUICK} --precision bf16", 2)
    line = refused_resume(experiment, run, capsys, f"{QUICK} --precision fp32")
    assert "precision was bf16, is fp32" in line


@pytest.mark.parametrize("flags", ["", "--epochs 1"])
def test_an_existing_run_is_refused_without_a_flag_and_nothing_touched(
    experiment, run, refusal, flags
):
    run()
    before = experiment.files()
    code, _ = run(flags)
    assert code == 2
    line = refusal()
    for flag in ("--resume", "--overwrite", "--run_name"):
        assert flag in line
    assert experiment.files() == before


@pytest.mark.parametrize("flags", ["", "--resume"])
def test_a_checkpoint_without_its_log_is_not_replaced(experiment, run, refusal, flags):
    run()
    before = experiment.files()
    # Another folder of logs does not make the checkpoint another run's.
    code, _ = run(f"{flags} --log_dir {experiment.folder}/elsewhere")
    assert code == 2
    line = refusal()
    assert experiment.log()["best_checkpoint"] in line
    for flag in ("--overwrite", "--run_name"):
        assert flag in line
    assert experiment.files() == before


def test_overwrite_replaces_a_run(experiment, run, interrupt):
    interrupt(f"{SHUFFLED} --seed 1", 2)
    code, log = run("--epochs 1 --overwrite")
    assert (code, log["config"]["seed"], len(log["epochs"])) == (0, 42, 2)
    assert files_in(experiment.folder / "models") == {Path(log["best_checkpoint"])}
    state = experiment.state()["log"]
    assert (state["config"]["seed"], len(state["epochs"])) == (42, 2)


# ---- in a worker thread --------------------------------------------------------------------------
def in_a_thread(function, *arguments):
    """What a function returns in a thread of its own, where Python has no signals."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def test_a_trainer_works_in_a_worker_thread(experiment, run):
    _, whole = run("", "whole")
    log = in_a_thread(make_trainer(experiment, "", "threaded").train)
    assert without_timing(log) == without_timing(whole)
    assert_equal_weights(experiment.weights("threaded"), experiment.weights("whole"))


def test_the_script_works_in_a_worker_thread(experiment, run):
    _, whole = run("", "whole")
    assert in_a_thread(train_twins.main, experiment.flags("", "threaded")) == 0
    assert without_timing(experiment.log("threaded")) == without_timing(whole)


def test_a_sweep_works_in_a_worker_thread(experiment):
    assert in_a_thread(train_twins.main, experiment.flags("--seed 1 2", "")) == 0
    assert len(files_in(experiment.folder / "models")) == 2


# ---- several runs in one command -----------------------------------------------------------------
SWEEP = "--freeze_backbone False True --margin 0.3 0.2 --seed 2 1"
SWEPT = list(itertools.product(("frozen", "full"), (0.2, 0.3), (1, 2)))
# What names of runs say of the flags that all runs here are given.
COMMON = "quadruplet_weight0_drift_weight0_learning_rate0.0003_validation_split0.3_precisionfp32"


def swept_name(mode, margin=0.3, seed=None, percentage=100):
    name = f"{mode}_{percentage}pct_margin{margin}_{COMMON}"
    return f"{name}_seed{seed}" if seed else name


SWEPT_NAMES = [swept_name(mode, margin, seed) for mode, margin, seed in SWEPT]


def summary(out):
    """(the rows of the table at the end, the command behind it) of what a sweep has printed."""
    lines = out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("run "))
    *table, _, _, command = lines[header:]
    rows = [line.split() for line in table[1:]]
    return rows, shlex.split(command)


@pytest.mark.parametrize("flag", OTHER_VALUES)
def test_every_flag_of_the_recipe_takes_several_values(flag):
    another = "32" if flag == "batch_size" else str(RECIPE[flag].default)
    runs = parse_runs(with_metadata(f"--{flag} {OTHER_VALUES[flag]} {another}").split())
    assert len({getattr(run, flag) for run in runs}) == 2


def test_every_combination_of_values_is_a_run():
    flags = "--learning_rate 1e-3 1e-4 --distance cosine euclidean --batch_size 8 16 32"
    runs = parse_runs(flags.split())
    combinations = {(run.learning_rate, run.distance, run.batch_size) for run in runs}
    assert len(runs) == len(combinations) == 2 * 2 * 3


def test_every_combination_is_run_as_it_would_be_alone_the_cheapest_first(experiment, run, capsys):
    assert train_twins.main(experiment.flags(SWEEP, "")) == 0
    rows, _ = summary(capsys.readouterr().out)
    assert [row[0] for row in rows] == SWEPT_NAMES
    for name, (mode, margin, seed), row in zip(SWEPT_NAMES, SWEPT, rows, strict=True):
        flags = f"--freeze_backbone {mode == 'frozen'} --margin {margin} --seed {seed}"
        _, log = run(flags, f"alone_{name}")
        assert without_timing(experiment.log(name)) == without_timing(log)
        assert_equal_weights(experiment.weights(name), experiment.weights(f"alone_{name}"))
        best = log["epochs"][log["best_epoch"]]
        assert row[1:] == [
            str(best["epoch"]),
            f"{100 * best['val_eer']:.2f}",
            f"{best['val_auc']:.4f}",
            f"{best['val_general_auc']:.4f}",
        ]


def test_a_sweep_ends_with_the_command_that_tests_its_checkpoints(experiment, capsys):
    assert train_twins.main(experiment.flags("--freeze_backbone --seed 1 2", "")) == 0
    _, command = summary(capsys.readouterr().out)
    names = [swept_name("frozen", seed=seed) for seed in (1, 2)]
    checkpoints = [experiment.log(name)["best_checkpoint"] for name in names]
    script = ["python", "evaluate_twins.py", "--checkpoints"]
    assert command == [*script, str(experiment.start), *checkpoints]


def test_several_runs_need_their_crops_and_backbone_features_once(
    experiment, passes, monkeypatch, capsys
):
    read_crop = triplet_dataset.read_crop
    opened = []

    def counted_read_crop(path):
        opened.append(path)
        return read_crop(path)

    monkeypatch.setattr(triplet_dataset, "read_crop", counted_read_crop)
    flags = "--freeze_backbone --train_percentage 50 100 --margin 0.2 0.3"
    assert train_twins.main(experiment.flags(flags, "")) == 0
    assert sum(passes["backbone"]) == len(opened) == N_IMAGES
    rows, _ = summary(capsys.readouterr().out)
    small, _, large, _ = (row[0] for row in rows)
    assert small == swept_name("frozen", 0.2, percentage=50)
    assert large == swept_name("frozen", 0.2, percentage=100)


def test_a_failed_run_of_several_is_named_the_others_go_on_and_resume_makes_up_for_it(
    experiment, capsys
):
    failed = SWEPT_NAMES[1]
    others = [name for name in SWEPT_NAMES if name != failed]
    in_the_way = experiment.folder / "logs" / failed / "config.json"
    in_the_way.mkdir(parents=True)
    assert train_twins.main(experiment.flags(SWEEP, "")) == 1
    out, error = capsys.readouterr()
    rows, _ = summary(out.split("FAILED")[0])
    assert [row[0] for row in rows] == others
    assert f"FAILED: {failed}, for the reason above; when it is mended, repeat the command" in out
    assert f"{failed}: {in_the_way}: Is a directory\n" in error

    before = {path: file for path, file in experiment.files().items() if failed not in str(path)}
    in_the_way.rmdir()
    assert train_twins.main(experiment.flags(f"{SWEEP} --resume", "")) == 0
    rows, _ = summary(capsys.readouterr().out)
    assert [row[0] for row in rows] == SWEPT_NAMES
    assert before.items() <= experiment.files().items()


def test_an_interrupted_sweep_goes_on_where_it_stopped(experiment, interrupt, capsys):
    flags = "--freeze_backbone True False --epochs 3"
    names = [swept_name("frozen"), swept_name("full")]
    interrupt(flags, 5, name="")
    error = capsys.readouterr().err
    assert "train_twins.py: interrupted; --resume goes on from the last saved epoch\n" in error
    assert train_twins.main(experiment.flags(f"{flags} --resume", "")) == 0
    logs = [without_timing(experiment.log(name)) for name in names]
    weights = [experiment.weights(name) for name in names]
    assert train_twins.main(experiment.flags(f"{flags} --overwrite", "")) == 0
    for name, resumed_log, resumed_weights in zip(names, logs, weights, strict=True):
        assert without_timing(experiment.log(name)) == resumed_log
        assert_equal_weights(experiment.weights(name), resumed_weights)


def validated_run(val_auc, samples, seed=1, **recipe):
    config = {"seed": seed, "run_name": f"run{seed}"}
    return ValidatedRun(f"{recipe} {seed}.pth", config, recipe, val_auc, np.array(samples))


RANKED = re.compile(
    r"  (?P<name>.*): AUC (?P<mean>[+-]\d\.\d{4}) "
    r"\[(?P<low>[+-]\d\.\d{4}), (?P<high>[+-]\d\.\d{4})\], (?P<verdict>.*)"
)


def ranking(lines):
    """(the name of the best setting and its AUC, the RANKED groups of the others) of lines."""
    first, *others = lines
    pattern = r"Validation chooses: (.*) \(AUC (\d\.\d{4})\)\. Differences to it:"
    name, auc = re.fullmatch(pattern, first).groups()
    return name, float(auc), [RANKED.fullmatch(line).groupdict() for line in others]


@pytest.fixture
def two_seeds_of_four_settings():
    """{margin: [ValidatedRun of a seed, ...]} on common resamples, which move all settings alike.

    On every resample, margin 0.2 is as good as 0.1, 0.4 a little worse, and 0.3 better or worse.
    """
    rng = np.random.default_rng(0)
    common = 0.8 + 0.05 * rng.standard_normal(1000)
    offsets = {
        0.3: -0.004 + 0.01 * rng.standard_normal(1000),
        0.4: -0.006 + 0.001 * rng.standard_normal(1000),
        0.1: np.zeros(1000),
        0.2: np.zeros(1000),
    }
    aucs = {0.3: 0.796, 0.4: 0.794, 0.1: 0.8001, 0.2: 0.8}
    settings = {}
    for margin, offset in offsets.items():
        settings[margin] = []
        for seed, change in ((1, 0.01), (2, -0.03)):
            samples = common + offset + change
            run = validated_run(aucs[margin] + change, samples, seed, margin=margin, distance="x")
            settings[margin].append(run)
    return settings


@pytest.fixture
def ranked(two_seeds_of_four_settings):
    """The ranking of the four settings, whose runs come in the order of the seeds."""
    runs = itertools.chain(*zip(*two_seeds_of_four_settings.values(), strict=True))
    return ranking(train_twins.rank_settings(list(runs)))


def test_settings_are_ranked_by_their_mean_validation_auc_the_best_first(ranked):
    name, auc, others = ranked
    assert (name, auc) == ("margin 0.1", 0.7901)
    assert [other["name"] for other in others] == ["margin 0.2", "margin 0.3", "margin 0.4"]
    assert [float(other["mean"]) for other in others] == [-0.0001, -0.0041, -0.0061]


def test_differences_of_settings_have_intervals_from_the_same_resamples(
    two_seeds_of_four_settings, ranked
):
    _, _, others = ranked
    means = {}
    for margin, runs in two_seeds_of_four_settings.items():
        first, second = (run.samples for run in runs)
        means[margin] = (first + second) / 2
    for margin, other in zip((0.2, 0.3, 0.4), others, strict=True):
        differences = np.sort(means[margin] - means[0.1])
        # Of 1,000 resamples, 25 are outside on either side.
        assert float(other["low"]) == pytest.approx(differences[25], abs=5e-4)
        assert float(other["high"]) == pytest.approx(differences[-26], abs=5e-4)


def test_a_setting_that_is_worse_on_almost_all_resamples_is_worse_and_others_cannot_be_told(ranked):
    _, _, others = ranked
    unclear = "cannot be told from it"
    assert [other["verdict"] for other in others] == [unclear, unclear, "worse"]


def test_one_setting_is_not_ranked(two_seeds_of_four_settings):
    assert train_twins.rank_settings(two_seeds_of_four_settings[0.1]) == []
    assert train_twins.rank_settings([]) == []


RANKED_SWEEP = "--freeze_backbone --learning_rate 1e-3 1e-2 --seed 1 2 --epochs 1"
MANY_VALIDATE = "--validation_split 0.8"  # eight of ten families, enough for intervals


def auc_samples(experiment, log):
    """The validation AUC of a run's checkpoint on the resamples that --split_seed decides."""
    images = {name: [str(path) for path in paths] for name, paths in experiment.images.items()}
    pairs = pairs_among(experiment, log["config"]["val_ids"])
    evaluator = TwinEvaluator(TwinImages(images, pairs), log["config"]["split_seed"])
    crops = net.to_input(load_crops(evaluator.images.paths).pixels)
    with torch.no_grad():
        embeddings, _ = net.load_checkpoint(log["best_checkpoint"])(crops)
    return evaluator.estimate(evaluator.score(embeddings)).samples["auc"]


def test_a_sweep_ranks_its_settings_on_resamples_that_do_not_depend_on_the_seed(
    many_families, capsys
):
    flags = many_families.flags(f"{RANKED_SWEEP} {MANY_VALIDATE}", "")
    assert train_twins.main(flags) == 0
    aucs, samples = {}, {}
    for args in parse_runs(flags):
        log = many_families.log(args.run_name)
        aucs.setdefault(args.learning_rate, []).append(log["epochs"][1]["val_auc"])
        expected = auc_samples(many_families, log)
        stored = torch.load(log["best_checkpoint"], weights_only=True)["val_auc_samples"]
        np.testing.assert_allclose(stored.numpy(), expected, atol=1e-6)
        samples.setdefault(args.learning_rate, []).append(expected)
    means = {rate: np.mean(values) for rate, values in aucs.items()}
    best, other = sorted(means, key=means.get, reverse=True)
    differences = np.mean(samples[other], 0) - np.mean(samples[best], 0)

    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Validation chooses"))
    name, auc, (line,) = ranking(lines[start : start + 2])
    assert (name, line["name"]) == (f"learning_rate {best}", f"learning_rate {other}")
    assert auc == pytest.approx(means[best], abs=6e-5)
    assert float(line["mean"]) == pytest.approx(means[other] - means[best], abs=6e-5)
    low, high = np.percentile(differences, (2.5, 97.5))
    assert float(line["low"]) == pytest.approx(low, abs=6e-5)
    assert float(line["high"]) == pytest.approx(high, abs=6e-5)


@pytest.mark.parametrize(
    "flags",
    [
        f"--seed 1 2 {MANY_VALIDATE}",  # one setting
        f"--split_seed 1 2 {MANY_VALIDATE}",  # validated on different people
        "--margin 0.2 0.3 --validation_split 0",
        "--margin 0.2 0.3 --validation_split 0.3",  # three families are too few for intervals
    ],
)
def test_a_sweep_ranks_nothing_without_settings_and_common_validation(many_families, capsys, flags):
    flags = many_families.flags(f"--freeze_backbone --epochs 1 {flags}", "")
    assert train_twins.main(flags) == 0
    out = capsys.readouterr().out
    assert "python evaluate_twins.py --checkpoints" in out
    assert "Validation chooses" not in out
    assert "Differences" not in out


def test_a_sweep_over_columns_of_metadata_ranks_nothing(many_families, capsys):
    """Each column has other validation pairs."""
    metadata = many_families.folder / "metadata.csv"
    lines = ["path,day,place"]
    for paths in many_families.images.values():
        lines += [f"{path},{number},{number % 2}" for number, path in enumerate(paths)]
    metadata.write_text("\n".join(lines))
    flags = f"--freeze_backbone --epochs 1 {MANY_VALIDATE}"
    flags += f" --metadata {metadata} --cross day place"
    assert train_twins.main(many_families.flags(flags, "")) == 0
    assert "Validation chooses" not in capsys.readouterr().out


def test_the_name_of_a_run_is_never_a_path():
    (args,) = parse_runs(with_metadata("--cross date/time").split())
    assert args.run_name == "full_100pct_margin0.3_crossdate%2Ftime"


@pytest.mark.parametrize("sweep", ["", "--seed 1 2"])
@pytest.mark.parametrize("changed", ["crops", "pairs"])
def test_a_finished_run_of_other_crops_or_pairs_is_not_taken_for_this_one(
    experiment, refusal, sweep, changed
):
    assert train_twins.main(experiment.flags(f"--freeze_backbone --epochs 1 {sweep}", "")) == 0
    if changed == "crops":
        next(iter(experiment.images.values()))[0].unlink()
    else:
        pairs = json.loads(experiment.pairs.read_text())
        experiment.pairs.write_text(json.dumps(pairs[:-1]))
    flags = experiment.flags(f"--freeze_backbone --epochs 1 --resume {sweep}", "")
    assert train_twins.main(flags) == 2
    line = refusal()
    assert f"the {changed} are others than at its start" in line
    assert "--overwrite replaces it" in line


def test_a_finished_run_whose_state_is_gone_says_that_it_cannot_go_on(experiment, run, capsys):
    run("--epochs 1")
    (experiment.folder / "logs" / "run" / "last.pth").unlink()
    capsys.readouterr()
    code, _ = run("--epochs 2 --resume")
    assert code == 0
    assert "last.pth is gone. --overwrite starts it anew." in capsys.readouterr().out


def test_folds_of_people_whom_the_start_has_seen_are_refused_at_once(experiment, run, refusal):
    _, log = run("--freeze_backbone --epochs 1")
    flags = f"--freeze_backbone --folds 3 --pretrained {log['best_checkpoint']}"
    assert train_twins.main(experiment.flags(flags, "again")) == 2
    line = refusal()
    n_seen = len({*log["config"]["train_ids"], *log["config"]["val_ids"]})
    assert f"was trained or validated on {n_seen} of these people" in line
    assert not (experiment.folder / "logs" / "again_fold1of3").exists()


def test_finished_folds_do_not_need_the_starts_file(experiment, capsys):
    flags = "--freeze_backbone --epochs 1 --folds 3"
    assert train_twins.main(experiment.flags(flags, "")) == 0
    experiment.start.unlink()
    assert train_twins.main(experiment.flags(f"{flags} --resume", "")) == 0
    assert "This command tests each run on the fold" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_with_this_name_stays(experiment, run):
    _, log = run("--freeze_backbone --epochs 2 --seed 2")
    best = Path(log["best_checkpoint"])
    content = torch.load(best, weights_only=True)
    content["config"]["seed"] = 3
    other = best.with_name(best.name.replace(f"epoch{log['best_epoch']}", "epoch7"))
    torch.save(content, other)
    code, _ = run("--freeze_backbone --epochs 2 --seed 2 --resume")
    assert code == 0
    assert other.exists()
    content["config"]["seed"] = 2
    torch.save(content, other)
    run("--freeze_backbone --epochs 2 --seed 2 --resume")
    assert not other.exists()


def test_a_run_does_not_replace_the_network_that_it_starts_from(experiment, run, refusal):
    _, log = run("--freeze_backbone --epochs 1")
    start = Path(log["best_checkpoint"])
    code, _ = run(f"--freeze_backbone --epochs 1 --pretrained {start} --overwrite")
    assert code == 2
    assert "would delete the network that it starts from" in refusal()
    assert start.exists()


def test_a_long_run_whose_state_is_gone_does_not_begin_again(
    experiment, interrupt, run, refusal, monkeypatch
):
    interrupt("--epochs 4", 3)
    (experiment.folder / "logs" / "run" / "last.pth").unlink()
    monkeypatch.setattr(train_twins, "SAVE_SECONDS", 0)
    before = experiment.files()
    refusal()
    code, _ = run("--epochs 4 --resume")
    assert code == 2
    assert "last.pth: it is gone, and with it " in refusal()
    assert experiment.files() == before


@pytest.mark.parametrize("mode", ["--freeze_backbone", ""])
def test_the_state_of_a_run_is_no_network_to_start_from(experiment, run, refusal, mode):
    code, _ = run(f"{mode} --epochs 1")
    assert code == 0
    state = experiment.folder / "logs" / "run" / "last.pth"
    code, _ = run(f"{mode} --pretrained {state}", "second")
    assert code == 2
    assert f"{state}: this is the state from which --resume goes on" in refusal()


def test_a_finished_run_whose_checkpoint_is_gone_says_how_to_train_it_again(
    experiment, run, capsys
):
    _, log = run("--epochs 1")
    Path(log["best_checkpoint"]).unlink()
    capsys.readouterr()
    code, _ = run("--epochs 1 --resume")
    assert code == 0
    folder = experiment.folder / "logs" / "run"
    line = f"is gone; to train it again, delete {folder} and repeat the command"
    assert line in capsys.readouterr().out
    shutil.rmtree(folder)
    code, again = run("--epochs 1 --resume")
    assert code == 0
    assert again["best_checkpoint"] == log["best_checkpoint"]


def test_finished_runs_of_a_sweep_are_named_once(experiment, capsys):
    flags = experiment.flags("--freeze_backbone --epochs 1 --seed 1 2 --resume", "")
    assert train_twins.main(flags) == 0
    names = [swept_name("frozen", seed=seed) for seed in (1, 2)]
    first, second = (Path(experiment.log(name)["best_checkpoint"]) for name in names)
    first.unlink()
    # As a kill between the last log and the deletion of superseded checkpoints leaves it.
    superseded = second.with_name(second.name.replace("epoch1", "epoch7"))
    shutil.copy(second, superseded)
    capsys.readouterr()
    assert train_twins.main(flags) == 0
    assert not superseded.exists()
    out = capsys.readouterr().out
    for name in names:
        assert out.count(f"{name} is finished after 1 epochs") == 1
    assert out.count(f"warning: {first} is gone") == 1


def test_a_refused_sweep_leaves_the_files_of_its_finished_runs(experiment, refusal):
    flags = experiment.flags("--freeze_backbone --epochs 1 --seed 1 2 --resume", "")
    assert train_twins.main(flags) == 0
    best = Path(experiment.log(swept_name("frozen", seed=1))["best_checkpoint"])
    shutil.copy(best, best.with_name(best.name.replace("epoch1", "epoch7")))
    experiment.change_a_crop()
    before = experiment.files()
    assert train_twins.main(flags) == 2
    assert "the crops are others than at its start" in refusal()
    assert experiment.files() == before


def test_a_sweep_without_any_checkpoint_left_suggests_no_evaluation(experiment, capsys):
    flags = experiment.flags("--freeze_backbone --epochs 1 --seed 1 2 --resume", "")
    assert train_twins.main(flags) == 0
    shutil.rmtree(experiment.folder / "models")
    capsys.readouterr()
    assert train_twins.main(flags) == 0
    assert "evaluate_twins.py" not in capsys.readouterr().out


def test_the_name_of_a_fold_spells_a_column_as_that_of_a_run_does():
    flags = "--cross a/b --metadata m.csv"
    (args,) = parse_runs(flags.split())
    first, _ = parse_runs([*flags.split(), "--folds", "2"])
    assert first.run_name == f"{args.run_name}_fold1of2"


def test_several_runs_cannot_share_a_name(run, refusal):
    code, _ = run(SWEEP, "one_name")
    assert code == 2
    assert "--run_name one_name: 8 runs need names of their own" in refusal()


def test_runs_whose_values_are_too_close_for_two_names_are_refused(run, refusal):
    code, _ = run("--margin 0.3 0.30000001", "")
    assert code == 2
    assert "two runs would have this name" in refusal()


def test_a_sweep_is_refused_as_a_whole_if_one_run_is_there_already(experiment, refusal):
    assert train_twins.main(experiment.flags("--freeze_backbone False", "")) == 0
    before = experiment.files()
    assert train_twins.main(experiment.flags("--freeze_backbone True False", "")) == 2
    assert f"{swept_name('full')}: this run exists" in refusal()
    assert experiment.files() == before


def test_a_sweep_with_a_wrong_file_is_refused_before_its_first_run(experiment, refusal):
    assert train_twins.main(experiment.flags(f"{SWEEP} --aligned_json missing.json", "")) == 2
    assert refusal().startswith("--aligned_json missing.json: ")
    assert experiment.files() == {}


# ---- too little memory ---------------------------------------------------------------------------
def run_out_of_memory(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_too_little_memory_in_a_step_is_one_line_that_advises_smaller_steps(
    run, refusal, monkeypatch
):
    monkeypatch.setattr(TwinTrainer, "step", run_out_of_memory)
    code, _ = run()
    assert code == 2
    advice = "lower --images_per_batch or --batch_size, or take another --device"
    assert refusal() == f"out of memory: {advice}"


def test_too_little_memory_in_alignment_does_not_advise_smaller_steps(
    tmp_path, photos, experiment, refusal, monkeypatch
):
    package = ModuleType("face_alignment")
    package.LandmarksType = Namespace(TWO_D=1)
    network = torch.nn.Identity()
    detector = Namespace(detect_from_image=run_out_of_memory, face_detector=network)
    package.FaceAlignment = lambda *arguments, **options: Namespace(face_detector=detector)
    monkeypatch.setitem(sys.modules, "face_alignment", package)
    flags = experiment.flags(
        f"--id_to_images {photos}/id_to_images.json --train_pairs {photos}/pairs.json "
        f"--aligned_folder {tmp_path}/crops --aligned_json {tmp_path}/crops.json"
    )
    flags.remove("--skip_alignment")
    assert train_twins.main(flags) == 2
    line = refusal()
    assert "batch" not in line
    assert line.startswith("out of memory")
    assert "--device cpu" in line


# ---- command line --------------------------------------------------------------------------------
SHORT_COMMAND = (
    "--train_percentage 50 --freeze_backbone False --margin 0.3 --epochs 1 "
    "--arch ir_tiny --pretrained none --landmarks landmarks.json --device cpu"
)


def test_the_short_command_works_in_a_folder_with_files_of_the_default_names(
    tmp_path, monkeypatch, capsys
):
    write_photos(tmp_path, 3, 2, seed=1)
    (tmp_path / "pairs.json").rename(tmp_path / "train_twin_id_pairs.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(net.Backbone, "features", quick_features)
    name = "full_50pct_margin0.3"
    assert train_twins.main(SHORT_COMMAND.split()) == 0
    assert "12 photographs of 6 people: 12 aligned" in capsys.readouterr().out
    pictures = list(Path("train_aligned_images").rglob("*.png"))
    assert len(pictures) == 12 + 1  # and the contact sheet
    assert len(json.loads(Path("id_to_train_aligned_images.json").read_text())) == 6
    (checkpoint,) = files_in(Path("models"))
    assert checkpoint.name == f"twin_tuned_irtiny_{name}_epoch1.pth"
    files = {path.name for path in files_in(Path("training_logs", name))}
    curves = {"loss_curves.png", "validation_curves.png"}
    assert files == {"config.json", "training_log.json", "last.pth", *curves}

    assert train_twins.main([*SHORT_COMMAND.split(), "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "file"),
    [
        ("", "--id_to_images id_to_images.json"),
        ("--skip_alignment", "--aligned_json id_to_train_aligned_images.json"),
    ],
)
def test_a_default_file_that_is_not_there_is_named_with_its_flag_and_format(
    tmp_path, monkeypatch, refusal, flags, file
):
    monkeypatch.chdir(tmp_path)
    assert train_twins.main(["--pretrained", "none", *flags.split()]) == 2
    assert re.match(rf"{file}: .*expected a JSON file, \{{.*\}}", refusal())
    assert os.listdir(tmp_path) == []


DOCUMENTED = """id_to_images train_pairs aligned_folder aligned_json skip_alignment train_percentage
    freeze_backbone margin batch_size epochs learning_rate validation_split output_dir log_dir
    device max_workers arch pretrained distance images_per_batch quadruplet_weight drift_weight
    weight_decay monitor patience seed split_seed precision landmarks realign run_name resume
    overwrite"""


def test_help_lists_every_documented_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        train_twins.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in DOCUMENTED.split():
        assert re.search(rf"^  --{flag}\b", text, re.MULTILINE), flag


@pytest.mark.parametrize(
    ("spellings", "value"),
    [("True true TRUE 1 yes y on t", True), ("False false FALSE 0 no N off f", False)],
)
def test_freeze_backbone_takes_the_usual_spellings(spellings, value):
    for text in spellings.split():
        (args,) = parse_runs(["--freeze_backbone", text])
        assert args.freeze_backbone is value


@pytest.mark.parametrize(("flags", "value"), [(["--freeze_backbone"], True), ([], False)])
def test_a_bare_freeze_backbone_means_true(flags, value):
    (args,) = parse_runs(flags)
    assert args.freeze_backbone is value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pretrained missing.ckpt", "missing.ckpt: no such file"),
        ("--images_per_batch 15", "--images_per_batch: must be a whole number from 16 to "),
        ("--precision fp16", "--precision fp32 or bf16"),
        ("--device cuda:77", "--device cuda:77: "),
        ("--resume --overwrite", "--overwrite: "),
        ("--freeze_backbone maybe", "--freeze_backbone: "),
        ("--precision x", "--precision: "),
        ("--distance x", "--distance: "),
        ("--schedule cosine", "unrecognized arguments: --schedule cosine"),
        ("--monitor x", "--monitor: "),
        ("--seed x", "--seed: "),
    ],
)
def test_a_wrong_flag_is_one_line_with_its_name_and_writes_no_model(
    experiment, run, refusal, flags, message
):
    code, _ = run(flags)
    assert code == 2
    assert message in refusal()
    assert not (experiment.folder / "models").exists()
