import csv
import itertools
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

import evaluate_twins as ev
import net
from tests.synthetic import write_photos
from triplet_dataset import TwinImages, load_crops, read_id_to_images, read_pairs

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
        "tar_at_far": {
            key: None if len(impostor) < 1 / far else max(1 - fnmr for _, fmr, fnmr, _ in rows if fmr <= far)
            for key, far in (("0.01", 0.01), ("0.001", 0.001), ("0.0001", 0.0001))
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
    for far, tar in got["tar_at_far"].items():
        assert tar == pytest.approx(tpr[fpr <= float(far)].max(), abs=1e-9)
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
    assert got["tar_at_far"] == {"0.01": None, "0.001": None, "0.0001": None}


def test_rates_are_null_just_below_what_the_sample_resolves():
    genuine = np.array([0.9])
    for n, expected in ((99, None), (100, 1.0)):
        assert ev.verification_metrics(genuine, np.linspace(0, 0.5, n))["tar_at_far"]["0.01"] == expected


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1])
def test_general_threshold_is_the_lowest_with_that_rate(ties, rate):
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1, 5000).round(1 if ties else 12)
    descending = np.sort(scores)[::-1]
    t = ev.threshold_at_fmr(descending[: int(rate * 5000) + 1], 5000, rate)
    assert (scores >= t).mean() <= rate
    below = scores[scores < t].max()
    assert (scores >= below).mean() > rate
    assert t == np.nextafter(below, np.inf)


def test_general_threshold_needs_enough_pairs():
    assert ev.threshold_at_fmr(np.array([0.5]), 999, 0.001) is None
    assert ev.threshold_at_fmr(np.linspace(1, 0, 1000), 1000, 0.001) == np.nextafter(np.linspace(1, 0, 1000)[1], 2)
    assert ev.threshold_at_fmr(np.empty(0), 0, 0.001) is None


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
def test_general_scores_are_the_highest_of_all_cross_family_pairs(chunk):
    embeddings = torch.nn.functional.normalize(torch.randn(17, 8))
    family = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 0, 4, 4, 5, 5, 5])
    pairs = [(i, j) for i, j in itertools.combinations(range(17), 2) if family[i] != family[j]]
    expected = sorted((float(embeddings[i] @ embeddings[j]) for i, j in pairs), reverse=True)
    total, highest = ev.general_scores(embeddings, family, 10, chunk)
    assert total == len(pairs)
    np.testing.assert_allclose(highest, expected[:10], atol=1e-6)


def test_embedding_does_not_depend_on_the_batch(tiny_model):
    crops = torch.randint(0, 256, (7, 112, 112, 3), dtype=torch.uint8)
    a, b = (ev.embed(tiny_model, crops, torch.device("cpu"), size) for size in (2, 7))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert a.dtype == torch.float32


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
    for key in ("eer", "auc", "best_accuracy", "accuracy_at_eer"):
        assert metrics[key] == pytest.approx(expected[key], abs=1e-6)
    assert metrics["general_threshold"]["0.001"] == {"threshold": None, "twin_fmr": None, "fnmr": None}
    for name in ("roc_curve.png", "score_distributions.png"):
        assert (tmp_path / "out" / "b" / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "comparison.png").exists()
    out = capsys.readouterr().out
    assert "16 images of 7 people" in out
    assert "not a way to choose a checkpoint" in out


def test_every_image_is_embedded_once_per_checkpoint(evaluation, monkeypatch):
    seen, original = [], net.Backbone.forward
    monkeypatch.setattr(net.Backbone, "forward", lambda self, x: seen.append(len(x)) or original(self, x))
    assert evaluation("--batch_size 5") == 0
    assert sum(seen) == 2 * 16
    assert max(seen) == 5


def test_twin_fmr_and_fnmr_at_the_general_threshold():
    evaluator = object.__new__(ev.TwinEvaluator)
    evaluator.images = type("Images", (), {"paths": ["x"] * 4})
    general = np.sort(np.random.default_rng(0).normal(0, 0.1, 20000))[::-1]
    genuine, twin = np.linspace(0, 1, 50), np.linspace(-0.5, 0.6, 70)
    got = evaluator.metrics(ev.Scores(genuine, twin, 20000, general[:30]))["general_threshold"]
    t = got["0.001"]["threshold"]
    assert (general >= t).sum() == 20
    assert got["0.001"]["twin_fmr"] == (twin >= t).mean()
    assert got["0.001"]["fnmr"] == (genuine < t).mean()
    assert got["0.0001"]["threshold"] > t


def test_checkpoints_of_one_stem_get_folders_of_their_own(tmp_path, evaluation):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.pth").write_bytes((tmp_path / "b.pth").read_bytes())
    assert evaluation(checkpoints="a.pth other/a.pth b.pth") == 0
    folders = [p for p in (tmp_path / "out").iterdir() if p.is_dir()]
    assert len(folders) == 3
    recorded = {json.loads((p / "metrics.json").read_text())["checkpoint"] for p in folders}
    assert recorded == {str(tmp_path / "a.pth"), str(tmp_path / "other" / "a.pth"), str(tmp_path / "b.pth")}


def test_table_marks_the_best_of_each_column():
    def metrics(eer, auc):
        general = {"twin_fmr": None, "fnmr": None, "threshold": None}
        far = {"0.01": None, "0.001": None, "0.0001": None}
        return {
            "eer": eer,
            "auc": auc,
            "best_accuracy": 0.5,
            "tar_at_far": far,
            "general_threshold": {"0.001": general},
        }

    lines = ev.comparison_table([("first", metrics(0.1, 0.8)), ("second", metrics(0.2, 0.9))]).splitlines()
    assert lines[1].split() == ["first", "10.00*", "0.8000", "50.00*", "-", "-", "-", "-"]
    assert lines[2].split() == ["second", "20.00", "0.9000*", "50.00*", "-", "-", "-", "-"]


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
        realign max_workers device batch_size seed"""
    assert all(f"  --{flag} " in text or f"  --{flag}\n" in text for flag in flags.split())
