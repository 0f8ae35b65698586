"""Which settings help people who were in no part of the training? By hand, not in CI.

    python -m tests.study --pairs train_twin_id_pairs.json --aligned_json id_to_train_aligned_images.json \\
      --pretrained adaface_ir18_distilled.ckpt --arch ir_18 --output study --seeds 1 2 3 \\
      --recipe "default: --freeze_backbone" --recipe "the plan: --freeze_backbone --learning_rate 1e-3 ..."

The pairs are dealt into folds of whole families. Each recipe (a name and flags of train_twins.py) is trained on all
folds but one, with every seed, and tested on that one, so every pair is tested by networks that have seen neither of
its people. The figures are means over folds and seeds of the difference to the start; their 95 % intervals are a
bootstrap over families, the same resamples for all. With --test_pairs and --test_aligned_json a second table says the
same of those people. Runs that are there are not made again, so a recipe can be added later.
"""

import argparse
import re
from pathlib import Path

import numpy as np

import train_twins
from evaluate_twins import TwinEvaluator, interval, plot_figure
from net import embed, load_checkpoint, pick_device
from triplet_dataset import TwinImages, find_families, load_crops, read_id_to_images, read_pairs, write_json

FIGURES = {"auc": ("twin AUC", 1), "eer": ("twin EER, points", 100), "general_auc": ("general AUC", 1)}
FIGURES |= {"fnmr_0.001": ("FNMR at general FMR 0.1 %, points", 100)}


def folds(pairs, n):
    """n lists of pairs, whole families each."""
    family = find_families(pairs)
    fold = np.random.default_rng(0).permutation(max(family.values()) + 1) % n
    return [[pair for pair in pairs if fold[family[pair[0]]] == k] for k in range(n)]


def estimates(id_to_images, pairs, checkpoints, device, resamples):
    """[(figures, samples) of each checkpoint] on the people of the pairs; checkpoints of one backbone run it once."""
    images = TwinImages(id_to_images, pairs)
    evaluator = TwinEvaluator(images, resamples=resamples)
    crops = load_crops(images.paths).pixels
    models = [load_checkpoint(checkpoint) for checkpoint in checkpoints]
    frozen = [m.facts.get("config", {}).get("freeze_backbone", True) for m in models]
    groups = [[m for m, f in zip(models, frozen, strict=True) if f]]
    groups += [[m] for m, f in zip(models, frozen, strict=True) if not f]
    found = {}
    for group in filter(None, groups):
        for model, embedding in zip(group, embed(group, crops, device, description="testing"), strict=True):
            found[id(model)] = tuple(evaluator.estimate(evaluator.score(embedding)))
    return [found[id(model)] for model in models]


def print_table(title, recipes, results, starts):
    """results {recipe: [(fold, figures, samples), ...]}; starts {fold: (figures, samples)}."""
    print(
        f"\n{title}; start: "
        + ", ".join(
            f"{label} {scale * np.mean([figures[name] for figures, _ in starts.values()]):.4f}"
            for name, (label, scale) in FIGURES.items()
        )
    )
    print(f"| recipe | {' | '.join(label for label, _ in FIGURES.values())} | steps | minutes |")
    print("| --- " * (len(FIGURES) + 3) + "|")
    for recipe in recipes:
        cells = []
        for name, (_, scale) in FIGURES.items():
            changes = [scale * (figures[name] - starts[fold][0][name]) for fold, figures, _ in results[recipe]]
            samples = np.mean([s[name] - starts[fold][1][name] for fold, _, s in results[recipe]], 0)
            low, high = interval(scale * samples)
            digits = 4 if scale == 1 else 2
            cells.append(f"{np.mean(changes):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")
        print(f"| {recipe} | {' | '.join(cells)} | {recipes[recipe]} |", flush=True)


def plot_curves(path, logs):
    """Change of the validation AUC against the epoch, means of the runs; logs {recipe: [training log, ...]}."""
    with plot_figure(path, 12.0, 3.8, 1, 2) as panels:
        for name, runs in logs.items():
            epochs = range(min(len(log["epochs"]) for log in runs))
            for axes, key in zip(panels, ("val_auc", "val_general_auc"), strict=True):
                values = np.array([[log["epochs"][epoch][key] for epoch in epochs] for log in runs], float)
                change = (values - values[:, :1]).mean(0)
                axes.plot(np.linspace(0, 1, len(epochs)), change, label=name)
        for axes, who in zip(panels, ("twins", "everyone else"), strict=True):
            axes.set(xlabel="share of the run's epochs", ylabel=f"change of the validation AUC, {who}")
            axes.axhline(0, color="grey", linewidth=0.8)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tests.study", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", required=True, help="train_twin_id_pairs.json")
    parser.add_argument("--aligned_json", required=True, help="the list of their crops")
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--arch", default="ir_50")
    parser.add_argument("--output", default="study", help="where networks and results go")
    parser.add_argument("--recipe", action="append", default=[], metavar="'NAME: FLAGS'", help="of train_twins.py")
    parser.add_argument("--test_pairs", help="of further people, for a last look")
    parser.add_argument("--test_aligned_json", help="the list of their crops")
    parser.add_argument("--folds", type=int, default=3, help="how many to deal the pairs into")
    parser.add_argument("--use_folds", type=int, nargs="+", help="test on these alone, where time is short")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--resamples", type=int, default=400)
    args = parser.parse_args(argv)
    output, device = Path(args.output), pick_device(args.device)
    images = read_id_to_images(args.aligned_json)
    pairs, _ = read_pairs(args.pairs, images)
    parts = folds(pairs, args.folds)
    used = args.use_folds or range(args.folds)
    people, logs, recipes = {}, {}, {}
    for recipe in args.recipe:
        name, _, flags = recipe.partition(":")
        for fold in used:
            train_pairs = output / f"pairs{fold}.json"
            write_json(train_pairs, [pair for k, part in enumerate(parts) if k != fold for pair in part])
            for seed in args.seeds:
                run = f"{re.sub('[^A-Za-z0-9.]+', '-', name).strip('-.')}_fold{fold}_seed{seed}"
                common = ["--train_pairs", train_pairs, "--aligned_json", args.aligned_json, "--skip_alignment"]
                common += ["--pretrained", args.pretrained, "--arch", args.arch, "--resume", "--seed", seed]
                common += ["--output_dir", output / "models", "--log_dir", output / "logs", "--run_name", run]
                arguments = [str(flag) for flag in [*common, "--device", args.device, *flags.split()]]
                trainer = train_twins.TwinTrainer(*train_twins.parse_runs(arguments), people.get(fold))
                logs.setdefault(name, []).append((fold, trainer.train()))
                people[fold] = trainer.people or people.get(fold)
        minutes = [sum(e["timing"]["seconds"] for e in log["epochs"]) / 60 for _, log in logs[name]]
        steps = [sum(e.get("steps", 0) for e in log["epochs"]) for _, log in logs[name]]
        recipes[name] = f"{np.mean(steps):.0f} | {np.mean(minutes):.1f}"
    plot_curves(output / "curves.png", {name: [log for _, log in runs] for name, runs in logs.items()})

    looks = {"Held-out folds": {fold: (images, parts[fold]) for fold in used}}
    if args.test_pairs:
        further = read_id_to_images(args.test_aligned_json)
        looks["Further people"] = dict.fromkeys(used, (further, read_pairs(args.test_pairs, further)[0]))
    for title, tested in looks.items():
        results, starts = {}, {}
        for fold in used:
            runs = [(name, log["best_checkpoint"]) for name in logs for f, log in logs[name] if f == fold]
            checkpoints = [args.pretrained, *(checkpoint for _, checkpoint in runs)]
            starts[fold], *found = estimates(*tested[fold], checkpoints, device, args.resamples)
            for (name, _), estimate in zip(runs, found, strict=True):
                results.setdefault(name, []).append((fold, *estimate))
        print_table(title, recipes, results, starts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
