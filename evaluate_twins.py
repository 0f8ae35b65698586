"""How well saved checkpoints tell twins apart: pair scores, verification metrics, pictures.

    python evaluate_twins.py --checkpoints pretrained/adaface_ir50_ms1mv2.ckpt models/*.pth
    python evaluate_twins.py --skip_alignment --checkpoints ...    # the crops are there already

The score of two images is the cosine similarity of their embeddings, in float32. Genuine pairs
show one person, twin impostor pairs the two twins of a pair, and general impostor pairs people of
different families. A threshold t accepts a pair with score >= t; FMR and FNMR are those of
ISO/IEC 19795-1. `train_twins.py` validates with the same functions.
"""

import base64
import copy
import json
import os
import shlex
import sys
import textwrap
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import cycler, rc_context
from matplotlib.figure import Figure

from align import (
    CropFinder,
    add_alignment_arguments,
    align_files,
    read_metadata,
    read_pair_list,
    read_rows_of_pairs,
    refuse_missing_values,
)
from net import (
    InputError,
    Parser,
    check_alive,
    embed,
    file_names,
    interrupt,
    list_checkpoints,
    load_checkpoint,
    number_between,
    pick_device,
    progress,
    read_csv,
    read_flag,
    relative_path,
    replacing,
    run_main,
    run_script,
    weights_sha256,
    write_csv,
    write_json,
)
from triplet_dataset import People, TwinImages, deal_into_folds, read_people

FALSE_ACCEPT_RATES = (0.01, 0.001, 0.0001)  # of twin impostors, for TAR at FAR
GENERAL_MATCH_RATES = (0.001, 0.0001)  # of general impostors, where NIST IR 8439 sets thresholds
# Thresholds that training finds on its validation people and evaluation applies unchanged:
# {name of the point: (the metric that is its threshold, that threshold in words)}.
OPERATING_POINTS = {
    "val_eer": ("eer_threshold", "equal errors on twins"),
    "val_general": ("general_threshold_0.001", "a general FMR of 0.1 %"),
}
# The rates at each general threshold and operating point: {name: in words}.
RATES = {"twin_fmr": "twin FMR", "general_fmr": "general FMR", "fnmr": "FNMR"}
MAX_GENERAL_PAIRS = 2_000_000  # if there are more general impostor pairs, they are sampled
NORMAL_QUANTILE = 1.96  # of 95 % intervals
MIN_FAMILIES = 6  # with fewer families there is no interval and no verdict
N_FOLDS = 10  # of accuracy_10_fold
LARGE_SHARE = 0.25  # of the genuine or twin pairs; a family with more is named in a warning
PAIRS_AT_ONCE = 1 << 12  # pairs scored at once, so that their embeddings stay in the cache


# ---- metrics -------------------------------------------------------------------------------------
class Metric(NamedTuple):
    """One figure of an evaluation."""

    name: str
    better: str | None  # "higher" or "lower"; None for a threshold or a spread: neither
    # Of a figure at a given FMR: the kind of its impostor pairs, "twin" or "general", and that
    # FMR. With fewer than 1 / rate such pairs there is no figure.
    impostors: str | None = None
    rate: float | None = None

    def as_text(self, value):
        """The value as text, in percent except for areas and thresholds."""
        if value is None:
            return "-"
        if "threshold" in self.name or self.name.endswith("auc"):
            return f"{value:.4f}"
        return f"{100 * value:.2f}"


def all_metrics():
    """Yield the Metrics in the order of metrics.json."""
    yield Metric("eer", "lower")
    yield Metric("eer_threshold", None)
    yield Metric("auc", "higher")
    yield Metric("best_accuracy", "higher")
    yield Metric("accuracy_at_eer", "higher")
    yield Metric("accuracy_10_fold", "higher")
    yield Metric("accuracy_10_fold_std", None)
    for rate in FALSE_ACCEPT_RATES:
        yield Metric(f"tar_at_far_{rate:g}", "higher", "twin", rate)
    yield Metric("general_auc", "higher")
    for rate in GENERAL_MATCH_RATES:
        yield Metric(f"general_threshold_{rate:g}", None, "general", rate)
    for rate in GENERAL_MATCH_RATES:
        for name in RATES:
            yield Metric(f"{name}_{rate:g}", "lower", "general", rate)
    for point in OPERATING_POINTS:
        for name in RATES:
            yield Metric(f"{name}_{point}", "lower")


METRICS = {metric.name: metric for metric in all_metrics()}


class ScoredPairs:
    """Image pairs of one kind, by ascending score.

    `scores` (K,). `code` (K,) int says whom a pair belongs to: family f for genuine and twin pairs,
    and f * F + g for a general pair of families f and g, F being the number of families. `fold`
    (K,) int: the fold of a genuine or twin pair, from 0 to N_FOLDS - 1; None without folds.
    """

    def __init__(self, scores, code, fold=None):
        order = np.argsort(scores, kind="stable")
        self.scores = scores[order]
        self.code = code[order]
        self.fold = None if fold is None else fold[order]
        self._sums = np.zeros(len(code) + 1, np.int64)

    def cumulative_weights(self, weight_of_code):
        """(K + 1,) int64: the total weight of the 0, 1, ... K pairs with the lowest scores.

        weight_of_code: what a pair of each code weighs. The next call overwrites the result: a new
        array for each of a thousand resamples would take longer than the sums.
        """
        # With the default mode, "raise", numpy would write through a temporary copy. No code is
        # out of range, so nothing is clipped.
        np.take(weight_of_code, self.code, out=self._sums[1:], mode="clip")
        np.cumsum(self._sums[1:], out=self._sums[1:])
        return self._sums


class RankedPairs:
    """The genuine, twin and general ScoredPairs of one network, ranked against each other once.

    `metrics(weights)` then gives the figures for any weights of the families.
    """

    def __init__(self, genuine, twin, general):
        self.genuine = genuine
        self.twin = twin
        self.general = general
        scores = np.concatenate([genuine.scores, twin.scores])
        self.thresholds = np.append(np.unique(scores), np.inf)
        # For each threshold, the number of pairs that score lower.
        self.genuine_below = np.searchsorted(genuine.scores, self.thresholds)
        self.twin_below = np.searchsorted(twin.scores, self.thresholds)
        # For each genuine pair, the number of general pairs that score lower, or no higher.
        self.general_below = np.searchsorted(general.scores, genuine.scores, "left")
        self.general_not_above = np.searchsorted(general.scores, genuine.scores, "right")
        if genuine.fold is not None:
            # `accuracy_of_folds` has a table with a row for each fold and a column for each
            # threshold, and its cells are numbered row by row. For each genuine and then each twin
            # pair: the cell of its fold and of the lowest threshold that rejects it.
            fold = np.concatenate([genuine.fold, twin.fold])
            lowest_above = np.searchsorted(self.thresholds, scores, "right")
            self.rejection_cell = fold * len(self.thresholds) + lowest_above

    def metrics(self, weights, given_thresholds):
        """{name: value} for weights (F,) of the families; see `verification_metrics`.

        Figures whose pairs weigh nothing are left out.
        """
        sums = {
            "genuine": self.genuine.cumulative_weights(weights),
            "twin": self.twin.cumulative_weights(weights),
            "general": self.general.cumulative_weights(np.outer(weights, weights).ravel()),
        }
        n_genuine = sums["genuine"][-1]
        n_twin = sums["twin"][-1]
        n_general = sums["general"][-1]
        result = {}
        if n_genuine and n_twin:
            result |= metrics_against_twins(
                sums["genuine"][self.genuine_below], sums["twin"][self.twin_below], self.thresholds
            )
            if self.genuine.fold is not None:
                accuracy = self.accuracy_of_folds(weights)
                result["accuracy_10_fold"] = np.nanmean(accuracy)
                result["accuracy_10_fold_std"] = np.nanstd(accuracy)
        if n_genuine and n_general:
            result["general_auc"] = area_under_curve(
                np.diff(sums["genuine"]),
                sums["general"][self.general_below],
                sums["general"][self.general_not_above],
                n_general,
            )
        points = dict(given_thresholds)
        if n_general:
            for rate in GENERAL_MATCH_RATES:
                threshold = general_threshold(self.general.scores, sums["general"], rate)
                result[f"general_threshold_{rate:g}"] = threshold
                points[f"{rate:g}"] = threshold
        for point, threshold in points.items():
            for name, value in self.rates_at(threshold, sums).items():
                result[f"{name}_{point}"] = value
        return result

    def accuracy_of_folds(self, weights):
        """(N_FOLDS,): the share of right decisions in each fold, NaN for a fold without pairs.

        Each fold is judged at the threshold with the most right decisions in the other folds, the
        lowest one on a tie.
        """
        genuine_weights = weights[self.genuine.code]
        twin_weights = weights[self.twin.code]
        # At the lowest threshold all pairs are accepted, which is right for the genuine ones. As
        # the threshold rises, each genuine pair that is rejected is one right decision less, and
        # each twin pair that is rejected one more.
        n_genuine = np.bincount(self.genuine.fold, genuine_weights, N_FOLDS)
        n_twin = np.bincount(self.twin.fold, twin_weights, N_FOLDS)
        gains = np.concatenate([-genuine_weights, twin_weights])
        n_thresholds = len(self.thresholds)
        gained = np.bincount(self.rejection_cell, gains, N_FOLDS * n_thresholds)
        n_right = n_genuine[:, None] + gained.reshape(N_FOLDS, n_thresholds).cumsum(1)
        n_right_elsewhere = n_right.sum(0) - n_right
        chosen = n_right_elsewhere.argmax(1)
        n_pairs = n_genuine + n_twin
        n_pairs[n_pairs == 0] = np.nan
        return n_right[np.arange(N_FOLDS), chosen] / n_pairs

    def rates_at(self, threshold, sums):
        """{name of RATES: value} at a threshold; sums: {kind: cumulative weights of its pairs}."""
        rates = {}
        if sums["twin"][-1]:
            rates["twin_fmr"] = 1 - share_below(self.twin.scores, sums["twin"], threshold)
        if sums["general"][-1]:
            rates["general_fmr"] = 1 - share_below(self.general.scores, sums["general"], threshold)
        if sums["genuine"][-1]:
            rates["fnmr"] = share_below(self.genuine.scores, sums["genuine"], threshold)
        return rates


def verification_metrics(genuine, twin, general, weightings, given_thresholds=None):
    """{name: (R,) float64} of all METRICS under R weightings of the families.

    genuine, twin and general: ScoredPairs. weightings: R arrays (F,) of ints, how often each
    family counts. A general pair then counts w_f * w_g times, so copies of one family are never
    strangers to each other. given_thresholds: {name of an operating point: threshold that other
    people gave}. A figure is NaN if a weighting leaves none of the pairs that it needs.

    "eer_threshold" is the lowest score for which |FMR - FNMR|, compared exactly, is least, and
    "eer" the mean of both there. "auc" and "general_auc" are the probability that a genuine score
    exceeds an impostor score, where ties count one half. "best_accuracy" is the largest share of
    right decisions over all thresholds. "accuracy_10_fold" is the mean, and
    "accuracy_10_fold_std" the population standard deviation, of `RankedPairs.accuracy_of_folds`.
    "tar_at_far_<rate>" is the largest 1 - FNMR with a twin FMR of at most that rate.
    "general_threshold_<rate>" is the lowest threshold with a general FMR of at most that rate.
    "twin_fmr_<point>", "general_fmr_<point>" and "fnmr_<point>" are the rates at such a
    threshold, and at those of `given_thresholds`.
    """
    ranked = RankedPairs(genuine, twin, general)
    results = []
    for weights in weightings:
        results.append(ranked.metrics(weights, given_thresholds or {}))
    columns = {}
    for name in METRICS:
        columns[name] = np.array([result.get(name, np.nan) for result in results])
    return columns


def metrics_against_twins(genuine_rejected, twin_rejected, thresholds):
    """{name: value} of the metrics of genuine against twin impostor pairs.

    genuine_rejected and twin_rejected: the weight (ints) of the pairs below each of the ascending
    thresholds, the last of which rejects all.
    """
    n_genuine = genuine_rejected[-1]
    n_twin = twin_rejected[-1]
    twin_accepted = n_twin - twin_rejected
    # |FMR - FNMR| times n_genuine * n_twin: integers, so the comparison is exact.
    gap = np.abs(twin_accepted * n_genuine - genuine_rejected * n_twin)
    at_eer = np.argmin(gap)
    fmr = twin_accepted[at_eer] / n_twin
    fnmr = genuine_rejected[at_eer] / n_genuine
    n_right = twin_rejected + n_genuine - genuine_rejected
    accuracy = n_right / (n_genuine + n_twin)
    result = {
        "eer": (fmr + fnmr) / 2,
        "eer_threshold": thresholds[at_eer],
        "auc": area_under_curve(
            np.diff(genuine_rejected), twin_rejected[:-1], twin_rejected[1:], n_twin
        ),
        "best_accuracy": accuracy.max(),
        "accuracy_at_eer": accuracy[at_eer],
    }
    for rate in FALSE_ACCEPT_RATES:
        # FMR falls and FNMR rises with the threshold, so the lowest one that will do is the best.
        lowest = np.argmax(twin_accepted <= rate * n_twin)
        result[f"tar_at_far_{rate:g}"] = 1 - genuine_rejected[lowest] / n_genuine
    return result


def area_under_curve(genuine, impostors_below, impostors_not_above, n_impostors):
    """The probability that a genuine score exceeds an impostor score; ties count one half.

    genuine: the weights of genuine pairs. impostors_below and impostors_not_above: for each of them
    the weight of the impostor pairs with a lower score, and with a lower or equal one. n_impostors:
    the weight of all impostor pairs.
    """
    doubled = genuine @ (impostors_below + impostors_not_above)
    return doubled / (2 * genuine.sum() * n_impostors)


def general_threshold(scores, sums, rate):
    """The lowest threshold at which no more than `rate` of the general impostor pairs are accepted.

    scores: of these pairs, ascending. sums: (K + 1,), their cumulative weights.
    """
    allowed_weight = int(rate * sums[-1])
    # A number of pairs, not a weight: so many of the lowest scores have to be rejected.
    n_rejected = np.searchsorted(sums, sums[-1] - allowed_weight)
    # A score at the threshold is accepted, so it is just above the highest rejected score.
    return np.nextafter(scores[n_rejected - 1], np.inf)


def share_below(scores, sums, threshold):
    """The share (by weight) of pairs whose score is below a threshold."""
    return sums[np.searchsorted(scores, threshold)] / sums[-1]


class Estimate(NamedTuple):
    """The metrics of one network.

    `figures`: {name: float or None}. `samples`: {name: (R,)} of its R resamples; None if there are
    too few families for them. `n_families`: "families" of TwinEvaluator.counts.
    """

    figures: dict
    samples: dict | None
    n_families: int


class TwinEvaluator:
    """Scores and metrics of networks on the image pairs of one TwinImages.

    `rows` {kind: (K, 2) int64}: the images of each pair of the kinds "genuine", "twin" and
    "general". If there are more than MAX_GENERAL_PAIRS general pairs, at most so many are drawn by
    the seed, with replacement (`general_is_sampled`).
    `family` (N,): the family of each image, from 0 to `n_families` - 1. Families without an image
    have no number.
    `counts`: how many images, pairs of each kind and families there are. "families" are those with
    genuine pairs or those with twin pairs, whichever are fewer.
    `weightings` (R, F): how often each resample draws each family, the same for all networks.
    `folds` {kind: (K,)}: the fold of each genuine and twin pair. Whole families are dealt by the
    seed, so that folds have about equally many pairs; {} if "families" of `counts` is less than
    N_FOLDS.

    listed: ListedPairs. Only these are the genuine and twin pairs, in the folds that they name, if
    they name any.
    group_of: {ID: number of a group}. General pairs are only of people of one group; a family must
    not be in two.
    Raises InputError if there is no genuine or no twin pair.
    """

    def __init__(
        self,
        images: TwinImages,
        seed: int = 42,
        resamples: int = 1000,
        listed: list | None = None,
        group_of: dict | None = None,
    ):
        self.images = images
        self.family = number_families(images)
        self.n_families = len(np.unique(self.family))
        if listed:
            self.rows, self.folds = rows_of_list(listed, images)
        else:
            self.rows = {"genuine": genuine_pairs(images), "twin": twin_pairs(images)}
            self.folds = {}
        self._refuse_to_measure_nothing(listed)
        group = np.zeros(len(self.family), np.int64)
        if group_of:
            group = np.array([group_of[images.ids[person]] for person in images.person])
        generator = np.random.default_rng(seed)
        self.rows["general"], n_general = general_pairs(self.family, group, generator)
        self.general_is_sampled = n_general > MAX_GENERAL_PAIRS
        n_with_pairs = min(self._count_families(kind) for kind in ("genuine", "twin"))
        self.counts = {
            "images": len(self.family),
            "genuine": len(self.rows["genuine"]),
            "twin": len(self.rows["twin"]),
            "general": n_general,
            "families": n_with_pairs,
        }
        if n_with_pairs < N_FOLDS:
            self.folds = {}
        elif not self.folds:
            self.folds = self._deal_into_folds(seed)
        equal = np.full(self.n_families, 1 / self.n_families)
        self.weightings = generator.multinomial(self.n_families, equal, resamples)

    def _refuse_to_measure_nothing(self, listed):
        """Raise InputError if there is no genuine or no twin pair."""
        reasons = {
            "genuine": "none of the people has two images; check the aligned crops",
            "twin": "there is no pair with images of both twins; check the aligned crops",
        }
        for kind, reason in reasons.items():
            if len(self.rows[kind]):
                continue
            if listed:
                reason = f"--pair_list has no {kind} pair whose images both have a crop"
                reason += "; check the list and the aligned crops"
            raise InputError(f"nothing to evaluate: {reason}")

    def _count_families(self, kind):
        """How many families have pairs of a kind."""
        return len(np.unique(self.family[self.rows[kind][:, 0]]))

    def _deal_into_folds(self, seed):
        """The folds of the genuine and twin pairs, by families."""
        family_of_pair = {kind: self.family[self.rows[kind][:, 0]] for kind in ("genuine", "twin")}
        n_pairs = np.bincount(np.concatenate(list(family_of_pair.values())))
        fold = deal_into_folds(n_pairs, N_FOLDS, seed)
        return {kind: fold[family] for kind, family in family_of_pair.items()}

    def part(self, keep):
        """The TwinEvaluator of some of these pairs; keep: {"genuine", "twin" or both: (K,) bool}.

        It has the same general pairs and resamples. "families" of its counts are only those with
        pairs of these kinds (the fewer, of two kinds). If they are fewer than N_FOLDS, there are
        no folds.
        """
        part = copy.copy(self)
        part.rows = dict(self.rows)
        part.folds = dict(self.folds)
        part.counts = dict(self.counts)
        for kind, mask in keep.items():
            part.rows[kind] = self.rows[kind][mask]
            part.counts[kind] = len(part.rows[kind])
            if self.folds:
                part.folds[kind] = self.folds[kind][mask]
            part.counts["families"] = min(part.counts["families"], part._count_families(kind))
        if part.counts["families"] < N_FOLDS:
            part.folds = {}
        return part

    def across(self, value_of):
        """The part whose genuine pairs have different values; value_of: {path: value}."""
        first, second = self.values_of_pairs("genuine", value_of)
        return self.part({"genuine": first != second})

    def values_of_pairs(self, kind, value_of):
        """Two (K,) arrays: the values of the first and of the second image of each pair of a kind.

        value_of: {path: value}.
        """
        values = np.array([value_of[path] for path in self.images.paths])
        return values[self.rows[kind]].T

    def warn_of_large_families(self):
        """Warnings that name a family with more than LARGE_SHARE of the genuine or twin pairs."""
        notes = []
        if self.n_families == 1:
            return notes
        for kind in ("genuine", "twin"):
            n_pairs = np.bincount(self.family[self.rows[kind][:, 0]], minlength=self.n_families)
            shares = n_pairs / n_pairs.sum()
            for family in np.flatnonzero(shares > LARGE_SHARE):
                people = np.unique(self.images.person[self.family == family])
                names = ", ".join(self.images.ids[person] for person in people)
                notes.append(
                    f"{shares[family]:.0%} of the {kind} pairs are of one family ({names}), which "
                    "decides much of the figures; use fewer of its images, or test more families"
                )
        return notes

    def warn_of_split_families(self):
        """Warnings if a list of pairs has pairs of one family in several folds."""
        folds_of = {}
        for kind, folds in self.folds.items():
            families = self.family[self.rows[kind][:, 0]]
            for family, fold in zip(families, folds, strict=True):
                folds_of.setdefault(family, set()).add(fold)
        n_split = sum(len(folds) > 1 for folds in folds_of.values())
        if not n_split:
            return []
        return [
            f"{n_split} families have pairs in several folds of --pair_list: the threshold of a "
            "fold is then chosen on its own people, so accuracy_10_fold looks better than it is"
        ]

    def score(self, embeddings: torch.Tensor) -> dict:
        """{kind: (K,) float64 cosines of `rows`}, of embeddings (N, 512) of unit length."""
        scores = {}
        for kind, rows in self.rows.items():
            chunks = []
            for chunk in torch.from_numpy(rows).to(embeddings.device).split(PAIRS_AT_ONCE):
                products = embeddings[chunk[:, 0]] * embeddings[chunk[:, 1]]
                chunks.append(products.sum(1))
            scores[kind] = torch.cat(chunks).cpu().double().numpy()
        return scores

    def _metrics(self, scores, weightings, given_thresholds):
        genuine_family = self.family[self.rows["genuine"][:, 0]]
        twin_family = self.family[self.rows["twin"][:, 0]]
        family_1, family_2 = self.family[self.rows["general"]].T
        general_code = family_1 * self.n_families + family_2
        genuine = ScoredPairs(scores["genuine"], genuine_family, self.folds.get("genuine"))
        twin = ScoredPairs(scores["twin"], twin_family, self.folds.get("twin"))
        general = ScoredPairs(scores["general"], general_code)
        return verification_metrics(genuine, twin, general, weightings, given_thresholds)

    def figures(self, scores: dict, given_thresholds: dict | None = None) -> dict:
        """{name: float or None} of all METRICS; None for a figure that these pairs cannot give.

        given_thresholds: see `verification_metrics`.
        """
        each_family_once = np.ones((1, self.n_families), np.int64)
        figures = {}
        for name, values in self._metrics(scores, each_family_once, given_thresholds).items():
            metric = METRICS[name]
            is_known = np.isfinite(values[0])
            if metric.rate is not None:
                is_known = is_known and self.counts[metric.impostors] * metric.rate >= 1
            figures[name] = float(values[0]) if is_known else None
        return figures

    def estimate(
        self, scores: dict, given_thresholds: dict | None = None, description: str | None = None
    ) -> Estimate:
        """The Estimate of scores; with a description there is a progress bar with this label."""
        figures = self.figures(scores, given_thresholds)
        n_families = self.counts["families"]
        if n_families < MIN_FAMILIES:
            return Estimate(figures, None, n_families)
        weightings = self.weightings
        if description:
            weightings = self._weightings_with_progress(description)
        samples = self._metrics(scores, weightings, given_thresholds)
        return Estimate(figures, samples, n_families)

    def _weightings_with_progress(self, description):
        """Yield the weightings of the resamples, with a progress bar and interrupts."""
        for weights in progress(self.weightings, description, "resample"):
            interrupt.raise_if_asked()
            yield weights


def number_families(images):
    """(N,) int: the family of each image, from 0; families without an image have no number.

    They are numbered in the order of their smallest IDs, so that results do not depend on the order
    of the files.
    """
    smallest_id = {}
    for name, family in zip(images.ids, images.family_of_person, strict=True):
        smallest_id[family] = min(name, smallest_id.get(family, name))
    _, numbers = np.unique([smallest_id[family] for family in images.family], return_inverse=True)
    return numbers


def genuine_pairs(images):
    """(K, 2) int64 rows: all pairs of images of one person.

    The images of a person are consecutive rows, from `images.first` on.
    """
    parts = [np.empty((0, 2), np.int64)]
    for first, count in zip(images.first, images.count, strict=True):
        parts.append(first + np.stack(np.triu_indices(count, 1), 1))
    return np.concatenate(parts)


def twin_pairs(images):
    """(K, 2) int64 rows: an image of a person and an image of their twin, for all pairs."""
    parts = [np.empty((0, 2), np.int64)]
    for a, b in images.pairs:
        rows_a = images.first[a] + np.arange(images.count[a])
        rows_b = images.first[b] + np.arange(images.count[b])
        column_a = np.tile(rows_a, len(rows_b))
        column_b = np.repeat(rows_b, len(rows_a))
        parts.append(np.stack([column_a, column_b], 1))
    return np.concatenate(parts)


def general_pairs(family, group, generator):
    """((K, 2) int64 rows, number): pairs of images of two families in one group.

    family, group: (N,), of each image; a family must not be in two groups. number: how many such
    pairs there are. If they are more than MAX_GENERAL_PAIRS, the rows are at most so many of them,
    drawn with replacement.
    """
    n_images = len(family)
    n_in_both_orders = (np.bincount(group) ** 2).sum() - (np.bincount(family) ** 2).sum()
    number = int(n_in_both_orders) // 2
    if number > MAX_GENERAL_PAIRS:
        candidates = generator.integers(n_images, size=(2 * MAX_GENERAL_PAIRS, 2))
    else:
        candidates = np.stack(np.triu_indices(n_images, 1), 1)
    first, second = candidates.T
    is_general = (family[first] != family[second]) & (group[first] == group[second])
    return candidates[is_general][:MAX_GENERAL_PAIRS], number


def rows_of_list(listed, images):
    """({kind: (K, 2) rows}, {kind: (K,) fold}) of ListedPairs; without folds in the list, {}.

    Pairs of which an image has no crop, or is the copy of another, are left out, and a pair that is
    listed several times, in whichever order, counts once. Raises InputError for wrong entries.
    """
    row_of = {path: row for row, path in enumerate(images.paths)}
    family_of = dict(zip(images.ids, images.family_of_person, strict=True))
    fold_names = sorted({pair.fold for pair in listed})
    has_folds = fold_names != [None]
    if has_folds and len(fold_names) != N_FOLDS:
        message = f"the column fold has {len(fold_names)} different values"
        raise InputError(f"--pair_list: {message}; give it {N_FOLDS}, or leave it out")
    rows = {"genuine": [], "twin": []}
    folds = {"genuine": [], "twin": []}
    seen = set()
    for pair in listed:
        check_listed_pair(pair, family_of)
        kind = "genuine" if pair.same else "twin"
        in_any_order = frozenset(pair.crops)
        is_repeated = in_any_order in seen
        seen.add(in_any_order)
        if all(crop in row_of for crop in pair.crops) and not is_repeated:
            rows[kind].append([row_of[crop] for crop in pair.crops])
            folds[kind].append(fold_names.index(pair.fold))
    rows = {kind: np.array(found, np.int64).reshape(-1, 2) for kind, found in rows.items()}
    if not has_folds:
        return rows, {}
    return rows, {kind: np.array(found, np.int64) for kind, found in folds.items()}


def check_listed_pair(pair, family_of):
    """Raise InputError for a ListedPair of strangers, or of an image with itself.

    family_of: {ID: family} of the test people.
    """
    for name in pair.ids:
        if name not in family_of:
            raise InputError(f"{pair.where}: ID {name!r} is in no pair of --test_pairs")
    # Siblings count as twins, also without a pair of their own in --test_pairs.
    if family_of[pair.ids[0]] != family_of[pair.ids[1]]:
        message = f"{' and '.join(pair.ids)} are no twins by --test_pairs"
        raise InputError(f"{pair.where}: {message}; delete the entry")
    if pair.crops[0] == pair.crops[1] and pair.crops[0]:
        raise InputError(f"{pair.where}: an image is paired with itself; delete the entry")


# ---- comparison with a baseline ------------------------------------------------------------------
def interval(samples):
    """The 95 % percentile interval [low, high] of bootstrap samples (R,); None if all are NaN."""
    if not np.isfinite(samples).any():
        return None
    low, high = np.nanpercentile(samples, (2.5, 97.5))
    return [float(low), float(high)]


def share_interval(value, samples, n_families, n_at_edge):
    """The 95 % interval [low, high] of a figure from 0 to 1; None if all samples are NaN.

    Percentiles of the bootstrap samples (R,) are too low for a rate near 0: they rest on the few
    families with errors that happened to be drawn. So the interval is that of the log odds, with
    the standard deviation of the samples (Schuckers, "Computational Methods in Biometric
    Authentication", 2010). A value of 0 or 1 has no log odds. Its interval is Wilson's for
    `n_at_edge` independent pairs, as in Fogliato, Patil, Perona, "Confidence intervals for error
    rates in 1:1 matching tasks", IJCV 2024, whose code takes the number of all pairs.
    """
    if not np.isfinite(samples).any():
        return None
    edge = NORMAL_QUANTILE**2 / (n_at_edge + NORMAL_QUANTILE**2)
    if value == 0:
        return [0.0, edge]
    if value == 1:
        return [1 - edge, 1.0]
    # The variance of samples of F families is too low by (F - 1) / F on average. Being estimated,
    # it also asks for Student's t, whose variance is (F - 1) / (F - 3).
    deviation = np.nanstd(samples) * np.sqrt(n_families / (n_families - 3))
    margin = NORMAL_QUANTILE * deviation / (value * (1 - value))
    bounds = np.log(value / (1 - value)) + np.array([-margin, margin])
    return torch.from_numpy(bounds).sigmoid().tolist()  # from log odds


def figure_interval(metric, value, samples, n_families):
    """The 95 % interval of a figure, None if there is none.

    tests/STUDY.md has measured how often each kind of interval holds the true value; hence the
    choice.
    """
    # Thresholds, and the standard deviation over folds, are no shares. TAR at FAR can be many
    # times as high in a resample without the family of the highest twin scores, so that the
    # deviation of its log odds says little.
    if metric.better is None or metric.name.startswith("tar_at_far"):
        return interval(samples)
    # Pairs of the same families are not independent: each family counts as one pair, and for
    # general pairs each two families do.
    n_at_edge = n_families
    if metric.name.startswith("general"):
        n_at_edge = n_families * (n_families - 1) / 2
    return share_interval(value, samples, n_families, n_at_edge)


def compare(estimates: list, baseline: Estimate | None = None) -> dict:
    """{name: {"value", "interval"}} of the Estimates of one setting, one for each seed.

    With several estimates, `value` is their mean and "range" their minimum and maximum. With a
    baseline there are also "difference", "difference_interval" and "verdict". The one rule for
    better and worse: the 95 % interval of the difference, on the same resamples of families,
    excludes zero.
    """
    result = {}
    for name in METRICS:
        values = [estimate.figures[name] for estimate in estimates]
        value = None
        samples = np.array([])
        if None not in values:
            value = sum(values) / len(values)
            if estimates[0].samples is not None:
                samples = np.mean([estimate.samples[name] for estimate in estimates], 0)
        bounds = figure_interval(METRICS[name], value, samples, estimates[0].n_families)
        entry = {"value": value, "interval": bounds}
        if len(estimates) > 1:
            entry["range"] = None if value is None else [min(values), max(values)]
        if baseline is not None:
            entry |= compare_figure(METRICS[name], value, samples, baseline)
        result[name] = entry
    return result


def compare_figure(metric, value, samples, baseline):
    """The difference of one figure to the baseline's, its interval, and the verdict."""
    result = {"difference": None, "difference_interval": None, "verdict": None}
    baseline_value = baseline.figures[metric.name]
    is_known = value is not None and baseline_value is not None
    if is_known:
        result["difference"] = value - baseline_value
        if baseline.samples is not None:
            change = samples - baseline.samples[metric.name]
            result["difference_interval"] = interval(change)
    if metric.better is not None:
        result["verdict"] = judge(metric, is_known, result["difference_interval"])
    return result


def judge(metric, is_known, difference_interval):
    """The verdict on a difference: better, worse, or why there is none."""
    if not is_known:
        return "not measured"
    if difference_interval is None:
        return "too few families to say"
    low, high = difference_interval
    if low <= 0 <= high:
        return "not distinguishable"
    is_higher = low > 0
    wants_higher = metric.better == "higher"
    return "better" if is_higher == wants_higher else "worse"


def format_with_interval(value, bounds, form):
    """A figure and its interval, which may be None, as text: "0.12 [0.10, 0.15]"."""
    text = f"{value:{form}}"
    if bounds:
        low, high = bounds
        text += f" [{low:{form}}, {high:{form}}]"
    return text


def describe(comparison):
    """What a comparison with a baseline says of twins and of everyone else: both AUCs, as text."""
    sentences = []
    for name, people in (("auc", "twins"), ("general_auc", "everyone else")):
        entry = comparison[name]
        sentence = f"{entry['verdict']} on {people}"
        if entry["difference"] is not None:
            change = format_with_interval(entry["difference"], entry["difference_interval"], "+.4f")
            sentence += f" (AUC {change})"
        sentences.append(sentence)
    return ", ".join(sentences)


@dataclass
class Checkpoint:
    """One checkpoint: what its file says, and then what its evaluation finds.

    The runs of a cross-validation (train_twins.py --folds) are one Checkpoint together: each of
    its `fold_runs` embeds the people of the fold that it has not seen.
    """

    path: str
    name: str  # of the folder of its results
    facts: dict  # what training wrote beside the weights, {} for upstream's
    weights_hash: str  # of the whole network
    backbone_hash: str  # of all but the embedding layer
    overlap: list  # test IDs that it was trained or validated on
    fold_runs: list | tuple = ()  # the Checkpoints of a cross-validation, one for each fold
    scores: dict | None = None  # see TwinEvaluator.score
    estimate: Estimate | None = None
    stratum_estimates: dict | None = None  # {label: Estimate}, see make_strata
    families: list | tuple = ()  # the rows of families.csv

    @property
    def config(self):
        return self.facts.get("config", {})

    @property
    def fold_ids(self):
        """The IDs of the fold that a run of a cross-validation left out; empty for others."""
        return {*self.config.get("fold_ids", [])}

    def tested_ids(self, test_ids):
        """The test IDs that it is tested on: those of its own fold; if there are none, all."""
        return (test_ids & self.fold_ids) or test_ids

    @property
    def seen_ids(self):
        """The IDs that it was trained or validated on, in this or an earlier round of training."""
        own = {*self.config.get("train_ids", []), *self.config.get("val_ids", [])}
        return own | {*self.facts.get("seen_ids", [])}

    @property
    def recipe(self):
        """What makes two training runs the same setting; {} for upstream's and for older files."""
        return self.config.get("recipe", {})

    @property
    def validation(self):
        """The figures of the validation people; {} if there are none.

        A cross-validation has none either, since each of its runs had other validation people.
        """
        return {} if self.fold_runs else self.facts.get("metrics", {})


class Setting(NamedTuple):
    """Checkpoints that differ in nothing but the seed, as one."""

    name: str
    differing: dict  # what tells its recipe from the others', {flag: its value in words}
    checkpoints: list
    figures: dict  # of `compare`: their means, against the baseline
    stratum_figures: dict | None = None  # {label: figures of the stratum, likewise}


def group_settings(checkpoints):
    """[Setting, ...] of Checkpoints; the first one is the baseline and stands alone.

    A setting is named by the flags that tell it from the others; else, if it has several seeds, by
    their number; else, or if that name is taken, by its first checkpoint.
    """
    baseline, *others = checkpoints
    figures, stratum_figures = compare_group([baseline])
    settings = [Setting(baseline.name, {}, [baseline], figures, stratum_figures)]
    flags = differing_flags(others)
    taken = {baseline.name}
    for group in group_by_recipe(others):
        recipe = group[0].recipe
        differing = {flag: describe_flag(flag, recipe[flag]) for flag in flags if flag in recipe}
        name = ", ".join(differing.values())
        if not name and len(group) > 1:
            name = f"mean of {len(group)} seeds"
        if not name or name in taken:
            name = group[0].name
        taken.add(name)
        figures, stratum_figures = compare_group(group, baseline)
        settings.append(Setting(name, differing, group, figures, stratum_figures))
    return settings


def compare_group(group, baseline=None):
    """(figures, {label of a stratum: figures}) of Checkpoints that are one setting."""
    against = None if baseline is None else baseline.estimate
    figures = compare([checkpoint.estimate for checkpoint in group], against)
    stratum_figures = {}
    for label in group[0].stratum_estimates or {}:
        against = None if baseline is None else baseline.stratum_estimates[label]
        estimates = [checkpoint.stratum_estimates[label] for checkpoint in group]
        stratum_figures[label] = compare(estimates, against)
    return figures, stratum_figures


def group_by_recipe(checkpoints):
    """The lists of Checkpoints that have one recipe and different seeds.

    Two checkpoints with the same recipe and the same seed, such as two epochs of a run, are not two
    seeds: they come into different lists. A checkpoint without a recipe is a list of its own.
    """
    groups = {}
    occurrences = Counter()
    for checkpoint in checkpoints:
        key = checkpoint.path
        if checkpoint.recipe:
            # A cross-validation tests other networks on each fold: it is a setting of its own.
            folds = checkpoint.config.get("folds")
            key = json.dumps([checkpoint.recipe, folds], sort_keys=True)
        seed = checkpoint.config.get("seed")
        occurrences[key, seed] += 1
        groups.setdefault((key, occurrences[key, seed]), []).append(checkpoint)
    return list(groups.values())


def differing_flags(checkpoints):
    """The flags of which the recipes of checkpoints have different values.

    Without the precision, which frozen and full runs differ in by themselves.
    """
    recipes = [checkpoint.recipe for checkpoint in checkpoints if checkpoint.recipe]
    all_flags = [flag for recipe in recipes for flag in recipe]
    flags = []
    for flag in dict.fromkeys(all_flags):  # each once, in their order
        values = {repr(recipe.get(flag)) for recipe in recipes}
        if len(values) > 1 and flag != "precision":
            flags.append(flag)
    return flags


def describe_flag(flag, value):
    """A flag of a recipe in words, for the name of a setting."""
    if flag == "freeze_backbone":
        return "frozen" if value else "full"
    if flag == "train_percentage":
        return f"{value} %"
    if flag.endswith("_sha256"):  # of the start's weights, the crops or the pairs
        return f"{flag.removesuffix('_sha256')} {value[:12]}"
    return f"{flag} {value}"


def chosen_by_validation(settings):
    """The name of the setting with the highest mean validation AUC.

    Settings without validation are passed over. None if fewer than two are left, or if they were
    validated on different pairs.
    """
    means = {}
    validated_on = set()
    for setting in settings:
        values = [checkpoint.validation.get("val_auc") for checkpoint in setting.checkpoints]
        if None in values:
            continue
        means[setting.name] = sum(values) / len(values)
        for checkpoint in setting.checkpoints:
            config = checkpoint.config
            val_ids = tuple(sorted(config.get("val_ids", [])))
            # --cross decides which pairs of these people count.
            validated_on.add((val_ids, config.get("cross")))
    if len(means) < 2 or len(validated_on) > 1:
        return None
    return max(means, key=means.get)


# ---- results: files and the table ----------------------------------------------------------------
def write_result(folder, evaluator, strata, checkpoint, crops, home, flip):
    """Write the tables and pictures of one checkpoint into `folder`.

    strata: {label: TwinEvaluator}. crops: of all images. home: the folder to which the paths in
    pair_scores.csv are relative.
    """
    content = {
        "checkpoint": checkpoint.path,
        "counts": evaluator.counts,
        "figures": compare([checkpoint.estimate]),
        "general_pairs_drawn": evaluator.general_is_sampled,
        "flip": flip,
        "overlap": checkpoint.overlap,
    }
    if checkpoint.fold_runs:
        content["folds"] = [run.path for run in checkpoint.fold_runs]
    if checkpoint.stratum_estimates:
        content["strata"] = {}
        for label, estimate in checkpoint.stratum_estimates.items():
            counts = strata[label].counts
            content["strata"][label] = {"counts": counts, "figures": compare([estimate])}
    write_json(folder / "metrics.json", content)
    write_csv(folder / "pair_scores.csv", list_pair_scores(evaluator, checkpoint, home))
    write_csv(folder / "families.csv", checkpoint.families)
    for kind in ("roc", "det"):
        with plot_figure(folder / f"{kind}_curve.png", 8.2) as axes:
            curve = (checkpoint.name, checkpoint.scores, checkpoint.estimate.figures)
            plot_rates(axes, [curve], kind)
    plot_distributions(folder / "score_distributions.png", checkpoint)
    plot_hardest(folder / "hardest_pairs.png", evaluator, checkpoint, crops)


def list_pair_scores(evaluator, checkpoint, home):
    """The rows of pair_scores.csv: all genuine and twin pairs."""
    images = evaluator.images
    paths = [relative_path(path, home) for path in images.paths]
    ids = [images.ids[person] for person in images.person]
    threshold = checkpoint.estimate.figures["eer_threshold"]
    rows = []
    for kind in ("genuine", "twin"):
        scores = checkpoint.scores[kind].tolist()
        for (a, b), score in zip(evaluator.rows[kind].tolist(), scores, strict=True):
            row = {
                "path_1": paths[a],
                "path_2": paths[b],
                "id_1": ids[a],
                "id_2": ids[b],
                "kind": kind,
                "score": score,
                "accepted_at_eer": int(score >= threshold),
            }
            rows.append(row)
    return rows


def list_families(evaluator, checkpoint):
    """The rows of families.csv: the family with the lowest twin AUC first, those without one last.

    The rates are those at the EER threshold of all families together.
    """
    images = evaluator.images
    threshold = checkpoint.estimate.figures["eer_threshold"]
    rows = []
    for family in range(evaluator.n_families):
        people = np.unique(images.person[evaluator.family == family])
        scores = {}
        for kind in ("genuine", "twin"):
            is_own = evaluator.family[evaluator.rows[kind][:, 0]] == family
            scores[kind] = np.sort(checkpoint.scores[kind][is_own])
        genuine, twin = scores["genuine"], scores["twin"]
        row = {
            "ids": " + ".join(sorted(images.ids[person] for person in people)),
            "images": int((evaluator.family == family).sum()),
            "genuine_pairs": len(genuine),
            "twin_pairs": len(twin),
            "twin_auc": None,
            "fnmr": float((genuine < threshold).mean()) if len(genuine) else None,
            "twin_fmr": float((twin >= threshold).mean()) if len(twin) else None,
        }
        if len(genuine) and len(twin):
            n_below = np.searchsorted(twin, genuine, "left")
            n_not_above = np.searchsorted(twin, genuine, "right")
            one_each = np.ones(len(genuine))
            row["twin_auc"] = float(area_under_curve(one_each, n_below, n_not_above, len(twin)))
        rows.append(row)
    return sorted(rows, key=lambda row: (row["twin_auc"] is None, row["twin_auc"]))


def write_comparison(args, checkpoints, settings, chosen, notes):
    """Write the files of the comparison; the first checkpoint is the baseline.

    notes: the warnings about data and checkpoints.
    """
    folder = Path(args.output_dir)
    baseline = checkpoints[0]
    entries = []
    table = []
    for checkpoint in checkpoints:
        against = None if checkpoint is baseline else baseline.estimate
        figures = compare([checkpoint.estimate], against)
        entries.append(
            {
                "name": checkpoint.name,
                "checkpoint": checkpoint.path,
                "overlap": checkpoint.overlap,
                "validation": checkpoint.validation,
                "figures": figures,
            }
        )
        for name, figure in figures.items():
            table.append(comparison_row(checkpoint, name, figure))
    content = {
        "command": args.command,
        "warnings": notes,
        "baseline": baseline.name,
        "chosen_by_validation": chosen,
        "settings": [
            {
                "name": setting.name,
                "checkpoints": [checkpoint.name for checkpoint in setting.checkpoints],
                "figures": setting.figures,
                "strata": setting.stratum_figures,
            }
            for setting in settings
        ],
        "checkpoints": entries,
    }
    write_json(folder / "comparison.json", content)
    write_csv(folder / "comparison.csv", table)
    plot_comparison(folder / "comparison.png", settings)
    plot_data_percentage(folder / "data_percentage.png", settings)
    if settings[0].stratum_figures:
        plot_strata(folder / "strata.png", settings)


def comparison_row(checkpoint, name, figure):
    """The row of comparison.csv for one figure of one checkpoint."""
    low, high = figure["interval"] or (None, None)
    difference_low, difference_high = figure.get("difference_interval") or (None, None)
    return {
        "name": checkpoint.name,
        "checkpoint": checkpoint.path,
        "overlap": len(checkpoint.overlap),
        "figure": name,
        "value": figure["value"],
        "value_low": low,
        "value_high": high,
        "difference": figure.get("difference"),
        "difference_low": difference_low,
        "difference_high": difference_high,
        "verdict": figure.get("verdict"),
    }


# What an evaluation writes into --output_dir itself, not into the folders of checkpoints.
COMPARISON_FILES = (
    "comparison.json",
    "comparison.csv",
    "comparison.png",
    "data_percentage.png",
    "strata.png",
    "report.html",
)
# What the table of the strata shows of each setting, {title: figure}.
STRATA_COLUMNS = {"AUC": "auc", "EER %": "eer", "FNMR %": "fnmr_0.001"}
# The columns of the table of the settings, {title: figure}, and the notes below it.
TABLE_COLUMNS = {
    "EER %": "eer",
    "AUC": "auc",
    "best acc %": "best_accuracy",
    "10-fold %": "accuracy_10_fold",
    "TAR@FAR1%": "tar_at_far_0.01",
    "twin FMR %": "twin_fmr_0.001",
    "FNMR %": "fnmr_0.001",
    "general AUC": "general_auc",
}
TABLE_NOTES = (
    "Twin FMR and FNMR are at the threshold where the general FMR is 0.1 %.",
    "10-fold: accuracy on ten folds of families, mean and standard deviation.",
    "A dash means that there are too few pairs or families to say.",
)


def comparison_table(settings, chosen):
    """Text for the terminal: the figures, the differences to the baseline, and what to mind."""
    baseline = settings[0]
    width = max(len("setting"), *(len(setting.name) for setting in settings))
    titles = "".join(f"  {title:>13}" for title in TABLE_COLUMNS)
    lines = [f"{'setting':{width}}{titles}"]
    for setting in settings:
        cells = []
        for name in TABLE_COLUMNS.values():
            cells.append(f"  {describe_figure(setting.figures, name):>13}")
        lines.append(f"{setting.name:{width}}{''.join(cells)}")
    lines += TABLE_NOTES
    for setting in settings:
        if setting is not baseline:
            lines += describe_setting(setting, baseline)
        lines += describe_overlap(setting)
        lines += describe_operating_points(setting)
        hardest = describe_hardest_families(setting)
        if hardest:
            lines.append(f"  {setting.name}, hardest families: {hardest}.")
    if len(settings) > 1:
        if chosen:
            lines.append(f"Validation would have chosen: {chosen}.")
        elif len(settings) > 2:
            lines.append("There is no common validation to choose a setting by.")
        lines.append("Choosing by the figures above would be selection on the test set.")
    return "\n".join(lines)


def describe_setting(setting, baseline):
    """The lines of the table that compare a setting with the baseline."""
    names = ", ".join(checkpoint.name for checkpoint in setting.checkpoints)
    title = f"{setting.name} ({names}) against {baseline.name}"
    lines = [f"{title}: {describe(setting.figures)}."]
    verdicts = [setting.figures[name]["verdict"] for name in ("general_auc", "fnmr_0.001")]
    if "worse" in verdicts:
        lines.append("  It got WORSE at recognising people in general.")
    return lines


def describe_figure(figures, name):
    """A figure as text, with the standard deviation over folds where there is one."""
    text = METRICS[name].as_text(figures[name]["value"])
    spread = figures.get(f"{name}_std")
    if spread and spread["value"] is not None:
        text += f" ± {100 * spread['value']:.2f}"
    return text


def describe_figure_with_interval(figures, name):
    """A figure as text, and its interval where there is one."""
    text = describe_figure(figures, name)
    bounds = figures[name]["interval"]
    if bounds:
        low, high = (METRICS[name].as_text(bound) for bound in bounds)
        text += f" [{low}, {high}]"
    return text


def describe_overlap(setting):
    """The lines that warn of checkpoints that have seen test people."""
    lines = []
    for checkpoint in setting.checkpoints:
        if checkpoint.overlap:
            n = len(checkpoint.overlap)
            lines.append(
                f"OVERLAP: {checkpoint.name} was trained or validated on {n} of the test "
                "people, so its figures look better than they are."
            )
    return lines


def describe_cross(args):
    """The line that says which pairs the main figures count."""
    return f"The genuine pairs are only those whose images have two values of {args.cross}."


def describe_operating_points(setting):
    """The lines of the table that say what the thresholds of the validation people really give."""
    lines = []
    for point, (_, purpose) in OPERATING_POINTS.items():
        texts = []
        for rate, label in RATES.items():
            figure = setting.figures[f"{rate}_{point}"]
            if figure["value"] is None:
                continue
            bounds = [100 * bound for bound in figure["interval"] or []]
            percent = format_with_interval(100 * figure["value"], bounds, ".3g")
            texts.append(f"{label} {percent} %")
        if texts:
            at = f"at the validation people's threshold for {purpose}"
            lines.append(f"  {setting.name}, {at}: {', '.join(texts)}.")
    return lines


def strata_table(settings, strata):
    """Text for the terminal: the figures of each stratum; strata: {label: TwinEvaluator}."""
    width = max(len(setting.name) for setting in settings)
    lines = []
    for label, part in strata.items():
        n_genuine, n_twin = part.counts["genuine"], part.counts["twin"]
        n_families = part.counts["families"]
        title = f"{n_genuine} genuine and {n_twin} twin pairs, {n_families} families"
        lines.append(f"{label}: {title}")
        for setting in settings:
            cells = []
            for column, name in STRATA_COLUMNS.items():
                text = describe_figure_with_interval(setting.stratum_figures[label], name)
                cells.append(f"{column} {text}")
            lines.append(f"  {setting.name:{width}}  {', '.join(cells)}")
    return "\n".join(lines)


def describe_hardest_families(setting):
    """The three families with the lowest twin AUC, a mean over the checkpoints, as text."""
    aucs_of_family = {}
    for checkpoint in setting.checkpoints:
        for row in checkpoint.families:
            if row["twin_auc"] is not None:
                aucs_of_family.setdefault(row["ids"], []).append(row["twin_auc"])
    means = {ids: sum(aucs) / len(aucs) for ids, aucs in aucs_of_family.items()}
    hardest = sorted(means, key=means.get)[:3]
    return ", ".join(f"{ids} (twin AUC {means[ids]:.3f})" for ids in hardest)


# ---- pictures ------------------------------------------------------------------------------------
# Okabe and Ito's colours, which people with any colour vision tell apart; line styles serve
# grey print.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
PICTURE_STYLE = {
    "axes.prop_cycle": cycler(color=COLOURS, linestyle=STYLES),
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,  # a name may hold dollar signs
}
# Left end of the axis in all pictures of distributions; lower scores count in the first bin.
LOWEST_SCORE = -0.6


@contextmanager
def plot_figure(path, width=6.0, height=4.2, rows=1, columns=1):
    """Yield the axes of a picture, an array if there are several, and write it at the end.

    Axes with labelled lines get a legend beside them.
    """
    with rc_context(PICTURE_STYLE):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        grid = figure.subplots(rows, columns)
        yield grid
        for axes in np.atleast_1d(grid).flat:
            handles, _ = axes.get_legend_handles_labels()
            if handles:
                axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    with replacing(path) as temporary, warnings.catch_warnings(record=True) as caught:
        figure.savefig(temporary, format="png")
    if any("missing from" in str(warning.message) for warning in caught):
        tell_of_missing_letters()


@cache
def tell_of_missing_letters():
    """Say once that pictures lack letters of a name."""
    print("warning: the pictures' font lacks letters of a name; they are boxes there")


def plot_rates(axes, curves, kind):
    """ROC ("roc") or DET ("det") of genuine against twin impostor pairs.

    curves: [(name, scores as of TwinEvaluator.score, {metric: value} for the legend), ...].
    """
    _, scores_of_first, _ = curves[0]
    n_twin_pairs = len(scores_of_first["twin"])  # all networks have the same pairs
    lowest = min(10, 100 / n_twin_pairs)  # a logarithmic axis has no 0: curves end at one pair
    for name, scores, figures in curves:
        fmr, fnmr = error_rates(scores)
        at_eer = int(np.argmin(np.abs(fmr - fnmr)))
        wrapped_name = wrap_name(name, 32)  # a wide legend would narrow the curves
        axes.plot(
            np.maximum(fmr, lowest),
            100 - fnmr if kind == "roc" else fnmr,
            label=f"{wrapped_name}\nAUC {figures['auc']:.3f}, EER {100 * figures['eer']:.1f} %",
            drawstyle="steps-post",
            marker="o",
            markevery=[at_eer],
        )
    axes.set(xscale="log", xlim=(lowest, 100))
    label_logarithmic_axis(axes.xaxis)
    axes.set_xlabel("false match rate on twin impostors (%); dot: EER")
    axes.set_title(kind.upper())
    if kind == "roc":
        axes.set(ylim=(0, 100), ylabel="true accept rate, 1 - FNMR (%)")
    else:
        lowest_eer = 100 * min(figures["eer"] for _, _, figures in curves)
        bottom = max(0.01, lowest_eer / 10)
        axes.set(yscale="log", ylim=(bottom, 100), ylabel="FNMR (%)")
        label_logarithmic_axis(axes.yaxis)


def wrap_name(name, width):
    """A name in lines of at most `width` letters, broken at spaces and after underscores."""
    return textwrap.fill(name.replace("_", "_ "), width).replace("_ ", "_")


def error_rates(scores):
    """(FMR on twins, FNMR), in percent, at all thresholds in ascending order."""
    genuine = np.sort(scores["genuine"])
    twin = np.sort(scores["twin"])
    thresholds = np.append(np.unique(np.concatenate([genuine, twin])), np.inf)
    fmr = 100 - 100 * np.searchsorted(twin, thresholds) / len(twin)
    fnmr = 100 * np.searchsorted(genuine, thresholds) / len(genuine)
    return fmr, fnmr


def label_logarithmic_axis(axis):
    """Label 1, 2 and 5 of each decade with plain numbers."""

    def label_minor(value, _):
        first_digit = f"{value:.0e}"[0]
        return f"{value:g}" if first_digit in "25" else ""

    axis.set(major_formatter="{x:g}", minor_formatter=label_minor)


def plot_distributions(path, checkpoint):
    """The distributions of genuine, twin and general scores, and the rates at two thresholds."""
    scores = checkpoint.scores
    with plot_figure(path, 8.6) as axes:
        for kind, values in scores.items():
            bounded = np.clip(values, LOWEST_SCORE, 1)
            counts, edges = np.histogram(bounded, 80, (LOWEST_SCORE, 1))
            share = 100 * counts / max(1, len(values))
            label = kind if kind == "genuine" else f"{kind} impostor"
            middles = (edges[:-1] + edges[1:]) / 2
            axes.plot(middles, share, label=label, drawstyle="steps-mid")
        lines = (
            ("eer_threshold", "twin EER", ":"),
            ("general_threshold_0.001", "general FMR 0.1 %", "--"),
        )
        for name, what, style in lines:
            threshold = checkpoint.estimate.figures[name]
            if threshold is not None:
                label = f"threshold at {what}\n{describe_rates(scores, threshold)}"
                axes.axvline(threshold, color="grey", linewidth=1.5, linestyle=style, label=label)
        axes.set(xlim=(LOWEST_SCORE, 1), yscale="log")
        label_logarithmic_axis(axes.yaxis)
        axes.set_title(wrap_name(checkpoint.name, 60), fontsize=9)
        axes.set_xlabel("score (cosine similarity)")
        axes.set_ylabel("share of the image pairs per bin (%)")


def describe_rates(scores, threshold):
    """The error rates at a threshold, a line each."""
    lines = [f"FNMR {100 * (scores['genuine'] < threshold).mean():.1f} %"]
    for kind in ("twin", "general"):
        if len(scores[kind]):
            rate = 100 * (scores[kind] >= threshold).mean()
            lines.append(f"{kind} FMR {rate:.3g} %")  # two digits would make 99.6 1e+02
    return "\n".join(lines)


def plot_hardest(path, evaluator, checkpoint, crops):
    """The worst wrong decisions at the EER threshold: eight twin pairs and eight genuine pairs."""
    threshold = checkpoint.estimate.figures["eer_threshold"]
    excess = {
        "twin": checkpoint.scores["twin"] - threshold,
        "genuine": threshold - checkpoint.scores["genuine"],
    }
    # A score at the threshold is accepted: wrong for a twin pair, right for a genuine one.
    is_wrong = {"twin": excess["twin"] >= 0, "genuine": excess["genuine"] > 0}
    with plot_figure(path, 9.6, 7.0, rows=4, columns=4) as grid:
        for axes in grid.flat:
            axes.set_axis_off()
            axes.set(xticks=[], yticks=[])  # to lay out invisible ticks would take half the time
        for kind, part in (("twin", grid[:2]), ("genuine", grid[2:])):
            plot_mistakes(part, evaluator, checkpoint, crops, kind, excess[kind], is_wrong[kind])
        heading = f"mistakes at the EER threshold {threshold:.3f}, the worst first"
        name = wrap_name(checkpoint.name, 100)
        grid[0, 0].figure.suptitle(f"{name}\n{heading}", fontsize=9)


def plot_mistakes(grid, evaluator, checkpoint, crops, kind, excess, is_wrong):
    """Show the worst mistakes of one kind of pairs.

    excess: how far the score of each pair is on the wrong side of the threshold, below 0 on the
    right side. is_wrong: whether the decision on each pair is wrong.
    """
    rows = evaluator.rows[kind]
    names = [short_name(path) for path in evaluator.images.paths]
    title = {"twin": "twins taken for one person", "genuine": "one person refused"}[kind]
    note = note_on_suspect(rows, is_wrong, names)
    # A longer line would make the first column wider. The empty ones leave room for the caption of
    # the first pair.
    heading = f"{title}: {is_wrong.sum()} of {len(rows)} pairs{note}"
    lines = textwrap.wrap(heading, 50, break_on_hyphens=False)
    grid[0, 0].set_title("\n".join([*lines, "", ""]), fontsize=7, loc="left")
    worst = choose_hardest(evaluator, rows, excess, is_wrong, grid.size)
    for axes, k in zip(grid.flat, worst, strict=False):
        a, b = rows[k]
        axes.imshow(np.concatenate([crops[a], crops[b]], 1))
        score = checkpoint.scores[kind][k]
        axes.set_title(f"score {score:.3f}\n{names[a]} | {names[b]}", fontsize=6)


def short_name(path):
    """The ID's folder and the file of a crop; of a long name the end, which tells crops apart."""
    folder_and_file = "/".join(Path(path).parts[-2:])
    return folder_and_file[-17:]  # as many characters as fit under a picture


def note_on_suspect(rows, is_wrong, names):
    """A hint at the image with most mistakes, if half of its pairs, and at least 4, are wrong."""
    if not is_wrong.any():
        return ""
    in_mistakes = Counter(rows[is_wrong].ravel().tolist())
    image, n_mistakes = in_mistakes.most_common(1)[0]
    n_pairs = np.count_nonzero(rows == image)
    if n_mistakes < max(4, n_pairs / 2):
        return ""
    return f"; {n_mistakes} of the {n_pairs} pairs with {names[image]} are wrong: look at it"


def choose_hardest(evaluator, rows, excess, is_wrong, n):
    """The n wrong pairs farthest from the threshold: no image twice, no family three times."""
    chosen = []
    images = set()
    times_shown = Counter()
    worst_first = np.argsort(-excess, kind="stable")
    for k in worst_first[is_wrong[worst_first]]:
        a, b = rows[k].tolist()
        family = evaluator.family[a]
        if a in images or b in images or times_shown[family] == 2:
            continue
        chosen.append(k)
        images |= {a, b}
        times_shown[family] += 1
        if len(chosen) == n:
            break
    return chosen


def differences(entries):
    """(K,) differences and (2, K) bounds of their intervals, of entries of `compare`.

    Where there is none, they are NaN.
    """
    change = [entry["difference"] for entry in entries]
    bounds = [entry["difference_interval"] or [None, None] for entry in entries]
    return np.array(change, float), np.array(bounds, float).T


def plot_comparison(path, settings):
    """The differences of all settings to the baseline with 95 % intervals, and their DET curves."""
    shown = {
        "auc": "twin AUC",
        "eer": "EER",
        "general_auc": "general AUC",
        "fnmr_0.001": "FNMR at\ngeneral FMR 0.1 %",
    }
    height = max(4.6, 2 + 0.4 * len(settings))
    with plot_figure(path, 13.0, height, 1, 2) as (left, right):
        # The baseline. It takes the first colour, as it does among the DET curves.
        left.plot([0, 0], [-1, len(shown)])
        for number, setting in enumerate(settings[1:], 1):
            change, bounds = differences([setting.figures[name] for name in shown])
            offset = 0.8 * (number / len(settings) - 0.5)  # settings beside each other
            y = np.arange(len(shown)) + offset
            (dots,) = left.plot(100 * change, y, "o")
            left.hlines(y, *(100 * bounds), color=dots.get_color(), linewidth=1.2)
        left.set(yticks=range(len(shown)), yticklabels=shown.values())
        baseline = wrap_name(settings[0].name, 50)
        left.set(ylim=(len(shown) - 0.5, -0.5), title=f"difference to {baseline}")
        left.set_xlabel("change in percentage points (AUC: in 0.01), with 95 % interval")
        curves = []
        for setting in settings:
            values = {name: figure["value"] for name, figure in setting.figures.items()}
            curves.append((setting.name, setting.checkpoints[0].scores, values))
        plot_rates(right, curves, "det")
        if any(len(setting.checkpoints) > 1 for setting in settings):
            right.set_title("DET: figures are means over seeds, curves are of the first seed")


def plot_strata(path, settings):
    """Twin AUC and FNMR of all settings in each stratum, with 95 % intervals."""
    panels = {"auc": "twin AUC", "fnmr_0.001": "FNMR at a general FMR of 0.1 % (%)"}
    labels = list(settings[0].stratum_figures)
    height = 2 + 0.25 * len(labels) * len(settings)
    with plot_figure(path, 13.0, height, 1, 2) as grid:
        for axes, (name, title) in zip(grid, panels.items(), strict=True):
            scale = 1 if name == "auc" else 100
            for number, setting in enumerate(settings):
                figures = [setting.stratum_figures[label][name] for label in labels]
                values = np.array([figure["value"] for figure in figures], float)
                bounds = [figure["interval"] or [None, None] for figure in figures]
                offset = 0.8 * ((number + 0.5) / len(settings) - 0.5)  # beside each other
                y = np.arange(len(labels)) + offset
                label = setting.name if axes is grid[-1] else None
                (dots,) = axes.plot(scale * values, y, "o", label=label)
                low, high = scale * np.array(bounds, float).T
                axes.hlines(y, low, high, color=dots.get_color(), linewidth=1.2)
            axes.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5))
            axes.set_xlabel(f"{title}, with 95 % interval")


def plot_data_percentage(path, settings):
    """The differences of both AUCs to the baseline by the share of triplets.

    Settings that differ in nothing but the share are one line; several seeds are a band.
    """
    baseline = settings[0]
    lines = {}  # {label of a line: {share: figures}}
    ticks = {}  # {share: its label on the axis}
    for setting in settings[1:]:
        first = setting.checkpoints[0]
        share = first.recipe.get("train_percentage")
        if share is None:
            continue
        differing = setting.differing.items()
        others = [words for flag, words in differing if flag != "train_percentage"]
        label = ", ".join(others) or "all runs"
        if share in lines.get(label, {}):  # the recipe comes again, as with two epochs of one run
            label = setting.name
        lines.setdefault(label, {})[share] = setting.figures
        ticks[share] = f"{share} %\n{first.config['n_touched_images']} images"

    panels = {"auc": "twins", "general_auc": "everyone else"}
    with plot_figure(path, 8.6, 6.2, 2) as grid:
        for axes, (name, people) in zip(grid, panels.items(), strict=True):
            baseline_value = baseline.figures[name]["value"]
            # From left of the smallest share to right of 100 %.
            whole_width = [0.7 * min(ticks, default=1), 140]
            axes.plot(whole_width, [0, 0], label=f"{baseline.name} (baseline)")
            for number, (label, points) in enumerate(sorted(lines.items())):
                shares = sorted(points)
                entries = [points[share][name] for share in shares]
                beside_each_other = np.array(shares) * 1.04**number  # none hides another
                plot_line_with_band(axes, beside_each_other, entries, label, baseline_value)
            axes.set(xscale="log", ylabel=f"change of the AUC, {people}")
            axes.set_xticks(list(ticks), ticks.values(), fontsize=7)
            axes.set_xticks([], minor=True)
        title = "differences with 95 % intervals"
        if any(len(setting.checkpoints) > 1 for setting in settings):
            title = "means over seeds with 95 % intervals; band: the range of the seeds"
        grid[0].set_title(title)
        grid[1].set_xlabel("share of the training triplets, and distinct images in it")


def plot_line_with_band(axes, x, entries, label, baseline_value):
    """A line through differences, with intervals, and a band for the range of several seeds.

    entries: of `compare`. baseline_value: what the differences are to; it may be None.
    """
    change, bounds = differences(entries)
    (line,) = axes.plot(x, change, marker="o", label=label)
    axes.vlines(x, *bounds, color=line.get_color(), linewidth=1)
    if baseline_value is not None:
        ranges = [entry.get("range") or [None, None] for entry in entries]
        low, high = np.array(ranges, float).T - baseline_value  # None becomes NaN
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


# ---- the page to mail ----------------------------------------------------------------------------
REPORT_STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #111; }
h1, h2 { line-height: 1.2; }
.table { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { border: 1px solid #bbb; padding: 0.2rem 0.5rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; break-inside: avoid; }
img { max-width: 100%; height: auto; }
figcaption { color: #444; }
"""
CAPTIONS = {
    "comparison.png": "Left: the change of each network against the first one, with 95 % "
    "intervals. AUC should rise, EER and FNMR should fall; an interval that includes zero decides "
    "nothing. Right: error rates against twins; the lower curve is the better one.",
    "strata.png": "The figures of each group of pairs beside each other. If pairs within a session "
    "do better than pairs across, the network also uses what a session has in common.",
    "data_percentage.png": "What more training triplets bring. Points above the line are better "
    "than the start.",
    "roc_curve.png": "How often the right person is accepted, against how often the twin is.",
    "det_curve.png": "Both error rates against twins on logarithmic axes; lower is better.",
    "score_distributions.png": "The less the curves overlap, the easier it is to decide. The lines "
    "are two thresholds, with the error rates that they give.",
    "hardest_pairs.png": "The most confident mistakes. A picture that comes up often may be "
    "labelled or aligned wrongly. These are faces: see what the data's licence says before this "
    "page is passed on.",
}


def write_report(args, settings, chosen, strata, evaluator, notes, device):
    """Write report.html: the whole evaluation on one page, with its pictures inside.

    notes: the warnings about data and checkpoints.
    """
    folder = Path(args.output_dir)
    parts = ["<h1>Telling identical twins apart</h1>"]
    parts += html_of_answer(settings, chosen, notes)
    parts.append("<h2>Figures</h2>")
    parts += html_of_figures(args, settings, strata)
    parts += html_of_comparison_pictures(folder, settings)
    for setting in settings:
        parts.append(f"<h2>{escape(setting.name)}</h2>")
        parts += html_of_setting(folder, setting)
    parts.append("<h2>How this was measured</h2>")
    parts.append(html_table(["what", "how many"], evaluator.counts.items()))
    parts.append(html_table(["", ""], list_conditions(args, settings, device)))
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>Twins</title><style>{REPORT_STYLE}</style></head>\n<body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def html_of_answer(settings, chosen, notes):
    """Yield the paragraphs that say whether the settings are better, and what to mind."""
    baseline = settings[0]
    important = []
    for setting in settings[1:]:
        important += describe_setting(setting, baseline)
    for setting in settings:
        important += describe_overlap(setting)
    for line in important:
        yield f"<p><strong>{escape(line)}</strong></p>"
    if chosen:
        yield html_paragraph(f"Validation would have chosen: {chosen}.")
    for note in notes:
        yield html_paragraph(f"Note: {note}.")


def html_of_figures(args, settings, strata):
    """Yield the tables and what they count."""
    if args.cross:
        yield html_paragraph(describe_cross(args))
    if args.pair_list:
        yield html_paragraph(f"The genuine and twin pairs are those of {args.pair_list}.")
    yield html_table(["setting", *TABLE_COLUMNS], rows_of_figures(settings))
    brackets = "In brackets: 95 % intervals by bootstrap over families."
    yield html_paragraph(" ".join([brackets, *TABLE_NOTES]))
    if strata:
        yield f"<pre>{escape(strata_table(settings, strata))}</pre>"


def html_of_comparison_pictures(folder, settings):
    """Yield the pictures that show all settings, those that have something to show."""
    yield html_figure(folder / "comparison.png")
    if settings[0].stratum_figures:
        yield html_figure(folder / "strata.png")
    if any("train_percentage" in setting.checkpoints[0].recipe for setting in settings[1:]):
        yield html_figure(folder / "data_percentage.png")


def html_of_setting(folder, setting):
    """Yield what there is on one setting; the pictures are those of its first checkpoint."""
    hardest = describe_hardest_families(setting)
    if hardest:
        yield html_paragraph(f"Hardest families: {hardest}.")
    for line in describe_operating_points(setting):
        yield html_paragraph(line)
    results = folder / setting.checkpoints[0].name
    for name in ("roc_curve", "det_curve", "score_distributions", "hardest_pairs"):
        yield html_figure(results / f"{name}.png")


def html_paragraph(text):
    return f"<p>{escape(text)}</p>"


def rows_of_figures(settings):
    """The rows of the table: a setting's name and its figures with their intervals, as text."""
    for setting in settings:
        cells = [setting.name]
        for name in TABLE_COLUMNS.values():
            cells.append(describe_figure_with_interval(setting.figures, name))
        yield cells


def list_conditions(args, settings, device):
    """What the figures depend on, as pairs of text."""
    yield "evaluation", args.command
    yield "seed of resamples, folds and general pairs", args.seed
    yield "device", device
    yield "versions", f"PyTorch {torch.__version__}, NumPy {np.__version__}"
    for setting in settings:
        runs = []
        for checkpoint in setting.checkpoints:
            runs += checkpoint.fold_runs or [checkpoint]
        for run in runs:
            yield run.name, run.path
            config = run.config
            if "command" in config:
                yield "trained by", config["command"]
            if run.recipe:
                flags = [f"{name} {value}" for name, value in run.recipe.items()]
                yield "recipe", ", ".join([*flags, f"seed {config['seed']}"])
                n_pairs = f"{config['n_train_pairs']} pairs, {config['n_train_images']} images"
                yield "trained on", f"{n_pairs}; validated on {config['n_val_pairs']} pairs"


def html_table(titles, rows):
    """A table; titles and cells may be anything that has a text."""
    lines = ["".join(f"<th>{escape(str(title))}</th>" for title in titles)]
    for row in rows:
        lines.append("".join(f"<td>{escape(str(cell))}</td>" for cell in row))
    inside = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="table"><table>{inside}</table></div>'


def html_figure(path):
    """The HTML of a picture, its bytes inside, with its caption; path: one named in CAPTIONS."""
    data = base64.b64encode(path.read_bytes()).decode()
    caption = CAPTIONS[path.name]
    image = f'<img src="data:image/png;base64,{data}" alt="{path.stem}"/>'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


# ---- the evaluation ------------------------------------------------------------------------------
def evaluate(args):
    """The whole evaluation of the command line; returns its Checkpoints, the baseline first."""
    if (args.cross or args.by) and not args.metadata:
        raise InputError("--cross and --by need --metadata, the file with those columns")
    if args.metadata and not (args.cross or args.by):
        raise InputError("--metadata is of no use without --cross or --by, which name its columns")
    device = pick_device(args.device)
    # All files are read before the alignment, which may take hours. The images that --pair_list
    # and --metadata name can only be looked up after it.
    images_flag = "aligned_json" if args.skip_alignment else "id_to_images"
    id_to_images, pairs, notes = read_people(args, images_flag, "test_pairs")
    checkpoints, notes_on_checkpoints = open_checkpoints(args, pairs)
    notes += notes_on_checkpoints
    if args.pair_list:
        read_flag(args, "pair_list", read_rows_of_pairs)
    if args.metadata:
        read_flag(args, "metadata", read_csv, ("path", *columns_of(args)))
    aligned = id_to_images if args.skip_alignment else align_files(args, "test_pairs")
    people = People(aligned, pairs, notes)
    add_overlap_by_images(args, checkpoints, people)
    checkpoints = pool_folds(checkpoints, people)
    evaluator, strata = make_evaluators(args, people, checkpoints)
    for warning in people.warnings:
        print(f"warning: {warning}")
    evaluate_checkpoints(args, checkpoints, evaluator, strata, people, device)
    report(args, checkpoints, evaluator, strata, people.warnings, device)
    return checkpoints


def make_evaluators(args, people, checkpoints):
    """(the TwinEvaluator of the main figures, {label: that of a stratum}).

    What was left out is added to people.warnings.
    """
    images = TwinImages(people.id_to_images, people.pairs)
    finder = CropFinder(args, people.id_to_images)
    listed = None
    if args.pair_list:
        listed = read_flag(args, "pair_list", read_pair_list, finder)
    group_of = group_by_network(checkpoints)
    evaluator = TwinEvaluator(images, args.seed, listed=listed, group_of=group_of)
    if group_of and not evaluator.counts["general"]:
        people.warnings.append(
            "no general figures: no two families are in one fold of each cross-validation"
        )
    n_without_crop = (images.count == 0).sum()
    if n_without_crop:
        people.warnings.append(f"{n_without_crop} people have no crop; their pairs are not tested")
    if listed:
        n_left_out = len(listed) - evaluator.counts["genuine"] - evaluator.counts["twin"]
        if n_left_out:
            reason = "an image has no crop, is the copy of another, or the pair is listed before"
            people.warnings.append(f"{n_left_out} pairs of --pair_list are left out: {reason}")
        people.warnings += evaluator.warn_of_split_families()
    strata = {}
    if args.metadata:
        metadata = read_columns(args, finder, images)
        evaluator, strata = make_strata(args, evaluator, metadata)
        people.warnings += drop_empty_strata(strata)
    people.warnings += evaluator.warn_of_large_families()
    return evaluator, strata


def group_by_network(checkpoints):
    """{ID: number of a group} for general pairs; {} without a cross-validation.

    Two people are in one group if each cross-validation has both in one of its folds, so that one
    network embeds the images of both.
    """
    folds_of = {}  # {ID: [its fold in each cross-validation]}
    for checkpoint in checkpoints:
        for fold, run in enumerate(checkpoint.fold_runs):
            for name in run.fold_ids:
                folds_of.setdefault(name, []).append(fold)
    number_of = {}  # {the folds of its people: number of the group}
    group_of = {}
    for name, folds in folds_of.items():
        group_of[name] = number_of.setdefault(tuple(folds), len(number_of))
    return group_of


def columns_of(args):
    """The columns of --metadata that --cross and --by name."""
    return [*args.by, args.cross] if args.cross else args.by


def read_columns(args, finder, images):
    """{column: {path: value}} of --cross and --by; InputError if an image lacks a value."""
    metadata = read_flag(args, "metadata", read_metadata, columns_of(args), finder)
    for column, value_of in metadata.items():
        refuse_missing_values(args.metadata, column, value_of, images.paths)
    return metadata


def make_strata(args, evaluator, metadata):
    """(the TwinEvaluator of the main figures, {label: that of a stratum}) of --cross and --by.

    metadata: {column: {path: value}}. A stratum may be without genuine or without twin pairs.
    """
    main = evaluator
    strata = {}
    if args.cross:
        main, strata = make_strata_of_cross(evaluator, args.cross, metadata[args.cross])
    for column in args.by:
        strata |= make_strata_of_values(main, column, metadata[column])
    return main, strata


def make_strata_of_cross(evaluator, column, value_of):
    """(the TwinEvaluator of the main figures, {label: that of a stratum}) of --cross.

    value_of: {path: value}. Raises InputError if no genuine pair has two values.
    """
    main = evaluator.across(value_of)
    if not main.counts["genuine"]:
        message = f"nobody has images with two values of {column}"
        raise InputError(f"--cross {column}: {message}")
    first, second = evaluator.values_of_pairs("genuine", value_of)
    strata = {
        f"genuine pairs of two values of {column}": main,
        f"genuine pairs of one {column}": evaluator.part({"genuine": first == second}),
        "all genuine pairs": evaluator,
    }
    return main, strata


def make_strata_of_values(evaluator, column, value_of):
    """{label: TwinEvaluator} of --by: the pairs with each value, and those with two values."""
    values = {kind: evaluator.values_of_pairs(kind, value_of) for kind in ("genuine", "twin")}
    strata = {}
    for value in sorted(set(value_of.values())):
        keep = {}
        for kind, (first, second) in values.items():
            keep[kind] = (first == value) & (second == value)
        strata[f"{column}: {value}"] = evaluator.part(keep)
    differs = {kind: first != second for kind, (first, second) in values.items()}
    strata[f"{column}: two values"] = evaluator.part(differs)
    return strata


def drop_empty_strata(strata):
    """Take out the strata without genuine or without twin pairs; returns a warning for each."""
    notes = []
    for label, part in list(strata.items()):
        counts = part.counts
        if not counts["genuine"] or not counts["twin"]:
            del strata[label]
            found = f"{counts['genuine']} genuine and {counts['twin']} twin pairs"
            notes.append(f"{label}: there are no figures, with {found}")
    return notes


def open_checkpoints(args, pairs):
    """([Checkpoint, ...], [warning, ...]): what the flags name, the baseline first, no copies.

    Raises InputError for one that was trained or validated on a test person, by its ID. The runs of
    a cross-validation are tested on the people of their own fold, if those are test people.
    """
    test_ids = {name for pair in pairs for name in pair}
    names = list(args.checkpoints)
    if args.baseline:
        names.insert(0, args.baseline)
    paths = list_checkpoints(names)
    folders = file_names(paths)
    checkpoints = []
    notes = []
    path_of_network = {}
    for path in paths:
        checkpoint = open_checkpoint(path, folders[path], args.channels)
        # A copy has the same weights and the same config. Equal weights alone are not enough: runs
        # that differ in --monitor may keep the same ones, and of two files one may not say whom
        # the network was trained on.
        network = (checkpoint.weights_hash, repr(checkpoint.config))
        first = path_of_network.setdefault(network, path)
        if first != path:
            notes.append(f"{path} holds the same network as {first}, which is used once")
            continue
        # train_twins.py adds this at the end of a run that has validation.
        if checkpoint.config.get("n_val_pairs") and "against_start" not in checkpoint.facts:
            way_out = "finish it with --resume, or leave the checkpoint out"
            notes.append(f"{path}: its training has not ended; {way_out}")
        checkpoint.overlap = sorted(checkpoint.tested_ids(test_ids) & checkpoint.seen_ids)
        if checkpoint.overlap and not args.allow_overlap:
            number = f"{len(checkpoint.overlap)} of the {len(test_ids)} test people"
            refuse_overlap(checkpoint, f"{number}: {', '.join(checkpoint.overlap)}")
        notes += note_on_spellings(checkpoint, test_ids)
        checkpoints.append(checkpoint)
    notes += notes_on_lengths(checkpoints[1:])  # the baseline is in no mean
    return checkpoints, notes


def open_checkpoint(path, name, channels):
    """The Checkpoint in a file; its overlap is not known yet."""
    model = load_checkpoint(path, channels=channels)
    return Checkpoint(
        path,
        name,
        model.facts,
        weights_hash=weights_sha256(model),
        backbone_hash=weights_sha256(model, backbone_only=True),
        overlap=[],
    )


def notes_on_lengths(checkpoints):
    """A warning for each setting whose seeds have different --epochs or --patience."""
    notes = []
    for group in group_by_recipe(checkpoints):
        lengths = {(run.config.get("epochs"), run.config.get("patience")) for run in group}
        if len(lengths) > 1:
            names = ", ".join(run.name for run in group)
            notes.append(f"{names}: their mean is of runs with different --epochs or --patience")
    return notes


def note_on_spellings(checkpoint, test_ids):
    """[warning] if only capitals, spaces or zeros tell test IDs from IDs that it has seen."""

    def plain(name):
        return name.strip().casefold().lstrip("0")

    seen = {plain(name): name for name in checkpoint.seen_ids}
    tested = checkpoint.tested_ids(test_ids) - checkpoint.seen_ids
    alike = sorted(name for name in tested if plain(name) in seen)
    if not alike:
        return []
    example = f"such as {alike[0]!r}: it was trained or validated on {seen[plain(alike[0])]!r}"
    what = f"{len(alike)} test people may be people that it has seen, in another spelling"
    return [f"{checkpoint.path}: {what}, {example}; if they are, test on others"]


def refuse_overlap(checkpoint, what):
    """Raise InputError for a checkpoint; what: that which it has seen."""
    way_out = "test on others, or say --allow_overlap"
    raise InputError(f"{checkpoint.path}: was trained or validated on {what}; {way_out}")


def add_overlap_by_images(args, checkpoints, people):
    """Add to each checkpoint's overlap the test people of whom it has seen an image in training.

    This finds people who had another ID there, also by copies of an image. Raises InputError for
    them without --allow_overlap.
    """
    test_ids = {*people.id_to_images}
    for checkpoint in checkpoints:
        known_hashes = {*checkpoint.facts.get("crop_sha256", [])}
        hashes_and_owners = zip(people.crops.sha256, people.owner, strict=True)
        seen = {owner for sha256, owner in hashes_and_owners if sha256 in known_hashes}
        if "seen_images" in checkpoint.facts:
            seen |= people.people_on(checkpoint.facts["seen_images"])
        seen &= checkpoint.tested_ids(test_ids)
        if seen and not args.allow_overlap:
            refuse_overlap(checkpoint, f"images of {', '.join(sorted(seen))}")
        checkpoint.overlap = sorted({*checkpoint.overlap, *seen})


def pool_folds(checkpoints, people):
    """The Checkpoints, with the runs of each cross-validation on the test people made into one.

    Raises InputError if such runs are not one for each fold.
    """
    test_ids = {*people.id_to_images}
    groups = {}
    for checkpoint in checkpoints:
        key = checkpoint.path
        if checkpoint.fold_ids & test_ids:
            recipe = json.dumps(checkpoint.recipe, sort_keys=True)
            key = (recipe, checkpoint.config["seed"], checkpoint.config["folds"])
        groups.setdefault(key, []).append(checkpoint)
    pooled = []
    for group in groups.values():
        if group[0].fold_ids & test_ids:
            pooled.append(pool_runs(group, people.pairs))
        else:
            pooled += group
    name_cross_validations(pooled)
    return pooled


def pool_runs(runs, pairs):
    """The Checkpoint of the runs of a cross-validation.

    Raises InputError if they are not one for each fold, if a test person is in none of the folds,
    and if the two people of a test pair are in different ones.
    """
    first = runs[0]
    n_folds = first.config["folds"]
    folds = [run.config["fold"] for run in runs]
    missing = [fold for fold in range(1, n_folds + 1) if fold not in folds]
    repeated = sorted({fold for fold in folds if folds.count(fold) > 1})
    fold_of = {name: run.config["fold"] for run in runs for name in run.fold_ids}
    strangers = {name for pair in pairs for name in pair if name not in fold_of}
    divided = [pair for pair in pairs if fold_of.get(pair[0]) != fold_of.get(pair[1])]
    problem = None
    if missing:
        problem = f"the runs of folds {missing} of {n_folds} are missing"
    elif repeated:
        problem = f"there are several runs of folds {repeated} of {n_folds}"
    elif strangers:
        problem = f"{len(strangers)} of the test people are in none of its folds"
    elif divided:
        problem = f"{' and '.join(divided[0])} are a test pair, but in different folds"
    if problem:
        raise InputError(
            f"{first.path}: {problem}; give --checkpoints one run of each of the {n_folds} folds, "
            "and --test_pairs the pairs that the folds were made of"
        )
    overlap = {name for run in runs for name in run.overlap}
    return replace(first, overlap=sorted(overlap), fold_runs=runs)


def name_cross_validations(checkpoints):
    """Name each cross-validation after its runs, and differently from all other checkpoints.

    That of the runs a_fold1of3, a_fold2of3 and a_fold3of3 is a_3folds.
    """
    path_of = {}  # {path of a checkpoint: its path, or a made-up one for a cross-validation}
    for checkpoint in checkpoints:
        path_of[checkpoint.path] = checkpoint.path
        if checkpoint.fold_runs:
            config = checkpoint.config
            end = f"_fold{config['fold']}of{config['folds']}"
            file = f"{config['run_name'].removesuffix(end)}_{config['folds']}folds.pth"
            path_of[checkpoint.path] = os.path.join(os.path.dirname(checkpoint.path), file)
    names = file_names(list(path_of.values()))
    for checkpoint in checkpoints:
        if checkpoint.fold_runs:
            checkpoint.name = names[path_of[checkpoint.path]]


def evaluate_checkpoints(args, checkpoints, evaluator, strata, people, device):
    """Embed the images with all checkpoints, measure each, and write its results.

    Once the first is measured, the comparison of an earlier evaluation is deleted.
    """
    images = evaluator.images
    crops = people.crops.pixels[people.rows(images.paths)]
    home = os.path.dirname(os.path.abspath(args.aligned_json))
    for checkpoint, embeddings in embed_images(args, checkpoints, images, crops, device):
        measure(args, checkpoint, checkpoints, evaluator, strata, embeddings)
        for name in COMPARISON_FILES:
            # This evaluation may end early, or draw fewer pictures than an earlier one.
            Path(args.output_dir, name).unlink(missing_ok=True)
        folder = Path(args.output_dir, checkpoint.name)
        write_result(folder, evaluator, strata, checkpoint, crops, home, args.flip)


def embed_images(args, checkpoints, images, crops, device):
    """Yield (Checkpoint, embeddings (N, 512) of the images), as each is ready.

    In a cross-validation, each image is embedded by the run that has not seen its person. Networks
    with the same backbone, which differ in the embedding layer alone, run it once.
    """
    groups = {}
    for checkpoint in checkpoints:
        for run in checkpoint.fold_runs or [checkpoint]:
            groups.setdefault(run.backbone_hash, []).append((checkpoint, run))
    incomplete = {}  # {path of a cross-validation: [(run, its embeddings), ...] so far}
    for group in groups.values():
        runs = [run for _, run in group]
        results = embed_with_common_backbone(args, runs, crops, device)
        for (checkpoint, run), embeddings in zip(group, results, strict=True):
            check_alive(embeddings, run.path)
            if not checkpoint.fold_runs:
                yield checkpoint, embeddings
                continue
            incomplete.setdefault(checkpoint.path, []).append((run, embeddings))
            if len(incomplete[checkpoint.path]) == len(checkpoint.fold_runs):
                yield checkpoint, join_folds(incomplete.pop(checkpoint.path), images)


def join_folds(runs_and_embeddings, images):
    """(N, 512): for each image, the embedding by the run that has not seen its person.

    runs_and_embeddings: [(run, its embeddings (N, 512) of all images), ...].
    """
    _, embeddings_of_first = runs_and_embeddings[0]
    joined = torch.zeros_like(embeddings_of_first)
    for run, embeddings in runs_and_embeddings:
        is_tested = torch.from_numpy(np.isin(images.ids, list(run.fold_ids))[images.person])
        joined[is_tested] = embeddings[is_tested]
    return joined


def embed_with_common_backbone(args, checkpoints, crops, device):
    """The embeddings (N, 512) of crops for each of Checkpoints that differ in the last layer."""
    model = load_checkpoint(checkpoints[0].path, channels=args.channels)
    heads = [model.output_layer]
    for checkpoint in checkpoints[1:]:
        # Nothing but the head is kept, so that one backbone at a time is in memory.
        heads.append(load_checkpoint(checkpoint.path, channels=args.channels).output_layer)
    names = ", ".join(checkpoint.name for checkpoint in checkpoints)
    return embed(
        model,
        crops,
        device,
        heads,
        batch_size=args.batch_size,
        description=f"embedding with {names}"[:60],
        flip=args.flip,
    )


def measure(args, checkpoint, checkpoints, evaluator, strata, embeddings):
    """Fill in the scores, the estimates and the families of a checkpoint."""
    checkpoint.scores = evaluator.score(embeddings)
    thresholds = {}
    if not args.flip:  # validation thresholds hold for plain embeddings, not for fused ones
        thresholds = validation_thresholds(checkpoint, checkpoints)
    label = f"resampling {checkpoint.name}"
    checkpoint.estimate = evaluator.estimate(checkpoint.scores, thresholds, label)
    checkpoint.families = list_families(evaluator, checkpoint)
    checkpoint.stratum_estimates = {}
    for stratum, part in strata.items():
        scores = part.score(embeddings)
        label_of_stratum = f"{label}, {stratum}"
        estimate = part.estimate(scores, thresholds, label_of_stratum)
        checkpoint.stratum_estimates[stratum] = estimate


def validation_thresholds(checkpoint, checkpoints):
    """{name of OPERATING_POINTS: threshold} that the validation people gave a network.

    A trained checkpoint carries its own. Those of the network that training started from are in the
    trained checkpoint, as `start_metrics`; if several runs started from it, the first one counts.
    A cross-validation has none, since each of its runs had other validation people.
    """
    if checkpoint.fold_runs:
        return {}
    sources = [checkpoint.validation]
    for other in checkpoints:
        start_hash = other.recipe.get("weights_sha256")  # of the network that it started from
        if start_hash == checkpoint.weights_hash and not other.fold_runs:
            sources.append(other.facts.get("start_metrics", {}))
    for metrics in sources:
        thresholds = {}
        for point, (metric, _) in OPERATING_POINTS.items():
            threshold = metrics.get(f"val_{metric}")
            if threshold is not None:
                thresholds[point] = threshold
        if thresholds:
            return thresholds
    return {}


def report(args, checkpoints, evaluator, strata, notes, device):
    """Print the comparison of all checkpoints; write its files and the page to mail."""
    settings = group_settings(checkpoints)
    chosen = chosen_by_validation(settings)
    write_comparison(args, checkpoints, settings, chosen, notes)
    counts = evaluator.counts
    n_people = (evaluator.images.count > 0).sum()
    print(
        f"{counts['images']} images of {n_people} people in {evaluator.n_families} families, "
        f"on {device}:\n{counts['genuine']} genuine, {counts['twin']} twin impostor, "
        f"{counts['general']} general impostor pairs"
    )
    print(comparison_table(settings, chosen))
    if args.cross:
        print(describe_cross(args))
    if strata:
        print(strata_table(settings, strata))
    write_report(args, settings, chosen, strata, evaluator, notes, device)
    print(f"results in {args.output_dir}; report.html is one page with all of it")


def parse_args(argv=None):
    description = "Measure how well checkpoints tell the twins of a test set apart."
    parser = Parser(prog="evaluate_twins.py", description=description)
    add = parser.add_argument
    add(
        "--test_pairs",
        default="test_twin_id_pairs.json",
        metavar="FILE",
        help='JSON file [["ID", "twin\'s ID"], ...], or a CSV file of two columns',
    )
    add_alignment_arguments(parser, "test")
    add(
        "--skip_alignment",
        action="store_true",
        help="use the crops that --aligned_json lists, instead of aligning photographs",
    )
    add(
        "--channels",
        choices=("RGB", "BGR"),
        help="colour order that a network of CVLface (keys net.*) takes, "
        "if no yaml beside its file says it",
    )
    add(
        "--pair_list",
        metavar="FILE",
        help="score only these genuine and twin pairs of images: a CSV file with the columns "
        "path_1, path_2, same (1 or 0), and perhaps fold; or lines of two paths and 1 or 0",
    )
    add(
        "--metadata",
        metavar="FILE",
        help="CSV file with a column path, as in --id_to_images, and columns for --cross and --by",
    )
    add(
        "--cross",
        metavar="COLUMN",
        help="column of --metadata, such as session: the main figures count only genuine pairs "
        "whose images have different values there; figures of the other ones stand beside them",
    )
    add(
        "--by",
        metavar="COLUMN",
        nargs="+",
        default=[],
        help="columns of --metadata: also give figures for each value, of the pairs whose images "
        "both have it, and figures of the pairs whose images have different values",
    )
    add(
        "--checkpoints",
        required=True,
        nargs="+",
        metavar="FILE",
        help="networks to compare; folders and patterns with * are expanded",
    )
    add(
        "--baseline",
        metavar="FILE",
        help="network that the others are compared with; without it, the first of --checkpoints",
    )
    add(
        "--output_dir",
        default="evaluation_results",
        metavar="DIR",
        help="folder for the results",
    )
    add(
        "--batch_size",
        type=number_between(int, 1, 10**6),
        metavar="N",
        help="number of images that the network embeds at once; it decides speed and memory, not "
        "the results (default: 256 on CUDA, 8 on a CPU)",
    )
    add(
        "--seed",
        type=number_between(int, 0, 2**32 - 1),
        default=42,
        metavar="N",
        help="seed of the bootstrap, of the ten folds and of the sampled general impostor pairs",
    )
    add(
        "--flip",
        action="store_true",
        help="add the embeddings of each image and of its mirror image; the thresholds of the "
        "validation people are not applied then, since they are for single embeddings",
    )
    add(
        "--allow_overlap",
        action="store_true",
        help="also evaluate checkpoints that were trained on test people, and say so",
    )
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    args.command = shlex.join(["python", "evaluate_twins.py", *words])
    return args


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit code (see net.run_script)."""
    return run_script(
        "evaluate_twins.py",
        lambda: evaluate(parse_args(argv)),
        interrupted_message="interrupted; the results of the checkpoints done so far are saved",
        memory_advice="lower --batch_size, or take another --device",
    )


if __name__ == "__main__":
    run_main(main)
