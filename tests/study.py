"""Which settings help people who were in no part of the training? By hand, not in CI.

    python -m tests.study --pairs train_twin_id_pairs.json \\
      --aligned_json id_to_train_aligned_images.json \\
      --pretrained adaface_ir18_distilled.ckpt --arch ir_18 --output study --seeds 1 2 3 \\
      --recipe "default: --freeze_backbone" \\
      --recipe "the plan: --freeze_backbone --learning_rate 1e-3 ..."

The pairs are dealt into folds of whole families. Each recipe (a name and flags of train_twins.py)
is trained on all folds but one, with every seed, and tested on that one, so every pair is tested
by networks that have seen neither of its people. The figures are means over folds and seeds of
the difference to the start; their 95 % intervals are a bootstrap over families, the same resamples
for all. With --test_pairs and --test_aligned_json a second table says the same of those people.
Runs that are there are not made again, so a recipe can be added later.
"""

import argparse
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np

import train_twins
from evaluate_twins import TwinEvaluator, format_with_interval, interval, plot_figure
from net import embed, load_checkpoint, pick_device, weights_sha256, write_json
from triplet_dataset import TwinImages, find_families, load_crops, read_id_to_images, read_pairs


class Figure(NamedTuple):
    """A column of the tables."""

    metric: str
    title: str
    scale: int  # 100 for percentage points
    decimals: int


FIGURES = (
    Figure("auc", "twin AUC", 1, 4),
    Figure("eer", "twin EER, points", 100, 2),
    Figure("general_auc", "general AUC", 1, 4),
    Figure("fnmr_0.001", "FNMR at general FMR 0.1 %, points", 100, 2),
)


class Run(NamedTuple):
    """One run of a recipe."""

    recipe: str
    fold: int
    log: dict  # the content of its training_log.json


# ---- training ------------------------------------------------------------------------------------
def deal_into_folds(pairs, n):
    """n lists of pairs, whole families each."""
    family = find_families(pairs)
    n_families = max(family.values()) + 1
    fold_of_family = np.random.default_rng(0).permutation(n_families) % n
    folds = [[] for _ in range(n)]
    for pair in pairs:
        folds[fold_of_family[family[pair[0]]]].append(pair)
    return folds


def train_recipes(args, folds):
    """Train each recipe on all pairs but those of each fold, with each seed; returns the Runs."""
    people = {}  # {fold: the People to train on}, decoded once
    runs = []
    for text in args.recipe:
        recipe, _, flags = text.partition(":")
        for fold in args.use_folds:
            train_pairs = Path(args.output, f"pairs{fold}.json")
            others = [pair for number, part in enumerate(folds) if number != fold for pair in part]
            write_json(train_pairs, others)
            for seed in args.seeds:
                name = f"{to_file_name(recipe)}_fold{fold}_seed{seed}"
                arguments = [*common_flags(args, train_pairs, name, seed), *shlex.split(flags)]
                (settings,) = train_twins.parse_runs(arguments)
                trainer = train_twins.TwinTrainer(settings, people.get(fold))
                runs.append(Run(recipe, fold, trainer.train()))
                if trainer.people:
                    people[fold] = trainer.people
    return runs


def common_flags(args, train_pairs, name, seed):
    """The flags of train_twins.py that all recipes have."""
    flags = {
        "--train_pairs": train_pairs,
        "--aligned_json": args.aligned_json,
        "--pretrained": args.pretrained,
        "--arch": args.arch,
        "--seed": seed,
        "--output_dir": Path(args.output, "models"),
        "--log_dir": Path(args.output, "logs"),
        "--run_name": name,
        "--device": args.device,
    }
    listed = ["--skip_alignment", "--resume"]
    for flag, value in flags.items():
        listed += [flag, str(value)]
    return listed


def to_file_name(recipe):
    return re.sub("[^A-Za-z0-9.]+", "-", recipe).strip("-.")


# ---- testing -------------------------------------------------------------------------------------
def estimate_checkpoints(id_to_images, pairs, checkpoints, device, resamples):
    """The Estimates of checkpoints (paths) on the people of the pairs."""
    images = TwinImages(id_to_images, pairs)
    evaluator = TwinEvaluator(images, resamples=resamples)
    crops = load_crops(images.paths).pixels
    models = [load_checkpoint(checkpoint) for checkpoint in checkpoints]
    estimates = []
    for embeddings in embed_all(models, crops, device):
        estimates.append(evaluator.estimate(evaluator.score(embeddings)))
    return estimates


def embed_all(models, crops, device):
    """The embeddings (N, 512) of each network; networks with one backbone run it once."""
    groups = {}
    for number, model in enumerate(models):
        groups.setdefault(weights_sha256(model, backbone_only=True), []).append(number)
    embeddings = [None] * len(models)
    for numbers in groups.values():
        heads = [models[number].output_layer for number in numbers]
        results = embed(models[numbers[0]], crops, device, heads, description="testing")
        for number, result in zip(numbers, results, strict=True):
            embeddings[number] = result
    return embeddings


def test_runs(args, title, runs, people):
    """Print the table of the Runs on {fold: (id_to_images, pairs)}."""
    device = pick_device(args.device)
    starts = {}
    estimates = {}
    for fold, (id_to_images, pairs) in people.items():
        of_fold = [run for run in runs if run.fold == fold]
        checkpoints = [args.pretrained, *(run.log["best_checkpoint"] for run in of_fold)]
        starts[fold], *others = estimate_checkpoints(
            id_to_images, pairs, checkpoints, device, args.resamples
        )
        for run, estimate in zip(of_fold, others, strict=True):
            estimates.setdefault(run.recipe, []).append((fold, estimate))
    print_table(title, runs, estimates, starts)


# ---- results -------------------------------------------------------------------------------------
def print_table(title, runs, estimates, starts):
    """estimates: {recipe: [(fold, Estimate), ...]}; starts: {fold: Estimate of the start}."""
    at_start = []
    for figure in FIGURES:
        values = [start.figures[figure.metric] for start in starts.values()]
        if None in values:
            at_start.append(f"{figure.title} not measured")
        else:
            at_start.append(f"{figure.title} {figure.scale * np.mean(values):.4f}")
    print(f"\n{title}; start: {', '.join(at_start)}")
    titles = ["recipe", *(figure.title for figure in FIGURES), "steps", "minutes"]
    print(f"| {' | '.join(titles)} |")
    print("| --- " * len(titles) + "|")
    for recipe, estimates_of_recipe in estimates.items():
        cells = [recipe]
        for figure in FIGURES:
            cells.append(describe_change(figure, estimates_of_recipe, starts))
        cells += describe_effort([run.log for run in runs if run.recipe == recipe])
        print(f"| {' | '.join(cells)} |", flush=True)


def describe_change(figure, estimates, starts):
    """The mean difference to the start, with its interval, of [(fold, Estimate), ...]."""
    changes = []
    samples = []
    for fold, estimate in estimates:
        start = starts[fold]
        if None in (estimate.figures[figure.metric], start.figures[figure.metric]):
            return "not measured"
        changes.append(estimate.figures[figure.metric] - start.figures[figure.metric])
        if estimate.samples:
            samples.append(estimate.samples[figure.metric] - start.samples[figure.metric])
    bounds = None
    if len(samples) == len(changes):  # else a fold has too few families for an interval
        bounds = interval(figure.scale * np.mean(samples, 0))
    change = figure.scale * np.mean(changes)
    return format_with_interval(change, bounds, f"+.{figure.decimals}f")


def describe_effort(logs):
    """The mean number of steps and of minutes of a recipe's runs, as text."""
    steps = []
    minutes = []
    for log in logs:
        steps.append(sum(entry.get("steps", 0) for entry in log["epochs"]))
        minutes.append(sum(entry["timing"]["seconds"] for entry in log["epochs"]) / 60)
    return [f"{np.mean(steps):.0f}", f"{np.mean(minutes):.1f}"]


def plot_curves(path, runs):
    """Draw the change of both validation AUCs along the runs, the mean of each recipe."""
    curves = {"val_auc": "twins", "val_general_auc": "everyone else"}
    logs = {}
    for run in runs:
        logs.setdefault(run.recipe, []).append(run.log["epochs"])
    with plot_figure(path, 12.0, 3.8, 1, 2) as panels:
        for axes, (key, people) in zip(panels, curves.items(), strict=True):
            for recipe, epochs_of_runs in logs.items():
                n_epochs = min(len(epochs) for epochs in epochs_of_runs)
                values = []
                for epochs in epochs_of_runs:
                    values.append([entry[key] for entry in epochs[:n_epochs]])
                values = np.array(values, float)
                change = (values - values[:, :1]).mean(0)
                axes.plot(np.linspace(0, 1, n_epochs), change, label=recipe)
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.set_xlabel("share of the run's epochs")
            axes.set_ylabel(f"change of the validation AUC, {people}")


# ---- command line --------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="tests.study", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pairs", required=True, help="train_twin_id_pairs.json")
    add("--aligned_json", required=True, help="the list of their crops")
    add("--pretrained", required=True)
    add("--arch", default="ir_50")
    add("--output", default="study", help="folder for networks and results")
    add(
        "--recipe",
        action="append",
        default=[],
        metavar="'NAME: FLAGS'",
        help="flags of train_twins.py",
    )
    add("--test_pairs", help="pairs of further people, for a last look")
    add("--test_aligned_json", help="the list of their crops")
    add("--folds", type=int, default=3, help="number of folds (default 3)")
    add("--use_folds", type=int, nargs="+", help="test on these alone, where time is short")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--device", default="auto")
    add("--resamples", type=int, default=400)
    args = parser.parse_args(argv)
    if not args.use_folds:
        args.use_folds = list(range(args.folds))
    return args


def main(argv=None):
    args = parse_args(argv)
    images = read_id_to_images(args.aligned_json)
    pairs, _ = read_pairs(args.pairs, images)
    folds = deal_into_folds(pairs, args.folds)
    runs = train_recipes(args, folds)
    plot_curves(Path(args.output, "curves.png"), runs)
    test_runs(
        args, "Held-out folds", runs, {fold: (images, folds[fold]) for fold in args.use_folds}
    )
    if args.test_pairs:
        further_images = read_id_to_images(args.test_aligned_json)
        further_pairs, _ = read_pairs(args.test_pairs, further_images)
        people = dict.fromkeys(args.use_folds, (further_images, further_pairs))
        test_runs(args, "Further people", runs, people)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
