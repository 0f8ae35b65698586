"""Does it learn as well with grouped steps, and how long does it take? By hand, not in CI.

    python -m tests.study_batching --pairs train_twin_id_pairs.json --aligned_json id_to_train_aligned_images.json \\
      --pretrained adaface_ir18_distilled.ckpt --arch ir_18 --output batching \\
      --setting "shuffled: --freeze_backbone --batching shuffled" \\
      --setting "grouped 96: --freeze_backbone --batching grouped --images_per_batch 96 --learning_rate 1e-4"

Each setting (a name and flags of train_twins.py) is trained with every seed, which decides split, triplets and order.
From the logs come EER and AUC on the validation people, as change from the network before training, and the seconds of
training (validation taken out) until the mean over the seeds is --points of EER below or --auc of AUC above that.
Results that are there are not made again.
"""

import argparse
import re
from itertools import pairwise
from pathlib import Path

import numpy as np

import train_twins
from evaluate_twins import new_figure, save_figure


def curves(log):
    """Of one run: (seconds of training, change of EER in points, change of AUC) after each epoch, (epochs + 1, 3)."""
    epochs = log["epochs"]
    seconds = [0.0] + [e["timing"]["seconds"] - e["timing"]["validation_seconds"] for e in epochs[1:]]
    change = [[100 * (e["val_eer"] - epochs[0]["val_eer"]), e["val_auc"] - epochs[0]["val_auc"]] for e in epochs]
    return np.column_stack((np.cumsum(seconds), change))


def time_to(seconds, gains, goal):
    """Seconds at which the gain reaches the goal, linearly between epochs, as text."""
    for (t0, gain0), (t1, gain1) in pairwise(zip(seconds, gains, strict=True)):
        if gain1 >= goal:
            return f"{t0 + (t1 - t0) * (goal - gain0) / (gain1 - gain0):.0f}"
    return "never"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tests.study_batching", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", required=True, help="train_twin_id_pairs.json")
    parser.add_argument("--aligned_json", required=True, help="the list of their crops")
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--arch", default="ir_50")
    parser.add_argument("--output", default="batching", help="where networks and results go")
    parser.add_argument("--setting", action="append", required=True, metavar="'NAME: FLAGS'", help="of train_twins.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--points", type=float, default=0.5, help="of EER below the start (default 0.5)")
    parser.add_argument("--auc", type=float, default=0.003, help="above the start (default 0.003)")
    parser.add_argument("--validation_split", default="0.3")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    output, lines = Path(args.output), []
    figure, both = new_figure(11.0, 4.2, 1, 2)
    for setting in args.setting:
        name, _, flags = setting.partition(":")
        runs = []
        for seed in range(args.seeds):
            run = f"{re.sub('[^A-Za-z0-9.]+', '-', name).strip('-.')}_seed{seed}"
            common = ["--train_pairs", args.pairs, "--aligned_json", args.aligned_json, "--skip_alignment"]
            common += ["--pretrained", args.pretrained, "--arch", args.arch, "--device", args.device]
            common += ["--output_dir", output / "models", "--log_dir", output / "logs", "--run_name", run, "--resume"]
            common += ["--validation_split", args.validation_split, "--seed", seed, "--patience", 1000]
            arguments = [str(flag) for flag in [*common, *flags.split()]]
            runs.append(curves(train_twins.TwinTrainer(train_twins.parse_args(arguments)).train()))
        mean, last = np.mean(runs, 0), np.array([run[-1, 1:] for run in runs])
        cells = [
            f"{values.mean():+.{digits}f} ({values.min():+.{digits}f} to {values.max():+.{digits}f})"
            for values, digits in ((last[:, 0], 2), (last[:, 1], 4))
        ]
        cells += [f"{mean[-1, 0]:.0f}", time_to(mean[:, 0], -mean[:, 1], args.points)]
        cells += [time_to(mean[:, 0], mean[:, 2], args.auc)]
        lines.append(f"| {name.strip()} | {' | '.join(cells)} |")
        for axes, column in zip(both, (1, 2), strict=True):
            axes.plot(mean[:, 0], mean[:, column], marker="o", markersize=3, label=name.strip())
    for axes, label in zip(both, ("EER (percentage points)", "twin AUC"), strict=True):
        axes.set(xlabel="training time (s)", ylabel=f"change of the validation {label}")
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=0)
        axes.axhline(0, color="gray", linewidth=0.8)
    save_figure(figure, output / "batching.png", both[1])
    head = ("setting", "EER at the end, points (lowest to highest seed)", "AUC at the end", "seconds")
    print(f"| {' | '.join(head)} | seconds to {-args.points:g} points | to {args.auc:+g} of AUC |")
    print("| --- " * 6 + "|")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
