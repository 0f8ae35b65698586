"""Which settings help people who were in no part of the training? By hand, not in CI.

    python -m tests.study --data faces made_twins --pretrained adaface_ir18_distilled.ckpt \\
      --arch ir_18 --output study --folds 3 --seed 1 2 3 \\
      --recipe "drift 0.1: --freeze_backbone --drift_weight 0.1" \\
      --recipe "drift 0.3: --freeze_backbone --drift_weight 0.3"

Each of --data is a folder with the pairs and the lists of crops for training and test, under their
usual names. Each recipe (a name and flags of train_twins.py) is cross-validated there with
train_twins.py --folds: every pair is tested by networks that have seen neither of its people. With
--further, each recipe is also trained on all training pairs and tested on the test pairs. The
tables give the difference to the start (the network of --pretrained), a mean over seeds, with a
95 % interval over families. Runs that are finished are not made again, so a recipe can be added
later.
"""

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np

import evaluate_twins
import train_twins
from evaluate_twins import format_with_interval, plot_figure


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


class Recipe(NamedTuple):
    """A name, and flags of train_twins.py."""

    name: str
    flags: list


def train_and_test(args, data, recipe, cross_validate):
    """Run one recipe on one data set; returns (training logs, content of comparison.json).

    cross_validate: on the training pairs; else train on all of them and test on the test pairs.
    """
    kind = "folds" if cross_validate else "further"
    folder = Path(args.output, data.name, to_file_name(recipe.name), kind)
    train(args, data, recipe, cross_validate, folder)
    evaluate(args, data, recipe, cross_validate, folder)
    logs = [json.loads(path.read_text()) for path in sorted(folder.glob("logs/*/*_log.json"))]
    comparison = json.loads((folder / "results" / "comparison.json").read_text())
    if len(comparison["settings"]) != 2:  # the start and the recipe
        problem = "has networks of several settings"
        way_out = "give a recipe one value of each flag, and take another --output"
        raise SystemExit(f"{folder}/models {problem}; {way_out}")
    return logs, comparison


def train(args, data, recipe, cross_validate, folder):
    """Train one recipe on one data set, with every seed; networks and logs go to `folder`."""
    flags = [
        "--skip_alignment",
        "--resume",
        f"--train_pairs={data}/train_twin_id_pairs.json",
        f"--aligned_json={data}/id_to_train_aligned_images.json",
        f"--pretrained={args.pretrained}",
        f"--arch={args.arch}",
        f"--output_dir={folder}/models",
        f"--log_dir={folder}/logs",
        f"--device={args.device}",
        "--seed",
        *(str(seed) for seed in args.seed),
        *recipe.flags,
    ]
    if cross_validate:
        flags.append(f"--folds={args.folds}")
    if train_twins.main(flags):
        raise SystemExit(f"{recipe.name}: training failed")


def evaluate(args, data, recipe, cross_validate, folder):
    """Compare the networks of one recipe with the start; the results go to `folder`."""
    part = "train" if cross_validate else "test"
    flags = [
        "--skip_alignment",
        f"--test_pairs={data}/{part}_twin_id_pairs.json",
        f"--aligned_json={data}/id_to_{part}_aligned_images.json",
        f"--output_dir={folder}/results",
        f"--device={args.device}",
        "--checkpoints",
        args.pretrained,
        f"{folder}/models",
    ]
    if evaluate_twins.main(flags):
        raise SystemExit(f"{recipe.name}: the evaluation failed")


def to_file_name(recipe):
    return re.sub("[^A-Za-z0-9.]+", "-", recipe).strip("-.")


def print_table(title, results):
    """results: {name of a recipe: what `train_and_test` returns}."""
    _, comparison = next(iter(results.values()))
    start = comparison["settings"][0]["figures"]
    at_start = []
    for figure in FIGURES:
        value = start[figure.metric]["value"]
        text = "not measured" if value is None else f"{figure.scale * value:.{figure.decimals}f}"
        at_start.append(f"{figure.title} {text}")
    print(f"\n{title}; start: {', '.join(at_start)}")
    titles = ["recipe", *(figure.title for figure in FIGURES), "steps", "minutes"]
    print(f"| {' | '.join(titles)} |")
    print("| --- " * len(titles) + "|")
    for name, (logs, comparison) in results.items():
        _, setting = comparison["settings"]
        cells = [name]
        for figure in FIGURES:
            cells.append(describe_change(figure, setting["figures"][figure.metric]))
        print(f"| {' | '.join([*cells, *describe_effort(logs)])} |", flush=True)


def describe_change(figure, entry):
    """The difference to the start, with its interval."""
    if entry["difference"] is None:
        return "not measured"
    bounds = [figure.scale * bound for bound in entry["difference_interval"] or []]
    change = figure.scale * entry["difference"]
    return format_with_interval(change, bounds, f"+.{figure.decimals}f")


def describe_effort(logs):
    """The mean number of steps and of minutes of runs, as text."""
    steps = []
    minutes = []
    for log in logs:
        steps.append(sum(entry["steps"] for entry in log["epochs"]))
        minutes.append(sum(entry["timing"]["seconds"] for entry in log["epochs"]) / 60)
    return [f"{np.mean(steps):.0f}", f"{np.mean(minutes):.1f}"]


def plot_curves(path, results):
    """Draw the change of both validation AUCs against the steps, the mean of each recipe's runs."""
    curves = {"val_auc": "twins", "val_general_auc": "everyone else"}
    with plot_figure(path, 13.0, 4.2, 1, 2) as panels:
        for axes, (key, people) in zip(panels, curves.items(), strict=True):
            for name, (logs, _) in results.items():
                # Runs stop at different epochs. The curve has those that all have.
                n_epochs = min(len(log["epochs"]) for log in logs)
                epochs = [log["epochs"][:n_epochs] for log in logs]
                values = np.array([[entry[key] for entry in of_run] for of_run in epochs], float)
                steps = np.array([[entry["steps"] for entry in of_run] for of_run in epochs])
                change = (values - values[:, :1]).mean(0)
                label = name if axes is panels[-1] else None  # one legend serves both panels
                axes.plot(steps.cumsum(1).mean(0), change, label=label)
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.set_xlabel("training steps")
            axes.set_ylabel(f"change of the validation AUC, {people}")


def parse_recipe(text):
    name, colon, flags = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"must be 'NAME: FLAGS', not {text!r}")
    return Recipe(name.strip(), shlex.split(flags))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="tests.study", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", nargs="+", type=Path, required=True, help="folders of data sets")
    add("--pretrained", required=True)
    add("--arch", default="ir_50")
    add("--output", default="study", help="folder for networks and results")
    add(
        "--recipe",
        action="append",
        required=True,
        type=parse_recipe,
        metavar="'NAME: FLAGS'",
        help="flags of train_twins.py",
    )
    add("--further", action="store_true", help="also train on all pairs, test on the test pairs")
    add("--folds", type=int, default=3, help="number of folds (default 3); 0 for none")
    add("--seed", type=int, nargs="+", default=[1, 2, 3])
    add("--device", default="auto")
    args = parser.parse_args(argv)
    for what, names in (
        ("--data", [data.name for data in args.data]),
        ("--recipe", [to_file_name(recipe.name) for recipe in args.recipe]),
    ):
        if len(set(names)) < len(names):
            parser.error(f"{what}: two have the same name, so they would share a folder")
    return args


def main(argv=None):
    args = parse_args(argv)
    parts = []
    if args.folds:
        parts.append((f"{args.folds} folds", True))
    if args.further:
        parts.append(("further people", False))
    tables = []
    for data in args.data:
        for title, cross_validate in parts:
            results = {}
            for recipe in args.recipe:
                results[recipe.name] = train_and_test(args, data, recipe, cross_validate)
            tables.append((f"{data.name}, {title}", results))
            plot_curves(Path(args.output, data.name, f"curves, {title}.png"), results)
    for title, results in tables:
        print_table(title, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
