"""Evaluation: metrics, intervals and verdicts, embeddings, settings, and the files that it writes.

The oracles are brute force over all thresholds in fractions, scikit-learn, cases worked out by hand
and the network in double precision.
"""

import json
import re
import shutil
import weakref
from contextlib import contextmanager, nullcontext
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import scipy
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve

import evaluate_twins as ev
import net
import train_twins
from tests.conftest import (
    EVALUATED,
    SEEN,
    SHUFFLED,
    START_THRESHOLDS,
    THRESHOLDS,
    Experiment,
    crop_writer,
    quick_features,
    read_csv,
    tuned,
    variant,
)
from tests.reference import brute_force, kind_of, people
from tests.synthetic import write_photos
from triplet_dataset import TwinImages

CPU = torch.device("cpu")


# ---- metrics -------------------------------------------------------------------------------------
def metrics_of(genuine, twin, general=(), given_thresholds=None):
    """{name: float} of scores each of which counts once."""
    pairs = []
    for scores in (genuine, twin, general):
        one_family = np.zeros(len(scores), int)
        pairs.append(ev.ScoredPairs(np.asarray(scores, float), one_family))
    once = np.array([[1]])
    metrics = ev.verification_metrics(*pairs, once, given_thresholds)
    return {name: value for name, (value,) in metrics.items()}


def random_scores(rng):
    return rng.normal(0.5, 0.2, 60), rng.normal(0.3, 0.2, 1000), rng.normal(0, 0.2, 999)


def scores_with_many_ties(rng):
    genuine = rng.integers(3, 9, 80) / 10
    twin = rng.integers(0, 7, 100) / 10
    general = rng.integers(-5, 5, 2000) / 10
    return genuine, twin, general


CASES = {
    "random": random_scores,
    "many ties": scores_with_many_ties,
    "all equal": lambda rng: (np.full(5, 0.5), np.full(7, 0.5), np.full(9, 0.5)),
    "separated": lambda rng: ([0.8, 0.9], [0.3, 0.2, 0.1], [0.0, -0.1]),
    "one each, inverted": lambda rng: ([0.4], [0.6], [0.5]),
    "no general": lambda rng: (rng.normal(0, 1, 1), rng.normal(0.2, 1, 99), []),
}


@pytest.mark.parametrize("case", CASES)
def test_metrics_equal_brute_force(case):
    scores = CASES[case](np.random.default_rng(0))
    expected = pytest.approx(brute_force(*scores), abs=1e-12, nan_ok=True)
    assert metrics_of(*scores) == expected


@pytest.fixture(params=[15, 2], ids=["distinct", "ties"])
def many_scores(request):
    """(genuine, twin, general) scores, rounded to 15 or to 2 decimals."""
    rng = np.random.default_rng(1)
    sizes = ((0.5, 3000), (0.2, 12000), (0.0, 20000))
    return [rng.normal(mean, 0.2, n).round(request.param) for mean, n in sizes]


def labelled(genuine, impostor):
    """(labels, scores) as scikit-learn takes them."""
    labels = np.concatenate([np.ones(len(genuine)), np.zeros(len(impostor))])
    return labels, np.concatenate([genuine, impostor])


def scikit_learns_curve(genuine, impostor):
    """(FMR, 1 - FNMR, thresholds), from the highest threshold to the lowest."""
    return roc_curve(*labelled(genuine, impostor), drop_intermediate=False)


def test_areas_equal_scikit_learns(many_scores):
    genuine, twin, general = many_scores
    got = metrics_of(genuine, twin, general)
    assert got["auc"] == pytest.approx(roc_auc_score(*labelled(genuine, twin)), abs=1e-9)
    expected = roc_auc_score(*labelled(genuine, general))
    assert got["general_auc"] == pytest.approx(expected, abs=1e-9)


def test_tar_at_far_equals_scikit_learns(many_scores):
    genuine, twin, general = many_scores
    got = metrics_of(genuine, twin, general)
    fmr, tar, _ = scikit_learns_curve(genuine, twin)
    assert got["tar_at_far_0.01"] == pytest.approx(tar[fmr <= 0.01].max(), abs=1e-9)


def test_eer_equals_that_of_scikit_learns_curve(many_scores):
    genuine, twin, general = many_scores
    got = metrics_of(genuine, twin, general)
    fmr, tar, thresholds = scikit_learns_curve(genuine, twin)
    fnmr = 1 - tar
    gap = np.abs(fmr - fnmr)
    # scikit-learn's thresholds descend, so of equal gaps the last one has the lowest threshold.
    at = np.flatnonzero(gap <= gap.min() + 1e-12)[-1]
    assert got["eer"] == pytest.approx((fmr[at] + fnmr[at]) / 2, abs=1e-9)
    assert got["eer_threshold"] == pytest.approx(thresholds[at], abs=1e-9)


@pytest.mark.parametrize("rate", [0.001, 0.0001])
def test_general_thresholds_are_the_lowest_with_their_rate(many_scores, rate):
    _, _, general = many_scores
    threshold = metrics_of(*many_scores)[f"general_threshold_{rate:g}"]
    assert np.mean(general >= threshold) <= rate
    assert np.mean(general >= np.nextafter(threshold, -np.inf)) > rate


@pytest.mark.parametrize("rate", [0.001, 0.0001])
def test_fnmr_at_general_thresholds_equals_scikit_learns(many_scores, rate):
    genuine, _, general = many_scores
    got = metrics_of(*many_scores)
    fmr, tar, _ = scikit_learns_curve(genuine, general)
    assert got[f"fnmr_{rate:g}"] == pytest.approx(1 - tar[fmr <= rate].max(), abs=1e-9)


def test_metrics_of_a_case_worked_out_by_hand():
    # At the thresholds  1    2    3    4    5    6
    # the twin FMR is    1   3/4  2/4  1/4   0    0
    # and the FNMR is    0    0   1/3  1/3  1/3  2/3, so they differ least (by 1/12) at 4.
    got = metrics_of([2, 5, 6], [1, 2, 3, 4], [0, 2, 5])
    expected = {
        "eer_threshold": 4,
        "eer": (1 / 4 + 1 / 3) / 2,
        "auc": (1.5 + 4 + 4) / 12,
        "best_accuracy": 6 / 7,
        "accuracy_at_eer": 5 / 7,
        "tar_at_far_0.01": 2 / 3,
        "general_auc": (1.5 + 2.5 + 3) / 9,
        "twin_fmr_0.001": 0,
        "fnmr_0.001": 2 / 3,
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    # None of the three general pairs may be accepted.
    assert got["general_threshold_0.001"] == np.nextafter(5, 6)


def test_rates_at_a_given_threshold_are_shares_of_the_pairs():
    given = {"val_eer": 0.5}  # which accepts a score of 0.5
    got = metrics_of([0.4, 0.5, 0.9], [0.1, 0.5, 0.6, 0.7], [0.1, 0.2, 0.3, 0.4, 0.5], given)
    assert got["twin_fmr_val_eer"] == pytest.approx(3 / 4)
    assert got["general_fmr_val_eer"] == pytest.approx(1 / 5)
    assert got["fnmr_val_eer"] == pytest.approx(1 / 3)


def test_rates_at_a_given_threshold_need_no_pairs_of_other_kinds():
    got = metrics_of([0.4, 0.5, 0.9], [0.1, 0.5, 0.6, 0.7], [], {"val_eer": 0.5})
    assert got["twin_fmr_val_eer"] == pytest.approx(3 / 4)
    assert got["fnmr_val_eer"] == pytest.approx(1 / 3)
    assert np.isnan(got["general_fmr_val_eer"])


def test_general_thresholds_and_the_twin_fmr_there_need_no_genuine_pairs():
    got = metrics_of([], [1, 2, 6, 7], [0, 2, 5])
    assert got["general_threshold_0.001"] == np.nextafter(5, 6)
    assert got["twin_fmr_0.001"] == pytest.approx(2 / 4)
    assert got["general_fmr_0.001"] == 0
    assert np.isnan(got["fnmr_0.001"])


# ---- which pairs there are -----------------------------------------------------------------------
@pytest.fixture
def few_people():
    """TwinImages of people some of whom have no image; d and f are siblings, but no pair."""
    sizes = {"a": 3, "b": 2, "c": 1, "d": 0, "e": 4, "f": 2, "g": 0, "h": 0}
    pairs = [("a", "b"), ("b", "c"), ("a", "c"), ("d", "e"), ("e", "f"), ("g", "h")]
    id_to_images = {name: [f"/{name}/{i}" for i in range(n)] for name, n in sizes.items()}
    return TwinImages(id_to_images, pairs)


def test_image_pairs_equal_brute_force(few_people):
    evaluator = ev.TwinEvaluator(few_people)
    expected = {}
    for i, j in combinations(range(len(few_people.paths)), 2):
        expected.setdefault(kind_of(few_people, i, j), set()).add((i, j))
    for kind, rows in evaluator.rows.items():
        assert {tuple(sorted(row)) for row in rows.tolist()} == expected[kind]
        assert len(rows) == len(expected[kind])
        assert evaluator.counts[kind] == len(expected[kind])


def test_families_without_an_image_do_not_count(few_people):
    assert ev.TwinEvaluator(few_people).counts["families"] == 2  # not that of g and h


def test_families_without_twin_pairs_give_no_verdict():
    sizes = [(3, 3)] * 3 + [(3, 0)] * 5
    evaluator = ev.TwinEvaluator(people(*sizes))
    assert evaluator.counts["families"] == 3
    scores = {kind: np.linspace(0, 1, len(rows)) for kind, rows in evaluator.rows.items()}
    estimate = evaluator.estimate(scores)
    comparison = ev.compare([estimate], estimate)
    assert comparison["auc"]["verdict"] == "too few families to say"


def test_all_general_pairs_are_used_if_there_are_not_too_many(few_people):
    assert ev.TwinEvaluator(few_people).general_is_sampled is False


@pytest.fixture
def make_sampling_evaluator(monkeypatch):
    """make_sampling_evaluator(seed): 2,000 images, of whose general pairs 50,000 are sampled."""
    monkeypatch.setattr(ev, "MAX_GENERAL_PAIRS", 50_000)
    images = people(*[(2, 2)] * 500)
    return lambda seed: ev.TwinEvaluator(images, seed, resamples=1)


def test_of_too_many_general_pairs_so_many_are_sampled(make_sampling_evaluator):
    evaluator = make_sampling_evaluator(1)
    rows = evaluator.rows["general"]
    assert evaluator.general_is_sampled is True
    assert len(rows) == 50_000
    assert evaluator.counts["general"] == 2000 * 1996 // 2
    family = evaluator.images.family[rows]
    assert (family[:, 0] != family[:, 1]).all()


def test_sampled_general_pairs_are_spread_as_independent_draws_are(make_sampling_evaluator):
    rows = make_sampling_evaluator(1).rows["general"]
    times_sampled = np.bincount(rows.ravel(), minlength=2000)
    assert times_sampled.var() < 1.2 * times_sampled.mean()


def test_the_seed_decides_which_general_pairs_are_sampled(make_sampling_evaluator):
    rows = make_sampling_evaluator(1).rows["general"]
    assert np.array_equal(rows, make_sampling_evaluator(1).rows["general"])
    assert not np.array_equal(rows, make_sampling_evaluator(2).rows["general"])


# Images of the twins of each family; one family has no general pairs at all.
ENOUGH_TWIN_PAIRS = ((10, 10),)  # 100
TOO_FEW_TWIN_PAIRS = ((9, 11),)  # 99
ENOUGH_GENERAL_PAIRS = ((12, 13), (20, 20))  # 1,000
TOO_FEW_GENERAL_PAIRS = ((13, 14), (18, 19))  # 999
FIGURES_OF_TWIN_PAIRS = ["tar_at_far_0.01"]
FIGURES_OF_GENERAL_PAIRS = ["general_threshold_0.001", "twin_fmr_0.001", "fnmr_0.001"]


@pytest.mark.parametrize(
    ("families", "names", "is_known"),
    [
        (ENOUGH_TWIN_PAIRS, FIGURES_OF_TWIN_PAIRS, True),
        (TOO_FEW_TWIN_PAIRS, FIGURES_OF_TWIN_PAIRS, False),
        (ENOUGH_GENERAL_PAIRS, FIGURES_OF_GENERAL_PAIRS, True),
        (TOO_FEW_GENERAL_PAIRS, FIGURES_OF_GENERAL_PAIRS, False),
    ],
)
def test_rates_are_null_just_below_what_the_pairs_resolve(families, names, is_known):
    evaluator = ev.TwinEvaluator(people(*families), resamples=1)
    scores = {kind: np.linspace(0, 1, len(rows)) for kind, rows in evaluator.rows.items()}
    got = evaluator.figures(scores)
    assert [got[name] is not None for name in names] == [is_known] * len(names)
    assert got["tar_at_far_0.0001"] is None
    assert got["twin_fmr_0.0001"] is None
    has_general_pairs = len(families) > 1
    assert (got["general_auc"] is not None) is has_general_pairs


# ---- resamples and intervals ---------------------------------------------------------------------
def random_case(families, decimals):
    """(evaluator, (N, N) scores of all images, the same by kind as TwinEvaluator.score gives)."""
    rng = np.random.default_rng(families)
    sizes = rng.integers(1, 4, (families - 1, 2))
    evaluator = ev.TwinEvaluator(people(*sizes, (3, 2, 2)), seed=0, resamples=10)
    n = len(evaluator.family)
    matrix = rng.normal(0, 1, (n, n)).round(decimals)
    matrix += matrix.T
    scores = {kind: matrix[tuple(rows.T)] for kind, rows in evaluator.rows.items()}
    return evaluator, matrix, scores


def metrics_under(evaluator, scores, weightings):
    """{name: (R,)} of the metrics of scores under weightings of the families."""
    families = {kind: evaluator.family[rows] for kind, rows in evaluator.rows.items()}
    first, second = families["general"].T
    return ev.verification_metrics(
        ev.ScoredPairs(scores["genuine"], families["genuine"][:, 0]),
        ev.ScoredPairs(scores["twin"], families["twin"][:, 0]),
        ev.ScoredPairs(scores["general"], first * evaluator.n_families + second),
        weightings,
    )


def metrics_of_copied_families(evaluator, matrix, weighting):
    """The metrics of a data set in which family f is there weighting[f] times.

    Its copies are no strangers to each other: pairs of them do not count.
    """
    copies = []
    for image, family in enumerate(evaluator.family):
        copies += [(image, copy) for copy in range(weighting[family])]
    scores = {"genuine": [], "twin": [], "general": []}
    for (i, copy), (j, other_copy) in combinations(copies, 2):
        kind = kind_of(evaluator.images, i, j)
        if kind == "general" or copy == other_copy:
            scores[kind].append(matrix[i, j])
    thresholds = []
    for kind in ("genuine", "twin"):
        thresholds += [matrix[i, j] for i, j in evaluator.rows[kind]]
    return brute_force(**scores, scores=thresholds)


@pytest.mark.parametrize("decimals", [1, 15])
@pytest.mark.parametrize("families", [2, 3, 7])
def test_a_resample_equals_copying_the_families_and_makes_no_number_up(families, decimals):
    """If one family alone counts, there are no general pairs, and so no general threshold.

    Figures that do not exist are NaN here and there. Of two and three families, all weightings by
    0, 1 and 2 are looked at; of seven, the resamples.
    """
    evaluator, matrix, scores = random_case(families, decimals)
    weightings = evaluator.weightings
    if families <= 3:
        weightings = np.array(list(product(range(3), repeat=families)))
    got = metrics_under(evaluator, scores, weightings)
    for r, weighting in enumerate(weightings):
        expected = metrics_of_copied_families(evaluator, matrix, weighting)
        metrics = {name: values[r] for name, values in got.items()}
        assert metrics == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("families", [2, 3, 7])
def test_a_resample_has_as_many_families_as_there_are(families):
    evaluator, _, _ = random_case(families, 15)
    assert (evaluator.weightings.sum(1) == families).all()


@pytest.mark.parametrize("decimals", [1, 15])
def test_an_estimate_holds_the_metrics_of_all_resamples(decimals):
    evaluator, _, scores = random_case(7, decimals)
    expected = metrics_under(evaluator, scores, evaluator.weightings)
    np.testing.assert_equal(evaluator.estimate(scores).samples, expected)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """A family has one genuine score from N(1, 1) and one twin score from N(0, 1).

    So the true AUC is Phi(1 / sqrt(2)) = 0.7602.
    """
    no_general_pairs = ev.ScoredPairs(np.zeros(0), np.zeros(0, int))
    equal = np.full(40, 1 / 40)
    n_covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        genuine = ev.ScoredPairs(rng.normal(1, 1, 40), np.arange(40))
        twin = ev.ScoredPairs(rng.normal(0, 1, 40), np.arange(40))
        resamples = rng.multinomial(40, equal, 200)
        metrics = ev.verification_metrics(genuine, twin, no_general_pairs, resamples)
        low, high = ev.interval(metrics["auc"])
        n_covered += low <= 0.7602 <= high
    assert 0.87 < n_covered / 100 < 0.99


def interval_of(name, value, samples, n_families):
    """The interval that `compare` gives a figure with these samples."""
    figures = dict.fromkeys(ev.METRICS) | {name: value}
    all_samples = dict.fromkeys(ev.METRICS, np.full(len(samples), np.nan)) | {name: samples}
    return ev.compare([ev.Estimate(figures, all_samples, n_families)])[name]["interval"]


@pytest.mark.parametrize("name", ["fnmr_0.001", "auc"])
def test_intervals_of_shares_are_those_of_the_log_odds(name):
    samples = np.array([0.15, 0.2, 0.25, 0.3, np.nan])
    deviation = np.std(samples[:4]) * np.sqrt(29 / 26)
    margin = 1.96 * deviation / (0.2 * 0.8)  # the log odds change by 1 / (p (1 - p)) times p's
    expected = scipy.special.expit(scipy.special.logit(0.2) + np.array([-margin, margin]))
    assert interval_of(name, 0.2, samples, 29) == pytest.approx(expected.tolist())


@pytest.mark.parametrize("name", ["tar_at_far_0.01", "general_threshold_0.001"])
def test_intervals_of_thresholds_and_tar_are_percentiles(name):
    samples = np.linspace(0.1, 0.5, 41)
    assert interval_of(name, 0.2, samples, 29) == pytest.approx([0.11, 0.49])


def test_the_interval_of_the_mean_of_seeds_is_that_of_their_mean_samples():
    """The samples of the second seed deviate against those of the first: their mean is constant."""
    seeds = []
    for value, noise in ((0.1, 1), (0.3, -1)):
        seeds.append(estimate(noise=noise, eer=value))
    assert ev.compare(seeds)["eer"]["interval"] == pytest.approx([0.2, 0.2])


# {figure: how many pairs count if there is no error at all, with 29 families}
PAIRS_AT_EDGE = {"fnmr_0.001": 29, "twin_fmr_val_eer": 29, "general_fmr_val_eer": 29 * 28 // 2}


@pytest.mark.parametrize("name", PAIRS_AT_EDGE)
@pytest.mark.parametrize("rate", [0, 1])
def test_a_rate_without_any_error_has_the_interval_of_as_many_pairs_as_families(name, rate):
    n_pairs = PAIRS_AT_EDGE[name]
    wilson = scipy.stats.binomtest(rate * n_pairs, n_pairs).proportion_ci(method="wilson")
    low, high = interval_of(name, float(rate), np.full(10, float(rate)), 29)
    assert [low, high] == pytest.approx([wilson.low, wilson.high], abs=1e-5)
    assert high - low > 0.005


def test_the_interval_of_independent_pairs_is_about_the_binomial_one():
    evaluator = ev.TwinEvaluator(people(*[(2, 1)] * 60))  # one genuine pair in each family
    scores = {kind: np.zeros(len(rows)) for kind, rows in evaluator.rows.items()}
    scores["genuine"][12:] = 1
    entry = ev.compare([evaluator.estimate(scores, {"val_eer": 0.5})])["fnmr_val_eer"]
    wilson = scipy.stats.binomtest(12, 60).proportion_ci(method="wilson")
    assert entry["value"] == 0.2
    assert entry["interval"] == pytest.approx([wilson.low, wilson.high], abs=0.015)


def test_intervals_of_rare_errors_cover_the_truth_where_percentiles_do_not():
    """29 families with ten pairs each; errors are often of one family. The true rate is 0.03."""
    n_covered = np.zeros(2)
    for seed in range(400):
        rng = np.random.default_rng(seed)
        n_errors = rng.binomial(10, rng.beta(0.3, 9.7, 29))
        weightings = rng.multinomial(29, np.full(29, 1 / 29), 300)
        samples = weightings @ n_errors / 290
        intervals = (
            interval_of("fnmr_val_eer", n_errors.sum() / 290, samples, 29),
            ev.interval(samples),
        )
        n_covered += [low <= 0.03 <= high for low, high in intervals]
    ours, percentiles = n_covered / 400
    assert 0.92 < ours < 0.97
    assert percentiles < 0.9


# ---- comparison with a baseline ------------------------------------------------------------------
N_FAMILIES = 29


def estimate(noise=1, **figures):
    """An Estimate with these figures and no others.

    Its resamples scatter by 0.1 about each figure, in step with those of other estimates, or
    against them if `noise` is -1.
    """
    figures = dict.fromkeys(ev.METRICS) | figures
    scatter = noise * np.linspace(-0.1, 0.1, 41)
    samples = {}
    for name, value in figures.items():
        samples[name] = np.array(value, float) + scatter  # None becomes NaN
    return ev.Estimate(figures, samples, N_FAMILIES)


HIGHER_IS_BETTER = ("auc", "general_auc", "best_accuracy", "accuracy_at_eer", "tar_at_far_0.01")
LOWER_IS_BETTER = ("eer", "twin_fmr_0.001", "fnmr_0.0001")
COMPARED = (*HIGHER_IS_BETTER, *LOWER_IS_BETTER, "eer_threshold")
VERDICTS = {
    0.01: ("better", "worse"),  # of a figure that should be high, and of one that should be low
    -0.01: ("worse", "better"),
    0: ("not distinguishable", "not distinguishable"),
}


@pytest.mark.parametrize("step", VERDICTS)
def test_verdicts_know_which_way_is_better_and_thresholds_have_none(step):
    start = estimate(**dict.fromkeys(COMPARED, 0.5))
    got = ev.compare([estimate(**dict.fromkeys(COMPARED, 0.5 + step))], start)
    if_high, if_low = VERDICTS[step]
    assert {got[name]["verdict"] for name in HIGHER_IS_BETTER} == {if_high}
    assert {got[name]["verdict"] for name in LOWER_IS_BETTER} == {if_low}
    assert got["eer_threshold"]["verdict"] is None


@pytest.mark.parametrize("step", VERDICTS)
def test_differences_are_paired_so_that_noise_in_common_cancels(step):
    start = estimate(**dict.fromkeys(COMPARED, 0.5))
    got = ev.compare([estimate(**dict.fromkeys(COMPARED, 0.5 + step))], start)
    for name in COMPARED:
        assert got[name]["difference"] == pytest.approx(step)
        assert got[name]["difference_interval"] == pytest.approx([step, step])


def test_noise_of_its_own_hides_a_small_difference():
    got = ev.compare([estimate(noise=-1, auc=0.51)], estimate(auc=0.5))
    assert got["auc"]["verdict"] == "not distinguishable"


def test_without_a_baseline_there_are_values_and_intervals_alone():
    got = ev.compare([estimate(eer_threshold=0.5)])
    assert got["eer_threshold"] == {"value": 0.5, "interval": pytest.approx([0.405, 0.595])}


@pytest.mark.parametrize(
    ("families", "verdict"), [(5, "too few families to say"), (6, "not distinguishable")]
)
def test_fewer_than_six_families_give_no_interval_and_no_verdict(families, verdict):
    evaluator, _, scores = random_case(families, 15)
    cubes = {kind: values**3 for kind, values in scores.items()}
    entry = ev.compare([evaluator.estimate(cubes)], evaluator.estimate(scores))["auc"]
    assert entry["difference"] == 0  # the AUC depends on the order of the scores alone
    assert entry["verdict"] == verdict
    assert (entry["interval"] is None) is (families < 6)
    assert (entry["difference_interval"] is None) is (families < 6)


def test_a_figure_that_does_not_exist_is_not_measured():
    entry = ev.compare([estimate(auc=None)], estimate(auc=0.5))["auc"]
    assert entry == {
        "value": None,
        "interval": None,
        "difference": None,
        "difference_interval": None,
        "verdict": "not measured",
    }


def test_a_comparison_in_words():
    start = estimate(auc=0.8, general_auc=0.9)
    other = estimate(auc=0.81, general_auc=0.895)
    assert ev.describe(ev.compare([other], start)) == (
        "better on twins (AUC +0.0100 [+0.0100, +0.0100]), "
        "worse on everyone else (AUC -0.0050 [-0.0050, -0.0050])"
    )


def test_a_comparison_of_too_few_families_in_words():
    nothing = dict.fromkeys(ev.METRICS)
    start = ev.Estimate({**nothing, "auc": 0.8}, None, 5)
    other = ev.Estimate({**nothing, "auc": 0.81}, None, 5)
    words = "too few families to say on twins (AUC +0.0100), not measured on everyone else"
    assert ev.describe(ev.compare([other], start)) == words


# ---- embeddings ----------------------------------------------------------------------------------
def random_crops(n):
    return torch.randint(0, 256, (n, 112, 112, 3), dtype=torch.uint8)


def embed_in_double(model, crops, flip):
    """Embeddings as upstream makes them, in double precision.

    With flip, upstream adds the embeddings of both mirror images, each times its norm.
    """
    model.double()
    images = net.to_input(crops).double()
    with torch.no_grad():
        raw = model.output_layer(model.features(images))
        if flip:
            raw += model.output_layer(model.features(images.flip(3)))
    return torch.nn.functional.normalize(raw)


@pytest.mark.parametrize("flip", [False, True])
def test_embeddings_are_upstreams_whatever_the_batch_and_with_a_common_backbone(tiny_model, flip):
    crops = random_crops(5)
    models = [tiny_model, variant(tiny_model, 1)]
    heads = [model.output_layer for model in models]
    together = net.embed(tiny_model, crops, CPU, heads, batch_size=5, flip=flip)
    for model, with_others in zip(models, together, strict=True):
        (alone,) = net.embed(model, crops, CPU, batch_size=3, flip=flip)
        expected = embed_in_double(model, crops, flip)
        for embeddings in (with_others, alone):
            assert embeddings.dtype == torch.float32
            # Half precision on the way would be off by 1e-3.
            torch.testing.assert_close(embeddings.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("flip", [False, True])
def test_a_common_backbone_runs_once(tiny_model, flip):
    crops = random_crops(5)
    other = variant(tiny_model, 1)
    seen = []
    for model in (tiny_model, other):
        model.body.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    heads = [tiny_model.output_layer, other.output_layer]
    net.embed(tiny_model, crops, CPU, heads, batch_size=3, flip=flip)
    n_sides = 2 if flip else 1
    assert sum(seen) == len(crops) * n_sides


DEAD = {
    "overflow": (1e38, 0.3, "the norm of an embedding is zero or not finite"),
    "zeros": (0, 0, "the norm of an embedding is zero or not finite"),
    "all equal": (0, 0.3, "all its embeddings are the same"),
}


@pytest.mark.parametrize("case", DEAD)
def test_dead_networks_are_refused(tiny_model, case):
    scale, mean, reason = DEAD[case]
    alive = variant(tiny_model, 1)
    tiny_model.output_layer[3].weight.data *= scale
    tiny_model.output_layer[4].running_mean.fill_(mean)
    heads = [alive.output_layer, tiny_model.output_layer]
    embeddings_of_alive, embeddings_of_dead = net.embed(alive, random_crops(3), CPU, heads)
    net.check_alive(embeddings_of_alive, "alive.pth")
    with pytest.raises(net.InputError, match=rf"dead\.pth is dead: {reason}"):
        net.check_alive(embeddings_of_dead, "dead.pth")


# ---- metrics.json and pair_scores.csv ------------------------------------------------------------
class Independent(NamedTuple):
    """What is known of the evaluation of b.pth without evaluate_twins.py."""

    id_to_images: dict  # relative paths, each image once
    embedding: dict  # {path: (512,) float64}
    general: list  # the scores of all general pairs


@pytest.fixture(scope="module")
def independent(evaluated):
    id_to_images = json.loads(evaluated.aligned.read_text())
    id_to_images["test0a"].remove("test_aligned/again.png")  # a copy of another of her images
    paths = [path for images in id_to_images.values() for path in images]
    crops = np.stack([np.array(Image.open(evaluated.folder / path)) for path in paths])
    bgr = ((crops[..., ::-1].astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2)
    model = net.load_checkpoint(evaluated.folder / "models" / "b.pth")
    with torch.no_grad():
        embeddings, _ = model(torch.from_numpy(bgr.copy()))
    embedding = dict(zip(paths, embeddings.double().numpy(), strict=True))

    family = {}
    for name, images in id_to_images.items():
        family |= dict.fromkeys(images, name.rstrip("abc"))
    general = []
    for first, second in combinations(paths, 2):
        if family[first] != family[second]:
            general.append(embedding[first] @ embedding[second])
    return Independent(id_to_images, embedding, general)


def values_of(figures):
    return {name: entry["value"] for name, entry in figures.items()}


def pair_scores(evaluated, kind):
    """The scores of pairs of one kind in b's pair_scores.csv."""
    return [float(row["score"]) for row in evaluated.pairs if row["kind"] == kind]


def test_pair_scores_equal_those_of_independent_embeddings(evaluated, independent):
    for row in evaluated.pairs:
        first = independent.embedding[row["path_1"]]
        second = independent.embedding[row["path_2"]]
        assert float(row["score"]) == pytest.approx(first @ second, abs=2e-6)


def test_pair_scores_say_who_is_compared_and_what_is_decided(evaluated, independent):
    columns = ["path_1", "path_2", "id_1", "id_2", "kind", "score", "accepted_at_eer"]
    assert list(evaluated.pairs[0]) == columns
    threshold = evaluated.metrics["b"]["figures"]["eer_threshold"]["value"]
    for row in evaluated.pairs:
        first_id = row["id_1"]
        second_id = row["id_2"]
        images = {*independent.id_to_images[first_id], *independent.id_to_images[second_id]}
        assert {row["path_1"], row["path_2"]} <= images
        assert row["kind"] == ("genuine" if first_id == second_id else "twin")
        assert row["accepted_at_eer"] == str(int(float(row["score"]) >= threshold))


def test_counts_are_those_of_the_listed_pairs(evaluated, independent):
    counts = evaluated.metrics["b"]["counts"]
    general = len(independent.general)
    expected = {"images": 57, "genuine": 77, "twin": 109, "general": general}
    expected["families"] = 7  # an eighth has one image of each twin, so no genuine pair
    assert counts == expected
    for kind in ("genuine", "twin"):
        assert len(pair_scores(evaluated, kind)) == counts[kind]


def test_metrics_say_how_images_and_pairs_were_taken(evaluated):
    assert evaluated.metrics["b"]["general_pairs_drawn"] is False
    assert evaluated.metrics["b"]["flip"] is False


def test_figures_equal_brute_force_over_the_files_scores(evaluated, independent):
    got = values_of(evaluated.metrics["b"]["figures"])
    expected = brute_force(
        pair_scores(evaluated, "genuine"),
        pair_scores(evaluated, "twin"),
        independent.general,
        applied={"val_eer": 0.93, "val_general": 0.97},
    )
    n_unresolved = 8  # rates that so few pairs do not resolve, and accuracy on ten folds
    assert list(got.values()).count(None) == n_unresolved
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if got[name] is not None:
            assert got[name] == pytest.approx(value, abs=1e-4), name


def test_areas_of_the_files_equal_scikit_learns_and_lie_in_their_intervals(evaluated, independent):
    figures = evaluated.metrics["b"]["figures"]
    genuine = pair_scores(evaluated, "genuine")
    impostors = {"auc": pair_scores(evaluated, "twin"), "general_auc": independent.general}
    for name, impostor in impostors.items():
        value = figures[name]["value"]
        low, high = figures[name]["interval"]
        assert value == pytest.approx(roc_auc_score(*labelled(genuine, impostor)), abs=1e-4)
        assert low <= value <= high


# ---- comparison.json, comparison.csv and the terminal --------------------------------------------
def test_the_comparison_has_all_checkpoints_in_their_order_the_baseline_first(evaluated):
    paths = [checkpoint["checkpoint"] for checkpoint in evaluated.checkpoints]
    assert paths == [str(evaluated.folder / file) for file in EVALUATED]
    assert evaluated.content["baseline"] == "start"
    assert evaluated.checkpoints[0]["name"] == "start"


def test_the_comparison_repeats_what_each_checkpoints_own_file_says(evaluated):
    for checkpoint in evaluated.checkpoints:
        alone = evaluated.metrics[checkpoint["name"]]
        assert checkpoint["checkpoint"] == alone["checkpoint"]
        assert checkpoint["overlap"] == alone["overlap"]
        for name, entry in checkpoint["figures"].items():
            own = {"value": entry["value"], "interval": entry["interval"]}
            assert own == alone["figures"][name]


def test_overlap_names_the_test_people_that_a_checkpoint_has_seen(evaluated):
    for checkpoint, file in zip(evaluated.checkpoints, EVALUATED, strict=True):
        assert checkpoint["overlap"] == (SEEN if "leak" in file else [])


def test_comparison_csv_has_one_row_for_each_checkpoint_and_figure(evaluated):
    rows = {(row["name"], row["figure"]) for row in evaluated.table}
    names = [checkpoint["name"] for checkpoint in evaluated.checkpoints]
    assert rows == set(product(names, ev.METRICS))
    assert len(evaluated.table) == 5 * len(ev.METRICS)  # so no two names are alike


def test_comparison_csv_holds_what_comparison_json_holds(evaluated):
    rows = {(row["name"], row["figure"]): row for row in evaluated.table}
    for checkpoint in evaluated.checkpoints:
        for figure, entry in checkpoint["figures"].items():
            low, high = entry["interval"] or (None, None)
            difference_low, difference_high = entry.get("difference_interval") or (None, None)
            expected = {
                "overlap": len(checkpoint["overlap"]),
                "value": entry["value"],
                "value_low": low,
                "value_high": high,
                "difference": entry.get("difference"),
                "difference_low": difference_low,
                "difference_high": difference_high,
                "verdict": entry.get("verdict"),
            }
            row = rows[checkpoint["name"], figure]
            for column, value in expected.items():
                assert row[column] == ("" if value is None else str(value))


def test_differences_are_those_to_the_baseline_and_decide_the_verdict(evaluated):
    start, *others = evaluated.checkpoints
    for checkpoint in others:
        for name, entry in checkpoint["figures"].items():
            if entry["value"] is None:
                continue
            assert entry["difference"] == entry["value"] - start["figures"][name]["value"]
            if "threshold" not in name:
                low, high = entry["difference_interval"]
                assert (low <= 0 <= high) is (entry["verdict"] == "not distinguishable")


def test_the_terminal_describes_each_setting_against_the_baseline(evaluated):
    figures = {checkpoint["name"]: checkpoint["figures"] for checkpoint in evaluated.checkpoints}
    of_one_checkpoint = [s for s in evaluated.settings[1:] if len(s["checkpoints"]) == 1]
    assert len(of_one_checkpoint) == 2
    for setting in of_one_checkpoint:
        (name,) = setting["checkpoints"]
        words = ev.describe(figures[name])
        assert f"{setting['name']} ({name}) against start: {words}." in evaluated.said.getvalue()


def test_the_terminal_says_what_was_evaluated_and_what_to_mind(evaluated):
    said = evaluated.said.getvalue()
    assert "57 images of 16 people in 8 families, on cpu:" in said
    assert "warning: 1 images are copies of another of their ID; each is used once" in said
    assert "warning: 1 people have no crop; their pairs are not tested" in said
    assert "OVERLAP: leak was trained or validated on 2 of the test people" in said
    assert f"Validation would have chosen: {evaluated.content['chosen_by_validation']}." in said


# ---- settings ------------------------------------------------------------------------------------
def test_seeds_are_one_setting_and_settings_are_named_by_what_differs(evaluated):
    names = [setting["name"] for setting in evaluated.settings]
    assert names == ["start", "10 %", "20 %", "30 %"]
    first, second = evaluated.settings[2]["checkpoints"]
    assert first == "b"
    assert second.startswith("a+")  # two files are named a.pth
    assert evaluated.content["chosen_by_validation"] == "20 %"


def test_a_setting_of_several_seeds_has_their_means_and_ranges(evaluated):
    setting = evaluated.settings[2]
    runs = [
        checkpoint["figures"]
        for checkpoint in evaluated.checkpoints
        if checkpoint["name"] in setting["checkpoints"]
    ]
    for name, entry in setting["figures"].items():
        values = [run[name]["value"] for run in runs]
        if None in values:  # at operating points: other/a.pth has none
            assert entry["value"] is None
            assert entry["range"] is None
            assert entry["difference"] is None
            continue
        differences = [run[name]["difference"] for run in runs]
        assert entry["value"] == pytest.approx(np.mean(values))
        assert entry["range"] == pytest.approx([min(values), max(values)])
        assert entry["difference"] == pytest.approx(np.mean(differences))


def test_the_terminal_names_all_seeds_of_a_setting(evaluated):
    names = ", ".join(evaluated.settings[2]["checkpoints"])
    assert f"20 % ({names}) against start: " in evaluated.said.getvalue()


def checkpoint(name, recipe=None, config=None, metrics=None, weights=None, **figures):
    """A Checkpoint with these figures and none of the others.

    recipe: what its recipe has besides that of conftest.tuned; None for upstream's, without any.
    """
    facts = {"config": {}, "metrics": metrics or {}}
    if recipe is not None:
        facts["config"] = tuned(**recipe)
    facts["config"] |= config or {}
    return ev.Checkpoint(
        f"{name}.pth",
        name,
        facts,
        weights_hash=weights,
        backbone_hash=None,
        overlap=[],
        estimate=estimate(**figures),
    )


def setting_names(*checkpoints):
    """The names of settings, but for the baseline's."""
    return [setting.name for setting in ev.group_settings([checkpoint("start"), *checkpoints])[1:]]


def test_settings_are_named_by_a_value_that_differs():
    low = checkpoint("a", {"learning_rate": 1e-4})
    high = checkpoint("b", {"learning_rate": 1e-3})
    assert setting_names(low, high) == ["learning_rate 0.0001", "learning_rate 0.001"]


def test_settings_are_named_by_every_value_that_differs():
    low = checkpoint("a", {"learning_rate": 1e-4, "freeze_backbone": False})
    high = checkpoint("b", {"learning_rate": 1e-3})
    names = ["full, learning_rate 0.0001", "frozen, learning_rate 0.001"]
    assert setting_names(low, high) == names


def test_a_setting_with_nothing_to_tell_it_from_is_the_mean_of_its_seeds():
    seeds = [checkpoint("a", {"seed": 1}), checkpoint("b", {"seed": 2})]
    assert setting_names(*seeds) == ["mean of 2 seeds"]


def test_two_checkpoints_of_one_seed_such_as_two_epochs_are_two_settings():
    first = checkpoint("a", {"seed": 1})
    second = checkpoint("b", {"seed": 1}, config={"n_train_pairs": 9})
    assert setting_names(first, second) == ["a", "b"]


def test_the_difference_of_a_setting_is_paired_before_the_mean_over_seeds():
    start = checkpoint("start", auc=0.7)
    seeds = [checkpoint("a", {"seed": 1}, auc=0.8), checkpoint("b", {"seed": 2}, auc=0.81)]
    _, setting = ev.group_settings([start, *seeds])
    entry = setting.figures["auc"]
    samples_of_start = start.estimate.samples["auc"]
    samples = np.mean([seed.estimate.samples["auc"] for seed in seeds], 0)
    expected = np.percentile(samples - samples_of_start, (2.5, 97.5))
    assert entry["value"] == pytest.approx(0.805)
    assert entry["range"] == [0.8, 0.81]
    assert entry["difference_interval"] == pytest.approx(list(expected))


# ---- operating points from validation ------------------------------------------------------------
def test_the_start_is_judged_at_the_thresholds_of_epoch_0(evaluated):
    rows = read_csv(evaluated.out / "start" / "pair_scores.csv")
    scores = {"twin": [], "genuine": []}
    for row in rows:
        scores[row["kind"]].append(float(row["score"]))
    figures = evaluated.settings[0]["figures"]
    for point, (metric, _) in ev.OPERATING_POINTS.items():
        threshold = START_THRESHOLDS[f"val_{metric}"]
        twin_fmr = np.mean(np.array(scores["twin"]) >= threshold)
        fnmr = np.mean(np.array(scores["genuine"]) < threshold)
        assert figures[f"twin_fmr_{point}"]["value"] == pytest.approx(twin_fmr)
        assert figures[f"fnmr_{point}"]["value"] == pytest.approx(fnmr)


def in_percent(entry):
    """A rate with its interval, as the terminal shows it."""
    low, high = entry["interval"]
    return f"{100 * entry['value']:.3g} [{100 * low:.3g}, {100 * high:.3g}] %"


@pytest.mark.parametrize("point", ev.OPERATING_POINTS)
def test_the_terminal_says_what_the_validation_peoples_threshold_gives(evaluated, point):
    figures = evaluated.settings[0]["figures"]
    _, purpose = ev.OPERATING_POINTS[point]
    line = (
        f"  start, at the validation people's threshold for {purpose}: "
        f"twin FMR {in_percent(figures[f'twin_fmr_{point}'])}, "
        f"general FMR {in_percent(figures[f'general_fmr_{point}'])}, "
        f"FNMR {in_percent(figures[f'fnmr_{point}'])}."
    )
    assert line in evaluated.said.getvalue().splitlines()


def run_from(weights):
    """A checkpoint whose training started from these weights and found a threshold with them."""
    run = checkpoint("run", {"weights_sha256": weights}, weights="those of run.pth")
    run.facts["start_metrics"] = {"val_eer_threshold": 0.5}
    return run


def test_thresholds_of_the_start_are_found_by_the_hash_of_its_weights():
    start = checkpoint("start", weights="A")
    assert ev.validation_thresholds(start, [start, run_from("A")]) == {"val_eer": 0.5}


def test_cross_validations_of_other_numbers_of_folds_are_settings_of_their_own():
    runs = []
    for seed, folds in ((1, 3), (2, 3), (3, 5), (4, None)):
        config = {"seed": seed, "folds": folds}
        runs.append(checkpoint(f"seed{seed}", {}, config=config))
    groups = [[run.name for run in group] for group in ev.group_by_recipe(runs)]
    assert groups == [["seed1", "seed2"], ["seed3"], ["seed4"]]


def test_other_weights_get_no_thresholds_of_the_start():
    other = checkpoint("start", weights="B")
    assert ev.validation_thresholds(other, [other, run_from("A")]) == {}


def test_a_networks_own_thresholds_come_before_those_of_a_run_that_started_from_it():
    start = checkpoint("start", metrics={"val_eer_threshold": 0.4}, weights="A")
    assert ev.validation_thresholds(start, [start, run_from("A")]) == {"val_eer": 0.4}


def test_a_cross_validation_takes_no_thresholds_from_a_run_that_started_from_its_first_network():
    pooled = checkpoint("start", weights="A")
    pooled.fold_runs = [checkpoint("first", weights="A"), checkpoint("second", weights="B")]
    assert ev.validation_thresholds(pooled, [pooled, run_from("A")]) == {}


# ---- a network is known by its weights -----------------------------------------------------------
PLOTS = ("rates", "distributions", "hardest", "comparison", "data_percentage")


@contextmanager
def quick_scripts():
    """Let the scripts draw no pictures and their networks see small images; yields the patch."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PLOTS:
            patch.setattr(ev, f"plot_{name}", lambda *arguments: None)
        patch.setattr(ev, "plot_figure", lambda *arguments: nullcontext())
        patch.setattr(ev, "write_report", lambda *arguments: None)  # it has the pictures inside
        patch.setattr(train_twins, "plot_curves", lambda folder, log: None)
        patch.setattr(net.Backbone, "features", quick_features)
        yield patch


def train_elsewhere(experiment, seed):
    """Train a seed from a copy of the start, named model.pth, which is not there afterwards."""
    machine = experiment.folder / f"machine{seed}"
    start = machine / "model.pth"
    machine.mkdir()
    shutil.copy(experiment.start, start)
    more = f"--freeze_backbone {SHUFFLED} --pretrained {start} --seed {seed}"
    assert train_twins.main(experiment.flags(more, name=f"seed{seed}")) == 0
    shutil.rmtree(machine)


class TrainedElsewhere(NamedTuple):
    """Two seeds that were trained on two machines and are evaluated on a third one."""

    experiment: Experiment
    checkpoints: list  # of evaluate: the start, a network with the name that it had, two seeds
    alone: list  # the same, each evaluated by itself
    settings: list  # of comparison.json
    passes: list  # [(images that passed a backbone, networks in memory then), ...]


def flags_of_test(folder, sizes):
    """Write test people into a folder; the flags that evaluate the checkpoints that follow."""
    aligned, pairs = crop_writer(folder)(sizes, "test")
    out = folder / "out"
    flags = f"--test_pairs {pairs} --aligned_json {aligned} --skip_alignment --device cpu"
    return [*flags.split(), "--output_dir", str(out), "--checkpoints"]


@pytest.fixture(scope="module")
def trained_elsewhere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    experiment = Experiment(folder)
    flags = flags_of_test(folder, [[2, 2]] * 6)
    namesake = folder / "namesake" / "model.pth"
    net.save_checkpoint(namesake, net.build_model("ir_tiny"))
    in_memory = weakref.WeakSet()
    passes = []
    create = net.Backbone.__init__

    def remembered_init(self, arch):
        create(self, arch)
        in_memory.add(self)

    def counted_features(self, x):
        passes.append((len(x), len(in_memory)))
        return quick_features(self, x)

    def evaluate(paths):
        return ev.evaluate(ev.parse_args([*flags, *map(str, paths)]))

    with quick_scripts() as patch:
        train_elsewhere(experiment, seed=1)
        train_elsewhere(experiment, seed=2)
        seeds = sorted((folder / "models").glob("*.pth"))
        paths = [experiment.start, namesake, *seeds]
        alone = [evaluate([path])[0] for path in paths]
        patch.setattr(net.Backbone, "__init__", remembered_init)
        patch.setattr(net.Backbone, "features", counted_features)
        checkpoints = evaluate(paths)
    comparison = json.loads((folder / "out" / "comparison.json").read_text())
    return TrainedElsewhere(experiment, checkpoints, alone, comparison["settings"], passes)


def test_a_start_that_was_moved_and_renamed_has_the_thresholds_of_epoch_0(trained_elsewhere):
    start = trained_elsewhere.checkpoints[0]
    metrics = trained_elsewhere.experiment.checkpoint("seed1")["start_metrics"]
    threshold = metrics["val_eer_threshold"]
    for rate, kind in (("twin_fmr", "twin"), ("general_fmr", "general")):
        expected = np.mean(start.scores[kind] >= threshold)
        assert 0 < expected < 1
        assert start.estimate.figures[f"{rate}_val_eer"] == pytest.approx(expected)


def test_another_network_whose_file_has_the_name_of_the_start_has_no_thresholds(trained_elsewhere):
    namesake = trained_elsewhere.checkpoints[1]
    assert Path(namesake.path).name == "model.pth"
    rates = [namesake.estimate.figures[f"{rate}_val_eer"] for rate in ev.RATES]
    assert rates == [None, None, None]


def test_the_recipe_is_the_same_whichever_copy_of_the_start_a_run_began_with(trained_elsewhere):
    first = trained_elsewhere.experiment.checkpoint("seed1")["config"]
    second = trained_elsewhere.experiment.checkpoint("seed2")["config"]
    assert first["pretrained"] != second["pretrained"]
    assert first["recipe"] == second["recipe"]


def test_seeds_trained_from_two_copies_of_one_start_are_one_setting(trained_elsewhere):
    names = [setting["name"] for setting in trained_elsewhere.settings]
    assert names == ["start", "model", "mean of 2 seeds"]
    seeds = [Path(checkpoint.path).stem for checkpoint in trained_elsewhere.checkpoints[2:]]
    assert trained_elsewhere.settings[2]["checkpoints"] == seeds


def test_evaluation_runs_a_backbone_once_for_all_checkpoints_that_have_it(trained_elsewhere):
    n_backbones = 2  # the start and the frozen seeds have one, the namesake another
    n_images = 24
    n_passed = sum(n for n, _ in trained_elsewhere.passes)
    assert n_passed == n_backbones * n_images


def test_evaluation_keeps_one_backbone_in_memory_for_checkpoints_that_share_it(trained_elsewhere):
    networks_in_memory = [n for _, n in trained_elsewhere.passes]
    assert set(networks_in_memory) == {1}


def test_checkpoints_that_share_a_backbone_have_the_results_of_each_alone(trained_elsewhere):
    twin_scores = [checkpoint.scores["twin"] for checkpoint in trained_elsewhere.checkpoints]
    assert len(np.unique(twin_scores, axis=0)) == 4  # else it would not be seen if two were swapped
    operating_points = tuple(ev.OPERATING_POINTS)  # alone, the start has no thresholds
    for together, alone in zip(trained_elsewhere.checkpoints, trained_elsewhere.alone, strict=True):
        np.testing.assert_equal(together.scores, alone.scores)
        for name in ev.METRICS:
            if name.endswith(operating_points):
                continue
            assert together.estimate.figures[name] == alone.estimate.figures[name]
            np.testing.assert_equal(together.estimate.samples[name], alone.estimate.samples[name])


# ---- test people that were trained on ------------------------------------------------------------
def save_as_jpeg(path, copy):
    Image.open(path).save(copy.with_suffix(".jpg"), quality=50)
    return copy.with_suffix(".jpg")


def save_smaller_and_enlarge(path, copy):
    with Image.open(path) as crop:
        crop.resize((80, 80)).resize((112, 112)).save(copy.with_suffix(".png"))
    return copy.with_suffix(".png")


class Recompressed(NamedTuple):
    """A test set that holds the photographs of two trained people once more, under other IDs."""

    flags: list  # that evaluate `checkpoint` on it
    checkpoint: Path
    out: Path


@pytest.fixture(params=[save_as_jpeg, save_smaller_and_enlarge])
def recompressed(tmp_path, request):
    """The other test people are new."""
    experiment = Experiment(tmp_path)
    save_again = request.param
    with quick_scripts():
        flags = experiment.flags("--freeze_backbone --validation_split 0 --epochs 1")
        assert train_twins.main(flags) == 0
        (checkpoint,) = (tmp_path / "models").glob("*.pth")
        flags = flags_of_test(tmp_path, [[2, 2]] * 3)
        listed = json.loads((tmp_path / "test.json").read_text())
        for name, trained in (("test1a", "train0a"), ("test1b", "train0b")):
            copies = []
            for number, path in enumerate(experiment.images[trained]):
                copies.append(str(save_again(path, tmp_path / f"{name}{number}")))
            listed[name] = copies
        (tmp_path / "test.json").write_text(json.dumps(listed))
        yield Recompressed([*flags, str(checkpoint)], checkpoint, tmp_path / "out")


def test_a_test_set_of_recompressed_training_photographs_is_refused(recompressed, capsys):
    assert ev.main(recompressed.flags) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    problem = "was trained or validated on images of test1a, test1b; test on others"
    way_out = "or say --allow_overlap"
    assert line == f"evaluate_twins.py: {recompressed.checkpoint}: {problem}, {way_out}"
    assert not recompressed.out.exists()


def test_every_output_says_that_training_photographs_are_tested_on(recompressed, capsys):
    assert ev.main([*recompressed.flags, "--allow_overlap"]) == 0
    name = recompressed.checkpoint.stem
    said = f"OVERLAP: {name} was trained or validated on 2 of the test people"
    assert said in capsys.readouterr().out
    metrics = json.loads((recompressed.out / name / "metrics.json").read_text())
    assert metrics["overlap"] == ["test1a", "test1b"]
    comparison = json.loads((recompressed.out / "comparison.json").read_text())
    (entry,) = comparison["checkpoints"]
    assert entry["overlap"] == ["test1a", "test1b"]
    assert {row["overlap"] for row in read_csv(recompressed.out / "comparison.csv")} == {"2"}


# ---- a family with most of the pairs -------------------------------------------------------------
def large_families(sizes):
    """The warnings of large families, of which each has so many images of each person."""
    id_to_images = {}
    pairs = []
    for number, counts in enumerate(sizes):
        names = [f"{number}{letter}" for letter in "abc"[: len(counts)]]
        pairs += combinations(names, 2)
        for name, count in zip(names, counts, strict=True):
            id_to_images[name] = [f"{name}{i}" for i in range(count)]
    return ev.TwinEvaluator(TwinImages(id_to_images, pairs)).warn_of_large_families()


def test_a_family_with_most_of_the_pairs_is_named_with_its_share():
    # It has 20 genuine pairs and 25 twin pairs, and each of the others 2 and 4.
    genuine, twin = large_families([[2, 2], [5, 5], [2, 2], [2, 2]])
    assert genuine.startswith("77% of the genuine pairs are of one family (1a, 1b)")
    assert twin.startswith("68% of the twin pairs are of one family (1a, 1b)")


def test_a_family_may_hold_many_pairs_of_one_kind_alone():
    # It has 15 of 31 genuine pairs, and as many twin pairs as each of the others.
    (warning,) = large_families([[6, 1], [2, 3], [2, 3], [2, 3], [2, 3]])
    assert "genuine pairs are of one family (0a, 0b)" in warning


def test_a_family_that_alone_has_genuine_pairs_is_named():
    (warning,) = [line for line in large_families([[3, 1], [1, 1]]) if "genuine" in line]
    assert warning.startswith("100% of the genuine pairs are of one family (0a, 0b)")


def test_all_large_families_are_named():
    families = large_families([[5, 5], [2, 2], [5, 5], [2, 2]])
    named = [re.search(r"of the (.*) pairs .*\((.*)\)", line).groups() for line in families]
    people = ("0a, 0b", "2a, 2b")
    assert named == [*product(["genuine"], people), *product(["twin"], people)]


def test_no_family_is_named_if_none_has_more_than_a_quarter():
    assert large_families([[3, 3]] * 4) == []
    assert large_families([[4, 4], *[[3, 3]] * 6]) == []


def test_a_family_that_is_the_only_one_is_not_named():
    assert large_families([[3, 3]]) == []


@pytest.mark.parametrize(("n_images", "is_named"), [(6, True), (2, False)])
def test_the_terminal_names_a_family_with_most_of_the_pairs(
    tmp_path, tiny_model, capsys, n_images, is_named
):
    net.save_checkpoint(tmp_path / "a.pth", tiny_model)
    with quick_scripts():
        flags = flags_of_test(tmp_path, [[n_images, n_images], *[[2, 2]] * 4])
        assert ev.main([*flags, str(tmp_path / "a.pth")]) == 0
    out = capsys.readouterr().out
    warning = "genuine pairs are of one family (test0a, test0b)"
    assert (warning in out) == is_named
    assert ("of one family" in out) == is_named


# ---- checkpoints of the earlier version ----------------------------------------------------------
# The config of a run that the version without recipes wrote, as far as it compared settings by it.
EARLIER_CONFIG = {
    "arch": "ir_tiny",
    "pretrained": "pretrained/adaface_ir50_ms1mv2.ckpt",
    "freeze_backbone": True,
    "train_percentage": 100,
    "validation_split": 0.3,
    "margin": 0.3,
    "distance": "cosine",
    "images_per_batch": 96,
    "batch_size": 8,
    "epochs": 2,
    "quadruplet_weight": 0.0,
    "drift_weight": 0.0,
    "learning_rate": 0.0003,
    "schedule": "constant",
    "weight_decay": 0.0001,
    "monitor": "val_auc",
    "patience": 10,
    "precision": "fp32",
    "split_seed": 42,
    "planned_epochs": 2,
    "used_precision": "fp32",
    "n_train_pairs": 4,
    "n_touched_images": 11,
    "train_ids": ["train0a", "train0b"],
    "val_ids": ["train2a", "train2b"],
    "crops_sha256": "2151e1bcc13599e499e9b7e484b99e01b11f1f91d8627dfdb4b6a3df68e96814",
}


def write_earlier_checkpoint(path, model, seed, **config):
    """Write a checkpoint as the version without recipes did."""
    content = {
        "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()},
        "arch": model.arch,
        "epoch": 1,
        "config": {**EARLIER_CONFIG, "seed": seed, **config},
        "metrics": {"val_auc": 0.8 + seed / 100, **THRESHOLDS},
        "start_metrics": {"val_auc": 0.75, **START_THRESHOLDS},
        "crop_sha256": ["580204f50d26ad1f6296fbe6438ac1b4fe6df56987e17a2e8d41ab33903004df"],
        "against_start": {},
    }
    torch.save(content, path)


class Earlier(NamedTuple):
    """An evaluation of a start and two seeds that the version without recipes trained."""

    code: int
    out: Path
    settings: list  # of comparison.json
    checkpoints: list  # of comparison.json


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    torch.manual_seed(0)
    start = net.build_model("ir_tiny")
    paths = [str(folder / name) for name in ("start.pth", "first.pth", "second.pth")]
    net.save_checkpoint(paths[0], start)
    write_earlier_checkpoint(paths[1], variant(start, 1), seed=1)
    write_earlier_checkpoint(paths[2], variant(start, 2), seed=2)
    with quick_scripts():
        code = ev.main([*flags_of_test(folder, [[2, 2], [2, 2]]), *paths])
    content = json.loads((folder / "out" / "comparison.json").read_text())
    return Earlier(code, folder / "out", content["settings"], content["checkpoints"])


def test_checkpoints_of_the_earlier_version_load_with_all_that_they_say(tiny_model, tmp_path):
    write_earlier_checkpoint(tmp_path / "a.pth", tiny_model, seed=1)
    model = net.load_checkpoint(tmp_path / "a.pth")
    assert model.facts["config"] == {**EARLIER_CONFIG, "seed": 1}
    for key, value in tiny_model.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_checkpoints_of_the_earlier_version_are_evaluated(earlier):
    assert earlier.code == 0
    for entry in earlier.checkpoints:
        assert entry["figures"]["auc"]["value"] is not None


def test_checkpoints_of_the_earlier_version_stand_alone_as_settings(earlier):
    """Without recipes nobody knows whether two of them differ in the seed alone."""
    names = [setting["name"] for setting in earlier.settings]
    assert names == ["start", "first", "second"]
    assert [setting["checkpoints"] for setting in earlier.settings] == [[name] for name in names]


def test_checkpoints_of_the_earlier_version_have_their_own_thresholds(earlier):
    is_accepted = []
    for row in read_csv(earlier.out / "first" / "pair_scores.csv"):
        if row["kind"] == "twin":
            is_accepted.append(float(row["score"]) >= THRESHOLDS["val_eer_threshold"])
    figures = earlier.checkpoints[1]["figures"]
    assert figures["twin_fmr_val_eer"]["value"] == pytest.approx(np.mean(is_accepted))


def test_a_start_that_is_known_by_the_name_of_its_file_alone_has_no_thresholds(earlier):
    """The earlier version wrote the path of the start into its checkpoints, and no hash."""
    assert earlier.checkpoints[0]["figures"]["twin_fmr_val_eer"]["value"] is None


# ---- pictures ------------------------------------------------------------------------------------
PICTURES = ("roc_curve.png", "det_curve.png", "score_distributions.png", "hardest_pairs.png")


def test_all_pictures_are_drawn(evaluated):
    common = {("out", "comparison.png"), ("out", "data_percentage.png")}
    assert set(evaluated.figures) == {*product(evaluated.metrics, PICTURES), *common}


def test_pictures_are_neither_empty_nor_black(evaluated):
    for folder, name in evaluated.figures:
        home = evaluated.out if folder == "out" else evaluated.out / folder
        with Image.open(home / name) as picture:
            is_dark = np.asarray(picture.convert("L")) < 200
        assert 0.002 < is_dark.mean() < 0.9, name


def test_pictures_have_titles_and_both_axes_labels(evaluated):
    for (_, name), figure in evaluated.figures.items():
        if name == "hardest_pairs.png":
            continue
        assert figure.axes[0].get_title()
        for axes in figure.axes:
            labels = [label.get_text() for label in axes.get_yticklabels()]
            assert axes.get_ylabel() or all(labels)
            # The panels of data_percentage.png, one below the other, have a common x axis.
            lowest = figure.axes[-1] if name == "data_percentage.png" else axes
            assert lowest.get_xlabel()


@pytest.fixture
def not_told_of_letters():
    """As in a process that has drawn no picture yet."""
    ev.tell_of_missing_letters.cache_clear()
    yield
    ev.tell_of_missing_letters.cache_clear()


@pytest.mark.usefixtures("not_told_of_letters")
def test_letters_that_the_font_lacks_are_told_once(tmp_path, capfd, recwarn):
    for name in ("first", "second"):
        with ev.plot_figure(tmp_path / f"{name}.png") as axes:
            axes.plot([0, 1], label="\u53cc\u5b50")
            axes.set_title("\u53cc\u5b50 twins")
        assert (tmp_path / f"{name}.png").is_file()
    out, error = capfd.readouterr()
    (line,) = out.splitlines()
    assert line == "warning: the pictures' font lacks letters of a name; they are boxes there"
    assert error == ""
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.usefixtures("not_told_of_letters")
def test_nothing_is_told_of_letters_that_the_font_has(tmp_path, capfd):
    with ev.plot_figure(tmp_path / "picture.png") as axes:
        axes.set_title("Zo\u00eb, \u0416\u0435\u043d\u044f")
    assert capfd.readouterr() == ("", "")


def label_in_det(name, figures):
    """The label of a curve in comparison.png."""
    return f"{name}\nAUC {figures['auc']['value']:.3f}, EER {100 * figures['eer']['value']:.1f} %"


def test_det_curves_are_labelled_with_the_means_of_their_settings(evaluated):
    _, det = evaluated.figures["out", "comparison.png"].axes
    labels = [text.get_text() for text in det.get_legend().get_texts()]
    expected = [label_in_det(setting["name"], setting["figures"]) for setting in evaluated.settings]
    assert labels == expected

    several_seeds = evaluated.settings[2]
    first_seed = evaluated.metrics[several_seeds["checkpoints"][0]]["figures"]
    assert labels[2] != label_in_det(several_seeds["name"], first_seed)


@pytest.mark.parametrize(
    "name", ["twin_tuned_ir50_full_10pct_margin0.3_epoch7", "drift_weight 0.1"]
)
def test_names_are_broken_at_spaces_and_after_underscores(name):
    lines = ev.wrap_name(name, 12).split("\n")
    assert max(len(line) for line in lines) <= 12
    words = [word for line in lines for word in re.findall("[^_ ]+", line)]
    assert words == re.findall("[^_ ]+", name)


def test_det_curves_are_labelled_with_the_figures_of_the_table(evaluated):
    _, det = evaluated.figures["out", "comparison.png"].axes
    lines = evaluated.said.getvalue().splitlines()
    (head,) = [number for number, line in enumerate(lines) if line.startswith("setting ")]
    rows = lines[head + 1 :][: len(evaluated.settings)]
    texts = det.get_legend().get_texts()
    for setting, row, text in zip(evaluated.settings, rows, texts, strict=True):
        eer, auc, *_ = row.removeprefix(setting["name"]).split()
        label = re.fullmatch(r"(.+)\nAUC (.+), EER (.+) %", text.get_text())
        # The table has one decimal more, so its own rounding comes on top of that of the label.
        assert label[1] == setting["name"]
        assert float(label[2]) == pytest.approx(float(auc), abs=0.0005 + 0.00005 + 1e-9)
        assert float(label[3]) == pytest.approx(float(eer), abs=0.05 + 0.005 + 1e-9)


def test_the_det_picture_says_that_its_curves_are_of_the_first_seed(evaluated):
    _, det = evaluated.figures["out", "comparison.png"].axes
    assert "figures are means over seeds, curves are of the first seed" in det.get_title()


class Half(NamedTuple):
    """The half of b's hardest_pairs.png that shows mistakes with pairs of one kind."""

    kind: str
    heading: str
    titles: list  # of the pairs that are shown
    pairs: list  # rows of pair_scores.csv, all of the kind
    mistakes: list  # those of them that are decided wrongly


@pytest.fixture
def halves(evaluated):
    grid = evaluated.figures["b", "hardest_pairs.png"].axes
    halves = []
    for kind, wrong_decision, part in (("twin", "1", grid[:8]), ("genuine", "0", grid[8:])):
        heading = " ".join(part[0].get_title("left").split())  # it is wrapped
        titles = [axes.get_title() for axes in part if axes.get_title()]
        pairs = [row for row in evaluated.pairs if row["kind"] == kind]
        mistakes = [row for row in pairs if row["accepted_at_eer"] == wrong_decision]
        halves.append(Half(kind, heading, titles, pairs, mistakes))
    return halves


def test_hardest_pairs_are_counted(halves):
    for half in halves:
        assert f": {len(half.mistakes)} of {len(half.pairs)} pairs" in half.heading


def of_crop(rows, crop):
    """The rows of pair_scores.csv with a crop, by the end of its path."""
    return [row for row in rows if row["path_1"].endswith(crop) or row["path_2"].endswith(crop)]


def test_a_crop_that_is_in_many_of_the_mistakes_is_named(halves):
    suspects = []
    for half in halves:
        note = r"; (\d+) of the (\d+) pairs with (\S+) are wrong: look at it"
        for n_mistakes, n_pairs, crop in re.findall(note, half.heading):
            assert len(of_crop(half.mistakes, crop)) == int(n_mistakes)
            assert len(of_crop(half.pairs, crop)) == int(n_pairs)
            suspects.append(crop)
    assert suspects


def test_hardest_pairs_are_mistakes_the_worst_first(halves):
    for half in halves:
        shown = [float(re.match(r"score (-?[\d.]+)", title)[1]) for title in half.titles]
        scores = [float(row["score"]) for row in half.mistakes]
        descending = half.kind == "twin"
        worst = max(scores) if descending else min(scores)
        assert shown == sorted(shown, reverse=descending)
        assert shown[0] == round(worst, 3)


def test_hardest_pairs_show_a_crop_once(halves):
    for half in halves:
        crops = []
        for title in half.titles:
            crops += title.splitlines()[-1].split(" | ")
        assert len(crops) == 2 * len(half.titles)
        assert len(set(crops)) == len(crops)


# ---- the table -----------------------------------------------------------------------------------
FIRST = {"eer": 0.1, "auc": 0.8, "best_accuracy": 0.5, "general_auc": 0.9}
SECOND = {"eer": 0.2, "auc": 0.9, "best_accuracy": 0.5, "general_auc": 0.8}
GOT_WORSE = "got WORSE at recognising people in general"


def table_of(*checkpoints):
    """The lines of the terminal's table; the first checkpoint is the baseline."""
    settings = ev.group_settings(checkpoints)
    return ev.comparison_table(settings, ev.chosen_by_validation(settings)).splitlines()


def test_table_has_a_row_for_each_setting():
    lines = table_of(checkpoint("first", **FIRST), checkpoint("second", **SECOND))
    assert lines[1].split() == ["first", "10.00", "0.8000", "50.00", *"----", "0.9000"]
    assert lines[2].split() == ["second", "20.00", "0.9000", "50.00", *"----", "0.8000"]


def test_table_says_which_setting_got_worse_in_general():
    lines = table_of(checkpoint("first", **FIRST), checkpoint("second", **SECOND))
    assert sum(GOT_WORSE in line for line in lines) == 1


def test_table_blames_nothing_for_getting_better_in_general():
    lines = table_of(checkpoint("first", **FIRST), checkpoint("second", general_auc=0.95))
    assert "WORSE" not in "".join(lines)


def test_table_warns_of_selection_on_the_test_set():
    lines = table_of(checkpoint("first", **FIRST), checkpoint("second", **SECOND))
    assert lines[-1] == "Choosing by the figures above would be selection on the test set."


# ---- what validation would have chosen -----------------------------------------------------------
def validated(name, auc, ids):
    """A checkpoint with this AUC of the validation people `ids`."""
    return checkpoint(name, {}, config={"val_ids": list(ids)}, metrics={"val_auc": auc})


def chosen_of(*checkpoints):
    return ev.chosen_by_validation(ev.group_settings([checkpoint("first"), *checkpoints]))


def test_validation_chooses_the_highest_auc_of_common_people():
    assert chosen_of(validated("b", 0.9, "yx"), validated("a", 0.8, "xy")) == "b"


def test_validation_does_not_choose_among_those_with_different_people():
    a = validated("a", 0.8, "xy")
    b = validated("b", 0.9, "yx")
    assert chosen_of(a, b, validated("c", 1.0, "z")) is None


def test_validation_does_not_choose_among_those_with_different_pairs_of_the_same_people():
    a = validated("a", 0.8, "xy")
    b = validated("b", 0.9, "xy")
    b.facts["config"]["cross"] = "session"
    assert chosen_of(a, b) is None


def test_validation_does_not_choose_a_single_setting():
    assert chosen_of(validated("a", 0.8, "xy")) is None


NO_CHOICE = "There is no common validation to choose a setting by."


def test_table_says_that_there_is_no_common_validation():
    start, a, c = checkpoint("first"), validated("a", 0.8, "xy"), validated("c", 1.0, "z")
    assert table_of(start, a, c)[-2] == NO_CHOICE


def test_table_speaks_of_no_choice_where_there_is_none():
    assert NO_CHOICE not in table_of(checkpoint("first"), validated("a", 0.8, "xy"))


# ---- wrong input, and the whole way --------------------------------------------------------------
TEST = "--skip_alignment --aligned_json test.json --test_pairs test_pairs.json"
WRONG = {
    "no photographs listed": ("--checkpoints a.pth", "--id_to_images id_to_images.json: "),
    "no crops listed": (
        "--skip_alignment --checkpoints a.pth",
        "--aligned_json id_to_test_aligned_images.json: ",
    ),
    "no checkpoint in the folder": (
        f"{TEST} --checkpoints empty",
        "empty: no file ending in .pth",
    ),
    "no pairs": (
        f"{TEST} --checkpoints a.pth --test_pairs none.json",
        "--test_pairs none.json: expected",
    ),
    "no genuine pair": (
        f"{TEST} --checkpoints a.pth --aligned_json one.json",
        "none of the people has two images",
    ),
    "leak": (
        f"{TEST} --checkpoints leak.pth",
        "trained or validated on 2 of the 4 test people: test0a, test1b;",
    ),
    "leak of the earlier version": (
        f"{TEST} --checkpoints earlier.pth",
        "trained or validated on 2 of the 4 test people: test0a, test1b;",
    ),
}


@pytest.fixture
def wrong_inputs(write_crops, tiny_model, tmp_path, monkeypatch):
    """The files that WRONG names, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_crops([[2, 2], [2, 2]], "test")
    images = json.loads(Path("test.json").read_text())
    one_each = {name: paths[:1] for name, paths in images.items()}
    Path("one.json").write_text(json.dumps(one_each))
    Path("none.json").write_text("[]")
    Path("empty").mkdir()
    seen = {"train_ids": ["test1b"], "val_ids": ["test0a"]}
    net.save_checkpoint("a.pth", tiny_model)
    net.save_checkpoint("leak.pth", tiny_model, config=tuned() | seen)
    write_earlier_checkpoint("earlier.pth", tiny_model, seed=1, **seen)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(wrong_inputs, capsys, case):
    flags, message = WRONG[case]
    assert ev.main(flags.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if "crop/s" not in line]  # that is the progress bar's
    assert re.match(f"evaluate_twins.py: .*{re.escape(message)}", line)
    assert not Path("evaluation_results").exists()


def test_photographs_to_metrics(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ev, "MAX_GENERAL_PAIRS", 20)
    write_photos(".", 3, 2, seed=1)
    net.save_checkpoint("a.pth", tiny_model)
    flags = (
        "--checkpoints a.pth --test_pairs pairs.json --landmarks landmarks.json --device cpu "
        "--flip --aligned_folder crops"
    )
    assert ev.main(flags.split()) == 0
    metrics = json.loads(Path("evaluation_results/a/metrics.json").read_text())
    counts = {"images": 12, "genuine": 6, "twin": 12, "general": 48, "families": 3}
    assert metrics["counts"] == counts
    assert metrics["flip"] is True
    assert metrics["general_pairs_drawn"] is True


@pytest.mark.parametrize("picture", ["score_distributions.png", "det_curve.png"])
def test_logarithmic_axes_have_plain_numbers(evaluated, picture):
    (axes,) = evaluated.figures["b", picture].axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert "1" in labels
    assert not any("$" in label for label in labels)
