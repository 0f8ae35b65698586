import contextlib
import csv
import io
import itertools
import json
import math
import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve

import evaluate_twins as ev
import net
from tests.conftest import crop_writer
from tests.synthetic import write_photos
from triplet_dataset import TwinImages

FAR, GENERAL = ("0.01", "0.001", "0.0001"), ("0.001", "0.0001")
CPU = torch.device("cpu")

# ---- metrics --------------------------------------------------------------------------------------------------------


def rate(scores, accepted):
    return Fraction(int(accepted(scores).sum()), len(scores))


def brute_force(genuine, twin, general):
    """The metrics by the words of DESIGN.md: every threshold tried, every pair compared, rates as fractions."""
    genuine, twin, general = map(np.asarray, (genuine, twin, general))
    found = dict.fromkeys(ev.METRICS, math.nan)

    def auc(impostor):
        wins = (genuine[:, None] > impostor).sum() + (genuine[:, None] == impostor).sum() / 2
        return wins / (len(genuine) * len(impostor))

    if len(genuine) and len(twin):
        rows = []
        for t in [*sorted({*genuine, *twin}), math.inf]:
            fmr, fnmr = rate(twin, lambda s: s >= t), rate(genuine, lambda s: s < t)  # noqa: B023
            right = (1 - fnmr) * len(genuine) + (1 - fmr) * len(twin)
            rows.append((abs(fmr - fnmr), t, fmr, fnmr, right / (len(genuine) + len(twin))))
        _, t, fmr, fnmr, right = min(rows)
        found |= {"eer": (fmr + fnmr) / 2, "eer_threshold": t, "accuracy_at_eer": right, "auc": auc(twin)}
        found["best_accuracy"] = max(row[4] for row in rows)
        for far in FAR:
            found[f"tar_at_far_{far}"] = max(1 - fnmr for _, _, fmr, fnmr, _ in rows if fmr <= Fraction(far))
    if len(genuine) and len(general):
        found["general_auc"] = auc(general)
    for far in GENERAL if len(genuine) and len(twin) and len(general) else ():
        above = np.nextafter(np.unique(general), np.inf)  # the general FMR changes there and nowhere else
        t = next(t for t in above if rate(general, lambda s: s >= t) <= Fraction(far))  # noqa: B023
        found[f"general_threshold_{far}"] = t
        found[f"twin_fmr_{far}"] = rate(twin, lambda s: s >= t)  # noqa: B023
        found[f"fnmr_{far}"] = rate(genuine, lambda s: s < t)  # noqa: B023
    return {name: float(value) for name, value in found.items()}


def metrics_of(genuine, twin, general=()):
    """{name: float} of scores of which each counts once."""
    pairs = [ev.Pairs(np.asarray(s, float), np.zeros(len(s), int)) for s in (genuine, twin, general)]
    return {name: values[0] for name, values in ev.verification_metrics(*pairs, np.array([[1]])).items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name


CASES = {
    "random": lambda r: (r.normal(0.5, 0.2, 60), r.normal(0.3, 0.2, 200), r.normal(0, 0.2, 1000)),
    "many ties": lambda r: (r.integers(3, 9, 80) / 10, r.integers(0, 7, 100) / 10, r.integers(-5, 5, 2000) / 10),
    "all equal": lambda r: (np.full(5, 0.5), np.full(7, 0.5), np.full(9, 0.5)),
    "separated": lambda r: ([0.8, 0.9], [0.3, 0.2, 0.1], [0.0, -0.1]),
    "inverted": lambda r: ([0.1, 0.2], [0.8, 0.9], [1.0]),
    "one each": lambda r: ([0.4], [0.6], [0.5]),
    "one genuine": lambda r: ([0.4], r.normal(0.3, 0.2, 1000), r.normal(0, 0.2, 999)),
    "no general": lambda r: (r.normal(0, 1, 3), r.normal(0.2, 1, 99), []),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(2))
def test_metrics_equal_brute_force(case, seed):
    scores = CASES[case](np.random.default_rng(seed))
    assert_same(metrics_of(*scores), brute_force(*scores))


@pytest.mark.parametrize("decimals", [15, 2])
def test_metrics_equal_scikit_learns(decimals):
    rng = np.random.default_rng(1)
    sizes = ((0.5, 3000), (0.2, 12000), (0.0, 20000))
    genuine, twin, general = (rng.normal(mean, 0.2, n).round(decimals) for mean, n in sizes)
    got = metrics_of(genuine, twin, general)
    truth, scores = np.r_[np.ones(3000), np.zeros(12000)], np.r_[genuine, twin]
    fpr, tpr, thresholds = roc_curve(truth, scores, drop_intermediate=False)
    assert got["auc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
    for far in FAR:
        assert got[f"tar_at_far_{far}"] == pytest.approx(tpr[fpr <= float(far)].max(), abs=1e-9)
    gap = np.abs(fpr - (1 - tpr))
    at = np.flatnonzero(gap <= gap.min() + 1e-12)[-1]  # scikit-learn's thresholds descend: the last is the lowest
    assert got["eer"] == pytest.approx((fpr[at] + 1 - tpr[at]) / 2, abs=1e-9)
    assert got["eer_threshold"] == thresholds[at]
    truth, scores = np.r_[np.ones(3000), np.zeros(20000)], np.r_[genuine, general]
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert got["general_auc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
    for far in GENERAL:
        assert got[f"fnmr_{far}"] == pytest.approx(1 - tpr[fpr <= float(far)].max(), abs=1e-9)


def test_metrics_of_a_case_worked_out_by_hand():
    # thresholds 1 2 3 4 5 6: FMR 1 3/4 2/4 1/4 0 0; FNMR 0 0 1/3 1/3 1/3 2/3 -> |difference| least at 4 (1/12).
    got = metrics_of([2, 5, 6], [1, 2, 3, 4], [0, 2, 5])
    assert got["eer_threshold"] == 4
    assert got["eer"] == pytest.approx((1 / 4 + 1 / 3) / 2)
    assert got["auc"] == pytest.approx((1.5 + 4 + 4) / 12)
    assert got["best_accuracy"] == pytest.approx(6 / 7)
    assert got["accuracy_at_eer"] == pytest.approx(5 / 7)
    assert got["tar_at_far_0.01"] == pytest.approx(2 / 3)
    assert got["general_auc"] == pytest.approx((1.5 + 2.5 + 3) / 9)
    assert got["general_threshold_0.001"] == np.nextafter(5, 6)  # none of the three may be accepted
    assert (got["twin_fmr_0.001"], got["fnmr_0.001"]) == (0, pytest.approx(2 / 3))


@pytest.mark.parametrize("decimals", [1, 12])
def test_general_threshold_is_the_lowest_with_that_rate(decimals):
    general = np.random.default_rng(0).normal(0, 1, 30_000).round(decimals)
    got = metrics_of([1.0], [0.5], general)
    for far in GENERAL:
        t = got[f"general_threshold_{far}"]
        assert np.mean(general >= t) <= float(far) < np.mean(general >= np.nextafter(t, -np.inf))


# ---- image pairs ----------------------------------------------------------------------------------------------------


def people(*families):
    """TwinImages of families given as images per person: people((3, 2), (2, 2, 2))."""
    named = [{f"{f}{chr(97 + i)}": n for i, n in enumerate(sizes)} for f, sizes in enumerate(families)]
    images = {name: [f"/{name}/{i}" for i in range(n)] for family in named for name, n in family.items()}
    return TwinImages(images, [pair for family in named for pair in itertools.combinations(family, 2)])


def kind_of(images, i, j):
    """What the pair of images i and j is, by the people's names; None for siblings that are no pair."""
    a, b = (images.ids[images.person[k]] for k in (i, j))
    twins = {frozenset((images.ids[x], images.ids[y])) for x, y in images.pairs}
    apart = images.family[i] != images.family[j]
    return "genuine" if a == b else "twin" if {a, b} in twins else "general" if apart else None


def test_image_pairs_equal_brute_force():
    names = {name: [f"/{name}/{i}" for i in range(n)] for name, n in zip("abcdefgh", (3, 2, 1, 0, 4, 2, 0, 0))}
    pairs = [("a", "b"), ("b", "c"), ("a", "c"), ("d", "e"), ("e", "f"), ("g", "h")]  # d and f are no pair
    images = TwinImages(names, pairs)
    evaluator = ev.TwinEvaluator(images)
    expected = {"genuine": set(), "twin": set(), "general": set(), None: set()}
    for i, j in itertools.combinations(range(len(images.paths)), 2):
        expected[kind_of(images, i, j)].add((i, j))
    for kind, rows in evaluator.rows.items():
        assert len(rows) == len(expected[kind]) == evaluator.counts[kind]
        assert {tuple(sorted(row)) for row in rows.tolist()} == expected[kind]
    assert not evaluator.drawn
    assert (evaluator.counts["images"], evaluator.counts["families"]) == (12, 2)  # the third has no image


def test_of_too_many_general_pairs_an_even_share_is_drawn_by_the_seed(monkeypatch):
    images = people(*[(2, 2)] * 500)
    monkeypatch.setattr(ev, "GENERAL_PAIRS", 50_000)
    evaluator, again, other = (ev.TwinEvaluator(images, seed, 1) for seed in (1, 1, 2))
    rows = evaluator.rows["general"]
    assert evaluator.drawn
    assert len(rows) == 50_000
    assert evaluator.counts["general"] == 2000 * 1996 // 2
    assert (images.family[rows[:, 0]] != images.family[rows[:, 1]]).all()
    met = np.bincount(rows.ravel(), minlength=2000)
    assert met.var() < 1.2 * met.mean()  # as of independent draws
    np.testing.assert_array_equal(rows, again.rows["general"])
    assert not np.array_equal(rows, other.rows["general"])


def test_scores_are_cosines_of_the_rows():
    evaluator = ev.TwinEvaluator(people((3, 2), (2, 2), (1, 4)))
    embeddings = torch.nn.functional.normalize(torch.randn(14, 512))
    for chunk in (5, 1 << 16):
        for kind, scores in evaluator.score(embeddings, chunk).items():
            expected = [float(embeddings[i].double() @ embeddings[j].double()) for i, j in evaluator.rows[kind]]
            np.testing.assert_allclose(scores, expected, atol=1e-6)


@pytest.mark.parametrize(("one", "other", "known"), [((9, 11), (1, 1), False), ((10, 10), (1, 1), True)])
def test_a_rate_needs_as_many_twin_pairs_as_resolve_it(one, other, known):
    evaluator = ev.TwinEvaluator(people(one, other[:1] + (0,)), resamples=1)  # 99 and 100 twin pairs
    figures = evaluator.figures({kind: np.linspace(0, 1, len(rows)) for kind, rows in evaluator.rows.items()})
    assert (figures["tar_at_far_0.01"] is not None) is known
    assert figures["tar_at_far_0.001"] is None


@pytest.mark.parametrize(("one", "other", "known"), [((13, 14), (18, 19), False), ((12, 13), (20, 20), True)])
def test_a_rate_needs_as_many_general_pairs_as_resolve_it(one, other, known):
    evaluator = ev.TwinEvaluator(people(one, other), resamples=1)  # 999 and 1,000 general pairs
    figures = evaluator.figures({kind: np.linspace(0, 1, len(rows)) for kind, rows in evaluator.rows.items()})
    for name in ("general_threshold", "twin_fmr", "fnmr"):
        assert (figures[f"{name}_0.001"] is not None) is known
        assert figures[f"{name}_0.0001"] is None
    assert figures["general_auc"] is not None


def test_one_family_has_no_general_figures():
    evaluator = ev.TwinEvaluator(people((3, 3)))
    figures = evaluator.figures(evaluator.score(torch.nn.functional.normalize(torch.randn(6, 512))))
    assert {name for name, value in figures.items() if value is None} >= {"general_auc", "fnmr_0.001", "twin_fmr_0.001"}
    assert None not in [figures[name] for name in ("eer", "auc", "best_accuracy")]


# ---- the bootstrap --------------------------------------------------------------------------------------------------


def random_case(families, seed, decimals, resamples=10):
    """(evaluator, (N, N) symmetric scores of all images, the same by kind as TwinEvaluator.score gives them)."""
    rng = np.random.default_rng(seed)
    evaluator = ev.TwinEvaluator(people(*rng.integers(1, 4, (families, 2)), (3, 2, 2)), seed, resamples)
    vectors = rng.normal(0, 1, (len(evaluator.family), 5)) + 2 * rng.normal(0, 1, (families + 1, 5))[evaluator.family]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    matrix = (vectors @ vectors.T).round(decimals)
    return evaluator, matrix, {kind: matrix[tuple(rows.T)] for kind, rows in evaluator.rows.items()}


def copied(evaluator, matrix, weighting):
    """The metrics of a data set in which family f is there weighting[f] times, its copies being no strangers."""
    images, scores = evaluator.images, {"genuine": [], "twin": [], "general": [], None: []}
    copies = [(i, c) for i, f in enumerate(evaluator.family) for c in range(weighting[f])]
    for (i, c), (j, d) in itertools.combinations(copies, 2):
        kind = kind_of(images, i, j)
        if kind == "general" or c == d:
            scores[kind].append(matrix[i, j])
    del scores[None]
    return brute_force(**scores)


@pytest.mark.parametrize("decimals", [1, 15])
@pytest.mark.parametrize("seed", range(2))
def test_a_resample_equals_copying_the_families(seed, decimals):
    evaluator, matrix, scores = random_case(5, seed, decimals)
    samples = evaluator.estimate(scores).samples
    assert (evaluator.weights.sum(1) == 6).all()
    for r, weighting in enumerate(evaluator.weights):
        assert_same({name: values[r] for name, values in samples.items()}, copied(evaluator, matrix, weighting))
    once = metrics_of(**scores)
    for name, value in evaluator.figures(scores).items():
        assert value is None or value == once[name]


@pytest.mark.parametrize("families", [1, 2])
def test_a_weighting_without_pairs_of_a_kind_gives_no_number(families):
    """One family alone has no general pairs, however often it counts; none at all has no pairs."""
    evaluator, matrix, scores = random_case(families, 0, 15)
    first, second = evaluator.family[evaluator.rows["general"]].T
    pairs = [ev.Pairs(scores[kind], evaluator.family[evaluator.rows[kind][:, 0]]) for kind in ("genuine", "twin")]
    pairs.append(ev.Pairs(scores["general"], first * (families + 1) + second))
    weightings = np.array([*itertools.product(range(3), repeat=families + 1)])
    got = ev.verification_metrics(*pairs, weightings)
    for r, weighting in enumerate(weightings):
        assert_same({name: values[r] for name, values in got.items()}, copied(evaluator, matrix, weighting))
        alone = (weighting > 0).sum() < 2
        for name in ("general_auc", *(f"{n}_{far}" for n in ("general_threshold", "twin_fmr", "fnmr") for far in GENERAL)):
            assert np.isnan(got[name][r]) or not alone


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """AUC of genuine ~ N(1, 1) against twin ~ N(0, 1), one of each a family: true AUC is Phi(1 / sqrt(2)) = 0.7602."""
    inside, none = 0, ev.Pairs(np.zeros(0), np.zeros(0, int))
    for seed in range(100):
        rng = np.random.default_rng(seed)
        genuine, twin = (ev.Pairs(rng.normal(mean, 1, 40), np.arange(40)) for mean in (1, 0))
        weights = rng.multinomial(40, np.full(40, 1 / 40), 200)
        low, high = ev.interval(ev.verification_metrics(genuine, twin, none, weights)["auc"])
        inside += low <= 0.7602 <= high
    assert 0.87 < inside / 100 < 0.99


def test_fewer_than_six_families_give_no_interval_and_no_verdict():
    for families, known in ((4, False), (5, True)):  # and the one of three people
        evaluator, _, scores = random_case(families, 0, 15)
        start = evaluator.estimate(scores)
        other = evaluator.estimate({kind: np.sqrt(1 + values) for kind, values in scores.items()})
        entry = ev.compare(other, start)["auc"]
        assert entry["value"] is not None
        assert (entry["interval"] is not None) is (entry["difference_interval"] is not None) is known
        assert entry["verdict"] == ("not distinguishable" if known else "too few families to say")


def estimate(noise=None, **figures):
    """An Estimate whose resamples are the figure plus `noise`."""
    noise = np.linspace(-0.1, 0.1, 41) if noise is None else noise
    samples = {name: np.full(41, np.nan) if value is None else value + noise for name, value in figures.items()}
    return ev.Estimate(figures, samples)


def test_differences_are_paired_and_know_which_way_is_better():
    higher = ("auc", "general_auc", "best_accuracy", "accuracy_at_eer", "tar_at_far_0.01")
    lower = ("eer", "twin_fmr_0.001", "fnmr_0.0001")
    thresholds = ("eer_threshold", "general_threshold_0.001")
    names = (*higher, *lower, *thresholds)
    start = estimate(**dict.fromkeys(names, 0.5))
    for step, verdicts in ((0.01, ("better", "worse")), (-0.01, ("worse", "better")), (0, ["not distinguishable"] * 2)):
        got = ev.compare(estimate(**dict.fromkeys(names, 0.5 + step)), start)  # noise in common cancels
        for name in names:
            verdict = None if name in thresholds else verdicts[name in lower]
            assert got[name]["verdict"] == verdict
            assert got[name]["difference"] == pytest.approx(step)
            assert got[name]["difference_interval"] == pytest.approx([step, step])
    unrelated = estimate(np.linspace(0.1, -0.1, 41), **dict.fromkeys(names, 0.51))
    assert ev.compare(unrelated, start)["auc"]["verdict"] == "not distinguishable"
    assert ev.compare(start)["auc"] == {"value": 0.5, "interval": pytest.approx([0.405, 0.595])}


def test_a_figure_that_does_not_exist_is_not_measured():
    for value, start in ((None, 0.5), (0.5, None), (None, None)):
        entry = ev.compare(estimate(eer=value), estimate(eer=start))["eer"]
        assert entry["verdict"] == "not measured"
        assert entry["difference"] is entry["difference_interval"] is None
    assert ev.interval(np.full(9, np.nan)) is None


def test_a_comparison_in_words():
    start, other = estimate(auc=0.8, general_auc=0.9), estimate(auc=0.81, general_auc=0.895)
    assert ev.describe(ev.compare(other, start)) == (
        "better on twins (AUC +0.0100 [+0.0100, +0.0100]), worse on everyone else (AUC -0.0050 [-0.0050, -0.0050])"
    )
    few = [e._replace(samples=None, figures=e.figures | {"general_auc": None}) for e in (other, start)]
    expected = "too few families to say on twins (AUC +0.0100), not measured on everyone else"
    assert ev.describe(ev.compare(*few)) == expected


# ---- embeddings -----------------------------------------------------------------------------------------------------


@pytest.fixture
def crops():
    return torch.randint(0, 256, (7, 112, 112, 3), dtype=torch.uint8)


def test_embeddings_do_not_depend_on_the_batch_and_are_full_float32(tiny_model, crops):
    small, whole = (net.embed([tiny_model], crops, CPU, size)[0] for size in (2, 7))
    torch.testing.assert_close(small, whole, atol=1e-5, rtol=0)
    assert whole.dtype == torch.float32
    with torch.no_grad():
        exact = tiny_model.double().features(net.to_input(crops).double())
        exact = torch.nn.functional.normalize(tiny_model.output_layer(exact))
    torch.testing.assert_close(whole.double(), exact, atol=1e-5, rtol=0)  # half precision is off by 1e-3


def test_flip_is_upstreams_fusion(tiny_model, crops):
    x = net.to_input(crops)
    with torch.no_grad():
        (e, n), (f, m) = tiny_model(x), tiny_model(torch.flip(x, dims=[3]))
    fused = (torch.stack([e, f]) * torch.stack([n, m])).sum(0)
    expected = fused / torch.norm(fused, 2, 1, keepdim=True)
    torch.testing.assert_close(net.embed([tiny_model], crops, CPU, flip=True)[0], expected, atol=1e-6, rtol=0)


def variant(model, seed=1):
    """A copy of a network with another embedding layer."""
    other = net.build_model("ir_tiny").eval()
    other.load_state_dict(model.state_dict())
    other.output_layer[3].weight.data += 0.02 * torch.randn(512, 32 * 49, generator=torch.manual_seed(seed))
    return other


@pytest.mark.parametrize("flip", [False, True])
def test_networks_of_one_backbone_run_it_once_per_image(tiny_model, crops, flip):
    models, seen = [tiny_model, variant(tiny_model)], [0, 0]
    alone = [net.embed([model], crops, CPU, 3, flip=flip)[0] for model in models]
    for number, model in enumerate(models):

        def count(module, inputs, output, number=number):
            seen[number] += len(output)

        model.body.register_forward_hook(count)
    together = net.embed(models, crops, CPU, 3, flip=flip)
    assert seen == [len(crops) * (1 + flip), 0]
    assert not torch.allclose(*together, atol=1e-3)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


DEAD = {"overflow": (1e38, None, "norm"), "zeros": (0, 0.0, "norm"), "all equal": (0, 0.3, "fallen together")}


@pytest.mark.parametrize("kind", DEAD)
def test_dead_networks_are_refused(tiny_model, crops, kind):
    scale, mean, reason = DEAD[kind]
    tiny_model.output_layer[3].weight.data *= scale
    if mean is not None:
        tiny_model.output_layer[4].running_mean.fill_(mean)
    with pytest.raises(net.InputError, match=reason):
        net.embed([variant(net.build_model("ir_tiny").eval()), tiny_model], crops, CPU)


# ---- a whole evaluation ---------------------------------------------------------------------------------------------

FAMILIES = [[4, 4], [3, 3, 2], [4, 3], [4, 4], [4, 3], [3, 4], [5, 4], [3, 0]]
PICTURES = ("roc_curve.png", "det_curve.png", "score_distributions.png", "hardest_pairs.png")
NAMES = ["start", "a+1", "b", "leak", "a+2"]


def write_checkpoints(folder, model):
    """start.ckpt as upstream writes it; in models/ three that training wrote; other/a.pth of the same stem as one."""
    torch.save({"state_dict": {f"model.{key}": value for key, value in model.state_dict().items()}}, folder / "start.ckpt")
    for number, (name, share) in enumerate((("models/a", 10), ("models/b", 100), ("models/leak", 50), ("other/a", 10))):
        config = {"train_ids": ["x"], "val_ids": ["y", "z"], "train_percentage": share, "margin": 0.3}
        config |= {"freeze_backbone": True, "n_touched_images": 9 * share}
        if name == "models/leak":
            config |= {"train_ids": ["test0a", "x"], "val_ids": ["z", "y", "test1c"]}
        facts = {"config": config, "metrics": {"val_auc": 0.9 - 0.1 * number}}
        net.save_checkpoint(folder / f"{name}.pth", variant(model, number), **facts)


def run(folder, flags, *checkpoints, data="test"):
    """(exit code, stdout, stderr) of an evaluation of the crops of `data` with a checkpoint in `folder`."""
    command = ["--test_pairs", f"{folder}/{data}_pairs.json", "--skip_alignment", "--aligned_json", f"{folder}/{data}.json"]
    command += ["--output_dir", f"{folder}/out", "--device", "cpu", *flags.split()]
    command += ["--checkpoints", *(str(folder / name) for name in checkpoints)]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = ev.main(command)
    return code, out.getvalue(), err.getvalue()
