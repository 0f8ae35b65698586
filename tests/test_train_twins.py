"""Fine-tuning: what a step computes, what a run writes, and how it starts, goes on and ends; on a tiny network."""

import itertools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn

import net
import train_twins
import triplet_dataset
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
from train_twins import Run, TwinTrainer, parse_runs, plot_curves
from triplet_dataset import load_crops
from triplet_loss import TripletLoss


# ---- what is trained ------------------------------------------------------------------------------------------------
def changed_keys(experiment):
    before, after = net.load_checkpoint(experiment.start).state_dict(), experiment.weights()
    return {key for key, value in before.items() if not torch.equal(value, after[key])}


@pytest.mark.parametrize("steps", [SHUFFLED, GROUPED])
def test_frozen_backbone_is_bitwise_unchanged_and_only_the_output_layer_trained(experiment, run, steps):
    assert run(f"--freeze_backbone {steps} --validation_split 0")[0] == 0
    assert changed_keys(experiment) == {f"output_layer.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")}


def test_full_mode_trains_every_parameter_and_no_batchnorm_statistic(experiment, run):
    assert run(f"{SHUFFLED} --validation_split 0")[0] == 0
    assert changed_keys(experiment) == {name for name, _ in net.build_model("ir_tiny").named_parameters()}


def naive_loss(args, model, start, crops, triplets):
    """(loss of a step, its plain triplet loss) by three forward passes, all pairs of triplets, a list of images."""
    anchor, positive, negative = (model(crops[triplets[:, i]])[0] for i in range(3))
    if args.distance == "cosine":
        near, far = 1 - (anchor * positive).sum(1), 1 - (anchor * negative).sum(1)
    else:
        near, far = (anchor - positive).norm(dim=1), (anchor - negative).norm(dim=1)
    plain = TripletLoss(args.margin, args.distance)(anchor, positive, negative)
    pairs = (near[:, None] - far[None, :] + args.margin).clamp_min(0).mean()
    images = sorted({int(row) for triplet in triplets for row in triplet})
    drift = torch.stack([1 - model(crops[[i]])[0][0] @ start(crops[[i]])[0][0].detach() for i in images]).mean()
    weight = args.quadruplet_weight
    return (1 - weight) * plain + weight * pairs + args.drift_weight * drift, plain


@pytest.mark.parametrize("mode", ["True", "False --distance euclidean", "False"])
@pytest.mark.parametrize("steps", [SHUFFLED, GROUPED])
@pytest.mark.parametrize("terms", ["", "--quadruplet_weight 0.7 --drift_weight 2"])
def test_a_step_equals_the_naive_three_forward_computation(experiment, monkeypatch, mode, steps, terms):
    flags = f"--freeze_backbone {mode} {steps} {terms} --learning_rate 0.1 --epochs 1"
    trainer = TwinTrainer(*parse_runs(experiment.flags(flags)))
    step, start, reference = trainer.step, net.load_checkpoint(experiment.start), net.load_checkpoint(experiment.start)
    taken = []

    def compared(triplets):
        # Each step from equal weights: one that rounding sends across a PReLU's kink has another slope from there on.
        reference.load_state_dict(trainer.model.state_dict())
        reference.zero_grad()
        statistics = step(triplets)
        crops = net.to_input(load_crops(trainer.train_set.images.paths).pixels)
        loss, plain = naive_loss(trainer.args, reference, start, crops, triplets)
        loss.backward()
        assert statistics[0].item() == pytest.approx(plain.item(), abs=1e-6)
        for (name, p), q in zip(trainer.model.named_parameters(), reference.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(p.grad, q.grad, atol=2e-5, rtol=1e-4, msg=name)
                torch.testing.assert_close(p, q - 0.1 * q.grad, atol=2e-6, rtol=1e-5, msg=name)
        taken.append(len(triplets))
        return statistics

    monkeypatch.setattr(train_twins, "make_optimizer", sgd)
    trainer.step = compared
    log = trainer.train()
    assert len(taken) == log["epochs"][1]["steps"] >= 2
    if steps == SHUFFLED:
        assert sum(taken) == log["config"]["n_train_triplets"]


@pytest.fixture
def passes():
    """{"backbone", "head": [images of each pass through it]}, by hooks on a network's first and last weights."""
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
    trainer = TwinTrainer(*parse_runs(experiment.flags(f"{mode} {steps} --epochs 1")))
    step, images = trainer.step, []

    def counted(triplets):
        passes["head"].clear()
        statistics = step(triplets)
        assert sum(passes["head"]) == len(np.unique(triplets))
        images.append(sum(passes["head"]))
        return statistics

    trainer.step = counted
    trainer.train()
    assert max(images) <= len(trainer.train_set.images.paths) < 3 * 8


def test_a_frozen_backbone_runs_once_per_image_for_all_runs_on_the_same_people(experiment, passes):
    trainer = TwinTrainer(*parse_runs(experiment.flags("--freeze_backbone --epochs 3", "first")))
    trainer.train()
    assert sum(passes["backbone"]) == sum(map(sum, FAMILIES))
    passes["backbone"].clear()
    flags = "--freeze_backbone --train_percentage 50 --margin 0.2 --seed 3 --split_seed 5"
    TwinTrainer(*parse_runs(experiment.flags(flags, "second")), trainer.people).train()
    assert passes["backbone"] == []
    model = net.load_checkpoint(experiment.start)
    model.input_layer[0].weight.data[0, 0, 0, 0] += 0.1
    net.save_checkpoint(experiment.start, model)  # another backbone has features of its own
    TwinTrainer(*parse_runs(experiment.flags("--freeze_backbone", "third")), trainer.people).train()
    assert sum(passes["backbone"]) == sum(map(sum, FAMILIES))


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


def test_the_rate_rises_over_a_tenth_and_falls_to_zero_or_stays():
    rates = [train_twins.rate_factor(progress, "cosine") for progress in (0, 0.05, 0.1, 0.55, 1)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert {train_twins.rate_factor(progress, "constant") for progress in (0, 0.5, 1)} == {1}


@pytest.mark.parametrize("mode", ["--freeze_backbone", ""])
@pytest.mark.parametrize("steps", [SHUFFLED, GROUPED])
def test_training_reduces_the_training_loss(run, mode, steps):
    _, log = run(f"{mode} {steps} --learning_rate 1e-3 --quadruplet_weight 1 --schedule cosine --epochs 4")
    assert log["epochs"][-1]["train_loss"] < 0.5 * log["epochs"][0]["train_loss"]


def test_drift_weight_holds_the_embeddings(experiment, run):
    crops = net.to_input(load_crops([path for paths in experiment.images.values() for path in paths]).pixels)
    moved = []
    for weight in (0, 100):
        run(f"--drift_weight {weight} --learning_rate 1e-3 --validation_split 0", f"drift{weight}")
        model = net.build_model("ir_tiny").eval()
        model.load_state_dict(experiment.weights(f"drift{weight}"))
        moved.append((1 - (model(crops)[0] * net.load_checkpoint(experiment.start)(crops)[0]).sum(1)).mean().item())
    assert moved[1] < 0.3 * moved[0]


# ---- random start ---------------------------------------------------------------------------------------------------
def test_a_random_start_is_up_to_the_seed(experiment, run):
    logs = [run(f"--pretrained none --seed {name[1:]}", name)[1] for name in ("a1", "b1", "c2")]
    a, b, c = (experiment.weights(name) for name in ("a1", "b1", "c2"))
    assert_equal_weights(a, b)
    assert without_timing(logs[0]) == without_timing(logs[1])  # so all that the clock decides is under "timing"
    assert not torch.equal(a["input_layer.0.weight"], c["input_layer.0.weight"])


# ---- figures --------------------------------------------------------------------------------------------------------
def measure(experiment, checkpoint, ids, distance):
    """{figure: value} of a network on people, by brute force over the definitions and scikit-learn."""
    images = [(name, path) for name in ids for path in experiment.images[name]]
    owner, family = [name for name, _ in images], [name[:-1] for name, _ in images]
    crops = np.stack([np.array(Image.open(path)) for _, path in images])
    with torch.no_grad():
        e = net.load_checkpoint(checkpoint)(net.to_input(crops))[0]
    twins = {frozenset(pair) for pair in json.loads(experiment.pairs.read_text())}
    numbers = range(len(images))
    triplets = [
        (a, p, n)
        for a, p in itertools.permutations(numbers, 2)
        for n in numbers
        if owner[a] == owner[p] and {owner[a], owner[n]} in twins
    ]
    loss = TripletLoss(0.3, distance)(*(e[list(rows)] for rows in zip(*triplets, strict=True)))
    scores = {"genuine": [], "twin": [], "general": []}
    for a, b in itertools.combinations(numbers, 2):
        kind = "genuine" if owner[a] == owner[b] else "twin" if {owner[a], owner[b]} in twins else "general"
        if kind != "general" or family[a] != family[b]:
            scores[kind].append(float(e[a] @ e[b]))
    truth = [1] * len(scores["genuine"]) + [0] * len(scores["twin"])
    fmr, tar, _ = roc_curve(truth, scores["genuine"] + scores["twin"], drop_intermediate=False)
    gap = np.abs(fmr - (1 - tar)).round(12)
    at = len(gap) - 1 - np.argmin(gap[::-1])  # the lower threshold on a tie
    general = [1] * len(scores["genuine"]) + [0] * len(scores["general"])
    return {
        "loss": loss.item(),
        "eer": (fmr[at] + 1 - tar[at]) / 2,
        "auc": roc_auc_score(truth, scores["genuine"] + scores["twin"]),
        "general_auc": roc_auc_score(general, scores["genuine"] + scores["general"]),
    }


@pytest.mark.parametrize(
    "flags", ["--distance euclidean", "--precision bf16", "--freeze_backbone", "--freeze_backbone --precision bf16"]
)
def test_logged_figures_are_those_of_the_saved_network_in_fp32(experiment, run, flags):
    code, log = run(f"{flags} --validation_split 0.5 --split_seed 1 --epochs 1")
    assert code == 0
    config, (start, end) = log["config"], log["epochs"]
    distance = config["distance"]
    expected = measure(experiment, experiment.start, config["train_ids"], distance)["loss"]
    assert start["train_loss"] == pytest.approx(expected, abs=1e-6)
    for entry, checkpoint in ((start, experiment.start), (end, log["best_checkpoint"])):
        figures = measure(experiment, checkpoint, config["val_ids"], distance)
        assert {name: entry[f"val_{name}"] for name in figures} == pytest.approx(figures, abs=1e-6)
    assert start["val_loss"] != end["val_loss"]


def test_precision_is_that_of_the_steps_alone(run):
    losses = {}
    for precision in ("fp32", "bf16"):
        _, log = run(f"--precision {precision} --learning_rate 0 --epochs 1", precision)
        assert log["config"]["used_precision"] == precision
        start, end = log["epochs"]
        assert start["val_loss"] == end["val_loss"]
        losses[precision] = end["train_loss"] - start["train_loss"]
    assert abs(losses["fp32"]) < 1e-6
    assert 1e-6 < abs(losses["bf16"]) < 2e-2


def test_precision_follows_the_device(experiment, monkeypatch):
    def chosen(device, has_bf16):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16}, raising=False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
        return TwinTrainer(*parse_runs(experiment.flags(f"--precision auto --device {device}"))).precision

    assert (chosen("cpu", True), chosen("cpu", False)) == ("bf16", "fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device=None, **options: ones(*size, **options))
    assert (chosen("cuda", True), chosen("cuda", False)) == ("bf16", "fp16")


# ---- what is written ------------------------------------------------------------------------------------------------
def test_config_log_and_checkpoint_hold_what_the_readers_rely_on(experiment, run):
    code, log = run("--train_percentage 50 --epochs 3")
    assert code == 0
    folder = experiment.folder / "logs" / "run"
    assert {path.name for path in folder.iterdir()} == {"config.json", "training_log.json"}  # and no last.pth
    config = json.loads((folder / "config.json").read_text())
    assert log["config"] == config
    args = vars(*parse_runs(experiment.flags("--train_percentage 50 --epochs 3")))
    assert {key: config[key] for key in args} == args
    triplets = {}
    for part in ("train", "val"):
        ids = config[f"{part}_ids"]
        pairs = [pair for pair in json.loads(experiment.pairs.read_text()) if set(pair) <= set(ids)]
        counts = [[len(experiment.images[name]) for name in pair] for pair in pairs]
        triplets[part] = [n * (n - 1) * m + m * (m - 1) * n for n, m in counts]
        assert config[f"n_{part}_pairs"] == len(pairs)
        assert len({name[:-1] for name in ids} & {name[:-1] for name in config["val_ids"]}) == (part == "val") * 2
    assert config["n_train_pairs"] + config["n_val_pairs"] == 6
    assert config["n_skipped_pairs"] == 1
    assert config["n_train_triplets"] == sum((50 * n + 99) // 100 for n in triplets["train"])
    assert config["n_val_triplets"] == sum(triplets["val"])  # all of them
    assert config["n_train_images"] == sum(len(experiment.images[name]) for name in config["train_ids"])
    assert config["trainable_parameters"] == [name for name, _ in net.build_model("ir_tiny").named_parameters()]
    assert config["versions"]["torch"] == torch.__version__
    assert config["used_device"] == "cpu"
    assert [entry["epoch"] for entry in log["epochs"]] == [0, 1, 2, 3]
    for entry in log["epochs"]:
        assert {"train_loss", "val_loss", "val_eer", "val_auc", "active_triplets"} <= set(entry)
        assert entry["timing"]["seconds"] > 0
    best = max(log["epochs"][1:], key=lambda entry: entry["val_auc"])
    assert (log["best_epoch"], log["stopped"]) == (best["epoch"], "epochs")
    path = Path(log["best_checkpoint"])
    assert list((experiment.folder / "models").iterdir()) == [path]
    assert path.name == f"twin_tuned_irtiny_run_epoch{best['epoch']}.pth"
    checkpoint = torch.load(path, weights_only=True)
    assert (checkpoint["arch"], checkpoint["epoch"], checkpoint["config"]) == ("ir_tiny", best["epoch"], config)
    assert checkpoint["metrics"].items() <= best.items()
    assert {"val_loss", "val_eer", "val_auc"} <= set(checkpoint["metrics"])
    statedict = checkpoint["state_dict"]  # as upstream's own inference reads it
    net.build_model("ir_tiny").load_state_dict({k[6:]: v for k, v in statedict.items() if k.startswith("model.")})


def test_curves_are_drawn_with_and_without_validation(tmp_path, run):
    for share in (0, 0.3):
        _, log = run(f"--validation_split {share}", f"split{share}")
        plot_curves(tmp_path / f"{share}", log)
        for name in ("loss_curves.png", "validation_curves.png"):
            assert Image.open(tmp_path / f"{share}" / name).size > (500, 300)


@pytest.mark.parametrize(("monitor", "best"), [("val_loss", 3), ("val_eer", 2), ("val_auc", 4)])
def test_the_best_epoch_is_the_first_best_by_the_monitor_and_never_the_start(experiment, monitor, best):
    run = Run(*parse_runs(experiment.flags(f"--monitor {monitor} --epochs 9 --patience 3")))
    figures = {"val_loss": "13211111", "val_eer": "03122132", "val_auc": "98579698"}
    for epoch in range(best + 4):
        entry = {"epoch": epoch, **{name: int(values[epoch]) for name, values in figures.items()}}
        assert run.append(entry) == (epoch > 0 and run.log["best_epoch"] == epoch)
        assert run.log["stopped"] == ("patience" if epoch == best + 3 else None)
    assert run.log["best_checkpoint"].endswith(f"models/twin_tuned_irtiny_run_epoch{best}.pth")


def test_superseded_checkpoints_go_and_those_of_other_runs_with_like_names_stay(experiment, run):
    models = experiment.folder / "models"
    assert run("--epochs 1", "pilot_frozen")[0] == 0
    others = [*models.iterdir(), models / ".7.twin_tuned_irtiny_pilot_frozen_epoch2.pth"]  # one being written
    others += [models / f"twin_tuned_{name}.pth" for name in ("irtiny_frozen_epoch1_epoch1", "ir50_frozen_epoch1")]
    for path in others:
        path.touch()
    _, log = run("--validation_split 0", "frozen")
    assert log["best_epoch"] == 2  # so that there was one to supersede
    assert set(models.iterdir()) == {*others, Path(log["best_checkpoint"])}


def test_default_run_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = "--freeze_backbone --train_percentage 75 --margin 0.50"
    for name, flags in {"full_100pct_margin0.3": "", "frozen_75pct_margin0.5": more}.items():
        assert Run(*parse_runs(["--pretrained", "none", *flags.split()])).name == name


# ---- who is trained on ----------------------------------------------------------------------------------------------
def test_split_seed_alone_decides_who_validates(experiment):
    def validated(flags):
        trainer = TwinTrainer(*parse_runs(experiment.flags(flags)))
        trainer.load_data()
        return trainer.val_set.images.ids

    first = validated("")
    assert validated("--seed 1 --train_percentage 5 --margin 0.2 --freeze_backbone") == first
    assert any(validated(f"--split_seed {seed}") != first for seed in (1, 2, 3))


def test_a_percentage_contains_the_smaller_ones_of_its_seed(experiment):
    def sampled(flags):
        trainer = TwinTrainer(*parse_runs(experiment.flags(flags)))
        trainer.load_data()
        return {tuple(row) for row in trainer.train_set.triplets(np.arange(len(trainer.train_set))).tolist()}

    small, large, everything = (sampled(f"--train_percentage {share}") for share in (20, 60, 100))
    assert small < large < everything
    assert sampled("--train_percentage 20 --seed 1") != small


def test_a_single_family_is_warned_of_and_its_last_epoch_kept(experiment, write_crops, run, capsys):
    aligned, pairs = write_crops([[3, 3, 2]], "single")
    code, log = run(f"--train_pairs {pairs} --aligned_json {aligned} --patience 1 --epochs 3")
    assert code == 0
    assert "warning: no validation" in capsys.readouterr().out
    assert (log["best_epoch"], log["stopped"]) == (3, "epochs")
    assert {entry["val_loss"] for entry in log["epochs"]} == {None}
    assert len(list((experiment.folder / "models").iterdir())) == 1


def test_skipped_pairs_and_repeated_images_are_counted_in_a_warning(experiment, run, capsys):
    images = json.loads(experiment.aligned.read_text())
    copy = experiment.folder / "copy.png"
    copy.write_bytes(experiment.images["train0a"][0].read_bytes())
    images["train0a"] += ["copy.png", "copy.png"]
    experiment.aligned.write_text(json.dumps(images))
    _, log = run("--validation_split 0")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert any("1 of 7 pairs have too few crops" in line for line in warnings)
    assert any(re.search(r"\b2 images are the same .*; each is used once", line) for line in warnings)
    assert log["config"]["n_train_images"] == sum(map(sum, FAMILIES[:-1]))


# ---- the end --------------------------------------------------------------------------------------------------------
def test_patience_stops(run):
    _, log = run("--learning_rate 0 --epochs 9 --patience 2")  # no epoch changes anything, so the first stays the best
    assert (log["best_epoch"], log["stopped"], len(log["epochs"])) == (1, "patience", 4)


def test_the_end_says_how_the_best_epoch_compares_with_the_start(tmp_path, experiment, run, capsys):
    _, log = run()
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("On the validation people")]
    assert line.count("too few families to say on") == 2
    assert log["against_start"]["auc"]["verdict"] == "too few families to say"
    (tmp_path / "many").mkdir()
    many = Experiment(tmp_path / "many", [[3, 3]] * 10)
    assert train_twins.main(many.flags("--validation_split 0.8 --learning_rate 1e-2")) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("On the validation people")]
    verdict = r"(better|worse|not distinguishable) on {} \(AUC [+-]0\.\d{{4}} \[[+-].*, [+-].*\]\)"
    verdicts = ", ".join(verdict.format(people) for people in ("twins", "everyone else"))
    match = re.fullmatch(rf"On the validation people, against the start: {verdicts}\.", line)
    log = many.log()
    assert match.groups() == tuple(log["against_start"][name]["verdict"] for name in ("auc", "general_auc"))
    for name in ("auc", "eer", "general_auc"):
        change = log["epochs"][log["best_epoch"]][f"val_{name}"] - log["epochs"][0][f"val_{name}"]
        assert log["against_start"][name]["difference"] == pytest.approx(change)


DAMAGE = {
    "overflow": lambda head: head[3].weight.data.fill_(3e38),
    "not a number": lambda head: head[3].weight.data[0].fill_(float("nan")),
    "all alike": lambda head: (head[3].weight.data.zero_(), head[3].bias.data.fill_(1)),
    "all zero": lambda head: (head[3].weight.data.zero_(), head[3].bias.data.copy_(head[4].running_mean)),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("split", [0, 0.3])
def test_a_network_that_dies_ends_the_run_and_is_never_the_best(experiment, run, refusal, monkeypatch, damage, split):
    step, steps = TwinTrainer.step, []

    def damaged(self, triplets):
        statistics = step(self, triplets)
        steps.append(triplets)
        if len(steps) == 2:  # the second epoch's
            DAMAGE[damage](self.model.output_layer)
        return statistics

    monkeypatch.setattr(TwinTrainer, "step", damaged)
    code, log = run(f"--epochs 5 --validation_split {split}")
    assert code == 2
    assert re.match(r"run, epoch 2\b.*--learning_rate below 0\.0003$", refusal())
    assert [entry["epoch"] for entry in log["epochs"]] == [0, 1]
    assert [path.name for path in (experiment.folder / "models").iterdir()] == ["twin_tuned_irtiny_run_epoch1.pth"]
    assert all(torch.isfinite(value).all() for value in experiment.weights().values())


def test_a_loss_that_is_not_finite_ends_the_run(experiment, run, refusal, monkeypatch):
    step = TwinTrainer.step
    monkeypatch.setattr(TwinTrainer, "step", lambda self, triplets: step(self, triplets) * float("nan"))
    assert run()[0] == 2
    assert re.match(r"run, epoch 1, step \d+: the loss .* not finite.*--learning_rate below 0\.0003$", refusal())
    assert not (experiment.folder / "models").exists()


@pytest.mark.parametrize("rate", ["0.5", "1e6"])
def test_a_rate_far_too_high_is_named_and_leaves_no_dead_checkpoint(run, refusal, rate):
    code, log = run(f"{SHUFFLED} --learning_rate {rate} --epochs 9")
    assert code == 2
    assert f"--learning_rate below {float(rate):g}" in refusal()
    if log["best_checkpoint"]:
        net.check_alive(net.load_checkpoint(log["best_checkpoint"])(torch.zeros(1, 3, 112, 112))[0], "the best")


# ---- start, go on, start over ---------------------------------------------------------------------------------------
def test_resume_starts_what_is_not_there_and_says_what_is_finished(experiment, run, capsys):
    assert run("--resume")[0] == 0
    before = experiment.files()
    capsys.readouterr()
    assert run("--resume")[0] == 0
    assert re.search(r"run is finished, 2 epochs; best: .*epoch\d\.pth", capsys.readouterr().out)
    assert experiment.files() == before


@pytest.mark.parametrize("finished", [False, True])
def test_resume_with_other_settings_is_refused_with_the_differences(experiment, run, interrupt, capsys, finished):
    run(SHUFFLED) if finished else interrupt(SHUFFLED, 2)
    before = experiment.files()
    other = "--margin 0.2 --seed 1 --freeze_backbone --split_seed 3 --drift_weight 1 --epochs 9"
    assert run(f"{SHUFFLED} --resume {other}")[0] == 2
    line = capsys.readouterr().err.splitlines()[-1]
    for text in ("margin was 0.3, is 0.2", "freeze_backbone was False, is True", "drift_weight was 0.0, is 1.0"):
        assert text in line
    assert "epochs" not in line
    assert experiment.files() == before


def test_changed_crops_are_refused_on_resume(experiment, run, interrupt, capsys):
    interrupt(SHUFFLED, 2)
    before = experiment.files()
    experiment.change_a_crop()
    assert run(f"{SHUFFLED} --resume")[0] == 2
    assert "crops_sha256 was" in capsys.readouterr().err.splitlines()[-1]
    assert experiment.files() == before


def test_resume_keeps_the_precision_or_takes_another(experiment, run, interrupt):
    for name, precision, used in (("kept", "auto", "bf16"), ("changed", "fp32", "fp32")):
        interrupt(f"{SHUFFLED} --precision bf16", 2, name)
        code, log = run(f"{SHUFFLED} --resume --precision {precision}", name)
        assert (code, log["config"]["used_precision"]) == (0, used)


def test_an_existing_run_is_refused_without_a_flag_and_nothing_touched(experiment, run, refusal):
    run()
    before = experiment.files()
    # Its checkpoint alone is enough: another folder of logs does not make it another run's.
    for flags in ("", "--epochs 1", f"--log_dir {experiment.folder}/elsewhere"):
        assert run(flags)[0] == 2
        line = refusal()
        assert all(flag in line for flag in ("--resume", "--overwrite", "--run_name"))
    assert experiment.files() == before


def test_overwrite_replaces_a_run(experiment, run, interrupt):
    interrupt(f"{SHUFFLED} --seed 1", 2)
    code, log = run("--epochs 1 --overwrite")
    assert (code, log["config"]["seed"], len(log["epochs"])) == (0, 42, 2)
    assert [str(path) for path in (experiment.folder / "models").iterdir()] == [log["best_checkpoint"]]
    assert not (experiment.folder / "logs" / "run" / "last.pth").exists()


# ---- several runs in one command ------------------------------------------------------------------------------------
SWEEP = "--freeze_backbone False True --margin 0.3 0.2 --seed 2 1"
SWEPT = [f"{mode}_100pct_margin{x}_seed{seed}" for mode in ("frozen", "full") for x in (0.2, 0.3) for seed in (1, 2)]


def summary(out):
    """(the rows of the table at the end, the command behind it) of what several runs have printed."""
    lines = out.splitlines()
    rows = lines[next(i for i, line in enumerate(lines) if line.startswith("run ")) + 1 : -2]
    return [row.split() for row in rows], shlex.split(lines[-1])


def test_every_combination_is_run_as_it_would_be_alone_the_cheapest_first(experiment, run, capsys):
    assert train_twins.main(experiment.flags(SWEEP, "")) == 0
    rows, command = summary(capsys.readouterr().out)
    assert [row[0] for row in rows] == SWEPT
    checkpoints = [experiment.log(name)["best_checkpoint"] for name in SWEPT]
    assert command == ["python", "evaluate_twins.py", "--checkpoints", str(experiment.start), *checkpoints]
    for name, row in zip(SWEPT, rows, strict=True):
        mode, _, margin, seed = name.split("_")
        flags = f"--freeze_backbone {mode == 'frozen'} --margin {margin[6:]} --seed {seed[4:]}"
        log = run(flags, f"alone_{name}")[1]
        assert without_timing(experiment.log(name)) == without_timing(log)
        assert_equal_weights(experiment.weights(name), experiment.weights(f"alone_{name}"))
        best = log["epochs"][log["best_epoch"]]
        assert row[1:] == [str(best["epoch"]), *(f"{best[f'val_{x}']:.4f}" for x in ("eer", "auc", "general_auc"))]


def test_several_runs_need_their_crops_and_backbone_features_once(experiment, passes, monkeypatch, capsys):
    read, opened = triplet_dataset.read_crop, []
    monkeypatch.setattr(triplet_dataset, "read_crop", lambda path: opened.append(path) or read(path))
    assert train_twins.main(experiment.flags("--freeze_backbone --train_percentage 50 100 --margin 0.2 0.3", "")) == 0
    assert sum(passes["backbone"]) == len(opened) == sum(map(sum, FAMILIES))
    assert [row[0] for row in summary(capsys.readouterr().out)[0]][::2] == [
        f"frozen_{n}pct_margin0.2" for n in (50, 100)
    ]


def test_a_failed_run_of_several_is_named_the_others_go_on_and_resume_makes_up_for_it(experiment, capsys):
    in_the_way = experiment.folder / "logs" / SWEPT[1] / "config.json"
    in_the_way.mkdir(parents=True)
    assert train_twins.main(experiment.flags(SWEEP, "")) == 1
    out, error = capsys.readouterr()
    assert [row[0] for row in summary(out.split("FAILED")[0])[0]] == [name for name in SWEPT if name != SWEPT[1]]
    assert f"FAILED: {SWEPT[1]}, for the reason above; --resume tries it again" in out
    assert f"{SWEPT[1]}: {in_the_way}: Is a directory\n" in error
    before = {path: content for path, content in experiment.files().items() if SWEPT[1] not in str(path)}
    in_the_way.rmdir()
    assert train_twins.main(experiment.flags(f"{SWEEP} --resume", "")) == 0
    assert [row[0] for row in summary(capsys.readouterr().out)[0]] == SWEPT
    assert before.items() <= experiment.files().items()


def test_an_interrupted_sweep_goes_on_where_it_stopped(experiment, interrupt, capsys):
    flags = "--freeze_backbone True False --epochs 3"
    names = ["frozen_100pct_margin0.3", "full_100pct_margin0.3"]
    interrupt(flags, 5, name="")
    assert "interrupted; what was done is saved, --resume goes on" in capsys.readouterr().err
    assert train_twins.main(experiment.flags(f"{flags} --resume", "")) == 0
    got = [(without_timing(experiment.log(name)), experiment.weights(name)) for name in names]
    assert train_twins.main(experiment.flags(f"{flags} --overwrite", "")) == 0
    for name, (log, weights) in zip(names, got, strict=True):
        assert without_timing(experiment.log(name)) == log
        assert_equal_weights(experiment.weights(name), weights)


def test_several_runs_are_refused_as_a_whole_before_the_first_begins(experiment, run, refusal):
    assert run(SWEEP, "one_name")[0] == 2
    assert "--run_name one_name: 8 runs cannot share it; each gets one of its own" in refusal()
    assert train_twins.main(experiment.flags("--freeze_backbone False", "")) == 0
    before = experiment.files()
    assert train_twins.main(experiment.flags("--freeze_backbone True False", "")) == 2
    assert "full_100pct_margin0.3: this run is there" in refusal()
    assert train_twins.main(experiment.flags(f"{SWEEP} --aligned_json missing.json", "")) == 2
    assert refusal().startswith("--aligned_json missing.json: ")
    assert experiment.files() == before


# ---- command line ---------------------------------------------------------------------------------------------------
def test_the_short_command_works_in_a_folder_with_files_of_the_default_names(tmp_path, monkeypatch, capsys):
    write_photos(tmp_path, 3, 2, seed=1)
    (tmp_path / "pairs.json").rename(tmp_path / "train_twin_id_pairs.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(net.Backbone, "features", quick_features)
    command = "--train_percentage 50 --freeze_backbone False --margin 0.3 --epochs 1"
    command += " --arch ir_tiny --pretrained none --landmarks landmarks.json --device cpu"
    assert train_twins.main(command.split()) == 0
    assert "12 photographs of 6 people: 12 aligned" in capsys.readouterr().out
    assert len(list(Path("train_aligned_images").rglob("*.png"))) == 12 + 1  # and the contact sheet
    assert len(json.loads(Path("id_to_train_aligned_images.json").read_text())) == 6
    assert [p.name for p in Path("models").iterdir()] == ["twin_tuned_irtiny_full_50pct_margin0.3_epoch1.pth"]
    files = {path.name for path in Path("training_logs/full_50pct_margin0.3").iterdir()}
    assert files == {"config.json", "training_log.json", "loss_curves.png", "validation_curves.png"}
    assert train_twins.main([*command.split(), "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["--id_to_images id_to_images.json", "--aligned_json id_to_train_aligned_images.json"])
def test_a_default_file_that_is_not_there_is_named_with_its_flag_and_format(tmp_path, monkeypatch, refusal, file):
    monkeypatch.chdir(tmp_path)
    assert train_twins.main(["--pretrained", "none", *["--skip_alignment"] * file.startswith("--aligned")]) == 2
    assert re.match(rf"{file}: .*expected a JSON file, \{{.*\}}", refusal())
    assert not list(tmp_path.iterdir())


def test_help_lists_every_documented_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        train_twins.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flags = """id_to_images train_pairs aligned_folder aligned_json skip_alignment train_percentage freeze_backbone
        margin batch_size epochs learning_rate validation_split output_dir log_dir device max_workers arch pretrained
        distance images_per_batch quadruplet_weight drift_weight schedule weight_decay monitor patience seed split_seed
        precision landmarks realign run_name resume overwrite"""
    for flag in flags.split():
        assert re.search(rf"^  --{flag}\b", text, re.MULTILINE), flag


@pytest.mark.parametrize("value", [True, False])
def test_freeze_backbone_takes_the_usual_spellings(value):
    for text in ("True true TRUE 1 yes y on t" if value else "False false FALSE 0 no N off f").split():
        assert parse_runs(["--freeze_backbone", text])[0].freeze_backbone is value
    assert parse_runs(["--freeze_backbone"])[0].freeze_backbone is True
    assert parse_runs([])[0].freeze_backbone is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pretrained missing.ckpt", "missing.ckpt: no such file"),
        ("--images_per_batch 15", "--images_per_batch: must be int from 16 to "),
        ("--precision fp16", "--precision fp32 or bf16"),
        ("--device cuda:77", "--device cuda:77: "),
        ("--resume --overwrite", "--overwrite: "),
        ("--freeze_backbone maybe", "--freeze_backbone: "),
        *((f"--{flag} x", f"--{flag}: ") for flag in ("precision", "distance", "schedule", "monitor", "seed")),
    ],
)
def test_a_wrong_flag_is_one_line_with_its_name_and_writes_no_model(experiment, run, refusal, flags, message):
    assert run(flags)[0] == 2
    assert message in refusal()
    assert not (experiment.folder / "models").exists()
