import csv
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

import evaluate_twins as ev
import net
from align import read_id_to_images, read_pairs
from tests.synthetic import write_photos
from triplet_dataset import TwinImages, load_crops

# ---- metrics


def brute_force(genuine, impostor):
    """The metrics by the words of DESIGN.md: every threshold tried, every pair counted in Python."""
    thresholds = [*sorted({*genuine, *impostor}), float("inf")]
    rows = []
    for t in thresholds:
        fmr = sum(s >= t for s in impostor) / len(impostor)
        fnmr = sum(s < t for s in genuine) / len(genuine)
        right = sum(s >= t for s in genuine) + sum(s < t for s in impostor)
        rows.append((t, fmr, fnmr, right / (len(genuine) + len(impostor))))
    gap = min(round(abs(fmr - fnmr), 12) for _, fmr, fnmr, _ in rows)
    t, fmr, fnmr, accuracy = next(row for row in rows if round(abs(row[1] - row[2]), 12) == gap)
    wins = sum((g > i) + 0.5 * (g == i) for g, i in itertools.product(genuine, impostor))
    return {
        "eer": (fmr + fnmr) / 2,
        "eer_threshold": t,
        "auc": wins / (len(genuine) * len(impostor)),
        "best_accuracy": max(row[3] for row in rows),
        "accuracy_at_eer": accuracy,
        **{
            f"tar_at_far_{far:g}": None
            if len(impostor) < 1 / far
            else max(1 - fnmr for _, fmr, fnmr, _ in rows if fmr <= far)
            for far in (0.01, 0.001, 0.0001)
        },
    }


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, abs=1e-12), key


CASES = {
    "random": lambda r: (r.normal(0.5, 0.2, 60), r.normal(0.3, 0.2, 150)),
    "many ties": lambda r: (r.integers(3, 9, 80) / 10, r.integers(0, 7, 120) / 10),
    "all equal": lambda r: (np.full(5, 0.5), np.full(7, 0.5)),
    "separated": lambda r: (np.array([0.8, 0.9]), np.array([0.1, 0.2, 0.3])),
    "inverted": lambda r: (np.array([0.1, 0.2]), np.array([0.8, 0.9])),
    "one genuine": lambda r: (np.array([0.4]), r.normal(0.3, 0.2, 30)),
    "one each": lambda r: (np.array([0.4]), np.array([0.6])),
    "mostly impostors": lambda r: (r.normal(0, 1, 3), r.normal(0.2, 1, 200)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_brute_force(case, seed):
    genuine, impostor = CASES[case](np.random.default_rng(seed))
    assert_same(ev.verification_metrics(genuine, impostor), brute_force(genuine.tolist(), impostor.tolist()))


@pytest.mark.parametrize("decimals", [15, 2])
def test_metrics_equal_scikit_learns(decimals):
    rng = np.random.default_rng(1)
    genuine, impostor = rng.normal(0.5, 0.2, 3000).round(decimals), rng.normal(0.2, 0.2, 12000).round(decimals)
    truth, scores = np.r_[np.ones(3000), np.zeros(12000)], np.r_[genuine, impostor]
    fpr, tpr, thresholds = roc_curve(truth, scores, drop_intermediate=False)
    got = ev.verification_metrics(genuine, impostor)
    assert got["auc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
    for far in (0.01, 0.001, 0.0001):
        assert got[f"tar_at_far_{far:g}"] == pytest.approx(tpr[fpr <= far].max(), abs=1e-9)
    gap = np.abs(fpr - (1 - tpr))
    at = np.flatnonzero(gap <= gap.min() + 1e-12)[-1]  # scikit-learn's thresholds descend: the last is the lowest
    assert got["eer"] == pytest.approx((fpr[at] + 1 - tpr[at]) / 2, abs=1e-9)
    assert got["eer_threshold"] == thresholds[at]


def test_metrics_of_a_case_worked_out_by_hand():
    # thresholds 1 2 3 4 5 6: FMR 1 3/4 2/4 1/4 0 0; FNMR 0 0 1/3 1/3 1/3 2/3 -> |difference| least at 4 (1/12).
    got = ev.verification_metrics(np.array([2.0, 5.0, 6.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert got["eer_threshold"] == 4
    assert got["eer"] == pytest.approx((1 / 4 + 1 / 3) / 2)
    assert got["auc"] == pytest.approx((1.5 + 4 + 4) / 12)
    assert got["best_accuracy"] == pytest.approx(6 / 7)
    assert got["accuracy_at_eer"] == pytest.approx(5 / 7)
    assert [got[f"tar_at_far_{far}"] for far in ("0.01", "0.001", "0.0001")] == [None] * 3


def test_rates_are_null_just_below_what_the_sample_resolves():
    genuine = np.array([0.9])
    for n, expected in ((99, None), (100, 1.0)):
        assert ev.verification_metrics(genuine, np.linspace(0, 0.5, n))["tar_at_far_0.01"] == expected


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1])
def test_general_threshold_is_the_lowest_with_that_rate(ties, rate):
    rng = np.random.default_rng(0)
    scores = np.sort(rng.normal(0, 1, 5000).round(1 if ties else 12))[::-1]
    weights = rng.integers(0, 4, (3, 5000))
    weights[0] = 1
    above = ev.threshold_above(scores, lambda n: weights[:, :n], weights.sum(1), rate)
    for w, s in zip(weights, above, strict=True):
        assert w[scores > s].sum() / w.sum() <= rate
        assert w[scores >= s].sum() / w.sum() > rate


# ---- pairs and scores


def test_image_pairs_equal_brute_force():
    images = {name: [f"/{name}/{i}" for i in range(n)] for name, n in zip("abcdef", (3, 2, 1, 0, 4, 2), strict=True)}
    pairs = [("a", "b"), ("b", "c"), ("a", "c"), ("d", "e"), ("e", "f")]
    table = TwinImages(images, pairs)
    genuine, twin = ev.image_pairs(table)

    def named(rows):
        return sorted(tuple(sorted((table.paths[i], table.paths[j]))) for i, j in rows)

    assert named(genuine) == sorted(pair for paths in images.values() for pair in itertools.combinations(paths, 2))
    expected = [tuple(sorted(x)) for a, b in pairs for x in itertools.product(images[a], images[b])]
    assert named(twin) == sorted(expected)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("kept", [7, 20, 1000])
def test_general_scores_are_the_highest_and_an_even_sample_of_all_cross_family_pairs(chunk, kept):
    embeddings = torch.nn.functional.normalize(torch.randn(17, 8))
    family = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 0, 4, 4, 5, 5, 5])
    pairs = [(i, j) for i, j in itertools.combinations(range(17), 2) if family[i] != family[j]]
    truth = {(i, j): float(embeddings[i] @ embeddings[j]) for i, j in pairs}
    got = ev.general_scores(embeddings, family, kept, chunk)
    assert got.total == len(pairs)
    np.testing.assert_allclose(got.top, sorted(truth.values(), reverse=True)[:kept], atol=1e-6)
    assert 0 < len(got.sample) <= len(pairs)
    possible = [(value, {family[i], family[j]}) for (i, j), value in truth.items()]
    for scores, families in ((got.top, got.top_families), (got.sample, got.sample_families)):
        for score, two in zip(scores, families, strict=True):
            assert any(abs(score - value) < 1e-6 and set(two) == both for value, both in possible)
    if kept == 1000:  # more than there are
        np.testing.assert_allclose(np.sort(got.sample), sorted(truth.values()), atol=1e-6)


def test_the_sample_of_general_scores_is_even():
    """Of 2,000 images in 500 families every image is met about as often, and the AUC is that of all pairs."""
    embeddings = torch.nn.functional.normalize(torch.randn(2000, 16))
    family = np.arange(2000) // 4
    everything = ev.general_scores(embeddings, family, 3_000_000)
    part = ev.general_scores(embeddings, family, 50_000, chunk=256)
    assert len(everything.sample) == everything.total == part.total == 2000 * 1996 // 2
    assert abs(len(part.sample) - 50_000) < 2_500
    met = np.bincount(part.sample_families.ravel(), minlength=500)
    assert met.min() > 0.6 * met.mean()
    assert met.max() < 1.4 * met.mean()
    for quantile in (0.1, 0.5, 0.9):
        assert np.quantile(part.sample, quantile) == pytest.approx(np.quantile(everything.sample, quantile), abs=0.01)
    np.testing.assert_allclose(part.top, everything.top[: len(part.top)], atol=1e-6)


def test_embedding_does_not_depend_on_the_batch(tiny_model):
    crops = torch.randint(0, 256, (7, 112, 112, 3), dtype=torch.uint8)
    a, b = (ev.embed(tiny_model, crops, torch.device("cpu"), size) for size in (2, 7))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert a.dtype == torch.float32


# ---- the bootstrap


class Case:
    """An evaluator without networks: random scores of random families."""

    def __init__(self, seed, n_families=6, ties=False, general=True):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(2, 5, (n_families, 2))
        images = {
            f"{f}{t}": [f"/{f}{t}{i}" for i in range(n)]
            for f, s in enumerate(sizes)
            for t, n in zip("ab", s, strict=True)
        }
        evaluator = object.__new__(ev.TwinEvaluator)
        evaluator.images = TwinImages(images, [(f"{f}a", f"{f}b") for f in range(n_families)])
        evaluator.family = np.repeat(np.arange(n_families), sizes.sum(1))
        evaluator.genuine, evaluator.twin = ev.image_pairs(evaluator.images)
        evaluator.weights = np.random.default_rng(seed).multinomial(
            n_families, np.full(n_families, 1 / n_families), 200
        )
        self.evaluator = evaluator
        embeddings = torch.from_numpy(rng.normal(0, 1, (len(evaluator.family), 5)))
        embeddings += 1.5 * torch.from_numpy(rng.normal(0, 1, (n_families, 5)))[evaluator.family]
        embeddings = torch.nn.functional.normalize(embeddings)
        digits = 1 if ties else 15
        self.all = (embeddings @ embeddings.T).numpy().round(digits)
        top = ev.general_scores(embeddings, evaluator.family)
        top = top._replace(top=top.top.round(digits), sample=top.sample.round(digits))
        genuine, twin = (self.all[rows[:, 0], rows[:, 1]] for rows in (evaluator.genuine, evaluator.twin))
        self.scores = ev.Scores(genuine, twin, top)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_resample_equals_copying_the_families(seed, ties):
    """Every family w times, as new people: all figures by brute force on the copied lists of scores."""
    case = Case(seed, ties=ties)
    evaluator, family = case.evaluator, case.evaluator.family
    weights = np.array([[1] * 6, [2, 0, 1, 1, 0, 2], [0, 3, 0, 0, 2, 1], [1, 2, 3, 0, 0, 0]])
    got = evaluator.estimate(case.scores, weights)
    for r, w in enumerate(weights):
        genuine = [
            s for s, (i, _) in zip(case.scores.genuine, evaluator.genuine, strict=True) for _ in range(w[family[i]])
        ]
        twin = [s for s, (i, _) in zip(case.scores.twin, evaluator.twin, strict=True) for _ in range(w[family[i]])]
        general = [
            case.all[i, j]
            for i, j in itertools.combinations(range(len(family)), 2)
            if family[i] != family[j]
            for _ in range(w[family[i]] * w[family[j]])
        ]
        expected = brute_force(genuine, twin)
        for name in ("eer", "auc", "best_accuracy", "accuracy_at_eer"):
            assert got[name][r] == pytest.approx(expected[name], abs=1e-9), name
        assert got["general_auc"][r] == pytest.approx(brute_force(genuine, general)["auc"], abs=1e-6)
        t = got["general_threshold_0.001"][r]
        assert np.mean(np.array(general) >= t) <= 0.001
        assert got["twin_fmr_0.001"][r] == pytest.approx(np.mean(np.array(twin) >= t))
        assert got["fnmr_0.001"][r] == pytest.approx(np.mean(np.array(genuine) < t))


def test_figures_are_the_unweighted_ones_and_null_where_unresolved():
    case = Case(1)
    figures, samples = case.evaluator.metrics(case.scores)
    direct = ev.verification_metrics(case.scores.genuine, case.scores.twin)
    assert {name: figures[name] for name in direct} == direct
    total = case.scores.general.total
    assert (figures["fnmr_0.001"] is None) == (total < 1000)
    assert figures["twin_fmr_0.0001"] is None
    assert ev.interval(samples["twin_fmr_0.0001"], figures["twin_fmr_0.0001"]) is None
    low, high = ev.interval(samples["auc"], figures["auc"])
    assert low < figures["auc"] < high
    again = case.evaluator.metrics(case.scores)[1]
    assert all(np.array_equal(samples[name], again[name], equal_nan=True) for name in samples)


def test_a_resample_without_pairs_of_a_kind_says_nothing():
    genuine, twin = np.array([0.5, 0.6]), np.array([0.1, 0.2])
    weights = np.array([[1, 1], [1, 1], [0, 0]]), np.array([[1, 1], [0, 0], [1, 1]])
    with np.errstate(invalid="ignore"):
        got = ev.twin_metrics(ev.error_rates(genuine, twin, *weights))
    for name, values in got.items():
        assert np.isnan(values).tolist() == [False, True, True], name


def test_one_family_has_no_general_pairs():
    case = Case(0, n_families=1)
    figures, _ = case.evaluator.metrics(case.scores)
    assert case.scores.general.total == 0
    assert figures["general_auc"] is figures["fnmr_0.001"] is figures["general_threshold_0.001"] is None
    assert figures["auc"] is not None


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """AUC of genuine ~ N(1, 1) against twin ~ N(0, 1), one of each a family: true AUC is Phi(1 / sqrt(2)) = 0.7602."""
    inside = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        genuine, twin = rng.normal(1, 1, 40), rng.normal(0, 1, 40)
        weights = rng.multinomial(40, np.full(40, 1 / 40), 300)
        samples = ev.twin_metrics(ev.error_rates(genuine, twin, weights, weights))["auc"]
        low, high = ev.interval(samples, 0.0)
        inside += low <= 0.7602 <= high
    assert 0.87 < inside / 150 < 0.99


def test_differences_are_paired_and_know_which_way_is_better():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 500)  # common to both networks: it must cancel
    base = {
        "auc": 0.8 + noise,
        "eer": 0.2 + noise,
        "fnmr_0.001": 0.5 + noise,
        "eer_threshold": noise,
        "twin_fmr_0.001": noise,
    }
    other = {"auc": base["auc"] + 0.01, "eer": base["eer"] + 0.01, "fnmr_0.001": base["fnmr_0.001"] - 0.01}
    other |= {"eer_threshold": noise, "twin_fmr_0.001": noise + rng.normal(0, 0.1, 500)}
    figures = {"auc": 0.81, "eer": 0.21, "fnmr_0.001": 0.49, "eer_threshold": 0.0, "twin_fmr_0.001": 0.0}
    start = {"auc": 0.8, "eer": 0.2, "fnmr_0.001": 0.5, "eer_threshold": 0.0, "twin_fmr_0.001": 0.0}
    got = ev.differences(figures, other, start, base)
    verdicts = {name: change["verdict"] for name, change in got.items()}
    assert verdicts == {
        "auc": "better",
        "eer": "worse",
        "fnmr_0.001": "better",
        "twin_fmr_0.001": "not distinguishable",
    }
    assert got["auc"]["difference"] == pytest.approx(0.01)
    assert got["auc"]["interval"] == pytest.approx([0.01, 0.01])
    same = ev.differences(start, base, start, base)
    assert {change["verdict"] for change in same.values()} == {"not distinguishable"}
    assert ev.differences({"auc": None}, {"auc": noise}, {"auc": 0.5}, {"auc": noise}) == {}


def test_a_thousand_resamples_of_nd_twins_take_seconds():
    import time

    rng = np.random.default_rng(0)
    case = Case(0, n_families=29)
    evaluator = case.evaluator
    images = {f"{f}{t}": [f"/{f}{t}{i}" for i in range(12)] for f in range(29) for t in "ab"}  # 696 images
    evaluator.images = TwinImages(images, [(f"{f}a", f"{f}b") for f in range(29)])
    evaluator.family = np.repeat(np.arange(29), 24)
    evaluator.genuine, evaluator.twin = ev.image_pairs(evaluator.images)
    evaluator.weights = rng.multinomial(29, np.full(29, 1 / 29), 1000)
    embeddings = torch.nn.functional.normalize(torch.randn(696, 512))
    general = ev.general_scores(embeddings, evaluator.family)
    scores = ev.Scores(rng.normal(0.5, 0.1, len(evaluator.genuine)), rng.normal(0.4, 0.1, len(evaluator.twin)), general)
    began = time.perf_counter()
    evaluator.metrics(scores)
    assert time.perf_counter() - began < 60  # some seconds, on a machine that may be busy


# ---- the whole evaluation


@pytest.fixture
def evaluation(tmp_path, write_crops, tiny_model):
    """evaluation("flags") -> exit code, on tiny data with checkpoints a.pth and b.pth."""
    aligned, pairs = write_crops([[3, 2], [2, 2, 2], [2, 3]], "test")
    net.save_checkpoint(tmp_path / "a.pth", tiny_model)
    for p in tiny_model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    net.save_checkpoint(tmp_path / "b.pth", tiny_model)

    def evaluate(flags="", checkpoints="a.pth b.pth"):
        files = " ".join(str(tmp_path / name) for name in checkpoints.split())
        command = (
            f"--test_pairs {pairs} --skip_alignment --aligned_json {aligned} --output_dir {tmp_path}/out --device cpu "
            f"{flags} --checkpoints {files}"
        )
        return ev.main(command.split())

    return evaluate


def test_files_of_an_evaluation_agree_with_an_independent_one(tmp_path, evaluation, capsys):
    assert evaluation() == 0
    metrics = json.loads((tmp_path / "out" / "b" / "metrics.json").read_text())
    with open(tmp_path / "out" / "b" / "pair_scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    images, pairs = read_id_to_images(tmp_path / "test.json"), read_pairs(tmp_path / "test_pairs.json")
    table = TwinImages(images, pairs)
    model = net.load_checkpoint(tmp_path / "b.pth")
    with torch.no_grad():
        e = dict(zip(table.paths, model(net.to_input(load_crops(table.paths)))[0], strict=True))
    assert metrics["checkpoint"] == str(tmp_path / "b.pth")
    genuine, twin = ([r for r in rows if r["kind"] == kind] for kind in ("genuine", "twin"))
    assert len(genuine) + len(twin) == len(rows)
    n = {name: len(paths) for name, paths in images.items()}
    assert metrics["counts"] == {
        "images": sum(n.values()),
        "genuine": len(genuine),
        "twin": len(twin),
        "general": sum(x * y for x, y in itertools.combinations((5, 6, 5), 2)),
    }
    assert len(genuine) == sum(k * (k - 1) // 2 for k in n.values())
    assert len(twin) == sum(n[a] * n[b] for a, b in pairs)
    for row in rows:
        assert float(row["score"]) == pytest.approx(float(e[row["path_1"]] @ e[row["path_2"]]), abs=2e-6)
        assert row["path_1"] in images[row["id_1"]]
        assert row["path_2"] in images[row["id_2"]]
        assert (row["id_1"] == row["id_2"]) == (row["kind"] == "genuine")
        assert abs(float(row["score"]) - metrics["eer_threshold"]) < 1e-6 or (
            row["accepted_at_eer"] == str(int(float(row["score"]) >= metrics["eer_threshold"]))
        )
    expected = brute_force(*([float(r["score"]) for r in part] for part in (genuine, twin)))
    assert metrics["intervals"]["eer"][0] <= metrics["eer"] <= metrics["intervals"]["eer"][1]
    assert metrics["tar_at_far"] == {"0.01": None, "0.001": None, "0.0001": None}
    assert metrics["overlap"] == []
    for key in ("eer", "auc", "best_accuracy", "accuracy_at_eer"):
        assert metrics[key] == pytest.approx(expected[key], abs=1e-6)
    assert metrics["general_threshold"]["0.001"] == {"threshold": None, "twin_fmr": None, "fnmr": None}
    for name in ("roc_curve.png", "det_curve.png", "score_distributions.png", "hardest_pairs.png"):
        assert (tmp_path / "out" / "b" / name).read_bytes().startswith(b"\x89PNG")
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert comparison["baseline"] == "a"
    assert comparison["checkpoints"][1]["metrics"]["eer"] == metrics["eer"]
    assert "to_baseline" not in comparison["checkpoints"][0]
    change = comparison["checkpoints"][1]["to_baseline"]["auc"]
    assert change["difference"] == pytest.approx(metrics["auc"] - comparison["checkpoints"][0]["metrics"]["auc"])
    with open(tmp_path / "out" / "comparison.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == ["a", "b"]
    assert float(table[1]["eer"]) == metrics["eer"]
    assert float(table[1]["auc_difference"]) == change["difference"]
    assert table[1]["auc_verdict"] == change["verdict"]
    for name in ("comparison.png", "data_percentage.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "16 images of 7 people" in out
    assert "Choosing by it is selection on the test set" in out
    assert "b against a, difference [95 % interval]" in out


def test_every_image_is_embedded_once_per_checkpoint(evaluation, monkeypatch):
    seen, original = [], net.Backbone.forward
    monkeypatch.setattr(net.Backbone, "forward", lambda self, x: seen.append(len(x)) or original(self, x))
    assert evaluation("--batch_size 5") == 0
    assert sum(seen) == 2 * 16
    assert max(seen) == 5


def test_checkpoints_of_one_stem_get_folders_of_their_own(tmp_path, evaluation):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.pth").write_bytes((tmp_path / "b.pth").read_bytes())
    assert evaluation(checkpoints="a.pth other/a.pth b.pth") == 0
    folders = [p for p in (tmp_path / "out").iterdir() if p.is_dir()]
    assert len(folders) == 3
    recorded = {json.loads((p / "metrics.json").read_text())["checkpoint"] for p in folders}
    assert recorded == {str(tmp_path / "a.pth"), str(tmp_path / "other" / "a.pth"), str(tmp_path / "b.pth")}


def result(name, facts=None, overlap=(), **figures):
    names = ("eer", "auc", "best_accuracy", "tar_at_far_0.01", "twin_fmr_0.001", "fnmr_0.001", "general_auc")
    figures = {key: figures.get(key) for key in names}
    samples = {key: np.full(10, np.nan if value is None else value) for key, value in figures.items()}
    return ev.Result(name, f"{name}.pth", facts or {}, None, figures, samples, list(overlap))


def test_table_marks_the_best_of_each_column():
    first, second = (
        result("first", eer=0.1, auc=0.8, best_accuracy=0.5),
        result("second", eer=0.2, auc=0.9, best_accuracy=0.5),
    )
    lines = ev.comparison_table([first, second], first, None).splitlines()
    assert lines[1].split() == ["first", "10.00*", "0.8000", "50.00*", "-", "-", "-", "-"]
    assert lines[2].split() == ["second", "20.00", "0.9000*", "50.00*", "-", "-", "-", "-"]
    assert "AUC +0.1000 [+0.1000, +0.1000] better; EER +0.1000 [+0.1000, +0.1000] worse" in "\n".join(lines)


def test_forgetting_is_said_in_a_plain_sentence():
    start, worse, better = (
        result(n, eer=0.1, auc=0.9, general_auc=v) for n, v in (("a", 0.99), ("b", 0.9), ("c", 0.995))
    )
    assert "got WORSE at recognising people in general" in ev.comparison_table([start, worse], start, None)
    assert "WORSE" not in ev.comparison_table([start, better], start, None)


def test_validation_chooses_only_among_those_that_share_their_people():
    def tuned(name, eer, ids, **metrics):
        return result(name, {"metrics": {"val_eer": eer, **metrics}, "config": {"val_ids": ids}})

    a, b, c = tuned("a", 0.2, ["x", "y"]), tuned("b", 0.1, ["y", "x"]), tuned("c", 0.05, ["z"])
    assert ev.chosen_by_validation([result("start"), a, b]) == "b"
    assert ev.chosen_by_validation([a, b, c]) is None
    assert ev.chosen_by_validation([result("start"), a]) is None
    equal = [tuned(name, 0.2, ["x", "y"], val_auc=auc) for name, auc in (("d", 0.7), ("e", 0.9), ("f", 0.8))]
    assert ev.chosen_by_validation(equal) == "e"


def test_the_hardest_pairs_are_mistakes_the_most_confident_first(monkeypatch):
    pairs = np.array([[0, 1], [0, 2], [1, 2], [2, 3]])
    images = SimpleNamespace(paths=list("wxyz"), ids=["p"], person=np.zeros(4, int))
    evaluator = SimpleNamespace(images=images, genuine=pairs, twin=pairs)
    scores = ev.Scores(np.array([0.9, 0.4, 0.5, 0.1]), np.array([0.2, 0.5, 0.8, 0.4]), None)
    drawn = []
    monkeypatch.setattr(ev, "save_figure", lambda figure, path: drawn.append(figure))
    monkeypatch.setattr(ev, "read_crop", lambda path: np.zeros((112, 112, 3), np.uint8))
    ev.plot_hardest("x.png", evaluator, result("net")._replace(scores=scores, figures={"eer_threshold": 0.5}))
    titles = [axes.get_title() for axes in drawn[0].axes if axes.get_title()]
    assert [title.splitlines()[:2] for title in titles] == [
        ["twins taken for one person", "score 0.800"],
        ["twins taken for one person", "score 0.500"],
        ["one person refused", "score 0.100"],
        ["one person refused", "score 0.400"],
    ]


def save_tuned(tmp_path, name, model, **config):
    config = {"train_ids": ["other1"], "val_ids": ["other2"], "train_percentage": 50, "margin": 0.3, **config}
    net.save_checkpoint(tmp_path / name, model, config=config, metrics={"val_eer": 0.1, "val_loss": 0.2})


def test_test_people_that_were_trained_on_stop_the_evaluation(tmp_path, evaluation, tiny_model, capsys):
    save_tuned(tmp_path, "leak.pth", tiny_model, train_ids=["test0a", "x"], val_ids=["test1c"])
    assert evaluation(checkpoints="a.pth leak.pth") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "leak.pth: was trained or validated on 2 of the 7 test people: test0a, test1c" in line
    assert not (tmp_path / "out").exists()
    assert evaluation("--allow_overlap", "a.pth leak.pth") == 0
    assert "OVERLAP: leak has seen 2 of the test people" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "leak" / "metrics.json").read_text())["overlap"] == ["test0a", "test1c"]
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["checkpoints"]
    assert [row["overlap"] for row in rows] == [[], ["test0a", "test1c"]]
    assert ",2," in (tmp_path / "out" / "comparison.csv").read_text().splitlines()[2]


def test_test_crops_do_not_go_among_the_training_crops(tmp_path, tiny_model, capsys):
    write_photos(tmp_path, 2, 2, seed=1)
    save_tuned(tmp_path, "a.pth", tiny_model, aligned_folder=f"{tmp_path}/train", aligned_json=f"{tmp_path}/train.json")
    common = (
        f"--test_pairs {tmp_path}/pairs.json --id_to_images {tmp_path}/id_to_images.json --device cpu "
        f"--landmarks {tmp_path}/landmarks.json --checkpoints {tmp_path}/a.pth --output_dir {tmp_path}/out"
    )
    for folder, name, flag in (("train", "x.json", "--aligned_folder"), ("x", "train.json", "--aligned_json")):
        command = f"{common} --aligned_folder {tmp_path}/{folder} --aligned_json {tmp_path}/{name}"
        assert ev.main(command.split()) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert flag in line
        assert "was trained from there" in line
        assert not (tmp_path / folder).exists()


def test_folders_and_the_baseline(tmp_path, evaluation, tiny_model):
    (tmp_path / "models").mkdir()
    for name, share in (("two.pth", 10), ("one.pth", 100)):
        save_tuned(tmp_path / "models", name, tiny_model, train_percentage=share)
    (tmp_path / "models" / "notes.txt").write_text("x")
    assert evaluation(f"--baseline {tmp_path}/b.pth", "a.pth models b.pth") == 0
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert comparison["baseline"] == "b"
    assert [row["name"] for row in comparison["checkpoints"]] == ["b", "a", "one", "two"]
    assert comparison["chosen_by_validation"] == "one"


def test_flip_is_upstreams_fusion(tiny_model, evaluation, tmp_path):
    crops = torch.randint(0, 256, (3, 112, 112, 3), dtype=torch.uint8)
    x = net.to_input(crops)
    with torch.no_grad():
        (e, n), (f, m) = tiny_model(x), tiny_model(torch.flip(x, dims=[3]))
    fused = (torch.stack([e, f]) * torch.stack([n, m])).sum(0)
    expected = fused / torch.norm(fused, 2, 1, keepdim=True)
    got = ev.embed(tiny_model, crops, torch.device("cpu"), flip=True)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert evaluation("--flip") == 0
    assert json.loads((tmp_path / "out" / "a" / "metrics.json").read_text())["flip"] is True


def test_photographs_to_metrics(tmp_path, tiny_model):
    write_photos(tmp_path, 3, 2, seed=1)
    net.save_checkpoint(tmp_path / "a.pth", tiny_model)
    command = (
        f"--test_pairs {tmp_path}/pairs.json --id_to_images {tmp_path}/id_to_images.json --landmarks "
        f"{tmp_path}/landmarks.json --aligned_folder {tmp_path}/crops --aligned_json {tmp_path}/a.json --device cpu "
        f"--checkpoints {tmp_path}/a.pth --output_dir {tmp_path}/out --max_workers 2"
    )
    assert ev.main(command.split()) == 0
    assert json.loads((tmp_path / "out" / "a" / "metrics.json").read_text())["counts"]["images"] == 12


@pytest.mark.parametrize(
    ("flags", "checkpoints", "message"),
    [
        ("", "missing.pth", "missing.pth: no such checkpoint"),
        ("--test_pairs nothing.json", "a.pth", "nothing.json"),
        ("--aligned_json nothing.json", "a.pth", "nothing.json"),
        ("--device cuda:42", "a.pth", "cuda:42"),
        ("--batch_size 0", "a.pth", "--batch_size"),
        ("--seed x", "a.pth", "--seed"),
        ("", "test.json", "test.json: not a readable PyTorch checkpoint"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(evaluation, tmp_path, capsys, flags, checkpoints, message):
    assert evaluation(flags, checkpoints) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evaluate_twins.py: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_nothing_to_evaluate_is_said(tmp_path, evaluation, capsys):
    images = json.loads((tmp_path / "test.json").read_text())
    (tmp_path / "one.json").write_text(json.dumps({name: paths[:1] for name, paths in images.items()}))
    assert evaluation(f"--aligned_json {tmp_path}/one.json") == 2
    assert "no person has two images" in capsys.readouterr().err


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        ev.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flags = """test_pairs id_to_images aligned_folder aligned_json checkpoints output_dir skip_alignment landmarks
        realign max_workers device batch_size seed baseline flip allow_overlap"""
    assert all(f"  --{flag} " in text or f"  --{flag}\n" in text for flag in flags.split())
