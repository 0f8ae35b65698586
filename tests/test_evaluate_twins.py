import csv
import json
import re
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve

import evaluate_twins as ev
import net
from tests.conftest import EVALUATED, SEEN, START_THRESHOLDS, tuned, variant
from tests.reference import brute_force, kind_of, people
from tests.synthetic import write_photos
from triplet_dataset import TwinImages

CPU = torch.device("cpu")


def metrics_of(genuine, twin, general=()):
    """{name: float} of scores each of which counts once."""
    pairs = [ev.Pairs(np.asarray(s, float), np.zeros(len(s), int)) for s in (genuine, twin, general)]
    return {name: values[0] for name, values in ev.verification_metrics(*pairs, np.array([[1]])).items()}


CASES = {
    "random": lambda r: (r.normal(0.5, 0.2, 60), r.normal(0.3, 0.2, 1000), r.normal(0, 0.2, 999)),
    "many ties": lambda r: (r.integers(3, 9, 80) / 10, r.integers(0, 7, 100) / 10, r.integers(-5, 5, 2000) / 10),
    "all equal": lambda r: (np.full(5, 0.5), np.full(7, 0.5), np.full(9, 0.5)),
    "separated": lambda r: ([0.8, 0.9], [0.3, 0.2, 0.1], [0.0, -0.1]),
    "one each, inverted": lambda r: ([0.4], [0.6], [0.5]),
    "no general": lambda r: (r.normal(0, 1, 1), r.normal(0.2, 1, 99), []),
}


@pytest.mark.parametrize("case", CASES)
def test_metrics_equal_brute_force(case):
    scores = CASES[case](np.random.default_rng(0))
    assert metrics_of(*scores) == pytest.approx(brute_force(*scores), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("decimals", [15, 2])
def test_metrics_equal_scikit_learns(decimals):
    rng = np.random.default_rng(1)
    scores = [rng.normal(mean, 0.2, n).round(decimals) for mean, n in ((0.5, 3000), (0.2, 12000), (0.0, 20000))]
    got, curves = metrics_of(*scores), {}
    for name, impostor in (("auc", scores[1]), ("general_auc", scores[2])):
        truth, both = np.r_[np.ones(3000), np.zeros(len(impostor))], np.r_[scores[0], impostor]
        curves[name] = roc_curve(truth, both, drop_intermediate=False)
        assert got[name] == pytest.approx(roc_auc_score(truth, both), abs=1e-9)
    fpr, tpr, thresholds = curves["auc"]
    assert got["tar_at_far_0.01"] == pytest.approx(tpr[fpr <= 0.01].max(), abs=1e-9)
    gap = np.abs(fpr - (1 - tpr))
    at = np.flatnonzero(gap <= gap.min() + 1e-12)[-1]  # scikit-learn's thresholds descend: the last is the lowest
    assert (got["eer"], got["eer_threshold"]) == pytest.approx(((fpr[at] + 1 - tpr[at]) / 2, thresholds[at]), abs=1e-9)
    fpr, tpr, _ = curves["general_auc"]
    for far in (0.001, 0.0001):
        t = got[f"general_threshold_{far:g}"]  # the lowest with that rate
        assert np.mean(scores[2] >= t) <= far < np.mean(scores[2] >= np.nextafter(t, -np.inf))
        assert got[f"fnmr_{far:g}"] == pytest.approx(1 - tpr[fpr <= far].max(), abs=1e-9)


def test_metrics_of_a_case_worked_out_by_hand():
    # thresholds 1 2 3 4 5 6: FMR 1 3/4 2/4 1/4 0 0; FNMR 0 0 1/3 1/3 1/3 2/3 -> |difference| least at 4 (1/12).
    got = metrics_of([2, 5, 6], [1, 2, 3, 4], [0, 2, 5])
    expected = {"eer_threshold": 4, "eer": (1 / 4 + 1 / 3) / 2, "auc": (1.5 + 4 + 4) / 12, "best_accuracy": 6 / 7}
    expected |= {"accuracy_at_eer": 5 / 7, "tar_at_far_0.01": 2 / 3, "general_auc": (1.5 + 2.5 + 3) / 9}
    expected |= {"twin_fmr_0.001": 0, "fnmr_0.001": 2 / 3}
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    assert got["general_threshold_0.001"] == np.nextafter(5, 6)  # none of the three may be accepted


def test_image_pairs_equal_brute_force():
    sizes = {"a": 3, "b": 2, "c": 1, "d": 0, "e": 4, "f": 2, "g": 0, "h": 0}
    pairs = [("a", "b"), ("b", "c"), ("a", "c"), ("d", "e"), ("e", "f"), ("g", "h")]  # d and f are no pair
    images = TwinImages({name: [f"/{name}/{i}" for i in range(n)] for name, n in sizes.items()}, pairs)
    evaluator, expected = ev.TwinEvaluator(images), {}
    for i, j in combinations(range(len(images.paths)), 2):
        expected.setdefault(kind_of(images, i, j), set()).add((i, j))
    for kind, rows in evaluator.rows.items():
        assert len(rows) == len(expected[kind]) == evaluator.counts[kind]
        assert {tuple(sorted(row)) for row in rows.tolist()} == expected[kind]
    assert (evaluator.counts["families"], evaluator.drawn) == (2, False)  # g and h have no image


def test_of_too_many_general_pairs_an_even_share_is_drawn_by_the_seed(monkeypatch):
    images = people(*[(2, 2)] * 500)
    monkeypatch.setattr(ev, "GENERAL_PAIRS", 50_000)
    evaluator, again, other = (ev.TwinEvaluator(images, seed, 1) for seed in (1, 1, 2))
    rows = evaluator.rows["general"]
    assert (evaluator.drawn, len(rows), evaluator.counts["general"]) == (True, 50_000, 2000 * 1996 // 2)
    assert (images.family[rows[:, 0]] != images.family[rows[:, 1]]).all()
    met = np.bincount(rows.ravel(), minlength=2000)
    assert met.var() < 1.2 * met.mean()  # as of independent draws
    assert [np.array_equal(rows, one.rows["general"]) for one in (again, other)] == [True, False]


def test_rates_are_null_just_below_what_the_pairs_resolve():
    """99 and 100 twin pairs, 999 and 1,000 general pairs; one family has no general pairs at all."""
    twin, general = ["tar_at_far_0.01"], [f"{name}_0.001" for name in ("general_threshold", "twin_fmr", "fnmr")]
    both = ((9, 11),), ((10, 10),), ((13, 14), (18, 19)), ((12, 13), (20, 20))
    for names, families in ((twin, both[:2]), (general, both[2:])):
        for known, sizes in enumerate(families):
            evaluator = ev.TwinEvaluator(people(*sizes), resamples=1)
            got = evaluator.figures({kind: np.linspace(0, 1, len(rows)) for kind, rows in evaluator.rows.items()})
            assert {got[name] is not None for name in names} == {bool(known)}
            assert got["tar_at_far_0.0001"] is got["twin_fmr_0.0001"] is None
            assert (got["general_auc"] is not None) is (len(sizes) > 1)


def random_case(families, decimals):
    """(evaluator, (N, N) scores of all images, the same by kind as TwinEvaluator.score gives them)."""
    rng = np.random.default_rng(families)
    evaluator = ev.TwinEvaluator(people(*rng.integers(1, 4, (families - 1, 2)), (3, 2, 2)), 0, 10)
    matrix = rng.normal(0, 1, (len(evaluator.family), len(evaluator.family))).round(decimals)
    matrix += matrix.T
    return evaluator, matrix, {kind: matrix[tuple(rows.T)] for kind, rows in evaluator.rows.items()}


def copied(evaluator, matrix, weighting):
    """The metrics of a data set in which family f is there weighting[f] times, its copies being no strangers."""
    scores = {"genuine": [], "twin": [], "general": []}
    copies = [(i, copy) for i, f in enumerate(evaluator.family) for copy in range(weighting[f])]
    for (i, copy), (j, other) in combinations(copies, 2):
        kind = kind_of(evaluator.images, i, j)
        if kind == "general" or copy == other:
            scores[kind].append(matrix[i, j])
    return brute_force(**scores, scores=[matrix[i, j] for x in ("genuine", "twin") for i, j in evaluator.rows[x]])


@pytest.mark.parametrize("decimals", [1, 15])
@pytest.mark.parametrize("families", [2, 3, 7])
def test_a_resample_equals_copying_the_families_and_makes_no_number_up(families, decimals):
    """One family has no general pairs, however often it counts: no threshold, nor rates at it (NaN there and here)."""
    evaluator, matrix, scores = random_case(families, decimals)
    codes = {kind: evaluator.family[rows[:, 0]] for kind, rows in evaluator.rows.items()}
    codes["general"] = codes["general"] * families + evaluator.family[evaluator.rows["general"][:, 1]]
    weightings = evaluator.weights if families > 3 else np.array([*product(range(3), repeat=families)])
    got = ev.verification_metrics(*(ev.Pairs(scores[kind], code) for kind, code in codes.items()), weightings)
    for r, weighting in enumerate(weightings):
        expected = pytest.approx(copied(evaluator, matrix, weighting), abs=1e-12, nan_ok=True)
        assert {name: values[r] for name, values in got.items()} == expected
    assert (evaluator.weights.sum(1) == families).all()
    if families > 3:
        np.testing.assert_equal(evaluator.estimate(scores).samples, got)


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


def estimate(noise=1, **figures):
    """An Estimate whose resamples scatter by 0.1 about the figure, all in step unless `noise` is -1."""
    samples = {name: (np.nan if x is None else x) + noise * np.linspace(-0.1, 0.1, 41) for name, x in figures.items()}
    return ev.Estimate(figures, samples)


def test_differences_are_paired_and_know_which_way_is_better():
    higher = dict.fromkeys(("auc", "general_auc", "best_accuracy", "accuracy_at_eer", "tar_at_far_0.01"), 0.5)
    lower = dict.fromkeys(("eer", "twin_fmr_0.001", "fnmr_0.0001"), 0.5)
    start = estimate(**higher, **lower, eer_threshold=0.5)
    for step, verdicts in ((0.01, ("better", "worse")), (-0.01, ("worse", "better")), (0, ["not distinguishable"] * 2)):
        got = ev.compare([estimate(**{name: value + step for name, value in start.figures.items()})], start)
        for name, entry in got.items():  # the noise in common has cancelled
            assert entry["verdict"] == (None if "threshold" in name else verdicts[name in lower])
            assert [entry["difference"], *entry["difference_interval"]] == pytest.approx([step] * 3)
    assert ev.compare([estimate(-1, auc=0.51)], start)["auc"]["verdict"] == "not distinguishable"  # noise of its own
    assert ev.compare([start])["auc"] == {"value": 0.5, "interval": pytest.approx([0.405, 0.595])}


def test_fewer_than_six_families_and_figures_that_do_not_exist_give_no_interval_and_no_verdict():
    for families, verdict in ((5, "too few families to say"), (6, "not distinguishable")):
        evaluator, _, scores = random_case(families, 15)
        cubes = evaluator.estimate({kind: values**3 for kind, values in scores.items()})
        entry = ev.compare([cubes], evaluator.estimate(scores))["auc"]
        assert (entry["difference"], entry["verdict"]) == (0, verdict)  # AUC depends on the order alone
        assert {entry["interval"] is None, entry["difference_interval"] is None} == {families < 6}
    entry = ev.compare([estimate(auc=None)], estimate(auc=0.5))["auc"]
    assert list(entry.values()) == [None, None, None, None, "not measured"]


def test_a_comparison_in_words():
    start, other = estimate(auc=0.8, general_auc=0.9), estimate(auc=0.81, general_auc=0.895)
    words = "better on twins (AUC +0.0100 [+0.0100, +0.0100]), worse on everyone else (AUC -0.0050 [-0.0050, -0.0050])"
    assert ev.describe(ev.compare([other], start)) == words
    few = [ev.Estimate({"auc": value, "general_auc": None}, None) for value in (0.81, 0.8)]
    words = "too few families to say on twins (AUC +0.0100), not measured on everyone else"
    assert ev.describe(ev.compare(few[:1], few[1])) == words


@pytest.mark.parametrize("flip", [False, True])
def test_embeddings_are_upstreams_whatever_the_batch_and_a_common_backbone_runs_once(tiny_model, flip):
    """`flip`: upstream adds the embeddings of both mirror images, each times its norm. Here in double precision."""
    crops = torch.randint(0, 256, (5, 112, 112, 3), dtype=torch.uint8)
    models, x, seen = [tiny_model, variant(tiny_model, 1)], net.to_input(crops).double(), []
    got = [net.embed(models, crops, CPU, 5, flip=flip), [net.embed([m], crops, CPU, 3, flip=flip)[0] for m in models]]
    for model in models:
        model.body.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    net.embed(models, crops, CPU, 3, flip=flip)
    assert sum(seen) == len(crops) * (1 + flip)
    for number, model in enumerate(models):
        with torch.no_grad():
            sides = [model.double().output_layer(model.features(side)) for side in ((x, x.flip(3)) if flip else (x,))]
        expected = torch.nn.functional.normalize(sum(sides))
        for embeddings in got:
            assert embeddings[number].dtype == torch.float32  # and no half precision on the way, which is off by 1e-3
            torch.testing.assert_close(embeddings[number].double(), expected, atol=1e-5, rtol=0)


def test_dead_networks_are_refused(tiny_model):
    alive, crops = variant(tiny_model, 1), torch.randint(0, 256, (3, 112, 112, 3), dtype=torch.uint8)
    weight = tiny_model.output_layer[3].weight.data.clone()
    for scale, mean, reason in ((1e38, 0.3, "the norm"), (0, 0, "the norm"), (0, 0.3, "all embeddings have fallen")):
        tiny_model.output_layer[3].weight.data = scale * weight  # overflow, zeros, all equal
        tiny_model.output_layer[4].running_mean.fill_(mean)
        embeddings = net.embed([alive, tiny_model], crops, CPU)
        net.check_alive(embeddings[0], "alive.pth")
        with pytest.raises(net.InputError, match=rf"dead\.pth is dead: {reason}"):
            net.check_alive(embeddings[1], "dead.pth")


def test_files_agree_with_an_independent_evaluation(evaluated):
    images, metrics = evaluated.images, evaluated.metrics["b"]
    got = {name: entry["value"] for name, entry in metrics["figures"].items()}
    family = {path: name[:5] for name, paths in images.items() for path in paths}
    crops = np.stack([np.array(Image.open(evaluated.folder / path)) for path in family]).astype(np.float32)
    bgr = torch.from_numpy(((crops[..., ::-1] - 127.5) / 127.5).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        embedding = net.load_checkpoint(evaluated.folder / "models" / "b.pth")(bgr)[0].double().numpy()
    embedding = dict(zip(family, embedding, strict=True))
    assert list(evaluated.pairs[0]) == ["path_1", "path_2", "id_1", "id_2", "kind", "score", "accepted_at_eer"]
    found = {"genuine": [], "twin": []}
    for row in evaluated.pairs:
        score, first, second = float(row["score"]), row["path_1"], row["path_2"]
        assert {first, second} <= {*images[row["id_1"]], *images[row["id_2"]]}
        assert row["kind"] == ("genuine" if row["id_1"] == row["id_2"] else "twin")
        assert score == pytest.approx(embedding[first] @ embedding[second], abs=2e-6)
        assert row["accepted_at_eer"] == str(int(score >= got["eer_threshold"]))
        found[row["kind"]].append(score)
    general = [embedding[a] @ embedding[b] for a, b in combinations(family, 2) if family[a] != family[b]]
    counts = {kind: len(scores) for kind, scores in found.items()} | {"general": len(general), "families": 8}
    assert metrics["counts"] == counts | {"images": 57} == counts | {"images": 57, "genuine": 77, "twin": 109}
    assert metrics["general_pairs_drawn"] is metrics["flip"] is False
    assert sum(value is None for value in got.values()) == 6  # rates that so few pairs do not resolve
    applied = {"val_eer": 0.93, "val_general": 0.97}
    for name, value in brute_force(**found, general=general, applied=applied).items():
        assert got[name] is None or got[name] == pytest.approx(value, abs=1e-4), name
    for name, impostor in (("auc", found["twin"]), ("general_auc", general)):
        truth = [1] * len(found["genuine"]) + [0] * len(impostor)
        assert got[name] == pytest.approx(roc_auc_score(truth, found["genuine"] + impostor), abs=1e-4)
        assert sorted([got[name], *metrics["figures"][name]["interval"]])[1] == got[name]


def test_the_comparison_stands_in_json_csv_and_terminal_the_baseline_first(evaluated):
    start, said, table = evaluated.checkpoints[0], evaluated.said.getvalue(), evaluated.table
    rows = {(row["name"], row["figure"]): row for row in table}
    setting = {name: entry["name"] for entry in evaluated.settings for name in entry["checkpoints"]}
    assert len(table) == len(rows) == 5 * len(ev.METRICS)  # no two names alike
    assert evaluated.content["baseline"] == start["name"] == "start"
    for checkpoint, file in zip(evaluated.checkpoints, EVALUATED, strict=True):
        name, figures = checkpoint["name"], checkpoint["figures"]
        alone = evaluated.metrics[name]
        assert alone["checkpoint"] == checkpoint["checkpoint"] == str(evaluated.folder / file)
        assert alone["overlap"] == checkpoint["overlap"] == (SEEN if "leak" in file else [])
        for figure, entry in figures.items():
            assert {"value": entry["value"], "interval": entry["interval"]} == alone["figures"][figure]
            expected = {"overlap": len(checkpoint["overlap"]), "verdict": entry.get("verdict")}
            for key, bounds in (("value", "interval"), ("difference", "difference_interval")):
                low, high = entry.get(bounds) or (None, None)
                expected |= {key: entry.get(key), f"{key}_low": low, f"{key}_high": high}
            expected = {key: "" if x is None else str(x) for key, x in expected.items()}
            assert expected.items() <= rows[name, figure].items()
            if checkpoint is not start and entry["value"] is not None:
                assert entry["difference"] == entry["value"] - start["figures"][figure]["value"]
                assert "threshold" in figure or (low <= 0 <= high) is (entry["verdict"] == "not distinguishable")
        alike = [other for other in setting if setting[other] == setting[name]]
        if checkpoint is not start and len(alike) == 1:
            assert f"{setting[name]} ({name}) against start: {ev.describe(figures)}." in said
    assert "57 images of 17 people in 8 families, on cpu:" in said
    assert "warning: 1 images are the same as another of their ID; each is used once" in said
    assert "warning: 1 people have no crop; their pairs are not tested" in said
    assert "OVERLAP: leak has seen 2 of the test people" in said
    assert f"Validation would have chosen: {evaluated.content['chosen_by_validation']}" in said


def test_seeds_are_one_setting_with_mean_and_range_and_the_start_has_thresholds_from_epoch_0(evaluated, tmp_path):
    assert [setting["name"] for setting in evaluated.settings] == ["start", "10 %", "20 %", "30 %"]
    names = evaluated.settings[2]["checkpoints"]
    assert (names[0], names[1][:2], evaluated.content["chosen_by_validation"]) == ("b", "a+", "20 %")
    runs = [checkpoint["figures"] for checkpoint in evaluated.checkpoints if checkpoint["name"] in names]
    for name, entry in evaluated.settings[2]["figures"].items():
        values = [run[name]["value"] for run in runs]
        if None in values:  # at operating points: other/a.pth has none
            assert entry["value"] is entry["range"] is entry["difference"] is None
        else:
            assert [entry["value"], *entry["range"]] == pytest.approx([np.mean(values), min(values), max(values)])
            assert entry["difference"] == pytest.approx(np.mean([run[name]["difference"] for run in runs]))
    assert f"20 % ({', '.join(names)}) against start: " in evaluated.said.getvalue()
    pairs = [*csv.DictReader((evaluated.out / "start" / "pair_scores.csv").read_text().splitlines())]
    for point, (threshold, purpose) in ev.OPERATING_POINTS.items():
        t, figures = START_THRESHOLDS[f"val_{threshold}"], evaluated.settings[0]["figures"]
        for name, kind, at_least in (("twin_fmr", "twin", True), ("fnmr", "genuine", False)):
            wrong = [(float(row["score"]) >= t) is at_least for row in pairs if row["kind"] == kind]
            assert figures[f"{name}_{point}"]["value"] == pytest.approx(np.mean(wrong))
        rates = [figures[f"{rate}_{point}"] for rate in ("twin_fmr", "general_fmr", "fnmr")]
        spelt = ["{:.3g} [{:.3g}, {:.3g}]".format(*(100 * x for x in (r["value"], *r["interval"]))) for r in rates]
        words = "twin FMR {} %, general FMR {} %, FNMR {} %".format(*spelt)
        line = f"  start, at the threshold for {purpose} of its validation people: {words}."
        assert line in evaluated.said.getvalue().splitlines()
    net.save_checkpoint(tmp_path / "start.ckpt", net.build_model("ir_tiny"))
    here, there, known = str(evaluated.out.parent / "start.ckpt"), str(tmp_path / "start.ckpt"), {"val_eer": 0.5}
    for start, path, found in ((here, here, known), (here, there, {}), ("start.ckpt", here, known)):
        run = {"config": {"pretrained": start}, "start_metrics": {"val_eer_threshold": 0.5}}
        assert ev.validation_thresholds(path, {path: {}, "run.pth": run}) == found


def test_settings_are_told_apart_and_named_by_every_value_that_differs():
    def names(*configs):
        runs = [result(f"r{i}", {"config": tuned(**config)}, auc=0.8 + i / 10) for i, config in enumerate(configs)]
        return [setting.name for setting in ev.group_settings([result("start", auc=0.7), *runs])][1:]

    low, high = {"learning_rate": 1e-4}, {"learning_rate": 1e-3}
    assert names(low, high) == ["learning_rate 0.0001", "learning_rate 0.001"]
    both = ["full, learning_rate 0.0001", "frozen, learning_rate 0.001"]
    assert names({**low, "freeze_backbone": False}, high) == both
    assert names({"seed": 1}, {"seed": 2}) == ["mean of 2 seeds"]  # one setting, and nothing to tell it from
    assert names({"seed": 1}, {"seed": 1, "n_train_pairs": 9}) == ["r0", "r1"]  # such as two epochs of a run
    a, b = (result(name, {"config": tuned(seed=i)}, auc=0.8 + i / 100) for i, name in enumerate("ab"))
    start = result("start", auc=0.7)
    _, setting = ev.group_settings([start, a, b])
    entry, samples = setting.figures["auc"], [r.estimate.samples["auc"] for r in (start, a, b)]
    assert (entry["value"], entry["range"]) == (pytest.approx(0.805), [0.8, 0.81])
    paired = np.percentile((samples[1] + samples[2]) / 2 - samples[0], (2.5, 97.5))
    assert entry["difference_interval"] == pytest.approx([*paired])


def test_pictures_are_there_and_labelled_and_the_hardest_pairs_are_mistakes_the_worst_first(evaluated):
    each = ("roc_curve.png", "det_curve.png", "score_distributions.png", "hardest_pairs.png")
    common = {("out", "comparison.png"), ("out", "data_percentage.png")}
    assert set(evaluated.figures) == {*product(evaluated.metrics, each), *common}
    for (folder, name), figure in evaluated.figures.items():
        with Image.open(evaluated.out / ("" if folder == "out" else folder) / name) as picture:
            assert 0.002 < (np.asarray(picture.convert("L")) < 200).mean() < 0.9, name
        for axes in figure.axes if name != "hardest_pairs.png" else ():
            labels = [label.get_text() for label in axes.get_yticklabels()]
            below = figure.axes[-1] if name == "data_percentage.png" else axes  # panels with a common x axis
            assert all([figure.axes[0].get_title(), below.get_xlabel(), axes.get_ylabel() or all(labels)])
    grid = evaluated.figures["b", "hardest_pairs.png"].axes
    titles, headings = [axes.get_title() for axes in grid], [grid[0].get_title("left"), grid[8].get_title("left")]
    parts, often = (titles[:8], titles[8:]), []
    for kind, accepted, part, heading in zip(("twin", "genuine"), "10", parts, headings, strict=True):
        pairs = [row for row in evaluated.pairs if row["kind"] == kind]
        scores = [float(row["score"]) for row in pairs if row["accepted_at_eer"] == accepted]
        assert f": {len(scores)} of {len(pairs)} pairs" in heading
        for crop, times, of in re.findall(r"; (\S+) is in (\d+) of its (\d+): look at it", heading):
            its = [row for row in pairs if any(row[path].endswith(crop) for path in ("path_1", "path_2"))]
            mistakes = [row for row in its if row["accepted_at_eer"] == accepted]
            assert (len(mistakes), len(its)) == (int(times), int(of))
            often.append(crop)
        shown = [float(text) for text in re.findall(r"score (-?[\d.]+)", "\n".join(part))]
        assert shown == sorted(shown, reverse=kind == "twin")
        assert shown[0] == round(max(scores) if kind == "twin" else min(scores), 3)
        crops = [crop for title in part if title for crop in title.splitlines()[-1].split(" | ")]
        assert len(set(crops)) == len(crops) == 2 * len(shown)
    assert often


def result(name, facts=None, **figures):
    """A Result with these figures and none of the others."""
    said = [(facts or {}).get(key, {}) for key in ("config", "metrics")]
    return ev.Result(name, f"{name}.pth", *said, None, estimate(**dict.fromkeys(ev.METRICS) | figures), [])


def table_of(*results):
    """The lines of the terminal's table, the first result being the baseline."""
    settings = ev.group_settings(results)
    return ev.comparison_table(settings, ev.chosen_by_validation(settings)).splitlines()


def test_table_says_what_got_worse_and_what_validation_chose_of_those_that_share_its_people():
    first = result("first", eer=0.1, auc=0.8, best_accuracy=0.5, general_auc=0.9)
    lines = table_of(first, result("second", eer=0.2, auc=0.9, best_accuracy=0.5, general_auc=0.8))
    assert lines[1].split() == ["first", "10.00", "0.8000", "50.00", "-", "-", "-", "0.9000"]
    assert lines[2].split() == ["second", "20.00", "0.9000", "50.00", "-", "-", "-", "0.8000"]
    assert sum("got WORSE at recognising people in general" in line for line in lines) == 1
    assert "WORSE" not in "".join(table_of(first, result("second", general_auc=0.95)))
    assert lines[-1] == "Choosing by the figures above would be selection on the test set."
    validated = (("a", 0.8, "xy"), ("b", 0.9, "yx"), ("c", 1.0, "z"))
    a, b, c = (result(n, {"metrics": {"val_auc": x}, "config": tuned(val_ids=ids)}) for n, x, ids in validated)
    chosen = [ev.chosen_by_validation(ev.group_settings(few)) for few in ([first, b, a], [first, a, b, c], [first, a])]
    assert chosen == ["b", None, None]
    assert table_of(a, c)[-2] == "No common validation to choose by."


WRONG = {
    "no photographs listed": ("--checkpoints a.pth", "--id_to_images id_to_images.json: "),
    "no crops listed": ("--skip_alignment --checkpoints a.pth", "--aligned_json id_to_test_aligned_images.json: "),
    "no checkpoint in the folder": ("{test} --checkpoints empty", "empty: no file ending in .pth"),
    "no pairs": ("{test} --checkpoints a.pth --test_pairs none.json", "--test_pairs none.json: expected"),
    "no genuine pair": ("{test} --checkpoints a.pth --aligned_json one.json", "no person has two images"),
    "leak": ("{test} --checkpoints leak.pth", "trained or validated on 2 of the 4 test people: test0a, test1b;"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(write_crops, tiny_model, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    write_crops([[2, 2], [2, 2]], "test")
    Path("none.json").write_text("[]")
    Path("one.json").write_text(json.dumps({x: y[:1] for x, y in json.loads(Path("test.json").read_text()).items()}))
    Path("empty").mkdir()
    net.save_checkpoint("a.pth", tiny_model)
    net.save_checkpoint("leak.pth", tiny_model, config=tuned(train_ids=["test1b"], val_ids=["test0a"]))
    test, (flags, message) = "--skip_alignment --aligned_json test.json --test_pairs test_pairs.json", WRONG[case]
    assert ev.main(flags.format(test=test).split()) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "crop/s" not in line]  # the progress bar's
    assert re.match(f"evaluate_twins.py: .*{re.escape(message)}", line)
    assert not Path("evaluation_results").exists()


def test_photographs_to_metrics(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ev, "GENERAL_PAIRS", 20)
    write_photos(".", 3, 2, seed=1)
    net.save_checkpoint("a.pth", tiny_model)
    command = "--checkpoints a.pth --test_pairs pairs.json --landmarks landmarks.json --device cpu --flip"
    assert ev.main(f"{command} --aligned_folder crops".split()) == 0
    metrics = json.loads(Path("evaluation_results/a/metrics.json").read_text())
    assert metrics["counts"] == {"images": 12, "genuine": 6, "twin": 12, "general": 48, "families": 3}
    assert metrics["flip"] is metrics["general_pairs_drawn"] is True
