"""Does a recipe help on people who were not in the training set? By hand, not in CI.

    python -m tests.study --pairs train_twin_id_pairs.json --aligned_json id_to_train_aligned_images.json \\
      --pretrained adaface_ir18_distilled.ckpt --arch ir_18 --output study \\
      --recipe "frozen: --freeze_backbone --train_percentage 1 --epochs 5" \\
      --recipe "full: --batching grouped --images_per_batch 64 --epochs 1"

The pairs are cut into family-disjoint folds. For each recipe (a name and flags of train_twins.py) a network is trained
on all folds but one and tested on that one, so every pair is tested once, by a network that has seen neither of its
people. The figures are means over the folds; the differences to the start are paired, their 95 % intervals a bootstrap
over the families of all folds. With --test_pairs and --test_aligned_json a second row says the same of those people,
tested with the networks of all folds. curves.png shows the epochs, as means over the folds. The README's tables on
fine-tuning come from here. Results that are there are not made again, so that a recipe can be added later.
"""

import argparse
import re
import time
from pathlib import Path

import numpy as np

import train_twins
from align import pick_device, read_id_to_images, read_json, read_pairs, write_json
from evaluate_twins import COLOURS, TwinEvaluator, new_figure, save_figure
from net import load_checkpoint
from triplet_dataset import find_families, hash_key, permute

FIGURES = {"auc": ("twin AUC", 1), "eer": ("twin EER, points", 100), "general_auc": ("general AUC", 1)}
FIGURES |= {"fnmr_0.001": ("FNMR at general FMR 0.1 %, points", 100)}


def folds(pairs, n):
    """n lists of pairs, whole families each, in an order of their own."""
    family = find_families(pairs)
    count = max(family.values()) + 1
    fold = permute(np.arange(count), count, hash_key("folds")) % n
    return [[pair for pair in pairs if fold[family[pair[0]]] == k] for k in range(n)]


def row(name, results, start, minutes):
    """A line of the table; results, start: (figures, bootstrap samples) of each fold."""
    cells = []
    for figure, (_, scale) in FIGURES.items():
        change = np.mean([r[0][figure] - s[0][figure] for r, s in zip(results, start, strict=True)])
        samples = np.mean([r[1][figure] - s[1][figure] for r, s in zip(results, start, strict=True)], 0)
        low, high = np.nanpercentile(samples, (2.5, 97.5))
        digits = 4 if scale == 1 else 2
        cells.append(f"{scale * change:+.{digits}f} [{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]")
    return f"| {name} | {' | '.join(cells)} | {minutes:.1f} |"


def scores(evaluators, checkpoints, name):
    """(figures, bootstrap samples) of each evaluator's people with the checkpoint at its place."""
    pairs = zip(evaluators, checkpoints, strict=True)
    return [e.metrics(e.score(load_checkpoint(checkpoint), name)) for e, checkpoint in pairs]


def plot_curves(path, logs):
    """Losses, and changes of EER and AUC on the validation people; logs: {recipe: [content of training_log.json]}."""
    figure, panels = new_figure(15.0, 3.8, 1, 3)
    for (name, runs), colour in zip(logs.items(), COLOURS, strict=False):
        epochs = range(min(len(log["epochs"]) for log in runs))

        def curve(key, runs=runs, epochs=epochs):
            values = [[log["epochs"][epoch][key] for epoch in epochs] for log in runs]
            return np.array(values, float).mean(0)  # None, without validation, becomes NaN: no line

        style = {"color": colour, "marker": "o", "markersize": 3}
        panels[0].plot(epochs, curve("train_loss"), **style)
        panels[0].plot(epochs, curve("val_loss"), linestyle="--", **style)
        for axes, key, scale in zip(panels[1:], ("val_eer", "val_auc"), (100, 1), strict=True):
            axes.plot(epochs, scale * (curve(key) - curve(key)[0]), label=name, **style)
    panels[0].set(ylim=(0, None), ylabel="triplet loss (solid: training, dashed: validation)")
    panels[1].set_ylabel("change of the validation EER (points)")
    panels[2].set_ylabel("change of the validation twin AUC")
    for axes in panels:
        axes.set_xlabel("epoch (0: before training)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
    save_figure(figure, path, panels[-1])


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
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--resamples", type=int, default=400)
    args = parser.parse_args(argv)
    output, device = Path(args.output), pick_device(args.device)
    images, pairs = read_id_to_images(args.aligned_json), read_pairs(args.pairs)
    parts = folds(pairs, args.folds)
    evaluators = [TwinEvaluator(images, part, device, resamples=args.resamples) for part in parts]
    looks = {"": evaluators}
    if args.test_pairs:
        further = read_id_to_images(args.test_aligned_json), read_pairs(args.test_pairs)
        looks[" (further people)"] = [TwinEvaluator(*further, device, resamples=args.resamples)] * args.folds
    starts = {look: scores(people, [args.pretrained] * args.folds, "start") for look, people in looks.items()}
    for look, start in starts.items():
        mean = {name: np.mean([figures[name] for figures, _ in start]) for name in FIGURES}
        print(f"start{look}: " + ", ".join(f"{label} {s * mean[name]:.4f}" for name, (label, s) in FIGURES.items()))
    print(f"| recipe | {' | '.join(label for label, _ in FIGURES.values())} | minutes |")
    print("| --- " * (len(FIGURES) + 2) + "|")
    logs = {}
    for recipe in args.recipe:
        name, _, flags = recipe.partition(":")
        name, checkpoints, minutes = name.strip(), [], 0.0
        for number in range(args.folds):
            run = f"{re.sub('[^A-Za-z0-9.]+', '-', name).strip('-.')}_fold{number}"
            kept = output / f"{run}.json"
            if not kept.exists():
                began = time.perf_counter()
                write_json(output / f"pairs{number}.json", [p for k, q in enumerate(parts) if k != number for p in q])
                common = ["--train_pairs", output / f"pairs{number}.json", "--aligned_json", args.aligned_json]
                common += ["--skip_alignment", "--pretrained", args.pretrained, "--arch", args.arch, "--resume"]
                common += ["--output_dir", output / "models", "--log_dir", output / "logs", "--run_name", run]
                arguments = [str(flag) for flag in [*common, "--device", args.device, *flags.split()]]
                log = train_twins.TwinTrainer(train_twins.parse_args(arguments)).train()
                write_json(kept, [log["best_checkpoint"], (time.perf_counter() - began) / 60])
            checkpoint, seconds = read_json(kept)
            minutes += seconds
            checkpoints.append(checkpoint)
            logs.setdefault(name, []).append(read_json(output / "logs" / run / "training_log.json"))
        for look, people in looks.items():
            print(row(name + look, scores(people, checkpoints, name), starts[look], minutes), flush=True)
    plot_curves(output / "curves.png", logs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
