"""How well saved checkpoints tell twins apart: pair scores, verification metrics, pictures.

    python evaluate_twins.py --checkpoints pretrained/adaface_ir50_ms1mv2.ckpt models/*.pth
    python evaluate_twins.py --skip_alignment --checkpoints ...       # the crops of --aligned_json are there already

The score of two images is the cosine of their embeddings, float32. Genuine pairs show one person, twin impostor pairs
two twins, general impostor pairs people of different families. A threshold t accepts score >= t; FMR and FNMR as in
ISO/IEC 19795-1. `train_twins.py` validates with the same functions.
"""

import os
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import cycler, rc_context
from matplotlib.figure import Figure

import net
from align import Parser, add_alignment_arguments, align_files, between, file_names, read_inputs, run_script
from net import InputError, progress
from triplet_dataset import People, TwinImages, write_csv, write_json

FALSE_ACCEPT_RATES = (0.01, 0.001, 0.0001)  # of twin impostors, for TAR at FAR
GENERAL_MATCH_RATES = (0.001, 0.0001)  # of general impostors, where NIST IR 8439 sets the threshold
# Operating points from validation: which figure of the validation people is the threshold, and what it is for.
OPERATING_POINTS = {"val_eer": ("eer_threshold", "equal errors on twins")}
OPERATING_POINTS["val_general"] = ("general_threshold_0.001", "a general FMR of 0.1 %")
METRICS = ("eer", "eer_threshold", "auc", "best_accuracy", "accuracy_at_eer")
METRICS += (*(f"tar_at_far_{far:g}" for far in FALSE_ACCEPT_RATES), "general_auc")
METRICS += tuple(f"general_threshold_{rate:g}" for rate in GENERAL_MATCH_RATES)
RATES = ("twin_fmr", "general_fmr", "fnmr")  # at each general threshold and at each operating point
METRICS += tuple(f"{rate}_{at}" for at in (*map(str, GENERAL_MATCH_RATES), *OPERATING_POINTS) for rate in RATES)
LOWER_IS_BETTER = ("eer", *RATES)
# What makes two training runs two settings, by their config.json; the seed does not, and the last gives no name.
SETTINGS = ("freeze_backbone", "train_percentage", "margin", "distance", "images_per_batch", "batch_size", "epochs")
SETTINGS += ("quadruplet_weight", "drift_weight", "learning_rate", "schedule", "weight_decay", "monitor", "patience")
SETTINGS += ("precision", "arch", "pretrained", "validation_split", "split_seed", "crops_sha256", "used_precision")
GENERAL_PAIRS = 2_000_000  # of more general impostor pairs, so many are drawn
MIN_FAMILIES = 6  # of fewer, the bootstrap knows too little for an interval or a verdict
# Okabe and Ito's colours, which people with any colour vision tell apart; line styles serve grey print.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
PICTURE_STYLE = {"axes.prop_cycle": cycler(color=COLOURS, linestyle=STYLES), "lines.linewidth": 1.2, "axes.grid": True}
PICTURE_STYLE |= {"lines.markersize": 4, "grid.alpha": 0.3, "legend.frameon": False, "legend.fontsize": 8}
PICTURE_STYLE |= {"text.parse_math": False}  # a name may hold dollar signs


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


def verification_metrics(genuine, twin, general, weightings, applied=None):
    """{name: (R,) float64} of the metrics for R weightings of the families, each (F,) int: how often it counts.

    genuine, twin and general: Pairs, whose codes are f, f and f * F + g for families f and g. A general pair counts
    w_f * w_g times, so copies of one family are no strangers. NaN where a weighting leaves none of the pairs needed.

    "eer_threshold": the lowest score where |FMR - FNMR|, exactly compared, is least; "eer": the mean of both there.
    "auc", "general_auc": the probability that a genuine score exceeds an impostor score, ties counting one half.
    "best_accuracy": the largest share of right decisions over all thresholds; "accuracy_at_eer".
    "tar_at_far_<rate>": the largest 1 - FNMR whose twin FMR is no more than that. "general_threshold_<rate>": the
    lowest with no higher general FMR. "twin_fmr_<name>", "general_fmr_<name>", "fnmr_<name>": the rates at a general
    threshold, named by its rate, and at those of `applied`, {name: threshold that other people gave}.
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
        if n and n_twin and n_general:
            points = dict(applied or {})
            for rate in GENERAL_MATCH_RATES:
                allowed = int(rate * n_general + 1e-9)  # a float would make searchsorted convert all sums
                highest_rejected = np.searchsorted(general_below, n_general - allowed) - 1
                t = points[f"{rate:g}"] = np.nextafter(general.scores[highest_rejected], np.inf)
                row[f"general_threshold_{rate:g}"] = t
            for name, t in points.items():
                row[f"twin_fmr_{name}"] = 1 - twin_below[np.searchsorted(twin.scores, t)] / n_twin
                row[f"general_fmr_{name}"] = 1 - general_below[np.searchsorted(general.scores, t)] / n_general
                row[f"fnmr_{name}"] = below[np.searchsorted(genuine.scores, t)] / n
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in METRICS}


class Estimate(NamedTuple):
    """The metrics of one network {name: float or None}; its resamples' {name: (R,)}, or None of too few families."""

    figures: dict
    samples: dict | None


class TwinEvaluator:
    """Scores and metrics of networks on the image pairs of one TwinImages.

    `rows` {"genuine", "twin", "general": (K, 2) int64}: the images of each unordered pair; of general pairs all, or
    GENERAL_PAIRS drawn from the seed if there are more (`drawn`). `counts`: of images, pairs by kind, families. All
    networks meet the same `resamples` of the families. Raises InputError without a genuine or a twin pair.
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

    def score(self, embeddings, chunk=1 << 12):  # whose products stay in a CPU's cache
        """{kind: (K,) float64 cosines of `rows`}, of embeddings (N, 512) of unit length in the order of `images`."""
        scores = {}
        for kind, rows in self.rows.items():
            parts = torch.from_numpy(rows.T).to(embeddings.device).split(chunk, 1)
            scores[kind] = torch.cat([(embeddings[a] * embeddings[b]).sum(1) for a, b in parts]).cpu().double().numpy()
        return scores

    def _metrics(self, scores, weightings, applied):
        codes = {kind: self.family[rows[:, 0]] for kind, rows in self.rows.items()}
        codes["general"] = codes["general"] * self.counts["families"] + self.family[self.rows["general"][:, 1]]
        return verification_metrics(*(Pairs(scores[kind], code) for kind, code in codes.items()), weightings, applied)

    def figures(self, scores, applied=None):
        """{name: float or None} of all metrics, each family counting once; a rate takes at least 1/rate impostors."""
        figures = {}
        for name, (value,) in self._metrics(scores, np.ones((1, self.counts["families"]), np.int64), applied).items():
            rate, impostors = name.rpartition("_")[2], self.counts["twin" if name.startswith("tar") else "general"]
            known = np.isfinite(value) and not (rate[0].isdigit() and impostors * float(rate) < 1)
            figures[name] = float(value) if known else None
        return figures

    def estimate(self, scores, description=None, applied=None):
        """The Estimate of scores, with `description` as label of a progress bar, or None for none."""
        if self.counts["families"] < MIN_FAMILIES:
            return Estimate(self.figures(scores, applied), None)
        weights = progress(self.weights, description, "resample") if description else self.weights
        return Estimate(self.figures(scores, applied), self._metrics(scores, weights, applied))


def interval(samples):
    """[low, high], the 95 % percentile interval of bootstrap samples (R,), or None without finite ones."""
    return [float(x) for x in np.nanpercentile(samples, (2.5, 97.5))] if np.isfinite(samples).any() else None


def compare(estimates, baseline=None):
    """{name: {"value", "interval"}}, with a baseline also "difference", "difference_interval" and "verdict".

    estimates: of one network, or of several, then their means and the "range" of the value. The one rule for better and
    worse: the difference's 95 % interval, on the same resamples of families, excludes zero. A threshold has no verdict.
    """
    result = {}
    for name in estimates[0].figures:
        values = [estimate.figures[name] for estimate in estimates]
        value = None if None in values else sum(values) / len(values)
        known = value is not None and estimates[0].samples is not None
        samples = np.mean([estimate.samples[name] for estimate in estimates], 0) if known else np.array([])
        entry = result[name] = {"value": value, "interval": interval(samples)}
        if len(estimates) > 1:
            entry["range"] = None if value is None else [min(values), max(values)]
        if baseline is not None:
            both = value is not None and baseline.figures[name] is not None
            change = interval(samples - baseline.samples[name]) if both and known else None
            verdict = "too few families to say" if both else "not measured"
            if change:
                better = "worse" if (change[0] > 0) == name.startswith(LOWER_IS_BETTER) else "better"
                verdict = "not distinguishable" if change[0] <= 0 <= change[1] else better
            entry["difference"], entry["difference_interval"] = value - baseline.figures[name] if both else None, change
            entry["verdict"] = None if "threshold" in name else verdict
    return result


def spell(value, bounds, form, scale=1):
    """A figure and its interval, which may be None, as text: "0.12 [0.10, 0.15]"."""
    numbers = [f"{scale * x:{form}}" for x in (value, *(bounds or []))]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]" if bounds else numbers[0]


def describe(comparison):
    """What a comparison with a baseline says of twins and of everyone else, as text: the verdicts on both AUCs."""
    words = []
    for name, people in (("auc", "twins"), ("general_auc", "everyone else")):
        change, bounds, verdict = (comparison[name][key] for key in ("difference", "difference_interval", "verdict"))
        words.append(f"{verdict} on {people}" + ("" if change is None else f" (AUC {spell(change, bounds, '+.4f')})"))
    return ", ".join(words)


class Result(NamedTuple):
    """One checkpoint's evaluation."""

    name: str
    checkpoint: str
    config: dict  # of its training, {} for upstream's
    validation: dict  # the figures of its validation people, or {}
    scores: dict  # see TwinEvaluator.score
    estimate: Estimate
    overlap: list  # test IDs that the checkpoint was trained or validated on


class Setting(NamedTuple):
    """Results that differ in nothing but the seed."""

    name: str
    parts: dict  # what tells it from the other settings, {name of SETTINGS: its value in words}
    results: list
    figures: dict  # of `compare`: their means against the baseline


def group_settings(results):
    """[Setting, ...] of Results, named by what differs among them; the first result, the baseline, stands alone."""
    groups, settings, seen = {}, [], Counter()
    for result in results:
        key = repr([result.config.get(name) for name in SETTINGS]) if result.config and groups else result.name
        seen[key, result.config.get("seed")] += 1  # two with one seed, such as two epochs of a run, differ in more
        groups.setdefault((key, seen[key, result.config.get("seed")]), []).append(result)
    values = {key: {repr(result.config.get(key)) for result in results if result.config} for key in SETTINGS}
    for group in groups.values():
        config = group[0].config
        words = {"freeze_backbone": "frozen" if config.get("freeze_backbone") else "full"}
        words["train_percentage"] = f"{config.get('train_percentage')} %"
        keys = [key for key in SETTINGS[:-1] if config and len(values[key]) > 1]
        parts = {key: words.get(key, f"{key} {str(config.get(key))[-24:]}") for key in keys}
        name = ", ".join(parts.values()) or f"mean of {len(group)} seeds" * (len(group) > 1)
        named = settings and name and name not in [setting.name for setting in settings]
        figures = compare([result.estimate for result in group], results[0].estimate if settings else None)
        settings.append(Setting(name if named else group[0].name, parts, group, figures))
    return settings


def chosen_by_validation(settings):
    """The name of the setting with the highest mean validation AUC; None unless two or more share validation people."""
    known = [s for s in settings if all(result.validation.get("val_auc") for result in s.results)]
    people = {tuple(sorted(result.config.get("val_ids", []))) for setting in known for result in setting.results}
    means = {setting.name: np.mean([r.validation["val_auc"] for r in setting.results]) for setting in known}
    return max(means, key=means.get) if len(means) > 1 and len(people) == 1 else None


def write_result(folder, evaluator, result, crops, home, flip):
    """metrics.json, pair_scores.csv and the pictures of one checkpoint into `folder`; paths as seen from `home`."""
    content = {"checkpoint": result.checkpoint, "counts": evaluator.counts, "figures": compare([result.estimate])}
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


def write_comparison(folder, results, settings):
    """comparison.json, whose content is returned, its table and pictures; the first result is the baseline."""
    entries, table = [], []
    summaries = [{"name": s.name, "checkpoints": [r.name for r in s.results], "figures": s.figures} for s in settings]
    content = {"baseline": results[0].name, "chosen_by_validation": chosen_by_validation(settings)}
    content |= {"settings": summaries, "checkpoints": entries}
    for result in results:
        figures = compare([result.estimate], None if result is results[0] else results[0].estimate)
        entry = {"name": result.name, "checkpoint": result.checkpoint, "overlap": result.overlap}
        entries.append({**entry, "validation": result.validation, "figures": figures})
        for name, figure in figures.items():
            row = {**entry, "overlap": len(result.overlap), "figure": name}
            for key, bounds in (("value", "interval"), ("difference", "difference_interval")):
                low, high = figure.get(bounds) or (None, None)
                row |= {key: figure.get(key), f"{key}_low": low, f"{key}_high": high}
            table.append({**row, "verdict": figure.get("verdict")})
    write_json(folder / "comparison.json", content)
    write_csv(folder / "comparison.csv", table)
    plot_comparison(folder / "comparison.png", settings)
    plot_data_percentage(folder / "data_percentage.png", settings)
    return content


@contextmanager
def plot_figure(path, width=6.0, height=4.2, rows=1, columns=1):
    """Yield the axes (an array of several) of a picture; at the end they get a grid and, outside, a legend."""
    with rc_context(PICTURE_STYLE):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        axes = figure.subplots(rows, columns)
        yield axes
        for one in np.atleast_1d(axes).flat:
            if one.get_legend_handles_labels()[0]:
                one.legend(loc="upper left", bbox_to_anchor=(1, 1))
    with net.replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def plot_rates(axes, results, kind, title=""):
    """ROC ("roc") or DET ("det") of genuine against twin impostor pairs, one line per result, with its EER."""
    lowest = 100 / len(results[0].scores["twin"])  # a logarithmic axis has no 0: curves end at one pair
    for result in results:
        genuine, twin = np.sort(result.scores["genuine"]), np.sort(result.scores["twin"])
        thresholds = np.append(np.unique(np.concatenate([genuine, twin])), np.inf)
        fmr = np.maximum(100 - 100 * np.searchsorted(twin, thresholds) / len(twin), lowest)
        fnmr = 100 * np.searchsorted(genuine, thresholds) / len(genuine)
        figures, at = result.estimate.figures, [int(np.argmin(np.abs(fmr - fnmr)))]
        label = f"{result.name}\nAUC {figures['auc']:.3f}, EER {100 * figures['eer']:.1f} %"
        y = 100 - fnmr if kind == "roc" else fnmr
        axes.plot(fmr, y, label=label, drawstyle="steps-post", marker="o", markevery=at)
    axes.set(xscale="log", xlim=(lowest, 100), xlabel="false match rate on twin impostors (%); dot: EER")
    scale, ylabel = ("linear", "true accept rate, 1 - FNMR (%)") if kind == "roc" else ("log", "FNMR (%)")
    bottom = 0 if kind == "roc" else max(0.01, 10 * min(result.estimate.figures["eer"] for result in results))
    axes.set(yscale=scale, ylim=(bottom, 100), ylabel=ylabel, title=kind.upper() + title)
    for axis in (axes.xaxis, axes.yaxis) if kind == "det" else (axes.xaxis,):
        axis.set(major_formatter="{x:g}", minor_formatter=lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")


def differences(entries):
    """(K,) differences and (2, K) bounds of their intervals, of entries of `compare`; NaN where there is none."""
    bounds = [entry["difference_interval"] or [None, None] for entry in entries]
    return np.array([entry["difference"] for entry in entries], float), np.array(bounds, float).T


def plot_comparison(path, settings):
    """The differences of all settings to the baseline with 95 % intervals, and the DET of each one's first seed."""
    shown = {"auc": "twin AUC", "eer": "EER", "general_auc": "general AUC", "fnmr_0.001": "FNMR at\ngeneral FMR 0.1 %"}
    with plot_figure(path, 13.0, max(4.6, 2 + 0.4 * len(settings)), 1, 2) as (left, right):
        left.plot([0, 0], [-1, len(shown)])
        for number, setting in enumerate(settings[1:], 1):
            change, bounds = differences([setting.figures[name] for name in shown])
            y = np.arange(len(shown)) + 0.8 * (number / len(settings) - 0.5)
            (dots,) = left.plot(100 * change, y, "o")
            left.hlines(y, *(100 * bounds), color=dots.get_color(), linewidth=1.2)
        left.set(yticks=range(len(shown)), yticklabels=shown.values(), ylim=(len(shown) - 0.5, -0.5))
        left.set(title=f"difference to {settings[0].name}", xlabel="points (0.01 of AUC), 95 % interval")
        plot_rates(right, [s.results[0]._replace(name=s.name) for s in settings], "det", ", of several seeds the first")


def plot_distributions(path, result):
    """Distributions of genuine, twin impostor and general impostor scores, and the rates at two thresholds."""
    low, scores = -0.6, result.scores  # one axis for all checkpoints; what lies lower is counted in the first bin
    with plot_figure(path, 8.6) as axes:
        for kind, values in scores.items():
            share = np.histogram(np.clip(values, low, 1), 80, (low, 1))[0] * 100 / max(1, len(values))
            label = kind if kind == "genuine" else f"{kind} impostor"
            axes.plot(np.linspace(low, 1, 80), share, label=label, drawstyle="steps-mid")
        for name, what in (("eer_threshold", "twin EER"), ("general_threshold_0.001", "general FMR 0.1 %")):
            if (at := result.estimate.figures[name]) is not None:
                rates = [f"FNMR {100 * (scores['genuine'] < at).mean():.1f} %"]
                for kind in ("twin", "general") if len(scores["general"]) else ("twin",):
                    rates.append(f"{kind} FMR {100 * (scores[kind] >= at).mean():.2g} %")
                text = "\n".join([f"threshold at {what}", *rates])
                axes.axvline(at, color="black", linewidth=1, linestyle="-" if "eer" in name else "--", label=text)
        axes.set(xlim=(low, 1), yscale="log", xlabel="score (cosine similarity)", title=result.name)
        axes.set_ylabel("share of the image pairs per bin (%)")


def plot_hardest(path, evaluator, result, crops, columns=4):
    """The worst errors at the EER threshold, each crop once at most, each family twice; crops: of all images."""
    threshold = result.estimate.figures["eer_threshold"]
    names = ["/".join(Path(p).parts[-2:])[-17:] for p in evaluator.images.paths]
    with plot_figure(path, 2.4 * columns, 7.0, 4, columns) as grid:
        kinds = (("twin", "twins taken for one person", -1), ("genuine", "one person refused", 1))
        for axes, (kind, title, sign) in zip((grid[:2].flat, grid[2:].flat), kinds, strict=True):
            rows, values = evaluator.rows[kind], result.scores[kind]
            mistaken = values >= threshold if sign < 0 else values < threshold
            wrong, note = np.count_nonzero(mistaken), ""
            for image, times in Counter(rows[mistaken].ravel().tolist()).most_common(1):
                of = np.count_nonzero(rows == image)
                note = f"; {names[image]} is in {times} of its {of}: look at it" if times >= max(4, of / 2) else ""
            axes[0].set_title(f"{title}: {wrong} of {len(values)} pairs{note}\n\n", fontsize=7, loc="left")
            seen, families, places = set(), [], iter(axes)
            for k in np.argsort(sign * values, kind="stable")[:wrong]:  # the farthest from the threshold first
                (a, b), family = rows[k], evaluator.family[rows[k][0]]
                if not {a, b} & seen and families.count(family) < 2 and (place := next(places, None)):
                    seen |= {a, b}
                    families.append(family)
                    place.imshow(np.concatenate([crops[a], crops[b]], 1))
                    place.set_title(f"score {values[k]:.3f}\n{names[a]} | {names[b]}", fontsize=6)
        title = f"{result.name}: mistakes at the EER threshold {threshold:.3f}, the worst first"
        grid[0, 0].figure.suptitle(title, fontsize=9)
        for place in grid.flat:
            place.set_axis_off()


def plot_data_percentage(path, settings):
    """Differences of both AUCs to the baseline by the share of triplets: a line per setting, its seeds as a band."""
    lines, images = {}, {}
    for setting in settings[1:]:
        if share := setting.results[0].config.get("train_percentage"):
            label = ", ".join(words for key, words in setting.parts.items() if key != "train_percentage") or "all runs"
            lines.setdefault(label, {})[share] = setting.figures
            images[share] = f"{share} %\n{setting.results[0].config['n_touched_images']} images"
    with plot_figure(path, 8.6, 6.2, 2) as grid:
        for axes, (name, people) in zip(grid, {"auc": "twins", "general_auc": "everyone else"}.items(), strict=True):
            axes.plot([0.7 * min(images, default=1), 140], [0, 0], label=f"{settings[0].name} (baseline)")
            for number, (label, points) in enumerate(sorted(lines.items())):
                entries = [points[share][name] for share in sorted(points)]
                share = np.array(sorted(points)) * 1.04**number  # beside each other
                change, bounds = differences(entries)
                (line,) = axes.plot(share, change, marker="o", label=label)
                axes.vlines(share, *bounds, color=line.get_color(), linewidth=1)
                seeds = np.array([entry.get("range") or [None, None] for entry in entries], float).T
                start = np.array(settings[0].figures[name]["value"], float)  # None becomes NaN
                axes.fill_between(share, *(seeds - start), color=line.get_color(), alpha=0.2, linewidth=0)
            axes.set(xscale="log", ylabel=f"change of the AUC, {people}")
            axes.set_xticks(list(images), images.values(), fontsize=7)
            axes.set_xticks([], minor=True)
        grid[0].set_title("means with 95 % intervals; band: the range of several seeds")
        grid[1].set_xlabel("share of the training triplets, and distinct images in it")


def comparison_table(settings, chosen):
    """Text for the terminal: the figures, the differences to the baseline in words, and how not to use them."""
    columns = {"EER %": "eer", "AUC": "auc", "best acc %": "best_accuracy", "TAR@FAR1%": "tar_at_far_0.01"}
    columns |= {"twin FMR %": "twin_fmr_0.001", "FNMR %": "fnmr_0.001", "general AUC": "general_auc"}
    width = max(len("setting"), *(len(setting.name) for setting in settings))
    lines = [f"{'setting':{width}}  " + "  ".join(f"{title:>11}" for title in columns)]
    for setting in settings:
        lines.append(f"{setting.name:{width}}")
        for name in columns.values():
            value = setting.figures[name]["value"]
            text = "-" if value is None else f"{value:.4f}" if name.endswith("auc") else f"{100 * value:.2f}"
            lines[-1] += f"  {text:>11}"
    lines.append("Twin FMR and FNMR are at the threshold where the general FMR is 0.1 %; -: too few pairs to say.")
    for setting in settings:
        figures = setting.figures
        if setting is not settings[0]:
            runs = ", ".join(result.name for result in setting.results)
            lines.append(f"{setting.name} ({runs}) against {settings[0].name}: {describe(figures)}.")
            if "worse" in [figures[name]["verdict"] for name in ("general_auc", "fnmr_0.001")]:
                lines.append("  It got WORSE at recognising people in general.")
        for result in setting.results:
            if seen := len(result.overlap):
                lines.append(f"OVERLAP: {result.name} has seen {seen} of the test people; it looks too good.")
        for point, (_, purpose) in OPERATING_POINTS.items():
            rates = [figures[f"{rate}_{point}"] for rate in RATES]
            if None not in [rate["value"] for rate in rates]:
                twin, general, fnmr = (spell(rate["value"], rate["interval"], ".3g", 100) for rate in rates)
                reached = f"twin FMR {twin} %, general FMR {general} %, FNMR {fnmr} %"
                lines.append(f"  {setting.name}, at the threshold for {purpose} of its validation people: {reached}.")
    if len(settings) > 1:
        lines.append(f"Validation would have chosen: {chosen}" if chosen else "No common validation to choose by.")
        lines.append("Choosing by the figures above would be selection on the test set.")
    return "\n".join(lines)


def parse_args(argv=None):
    parser = Parser(prog="evaluate_twins.py", description="How well checkpoints tell the twins of a test set apart.")
    add = parser.add_argument
    add("--test_pairs", default="test_twin_id_pairs.json", help='JSON [["ID", "twin\'s ID"], ...]')
    add_alignment_arguments(parser, "test")
    add("--checkpoints", required=True, nargs="+", help="networks to compare, or folders of them")
    add("--baseline", help="what the others are compared to; by default the first")
    add("--output_dir", default="evaluation_results", help="where results go")
    add("--batch_size", type=between(int, 1, 10**6), help="images at once (256 on CUDA, 8 on a CPU); for speed only")
    add("--seed", type=between(int, 0, 2**32 - 1), default=42, help="of the bootstrap and of drawn general pairs")
    add("--flip", action="store_true", help="embed each image and its mirror image, as one embedding")
    add("--allow_overlap", action="store_true", help="also evaluate on people a checkpoint was trained on, and say so")
    return parser.parse_args(argv)


def validation_thresholds(path, facts):
    """{name of OPERATING_POINTS: threshold} that training stored with a checkpoint, or with one that began from it."""
    figures = facts[path].get("metrics")
    for run in facts.values():
        start, found = Path(run.get("config", {}).get("pretrained", "")), run.get("start_metrics", {})
        if start.name == Path(path).name and (not start.is_file() or start.samefile(path)):
            figures = figures or (found if found.get("val_eer_threshold") is not None else None)
    known = {name: (figures or {}).get(f"val_{key}") for name, (key, _) in OPERATING_POINTS.items()}
    return {name: threshold for name, threshold in known.items() if threshold is not None}


def evaluate(args):
    """The whole evaluation of the command line; returns the list of Results, the baseline first."""
    device = net.pick_device(args.device)
    listed, pairs, notes = read_inputs(args, "aligned_json" if args.skip_alignment else "id_to_images", "test_pairs")
    tested, facts, backbones, overlaps = {name for pair in pairs for name in pair}, {}, {}, {}
    for path in net.list_checkpoints([*filter(None, [args.baseline]), *args.checkpoints]):  # before hours of alignment
        model = net.load_checkpoint(path, channels=args.channels)
        facts[path], config = model.facts, model.facts.get("config", {})
        backbones.setdefault(net.backbone_sha256(model), []).append(path)
        overlaps[path] = sorted(tested & {*config.get("train_ids", []), *config.get("val_ids", [])})
        if overlaps[path] and not args.allow_overlap:
            who = f"{len(overlaps[path])} of the {len(tested)} test people: {', '.join(overlaps[path])}"
            raise InputError(f"{path}: was trained or validated on {who}; test on others, or say --allow_overlap")
    people = People(listed if args.skip_alignment else align_files(args, "test_pairs"), pairs, notes)
    for path in facts:
        seen = {people.owner[crop][0] for crop in facts[path].get("crop_sha256", []) if crop in people.owner}
        if seen and not args.allow_overlap:
            raise InputError(f"{path}: was trained on images of {', '.join(sorted(seen))}; see --allow_overlap")
        overlaps[path] = sorted(seen | {*overlaps[path]})
    images = TwinImages(people.id_to_images, pairs)
    evaluator = TwinEvaluator(images, args.seed)
    if empty := (images.count == 0).sum():
        people.warnings.append(f"{empty} people have no crop; their pairs are not tested")
    for warning in people.warnings:
        print(f"warning: {warning}")
    pixels, home = people.crops.pixels[people.rows(images.paths)], os.path.dirname(os.path.abspath(args.aligned_json))
    output, names, results = Path(args.output_dir), file_names(facts), {}
    for group in backbones.values():
        models = [net.load_checkpoint(path, channels=args.channels) for path in group]
        embeddings = net.embed(models, pixels, device, args.batch_size, f"embedding with {names[group[0]]}", args.flip)
        for path, embedding in zip(group, embeddings, strict=True):
            net.check_alive(embedding, path)
            scores = evaluator.score(embedding)
            applied = {} if args.flip else validation_thresholds(path, facts)  # scores of fused embeddings are others
            estimate = evaluator.estimate(scores, f"resampling {names[path]}", applied)
            said = facts[path].get("config", {}), facts[path].get("metrics", {})
            results[path] = result = Result(names[path], path, *said, scores, estimate, overlaps[path])
            write_result(output / names[path], evaluator, result, pixels, home, args.flip)
    results, counts = [results[path] for path in facts], evaluator.counts
    settings = group_settings(results)
    chosen = write_comparison(output, results, settings)["chosen_by_validation"]
    print(f"{counts['images']} images of {len(images.ids)} people in {counts['families']} families, on {device}:")
    print(f"{counts['genuine']} genuine, {counts['twin']} twin impostor, {counts['general']} general impostor pairs")
    print(comparison_table(settings, chosen), f"results in {args.output_dir}", sep="\n")
    return results


def main(argv=None):
    """Evaluate; returns the exit code (see align.run_script)."""
    return run_script("evaluate_twins.py", lambda: evaluate(parse_args(argv)), "interrupted; what is done is saved")


if __name__ == "__main__":
    net.run_main(main)
