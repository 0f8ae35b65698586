"""How well saved checkpoints tell twins apart: pair scores, verification metrics, pictures.

    python evaluate_twins.py --checkpoints pretrained/adaface_ir50_ms1mv2.ckpt models/*.pth
    python evaluate_twins.py --skip_alignment --checkpoints ...       # the crops of --aligned_json are there already

The score of two images is the cosine of their embeddings. Genuine pairs show one person, twin impostor pairs the two
twins of a pair, general impostor pairs people of different families. A threshold t accepts score >= t; FMR and FNMR as
in ISO/IEC 19795-1. Every image is embedded once, in float32. `train_twins.py` validates with the same functions.
"""

import csv
import glob
import os
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from align import Parser, add_alignment_arguments, align_files, between, file_names, read_inputs, run_script
from net import InputError, backbone_sha256, embed, leave, load_checkpoint, pick_device, progress, replacing
from triplet_dataset import People, TwinImages, write_json

FALSE_ACCEPT_RATES = (0.01, 0.001, 0.0001)  # of twin impostors, for TAR at FAR
GENERAL_MATCH_RATES = (0.001, 0.0001)  # of general impostors, where NIST IR 8439 sets the threshold
METRICS = ("eer", "eer_threshold", "auc", "best_accuracy", "accuracy_at_eer")
METRICS += (*(f"tar_at_far_{far:g}" for far in FALSE_ACCEPT_RATES), "general_auc")
METRICS += tuple(f"{name}_{far:g}" for far in GENERAL_MATCH_RATES for name in ("general_threshold", "twin_fmr", "fnmr"))
LOWER_IS_BETTER = ("eer", "twin_fmr", "fnmr")
GENERAL_PAIRS = 2_000_000  # of more general impostor pairs, so many are drawn
SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")  # of the checkpoints in a folder
MIN_FAMILIES = 6  # of fewer, the bootstrap knows too little for an interval or a verdict
# Okabe and Ito's colours, which people with any colour vision tell apart; line styles serve grey print.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")


# ---- pairs and metrics ----------------------------------------------------------------------------------------------
class Pairs:
    """Image pairs of one kind by ascending score: `scores` (K,), and `code` (K,), the family or families of each."""

    def __init__(self, scores, code):
        order = np.argsort(scores, kind="stable")
        self.scores, self.code = scores[order], code[order]
        self.below = np.zeros(len(code) + 1, np.int64)

    def weigh(self, table):
        """(K + 1,) int64, until the next call: what the k lowest pairs weigh, a pair of code c weighing table[c]."""
        np.take(table, self.code, out=self.below[1:], mode="clip")
        np.cumsum(self.below[1:], out=self.below[1:])
        return self.below


def verification_metrics(genuine, twin, general, weightings):
    """{name: (R,) float64} of the metrics for R weightings of the families, each (F,) int: how often it counts.

    genuine, twin and general: Pairs, whose codes are f, f and f * F + g for families f and g. A general pair counts
    w_f * w_g times, so copies of one family are no strangers. NaN where a weighting leaves none of the pairs needed.

    - "eer_threshold": the lowest score where |FMR - FNMR|, exactly compared, is least; "eer": the mean of both there.
    - "auc", "general_auc": the probability that a genuine score exceeds an impostor score, ties counting one half.
    - "best_accuracy": the largest share of right decisions over all thresholds; "accuracy_at_eer".
    - "tar_at_far_<rate>": the largest 1 - FNMR whose twin FMR is no more than that.
    - "general_threshold_<rate>": the lowest with no higher general FMR; "twin_fmr_<rate>", "fnmr_<rate>": those there.
    """
    thresholds = np.append(np.unique(np.concatenate([genuine.scores, twin.scores])), np.inf)
    genuine_at, twin_at = (np.searchsorted(pairs.scores, thresholds) for pairs in (genuine, twin))
    left, right = (np.searchsorted(general.scores, genuine.scores, side) for side in ("left", "right"))
    rows = []
    for families in weightings:
        below, twin_below = genuine.weigh(families), twin.weigh(families)
        general_below = general.weigh(np.outer(families, families).ravel())
        n, n_twin, n_general = below[-1], twin_below[-1], general_below[-1]
        rows.append(row := {})
        if n and n_twin:
            rejected, accepted = below[genuine_at], n_twin - twin_below[twin_at]  # genuine and twin weights
            at = np.argmin(np.abs(accepted * n - rejected * n_twin))  # integers, so exact
            accuracy = (n_twin - accepted + n - rejected) / (n + n_twin)
            row["eer"], row["eer_threshold"] = (accepted[at] / n_twin + rejected[at] / n) / 2, thresholds[at]
            row["auc"] = np.diff(rejected) @ (2 * n_twin - accepted[:-1] - accepted[1:]) / (2 * n * n_twin)
            row["best_accuracy"], row["accuracy_at_eer"] = accuracy.max(), accuracy[at]
            for far in FALSE_ACCEPT_RATES:  # FMR falls, FNMR rises with the threshold: the first that will do is best
                row[f"tar_at_far_{far:g}"] = 1 - rejected[np.argmax(accepted <= far * n_twin)] / n
        if n and n_general:
            row["general_auc"] = np.diff(below) @ (general_below[left] + general_below[right]) / (2 * n * n_general)
        for rate in GENERAL_MATCH_RATES if n and n_twin and n_general else ():
            allowed = int(rate * n_general + 1e-9)  # a float would make searchsorted convert all sums
            highest_rejected = np.searchsorted(general_below, n_general - allowed) - 1
            t = row[f"general_threshold_{rate:g}"] = np.nextafter(general.scores[highest_rejected], np.inf)
            row[f"twin_fmr_{rate:g}"] = 1 - twin_below[np.searchsorted(twin.scores, t)] / n_twin
            row[f"fnmr_{rate:g}"] = below[np.searchsorted(genuine.scores, t)] / n
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in METRICS}


class Estimate(NamedTuple):
    """The metrics of one network {name: float or None}; its resamples' {name: (R,)}, or None of too few families."""

    figures: dict
    samples: dict | None


class TwinEvaluator:
    """Scores and metrics of networks on the image pairs of one TwinImages.

    `rows` {"genuine", "twin", "general": (K, 2) int64} number the images of each pair; every unordered pair stands
    once. General pairs are all that there are, or GENERAL_PAIRS drawn from the seed if there are more (`drawn`).
    `counts`: of images, pairs of each kind and families with images. All networks meet the same `resamples` bootstrap
    resamples of the families, so differences are paired. Raises InputError without a genuine or a twin pair.
    """

    def __init__(self, images, seed=42, resamples=1000):
        self.images, generator = images, np.random.default_rng(seed)
        _, self.family = np.unique(images.family, return_inverse=True)  # families without an image do not count
        ranges = [np.arange(f, f + n) for f, n in zip(images.first, images.count, strict=True)]
        genuine = [person[np.c_[np.triu_indices(len(person), 1)]] for person in ranges]
        twin = [np.stack(np.meshgrid(ranges[a], ranges[b]), -1).reshape(-1, 2) for a, b in images.pairs]
        self.rows = {"genuine": np.concatenate(genuine), "twin": np.concatenate(twin)}
        for kind, reason in (("genuine", "no person has two images"), ("twin", "no pair has images of both twins")):
            if len(self.rows[kind]) == 0:
                raise InputError(f"nothing to evaluate: {reason} among the pairs; check the aligned crops")
        n, sizes = len(self.family), np.bincount(self.family)
        total = int(n**2 - (sizes**2).sum()) // 2
        self.counts = {"images": n, **{kind: len(rows) for kind, rows in self.rows.items()}}
        self.counts |= {"general": total, "families": len(sizes)}
        self.drawn = total > GENERAL_PAIRS
        general = generator.integers(n, size=(2 * GENERAL_PAIRS, 2)) if self.drawn else np.c_[np.triu_indices(n, 1)]
        self.rows["general"] = general[self.family[general[:, 0]] != self.family[general[:, 1]]][:GENERAL_PAIRS]
        self.weights = generator.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), resamples)

    def score(self, embeddings, chunk=1 << 16):
        """{kind: (K,) float64 cosines of `rows`}, of embeddings (N, 512) of unit length in the order of `images`."""
        scores = {}
        for kind, rows in self.rows.items():
            parts = torch.from_numpy(rows.T).to(embeddings.device).split(chunk, 1)
            scores[kind] = torch.cat([(embeddings[a] * embeddings[b]).sum(1) for a, b in parts]).cpu().double().numpy()
        return scores

    def _metrics(self, scores, weightings):
        codes = {kind: self.family[rows[:, 0]] for kind, rows in self.rows.items()}
        codes["general"] = codes["general"] * self.counts["families"] + self.family[self.rows["general"][:, 1]]
        return verification_metrics(*(Pairs(scores[kind], code) for kind, code in codes.items()), weightings)

    def figures(self, scores):
        """{name: float or None} of all metrics, each family counting once; a rate takes at least 1/rate impostors."""
        figures = {}
        for name, (value,) in self._metrics(scores, np.ones((1, self.counts["families"]), np.int64)).items():
            rate, impostors = name.rpartition("_")[2], self.counts["twin" if name.startswith("tar") else "general"]
            known = np.isfinite(value) and not (rate[0].isdigit() and impostors * float(rate) < 1)
            figures[name] = float(value) if known else None
        return figures

    def estimate(self, scores, description=None):
        """The Estimate of scores, with `description` as label of a progress bar, or None for none."""
        if self.counts["families"] < MIN_FAMILIES:
            return Estimate(self.figures(scores), None)
        weights = progress(self.weights, description, "resample") if description else self.weights
        return Estimate(self.figures(scores), self._metrics(scores, weights))


# ---- intervals and verdicts -----------------------------------------------------------------------------------------
def interval(samples):
    """[low, high], the 95 % percentile interval of bootstrap samples (R,), or None without finite ones."""
    return [float(x) for x in np.nanpercentile(samples, (2.5, 97.5))] if np.isfinite(samples).any() else None


def compare(estimate, baseline=None):
    """{name: {"value", "interval"}}, with a baseline also "difference", "difference_interval" and "verdict".

    The difference is taken on the same resamples of families. The one rule for better and worse: its 95 % interval
    excludes zero. "too few families to say" has no interval, "not measured" no figure; a threshold has no verdict.
    """
    result = {}
    for name, value in estimate.figures.items():
        known = value is not None and estimate.samples is not None
        entry = result[name] = {"value": value, "interval": interval(estimate.samples[name]) if known else None}
        if baseline is not None:
            both = value is not None and baseline.figures[name] is not None
            change = interval(estimate.samples[name] - baseline.samples[name]) if both and known else None
            verdict = "too few families to say" if both else "not measured"
            if change:
                better = "worse" if (change[0] > 0) == name.startswith(LOWER_IS_BETTER) else "better"
                verdict = "not distinguishable" if change[0] <= 0 <= change[1] else better
            entry["difference"], entry["difference_interval"] = value - baseline.figures[name] if both else None, change
            entry["verdict"] = None if "threshold" in name else verdict
    return result


def describe(comparison):
    """What a comparison with the start says of twins and of everyone else, as text: the verdicts on both AUCs."""
    words = []
    for name, people in (("auc", "twins"), ("general_auc", "everyone else")):
        entry = comparison[name]
        bounds = " [{:+.4f}, {:+.4f}]".format(*entry["difference_interval"]) if entry["difference_interval"] else ""
        change = "" if entry["difference"] is None else f" (AUC {entry['difference']:+.4f}{bounds})"
        words.append(f"{entry['verdict']} on {people}{change}")
    return ", ".join(words)


class Result(NamedTuple):
    """One checkpoint's evaluation."""

    name: str
    checkpoint: str
    facts: dict  # what the checkpoint says of its training, {} for upstream's
    scores: dict  # see TwinEvaluator.score
    estimate: Estimate
    overlap: list  # test IDs that the checkpoint was trained or validated on


def chosen_by_validation(results):
    """The name of the result with the highest validation AUC; None unless two or more share validation people."""
    known = [r for r in results if r.facts.get("metrics", {}).get("val_auc") is not None]
    groups = {tuple(sorted(r.facts["config"].get("val_ids", []))) for r in known}
    return max(known, key=lambda r: r.facts["metrics"]["val_auc"]).name if len(known) > 1 and len(groups) == 1 else None


# ---- files ----------------------------------------------------------------------------------------------------------
def write_csv(path, rows):
    """Write dicts with the same keys as a table, atomically."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def write_result(folder, evaluator, result, crops, home, flip):
    """metrics.json, pair_scores.csv and the pictures of one checkpoint into `folder`; paths as seen from `home`."""
    content = {"checkpoint": result.checkpoint, "counts": evaluator.counts, "figures": compare(result.estimate)}
    content |= {"general_pairs_drawn": evaluator.drawn, "flip": flip, "overlap": result.overlap}
    write_json(folder / "metrics.json", content)
    images, threshold, table = evaluator.images, result.estimate.figures["eer_threshold"], []
    image = [(os.path.relpath(path, home), images.ids[i]) for path, i in zip(images.paths, images.person, strict=True)]
    for kind in ("genuine", "twin"):
        for (a, b), score in zip(evaluator.rows[kind].tolist(), result.scores[kind].tolist(), strict=True):
            row = {"path_1": image[a][0], "path_2": image[b][0], "id_1": image[a][1], "id_2": image[b][1], "kind": kind}
            table.append({**row, "score": score, "accepted_at_eer": int(score >= threshold)})
    write_csv(folder / "pair_scores.csv", table)
    for kind in ("roc", "det"):
        with plot_figure(folder / f"{kind}_curve.png", 8.2) as axes:
            plot_rates(axes, [result], kind)
    plot_distributions(folder / "score_distributions.png", result)
    plot_hardest(folder / "hardest_pairs.png", evaluator, result, crops)


def write_comparison(folder, results):
    """comparison.json, whose content is returned, its table and pictures; the first result is the baseline."""
    first, entries, table = results[0], [], []
    for result in results:
        figures = compare(result.estimate, None if result is first else first.estimate)
        entry = {"name": result.name, "checkpoint": result.checkpoint, "overlap": result.overlap}
        entries.append({**entry, "validation": result.facts.get("metrics", {}), "figures": figures})
        for name, figure in figures.items():
            row = {"name": result.name, "checkpoint": result.checkpoint, "figure": name}
            for key, bounds in (("value", "interval"), ("difference", "difference_interval")):
                low, high = figure.get(bounds) or (None, None)
                row |= {key: figure.get(key), f"{key}_low": low, f"{key}_high": high}
            table.append({**row, "verdict": figure.get("verdict"), "overlap": len(result.overlap)})
    content = {"baseline": first.name, "chosen_by_validation": chosen_by_validation(results), "checkpoints": entries}
    write_json(folder / "comparison.json", content)
    write_csv(folder / "comparison.csv", table)
    plot_comparison(folder / "comparison.png", results, entries)
    plot_data_percentage(folder / "data_percentage.png", results, entries)
    return content


# ---- pictures -------------------------------------------------------------------------------------------------------
@contextmanager
def plot_figure(path, width=6.0, height=4.2, rows=1, columns=1):
    """Yield the axes (an array of several) of a picture; at the end they get a grid and, outside, a legend."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns)
    yield axes
    for one in np.atleast_1d(axes).flat:
        one.grid(alpha=0.3)
        if one.get_legend_handles_labels()[0]:
            one.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def plot_line(axes, number, x, y, **options):
    """Draw a line in the colour and style of its number, black for 0, the baseline; returns the colour."""
    colour = COLOURS[number and 1 + (number - 1) % (len(COLOURS) - 1)]
    axes.plot(x, y, **{"color": colour, "linestyle": STYLES[number % len(STYLES)], "linewidth": 1.2, **options})
    return colour


def literal(text):
    """Text for a picture as it is: matplotlib would read formulas between dollar signs."""
    return text.replace("$", r"\$")


def plot_rates(axes, results, kind):
    """ROC ("roc") or DET ("det") of genuine against twin impostor pairs, one line per result, with its EER."""
    lowest, bottom = 100 / len(results[0].scores["twin"]), 50.0  # a logarithmic axis has no 0: curves end at one pair
    for number, result in enumerate(results):
        genuine, twin = np.sort(result.scores["genuine"]), np.sort(result.scores["twin"])
        thresholds = np.append(np.unique(np.concatenate([genuine, twin])), np.inf)
        fmr = np.maximum(100 - 100 * np.searchsorted(twin, thresholds) / len(twin), lowest)
        fnmr = 100 * np.searchsorted(genuine, thresholds) / len(genuine)
        bottom = min(bottom, max(100 / len(genuine), fnmr[np.argmax(fmr <= 50)] / 2))
        eer, auc = 100 * result.estimate.figures["eer"], result.estimate.figures["auc"]
        label = f"{literal(result.name)}\nAUC {auc:.3f}, EER {eer:.1f} %"
        y, at = (100 - fnmr, 100 - eer) if kind == "roc" else (fnmr, eer)
        plot_line(axes, number, fmr, y, label=label, drawstyle="steps-post")
        plot_line(axes, number, [eer], [at], marker="o", markersize=4)
    chance = np.geomspace(lowest, 100, 200)
    axes.plot(chance, chance if kind == "roc" else 100 - chance, ":", color="grey", linewidth=1, label="chance")
    axes.set(xscale="log", xlim=(lowest, 100), xlabel="false match rate on twin impostors (%); dot: EER")
    limits, ylabel = ((0, 100), "true accept rate, 1 - FNMR (%)") if kind == "roc" else ((bottom, 100), "FNMR (%)")
    axes.set(ylim=limits, yscale="linear" if kind == "roc" else "log", ylabel=ylabel, title=kind.upper())
    for axis in (axes.xaxis, axes.yaxis) if kind == "det" else (axes.xaxis,):
        axis.set(major_formatter="{x:g}", minor_formatter=lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")


def plot_comparison(path, results, checkpoints):
    """The differences of all checkpoints to the baseline with 95 % intervals, and their DET with the legend."""
    shown = {"auc": "twin AUC", "eer": "EER", "general_auc": "general AUC", "fnmr_0.001": "FNMR at\ngeneral FMR 0.1 %"}
    with plot_figure(path, 13.0, 4.6, 1, 2) as (left, right):
        for number, entry in enumerate(checkpoints[1:], 1):
            for place, change in enumerate(entry["figures"][name] for name in shown):
                if change["difference"] is not None:
                    y = place + 0.6 * (number / len(checkpoints) - 0.5)
                    bounds = change["difference_interval"] or [change["difference"]]
                    plot_line(left, number, 100 * np.array(bounds), [y] * len(bounds))
                    plot_line(left, number, [100 * change["difference"]], [y], marker="o", markersize=4)
        left.axvline(0, color="black", linewidth=0.8)
        left.set(yticks=range(len(shown)), yticklabels=shown.values(), ylim=(len(shown) - 0.5, -0.5))
        left.set(title=f"difference to {literal(results[0].name)}", xlabel="points (0.01 of AUC), 95 % interval")
        plot_rates(right, results, "det")


def plot_distributions(path, result):
    """Distributions of genuine, twin impostor and general impostor scores, and the rates at two thresholds."""
    low, scores = -0.6, result.scores  # one axis for all checkpoints; what lies lower is counted in the first bin
    with plot_figure(path, 8.6) as axes:
        for number, (kind, values) in enumerate(scores.items(), 1):
            share = np.histogram(np.clip(values, low, 1), 80, (low, 1))[0] * 100 / max(1, len(values))
            label = kind if kind == "genuine" else f"{kind} impostor"
            plot_line(axes, number, np.linspace(low, 1, 80), share, label=label, drawstyle="steps-mid")
        for name, what in (("eer_threshold", "twin EER"), ("general_threshold_0.001", "general FMR 0.1 %")):
            if (at := result.estimate.figures[name]) is not None:
                text = f"threshold at {what}\nFNMR {100 * (scores['genuine'] < at).mean():.1f} %"
                text += f", twin FMR {100 * (scores['twin'] >= at).mean():.1f} %"
                if len(scores["general"]):
                    text += f"\ngeneral FMR {100 * (scores['general'] >= at).mean():.2g} %"
                axes.axvline(at, color="black", linewidth=1, linestyle="-" if "eer" in name else "--", label=text)
        axes.set(xlim=(low, 1), yscale="log", xlabel="score (cosine similarity)", title=literal(result.name))
        axes.set_ylabel("share of the image pairs per bin (%)")


def plot_hardest(path, evaluator, result, crops, columns=4):
    """Crops (N, 112, 112, 3) of the worst errors at the EER threshold, each crop once at most, each family twice."""
    threshold = result.estimate.figures["eer_threshold"]
    names = [literal("/".join(Path(p).parts[-2:])[-17:]) for p in evaluator.images.paths]
    with plot_figure(path, 2.4 * columns, 7.0, 4, columns) as grid:
        kinds = (("twin", "twins taken for one person", -1), ("genuine", "one person refused", 1))
        for axes, (kind, title, sign) in zip((grid[:2].flat, grid[2:].flat), kinds, strict=True):
            rows, values = evaluator.rows[kind], result.scores[kind]
            wrong = np.count_nonzero(values >= threshold if sign < 0 else values < threshold)
            axes[0].set_title(f"{title}: {wrong} of {len(values)} pairs\n", fontsize=7)
            seen, families, places = set(), [], iter(axes)
            for k in np.argsort(sign * values, kind="stable")[:wrong]:  # the farthest from the threshold first
                (a, b), family = rows[k], evaluator.family[rows[k][0]]
                if not {a, b} & seen and families.count(family) < 2 and (place := next(places, None)):
                    seen |= {a, b}
                    families.append(family)
                    place.imshow(np.concatenate([crops[a], crops[b]], 1))
                    place.set_title(f"{place.get_title()}score {values[k]:.3f}\n{names[a]} | {names[b]}", fontsize=6)
        title = f"{literal(result.name)}: mistakes at the EER threshold {threshold:.3f}, the most confident first"
        grid[0, 0].figure.suptitle(title, fontsize=9)
        for place in grid.flat:
            place.set_axis_off()


def plot_data_percentage(path, results, checkpoints):
    """Difference of the EER to the baseline against the share of triplets, one line per mode and margin."""
    lines, images = {}, {}
    for result, entry in zip(results[1:], checkpoints[1:], strict=True):
        config, change = result.facts.get("config", {}), entry["figures"]["eer"]
        if share := config.get("train_percentage"):
            setting = f"{'embedding layer' if config['freeze_backbone'] else 'full network'}, margin {config['margin']}"
            bounds = change["difference_interval"] or [change["difference"]] * 2
            lines.setdefault(setting, []).append((share, 100 * change["difference"], *(100 * b for b in bounds)))
            images[share] = f"{share} %\n{config['n_touched_images']} images"
    with plot_figure(path, 7.8) as axes:
        for number, (setting, points) in enumerate(sorted(lines.items()), 1):
            share, change, low, high = np.array(sorted(points)).T
            share = share * 1.04 ** (number - 1)  # beside each other
            colour = plot_line(axes, number, share, change, marker="o", label=setting)
            axes.vlines(share, low, high, color=colour, linewidth=1)
        axes.axhline(0, color="black", linewidth=0.8, label=f"{literal(results[0].name)} (baseline)")
        axes.set(xscale="log", xlim=(0.8, 160), xlabel="share of the training triplets, and distinct images in it")
        axes.set(title="How much data is enough", ylabel="change of the EER against twins (points, 95 %)")
        axes.set_xticks(list(images), images.values(), fontsize=7)
        axes.set_xticks([], minor=True)


# ---- terminal -------------------------------------------------------------------------------------------------------
def comparison_table(results, content):
    """Text for the terminal: the figures, the differences to the baseline in words, and how not to use them."""
    columns = {"EER %": "eer", "AUC": "auc", "best acc %": "best_accuracy", "TAR@FAR1%": "tar_at_far_0.01"}
    columns |= {"twin FMR %": "twin_fmr_0.001", "FNMR %": "fnmr_0.001", "general AUC": "general_auc"}
    width = max(len("checkpoint"), *(len(result.name) for result in results))
    lines = [f"{'checkpoint':{width}}  " + "  ".join(f"{title:>11}" for title in columns)]
    for result in results:
        lines.append(f"{result.name:{width}}")
        for name in columns.values():
            value = result.estimate.figures[name]
            known = [r.estimate.figures[name] for r in results if r.estimate.figures[name] is not None]
            best = len(results) > 1 and known and value == (min if name.startswith(LOWER_IS_BETTER) else max)(known)
            text = "-" if value is None else f"{value:.4f}" if name.endswith("auc") else f"{100 * value:.2f}"
            lines[-1] += f"  {text + ('*' if best else ' '):>11}"
    lines.append("Twin FMR and FNMR are at the threshold where the general FMR is 0.1 %; -: too few pairs to say.")
    for result, entry in zip(results, content["checkpoints"], strict=True):
        if result is not results[0]:
            lines.append(f"{result.name} against {results[0].name}: {describe(entry['figures'])}.")
            if "worse" in [entry["figures"][name]["verdict"] for name in ("general_auc", "fnmr_0.001")]:
                lines.append("  It got WORSE at recognising people in general.")
        if "against_start" in result.facts:
            lines.append(f"  Its training said of its validation people: {describe(result.facts['against_start'])}.")
        if seen := len(result.overlap):
            lines.append(f"OVERLAP: {result.name} has seen {seen} of the test people; it looks too good.")
    if len(results) > 1:
        lines.append("* best on this test set, a description: choosing by it would be selection on the test set.")
        chosen = content["chosen_by_validation"]
        lines.append(f"Validation would have chosen: {chosen}" if chosen else "No common validation to choose by.")
    return "\n".join(lines)


# ---- command line ---------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = Parser(prog="evaluate_twins.py", description="How well checkpoints tell the twins of a test set apart.")
    add = parser.add_argument
    add("--test_pairs", default="test_twin_id_pairs.json", help='JSON [["ID", "twin\'s ID"], ...]')
    add_alignment_arguments(parser, "test")
    add("--checkpoints", required=True, nargs="+", help="networks to compare, or folders of them")
    add("--baseline", help="what the others are compared to; by default the first")
    add("--output_dir", default="evaluation_results", help="where results go")
    add("--batch_size", type=between(int, 1, 10**6), help="images at once (256 on CUDA, 8 on a CPU); for speed only")
    add("--seed", type=between(int, 0, 2**32 - 1), default=42, help="of the bootstrap")
    add("--flip", action="store_true", help="embed each image and its mirror image, as one embedding")
    add("--allow_overlap", action="store_true", help="also evaluate on people a checkpoint was trained on, and say so")
    return parser.parse_args(argv)


def list_checkpoints(names, baseline):
    """The files among `names`, folders opened, the baseline first; each once."""
    files = [baseline] if baseline else []
    for name in names:
        found = sorted(glob.glob(name)) if "*" in name else [name]  # some shells leave that to the program
        if Path(name).is_dir():
            found = sorted(str(p) for p in Path(name).iterdir() if p.suffix in SUFFIXES and p.name[0] != ".")
        if not found:
            raise InputError(f"{name}: no file ending in {', '.join(SUFFIXES)} there")
        files += found
    return list({os.path.abspath(file): file for file in files}.values())


def evaluate(args):
    """The whole evaluation of the command line; returns the list of Results, the baseline first."""
    device = pick_device(args.device)
    flag = "aligned_json" if args.skip_alignment else "id_to_images"
    listed, pairs, notes = read_inputs(args, flag, "test_pairs")
    tested, facts, backbones, overlaps = {name for pair in pairs for name in pair}, {}, {}, {}
    for path in list_checkpoints(args.checkpoints, args.baseline):  # before hours of alignment
        model = load_checkpoint(path, channels=args.channels)
        facts[path] = model.facts
        backbones.setdefault(backbone_sha256(model), []).append(path)
        config = model.facts.get("config", {})
        overlaps[path] = sorted(tested & {*config.get("train_ids", []), *config.get("val_ids", [])})
        trained = config.get("aligned_folder")
        if overlaps[path] and not args.allow_overlap:
            who = f"{len(overlaps[path])} of the {len(tested)} test people: {', '.join(overlaps[path])}"
            raise InputError(f"{path}: was trained or validated on {who}; test on others, or say --allow_overlap")
        if trained and not args.skip_alignment and os.path.abspath(trained) == os.path.abspath(args.aligned_folder):
            raise InputError(f"--aligned_folder {trained}: {path} was trained from there; name another")
    people = People(listed if args.skip_alignment else align_files(args, "test_pairs"), pairs)
    for path in [] if args.allow_overlap else facts:
        if seen := len({*facts[path].get("crop_sha256", [])} & {*people.crops.sha256}):
            raise InputError(f"{path}: {seen} test images are among those it was trained on; see --allow_overlap")
    images = TwinImages(people.id_to_images, pairs)
    evaluator = TwinEvaluator(images, args.seed)
    if (images.count == 0).any():
        notes.append(f"{(images.count == 0).sum()} people have no crop; their pairs are not tested")
    for note in notes + people.warnings:
        print(f"warning: {note}")
    pixels, home = people.crops.pixels[people.rows(images.paths)], os.path.dirname(os.path.abspath(args.aligned_json))
    output, names, results = Path(args.output_dir), file_names(facts), {}
    for group in backbones.values():
        models = [load_checkpoint(path, channels=args.channels) for path in group]
        embeddings = embed(models, pixels, device, args.batch_size, f"embedding with {names[group[0]]}", args.flip)
        for path, embedding in zip(group, embeddings, strict=True):
            scores = evaluator.score(embedding)
            estimate = evaluator.estimate(scores, f"resampling {names[path]}")
            results[path] = Result(names[path], path, facts[path], scores, estimate, overlaps[path])
            write_result(output / names[path], evaluator, results[path], pixels, home, args.flip)
    results, counts = [results[path] for path in facts], evaluator.counts
    content = write_comparison(output, results)
    print(f"{counts['images']} images of {len(images.ids)} people in {counts['families']} families, on {device}:")
    print(f"{counts['genuine']} genuine, {counts['twin']} twin impostor, {counts['general']} general impostor pairs")
    print(comparison_table(results, content), f"results in {args.output_dir}", sep="\n")
    return results


def main(argv=None):
    """Evaluate; returns the exit code (see align.run_script)."""
    return run_script("evaluate_twins.py", lambda: evaluate(parse_args(argv)), "interrupted; what is done is saved")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    leave(main())
