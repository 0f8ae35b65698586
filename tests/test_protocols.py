"""Protocols of papers: ten folds, the figures of single families."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score
from sklearn.model_selection import PredefinedSplit

import evaluate_twins as ev
from tests.conftest import read_csv
from tests.reference import people


def scores_of(evaluator, seed=0, decimals=2):
    """Scores of random embeddings: similar for one person, less so for twins."""
    rng = np.random.default_rng(seed)
    scores = {}
    for (kind, rows), mean in zip(evaluator.rows.items(), (0.5, 0.4, 0.0), strict=True):
        scores[kind] = rng.normal(mean, 0.2, len(rows)).round(decimals)
    return scores


# ---- accuracy on ten folds -----------------------------------------------------------------------
@pytest.fixture
def twelve_families():
    sizes = [(2, 3), (4, 1), (3, 3), (2, 2), (5, 4), (2, 1), (3, 2), (2, 2, 2), (6, 2), (2, 4)]
    return ev.TwinEvaluator(people(*sizes, (3, 3), (1, 2)), resamples=20)


def labels_and_folds(evaluator, scores):
    """(is genuine, score, fold) of all genuine and twin pairs."""
    labels = np.repeat([1, 0], [len(scores["genuine"]), len(scores["twin"])])
    values = np.concatenate([scores["genuine"], scores["twin"]])
    folds = np.concatenate([evaluator.folds["genuine"], evaluator.folds["twin"]])
    return labels, values, folds


@pytest.mark.parametrize("decimals", [1, 6], ids=["ties", "distinct"])
def test_ten_fold_accuracy_equals_a_slow_loop_over_scikit_learns_folds(twelve_families, decimals):
    scores = scores_of(twelve_families, decimals=decimals)
    labels, values, folds = labels_and_folds(twelve_families, scores)
    thresholds = [*np.unique(values), np.inf]
    accuracies = []
    for others, fold in PredefinedSplit(folds).split():
        on_others = [accuracy_score(labels[others], values[others] >= t) for t in thresholds]
        best = thresholds[int(np.argmax(on_others))]
        accuracies.append(accuracy_score(labels[fold], values[fold] >= best))
    assert len(accuracies) == 10
    figures = twelve_families.figures(scores)
    assert figures["accuracy_10_fold"] == pytest.approx(np.mean(accuracies), abs=1e-12)
    assert figures["accuracy_10_fold_std"] == pytest.approx(np.std(accuracies), abs=1e-12)


def test_no_family_is_in_two_folds_and_folds_are_of_similar_size():
    evaluator = ev.TwinEvaluator(people(*[(3, 3)] * 25, (3, 3, 3)))
    families_of_fold = [set() for _ in range(10)]
    n_pairs = np.zeros(10)
    for kind, folds in evaluator.folds.items():
        for (a, _), fold in zip(evaluator.rows[kind], folds, strict=True):
            families_of_fold[fold].add(evaluator.family[a])
            n_pairs[fold] += 1
    assert sum(len(families) for families in families_of_fold) == 26
    assert n_pairs.max() <= 2 * n_pairs.min()


def test_the_seed_deals_the_folds():
    images = people(*[(3, 3)] * 25)
    first, again, other = (ev.TwinEvaluator(images, seed).folds["twin"] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize(("n_families", "is_known"), [(9, False), (10, True)])
def test_ten_folds_need_ten_families_with_pairs(n_families, is_known):
    evaluator = ev.TwinEvaluator(people(*[(2, 2)] * n_families, (1, 0)))
    figures = evaluator.figures(scores_of(evaluator))
    assert (figures["accuracy_10_fold"] is not None) == is_known


def test_a_resample_weights_whole_families(twelve_families):
    evaluator = twelve_families
    scores = scores_of(evaluator)
    samples = evaluator.estimate(scores).samples["accuracy_10_fold"]
    for weights, sample in zip(evaluator.weightings, samples, strict=True):
        labels, values, folds = labels_and_folds(evaluator, scores)
        families = [evaluator.family[evaluator.rows[kind][:, 0]] for kind in ("genuine", "twin")]
        times = weights[np.concatenate(families)]
        labels, values, folds = (np.repeat(x, times) for x in (labels, values, folds))
        thresholds = [*np.unique(np.concatenate([scores["genuine"], scores["twin"]])), np.inf]
        accuracies = []
        for fold in np.unique(folds):
            here = folds == fold
            right = [((values >= t) == labels)[~here].sum() for t in thresholds]
            best = thresholds[int(np.argmax(right))]
            accuracies.append(((values >= best) == labels)[here].mean())
        assert sample == pytest.approx(np.mean(accuracies), abs=1e-12)


def test_the_table_has_mean_and_deviation_over_folds(twelve_families):
    scores = scores_of(twelve_families)
    figures = ev.compare([twelve_families.estimate(scores)])
    setting = ev.Setting("x", {}, [], figures)
    mean, std = (figures[f"accuracy_10_fold{end}"]["value"] for end in ("", "_std"))
    assert f"{100 * mean:.2f} ± {100 * std:.2f}" in ev.comparison_table([setting], None)


# ---- single families -----------------------------------------------------------------------------
def test_families_are_listed_with_their_own_figures_the_hardest_first(evaluated):
    rows = read_csv(evaluated.out / "b" / "families.csv")
    pairs = evaluated.pairs
    threshold = evaluated.metrics["b"]["figures"]["eer_threshold"]["value"]
    aucs = []
    for row in rows:
        names = set(row["ids"].split(" + "))
        own = [pair for pair in pairs if {pair["id_1"], pair["id_2"]} <= names]
        scores = {"genuine": [], "twin": []}
        for pair in own:
            scores[pair["kind"]].append(float(pair["score"]))
        genuine, twin = np.array(scores["genuine"]), np.array(scores["twin"])
        assert int(row["genuine_pairs"]) == len(genuine)
        assert int(row["twin_pairs"]) == len(twin)
        if not row["twin_auc"]:
            assert len(twin) == 0
            continue
        above = (genuine[:, None] > twin).mean() + (genuine[:, None] == twin).mean() / 2
        aucs.append(float(row["twin_auc"]))
        assert aucs[-1] == pytest.approx(above, abs=1e-6)
        assert float(row["fnmr"]) == pytest.approx((genuine < threshold).mean())
        assert float(row["twin_fmr"]) == pytest.approx((twin >= threshold).mean())
    assert aucs == sorted(aucs)
    assert len(rows) == 8


def test_the_three_hardest_families_are_named(evaluated):
    rows = read_csv(evaluated.out / "start" / "families.csv")
    hardest = [f"{row['ids']} (twin AUC {float(row['twin_auc']):.3f})" for row in rows[:3]]
    assert f"start, hardest families: {', '.join(hardest)}." in evaluated.said.getvalue()
