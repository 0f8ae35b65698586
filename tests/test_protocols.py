"""Protocols of papers: ten folds, single families, pair lists, sessions, cross-validation."""

import base64
import csv
import hashlib
import itertools
import json
import re
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import PredefinedSplit

import align
import evaluate_twins as ev
import net
import train_twins
import triplet_dataset as td
from tests.conftest import Experiment, crop_writer, quick_features, read_csv
from tests.reference import brute_force_auc, people


def scores_of(evaluator, seed=0, decimals=2):
    """Random scores of all pairs: 0.5 in the mean for one person, 0.4 for twins, else 0."""
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


def accuracy_of_each_fold(labels, values, folds, thresholds):
    """The accuracy in each fold at the threshold that is best in the others, by a slow loop."""
    accuracies = []
    for fold in np.unique(folds):
        in_fold = folds == fold
        n_right = [((values >= t) == labels)[~in_fold].sum() for t in thresholds]
        best = thresholds[int(np.argmax(n_right))]
        accuracies.append(((values >= best) == labels)[in_fold].mean())
    return accuracies


def test_ten_fold_accuracy_of_a_resample_is_that_of_copied_families(twelve_families):
    evaluator = twelve_families
    scores = scores_of(evaluator)
    labels, values, folds = labels_and_folds(evaluator, scores)
    thresholds = [*np.unique(values), np.inf]
    first_images = np.concatenate([evaluator.rows[kind][:, 0] for kind in ("genuine", "twin")])
    families = evaluator.family[first_images]
    samples = evaluator.estimate(scores).samples["accuracy_10_fold"]
    for weights, sample in zip(evaluator.weightings, samples, strict=True):
        copies = np.repeat(np.arange(len(labels)), weights[families])
        accuracies = accuracy_of_each_fold(
            labels[copies], values[copies], folds[copies], thresholds
        )
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
    assert len(rows) == 8
    threshold = evaluated.metrics["b"]["figures"]["eer_threshold"]["value"]
    aucs = []
    for row in rows:
        names = set(row["ids"].split(" + "))
        scores = {"genuine": [], "twin": []}
        for pair in evaluated.pairs:
            if {pair["id_1"], pair["id_2"]} <= names:
                scores[pair["kind"]].append(float(pair["score"]))
        genuine, twin = np.array(scores["genuine"]), np.array(scores["twin"])
        assert int(row["genuine_pairs"]) == len(genuine)
        assert int(row["twin_pairs"]) == len(twin)
        if not row["twin_auc"]:
            assert len(twin) == 0
            continue
        auc = float(row["twin_auc"])
        aucs.append(auc)
        assert auc == pytest.approx(brute_force_auc(genuine, twin), abs=1e-6)
        assert float(row["fnmr"]) == pytest.approx((genuine < threshold).mean())
        assert float(row["twin_fmr"]) == pytest.approx((twin >= threshold).mean())
    assert len(aucs) == 7  # one family has no twin pair
    assert aucs == sorted(aucs)


def test_the_three_hardest_families_are_named(evaluated):
    rows = read_csv(evaluated.out / "start" / "families.csv")
    hardest = [f"{row['ids']} (twin AUC {float(row['twin_auc']):.3f})" for row in rows[:3]]
    assert f"start, hardest families: {', '.join(hardest)}." in evaluated.said.getvalue()


# ---- pair lists and metadata ---------------------------------------------------------------------
@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Crops of twelve families, the names of their photographs, metadata, and a network.

    all_pairs, all_figures: what an evaluation of all pairs gives.
    """
    folder = tmp_path_factory.mktemp("protocols")
    aligned, pairs = crop_writer(folder)([[3, 3]] * 10 + [[4, 3], [3, 1, 2]], "test")
    torch.manual_seed(0)
    net.save_checkpoint(folder / "start.pth", net.build_model("ir_tiny"))
    images = json.loads(aligned.read_text())
    photographs = {}
    for name, crops in images.items():
        photographs[name] = [f"raw/{name}/{crop.split('/')[-1][:-4]}.jpg" for crop in crops]
    (folder / "photographs.json").write_text(json.dumps(photographs))
    rng = np.random.default_rng(0)
    metadata = {}  # {crop: {column: value}}
    for crop in itertools.chain.from_iterable(images.values()):
        metadata[crop] = {"session": f"s{rng.integers(2)}", "glasses": rng.choice(["no", "yes"])}
    rows = [{"path": crop, **values} for crop, values in metadata.items()]
    write_table(folder / "metadata.csv", rows)
    result = SimpleNamespace(
        folder=folder,
        aligned=aligned,
        pairs=pairs,
        images=images,
        photographs=photographs,
        metadata=metadata,
    )
    evaluation = evaluate(result, "all")
    result.all_pairs = evaluation.pairs
    result.all_figures = evaluation.metrics["figures"]
    return result


def write_table(path, rows, columns=None):
    """Write dicts to a CSV file: these columns of them, by default all."""
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, columns or rows[0], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def evaluation_flags(twins, out, more=""):
    """The flags of an evaluation of the network of `twins`; `more` comes last and decides."""
    return (
        f"--skip_alignment --test_pairs {twins.pairs} --aligned_json {twins.aligned} --device cpu "
        f"--id_to_images {twins.folder}/photographs.json --output_dir {twins.folder}/{out} "
        f"--checkpoints {twins.folder}/start.pth {more}"
    ).split()


def evaluate(twins, out, more=""):
    """Evaluate the network of `twins`; returns its folder, metrics and table of pair scores."""
    assert ev.main(evaluation_flags(twins, out, more)) == 0
    results = twins.folder / out
    return SimpleNamespace(
        folder=results,
        metrics=json.loads((results / "start" / "metrics.json").read_text()),
        pairs=read_csv(results / "start" / "pair_scores.csv"),
    )


def auc_of(rows):
    labels = [row["kind"] == "genuine" for row in rows]
    return roc_auc_score(labels, [float(row["score"]) for row in rows])


LIST_COLUMNS = ("path_1", "path_2", "same")  # of a pair list, which may also have "fold"


@pytest.fixture(scope="module")
def chosen_pairs(twins):
    """Every third pair, with the columns of a pair list; the fold depends on the family alone."""
    rows = []
    for row in twins.all_pairs[::3]:
        family = int(re.search("[0-9]+", row["id_1"])[0])
        same = int(row["kind"] == "genuine")
        rows.append(row | {"same": same, "family": family, "fold": f"f{family % 10}"})
    return rows


def photograph_of(twins, path):
    """The name of the photograph of a crop."""
    for name, crops in twins.images.items():
        if path in crops:
            return twins.photographs[name][crops.index(path)]
    raise KeyError(path)


@pytest.fixture(scope="module")
def of_list(twins, chosen_pairs):
    """The evaluation of `chosen_pairs` alone, in their folds."""
    path = twins.folder / "folds.csv"
    write_table(path, chosen_pairs, [*LIST_COLUMNS, "fold"])
    return evaluate(twins, "folds", f"--pair_list {path}")


def test_only_the_listed_pairs_are_scored(of_list, chosen_pairs):
    expected = {(row["path_1"], row["path_2"], row["score"]) for row in chosen_pairs}
    assert {(row["path_1"], row["path_2"], row["score"]) for row in of_list.pairs} == expected
    auc = of_list.metrics["figures"]["auc"]
    assert auc["value"] == pytest.approx(auc_of(chosen_pairs), abs=1e-6)
    assert auc["interval"][0] < auc["value"] < auc["interval"][1]


def test_the_folds_of_a_pair_list_are_those_of_its_column(of_list, chosen_pairs):
    figures = of_list.metrics["figures"]
    scores = np.array([float(row["score"]) for row in chosen_pairs])
    labels = np.array([row["same"] for row in chosen_pairs])
    folds = np.array([row["fold"] for row in chosen_pairs])
    accuracies = accuracy_of_each_fold(labels, scores, folds, [*np.unique(scores), np.inf])
    assert len(accuracies) == 10
    assert figures["accuracy_10_fold"]["value"] == pytest.approx(np.mean(accuracies))
    assert figures["accuracy_10_fold_std"]["value"] == pytest.approx(np.std(accuracies))


def test_a_warning_counts_families_that_the_folds_of_a_pair_list_split(
    twins, chosen_pairs, of_list, capsys
):
    comparison = json.loads((of_list.folder / "comparison.json").read_text())
    assert "several folds" not in str(comparison["warnings"])  # no family is split there
    rows = [dict(row) for row in chosen_pairs]
    for family in (3, 5):
        first_row = next(row for row in rows if row["family"] == family)
        first_row["fold"] = "f9"
    path = twins.folder / "split.csv"
    write_table(path, rows, [*LIST_COLUMNS, "fold"])
    evaluate(twins, "split", f"--pair_list {path}")
    assert "warning: 2 families have pairs in several folds" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["crops", "photographs", "lines"])
def test_a_list_may_name_crops_or_photographs_in_a_table_or_in_lines(twins, chosen_pairs, kind):
    path = twins.folder / f"{kind}.csv"
    listed = []
    for row in chosen_pairs:
        names = [row["path_1"], row["path_2"]]
        if kind == "photographs":
            names = [photograph_of(twins, name) for name in names]
        listed.append({"path_1": names[0], "path_2": names[1], "same": row["same"]})
    if kind == "lines":
        path = twins.folder / "pairs.txt"
        path.write_text("\n".join(" ".join(str(x) for x in row.values()) for row in listed))
    else:
        write_table(path, listed)
    crops = td.read_id_to_images(twins.aligned)
    photographs = twins.folder / "photographs.json"
    args = SimpleNamespace(aligned_json=twins.aligned, id_to_images=photographs)
    pairs = align.read_pair_list(path, align.CropFinder(args, crops))
    for row, pair in zip(chosen_pairs, pairs, strict=True):
        assert pair.ids == (row["id_1"], row["id_2"])
        assert pair.same == (row["kind"] == "genuine")
        expected = tuple(str(twins.folder / row[name]) for name in ("path_1", "path_2"))
        assert pair.crops == expected


def test_pairs_with_a_photograph_without_crop_are_left_out_and_counted(twins, capsys):
    photographs = json.loads((twins.folder / "photographs.json").read_text())
    photographs["test0a"].append("raw/test0a/no_face.jpg")
    (twins.folder / "more.json").write_text(json.dumps(photographs))
    a, b = twins.photographs["test0a"][:2]
    twin = twins.photographs["test0b"][0]
    rows = [f"{a},{b},1", f"{a},{twin},0", f"raw/test0a/no_face.jpg,{twin},0"]
    path = twins.folder / "with_missing.csv"
    path.write_text("\n".join(["path_1,path_2,same", *rows]))
    flags = f"--pair_list {path} --id_to_images {twins.folder}/more.json"
    result = evaluate(twins, "missing", flags)
    assert len(result.pairs) == 2
    assert "warning: 1 pairs of --pair_list are left out" in capsys.readouterr().out


def test_a_crop_that_is_not_in_use_is_known_as_an_image_without_crop(twins):
    """A copy that is left out, or an image of a person who is in no pair."""
    listed = td.read_id_to_images(twins.aligned)
    unused, *used = listed["test0a"]
    stranger = listed["test1a"][0]
    args = SimpleNamespace(aligned_json=twins.aligned, id_to_images="none")
    finder = align.CropFinder(args, {"test0a": used})
    assert finder(used[0], "pair 1") == ("test0a", used[0])
    assert finder(unused, "pair 2") == ("test0a", None)
    assert finder(stranger, "pair 3") == ("test1a", None)


def test_a_pair_that_is_listed_again_in_either_order_counts_once(twins, chosen_pairs, capsys):
    rows = []
    for row in chosen_pairs:
        turned = row | {"path_1": row["path_2"], "path_2": row["path_1"]}
        rows += [row, turned]
    write_table(twins.folder / "twice.csv", rows, LIST_COLUMNS)
    result = evaluate(twins, "twice", f"--pair_list {twins.folder}/twice.csv")
    found = [(row["path_1"], row["path_2"]) for row in result.pairs]
    assert sorted(found) == sorted((row["path_1"], row["path_2"]) for row in chosen_pairs)
    warning = f"warning: {len(chosen_pairs)} pairs of --pair_list are left out: "
    assert warning in capsys.readouterr().out


def test_titles_of_a_pair_list_may_have_capitals_and_spaces(twins, chosen_pairs, of_list):
    columns = {"path_1": "Path_1", "path_2": "path_2 ", "same": "SAME", "fold": "Fold"}
    rows = [{title: row[column] for column, title in columns.items()} for row in chosen_pairs]
    write_table(twins.folder / "capitals.csv", rows)
    result = evaluate(twins, "capitals", f"--pair_list {twins.folder}/capitals.csv")
    assert result.metrics["figures"] == of_list.metrics["figures"]


def test_ten_folds_of_a_list_need_ten_families_with_both_kinds_of_pairs(twins, chosen_pairs):
    twin_pairs_of_three_families = []
    for row in chosen_pairs:
        if row["kind"] == "genuine" or row["family"] < 3:
            twin_pairs_of_three_families.append(row)
    for columns in (LIST_COLUMNS, [*LIST_COLUMNS, "fold"]):
        write_table(twins.folder / "few.csv", twin_pairs_of_three_families, columns)
        result = evaluate(twins, "few", f"--pair_list {twins.folder}/few.csv")
        assert result.metrics["counts"]["families"] == 3
        assert result.metrics["figures"]["accuracy_10_fold"]["value"] is None


def test_figures_do_not_depend_on_the_order_of_the_files(twins):
    images = json.loads(twins.aligned.read_text())
    turned = twins.aligned.with_name("turned.json")
    turned.write_text(json.dumps(dict(reversed(images.items()))))
    pairs = twins.folder / "turned_pairs.json"
    pairs.write_text(json.dumps(json.loads(twins.pairs.read_text())[::-1]))
    result = evaluate(twins, "turned", f"--aligned_json {turned} --test_pairs {pairs}")
    for name, figure in result.metrics["figures"].items():
        expected = twins.all_figures[name]
        assert figure["value"] == pytest.approx(expected["value"], abs=1e-6)
        assert figure["interval"] == pytest.approx(expected["interval"], abs=1e-6)


WRONG_LISTS = {
    "an unknown path": ("x.png,{b},0", "pair 1: no image 'x.png' in"),
    "a wrong label": (
        "{a},{b},1",
        "pair 1: same is 1, but the images are of 'test0a' and 'test0b'",
    ),
    "no label": ("{a},{b},", "pair 1: same must be 1 or 0, not ''"),
    "strangers": ("{a},{stranger},0", "test0a and test1a are no twins by --test_pairs"),
    "an image with itself": ("{a},{a},1", "an image is paired with itself"),
    "too many values": ("{a},{b},0,x", "row 1 has 4 values; put values with a comma"),
    "an empty fold": ("{a},{b},0,", "pair 1: fold is empty"),
    "nothing": ("", "and at least one row"),
}


@pytest.mark.parametrize("case", WRONG_LISTS)
def test_a_wrong_pair_list_is_refused(twins, case, capsys):
    row, message = WRONG_LISTS[case]
    titles = "path_1,path_2,same"
    if case == "an empty fold":
        titles += ",fold"
    images = twins.images
    row = row.format(a=images["test0a"][0], b=images["test0b"][0], stranger=images["test1a"][0])
    path = twins.folder / "wrong.csv"
    path.write_text(f"{titles}\n{row}\n")
    flags = f"--id_to_images none --pair_list {path}"
    assert ev.main(evaluation_flags(twins, "wrong", flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert str(path) in line
    assert not (twins.folder / "wrong").exists()


def values_of(twins, row, column):
    """The set of the values that the two images of a pair have in a column of the metadata."""
    return {twins.metadata[row[path]][column] for path in ("path_1", "path_2")}


def has_one_session(twins, row):
    return len(values_of(twins, row, "session")) == 1


@pytest.fixture(scope="module")
def stratified(twins):
    flags = f"--metadata {twins.folder}/metadata.csv --cross session --by glasses"
    return evaluate(twins, "strata", flags)


def test_across_sessions_genuine_pairs_are_of_two_sessions(twins, stratified):
    expected = []
    for row in twins.all_pairs:
        if row["kind"] == "twin" or not has_one_session(twins, row):
            expected.append(row)
    # But for accepted_at_eer, which may be another, since other pairs have another EER threshold.
    for column in ("path_1", "path_2", "id_1", "id_2", "kind", "score"):
        assert [row[column] for row in stratified.pairs] == [row[column] for row in expected]
    value = stratified.metrics["figures"]["auc"]["value"]
    assert value == pytest.approx(auc_of(expected), abs=1e-6)


def test_pairs_within_sessions_and_all_pairs_stand_beside(twins, stratified):
    strata = stratified.metrics["strata"]
    within = [
        row for row in twins.all_pairs if row["kind"] == "twin" or has_one_session(twins, row)
    ]
    expected = {"genuine pairs of one session": within, "all genuine pairs": twins.all_pairs}
    for label, rows in expected.items():
        auc = strata[label]["figures"]["auc"]
        assert auc["value"] == pytest.approx(auc_of(rows), abs=1e-6)
        assert auc["interval"][0] < auc["value"] < auc["interval"][1]
        n_genuine = sum(row["kind"] == "genuine" for row in rows)
        assert strata[label]["counts"]["genuine"] == n_genuine


def test_strata_of_a_column_are_pairs_of_one_value_and_of_two(twins, stratified):
    strata = stratified.metrics["strata"]
    for value in ("no", "yes", "two values"):
        rows = []
        for row in stratified.pairs:
            values = values_of(twins, row, "glasses")
            if values == {value} or (value == "two values" and len(values) == 2):
                rows.append(row)
        stratum = strata[f"glasses: {value}"]
        assert stratum["figures"]["auc"]["value"] == pytest.approx(auc_of(rows), abs=1e-6)
        assert stratum["counts"]["twin"] == sum(row["kind"] == "twin" for row in rows)


def test_a_stratum_without_pairs_of_a_kind_is_named(twins, capsys):
    first, *others = twins.metadata
    rows = [{"path": first, "glasses": "sun"}] + [{"path": x, "glasses": "no"} for x in others]
    write_table(twins.folder / "rare.csv", rows)
    result = evaluate(twins, "rare", f"--metadata {twins.folder}/rare.csv --by glasses")
    assert list(result.metrics["strata"]) == ["glasses: no", "glasses: two values"]
    note = "glasses: sun: there are no figures, with 0 genuine and 0 twin pairs"
    assert f"warning: {note}" in capsys.readouterr().out
    assert note in json.loads((result.folder / "comparison.json").read_text())["warnings"]
    assert note in (result.folder / "report.html").read_text()


def test_terminal_and_page_say_which_genuine_pairs_count(twins, capsys):
    flags = f"--metadata {twins.folder}/metadata.csv --cross session"
    result = evaluate(twins, "cross", flags)
    line = "The genuine pairs are only those whose images have two values of session."
    assert line in capsys.readouterr().out
    assert line in (result.folder / "report.html").read_text()
    comparison = json.loads((result.folder / "comparison.json").read_text())
    assert flags in comparison["command"]


def test_strata_have_a_picture(stratified):
    with Image.open(stratified.folder / "strata.png") as picture:
        assert picture.format == "PNG"


def test_an_evaluation_without_strata_removes_an_earlier_picture_of_strata(twins):
    folder = twins.folder / "without_strata"
    folder.mkdir()
    (folder / "strata.png").touch()
    evaluate(twins, folder.name)
    assert not (folder / "strata.png").exists()


# {case: (flags, first rows of the table, message)}. {a} and {b} are images. The test adds rows that
# give all further images the session s, and {b} too where it is not among the first rows.
WRONG_METADATA = {
    "an image without a value": ("--cross session", "path,session\n", "images have no session"),
    "no such column": ("--cross day", "path,session\n{a},s\n", "its columns are: path, session"),
    "two rows that contradict each other": (
        "--cross session",
        "path,session\n{a},s\n{a},t\n",
        "row 2: another row says 's', not 't', of this image",
    ),
    "one value": (
        "--cross session",
        "path,session\n{a},s\n",
        "nobody has images with two values of session",
    ),
    "no column": (
        "",
        "path,session\n{a},s\n",
        "--metadata is of no use without --cross or --by",
    ),
    "a value that is missing as pandas writes it": (
        "--by session",
        "path,session\n{a},NaN\n",
        "images have no session",
    ),
    "two spellings of a value": (
        "--by session",
        "path,session\n{a},S\n",
        "session has the values 'S' and 's'; give them one spelling",
    ),
    "a number with and without decimals": (
        "--by session",
        "path,session\n{a},1\n{b},1.0\n",
        "session has the values '1' and '1.0'",
    ),
    "two columns of one title": (
        "--cross session",
        "path,session,Session\n{a},s,t\n",
        "two columns have one title",
    ),
}


@pytest.mark.parametrize("case", WRONG_METADATA)
def test_wrong_metadata_is_refused(twins, case, capsys):
    flags, text, message = WRONG_METADATA[case]
    a, b, *others = twins.metadata
    path = twins.folder / "wrong_metadata.csv"
    text = text.format(a=a, b=b)
    text += "".join(f"{crop},s\n" for crop in (b, *others) if crop not in text)
    path.write_text(text)
    flags += f" --id_to_images none --metadata {path}"
    assert ev.main(evaluation_flags(twins, "wrong", flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_empty_columns_and_rows_of_a_spreadsheet_are_passed_over(tmp_path):
    (tmp_path / "x.csv").write_text("path,session,,\na.jpg,1,,\n,,,\n")
    (row,) = net.read_csv(tmp_path / "x.csv", ("path", "session"))
    assert (row["path"], row["session"]) == ("a.jpg", "1")


@pytest.mark.parametrize("flag", ["--cross", "--by"])
def test_a_column_without_metadata_is_refused(twins, flag, capsys):
    assert ev.main(evaluation_flags(twins, "wrong", f"{flag} session")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--cross and --by need --metadata" in line


# ---- checkpoints that mislead --------------------------------------------------------------------
def test_a_network_under_two_names_is_used_once(twins, capsys):
    copy = twins.folder / "copy.pth"
    copy.write_bytes((twins.folder / "start.pth").read_bytes())
    result = evaluate(twins, "copy", f"--checkpoints {twins.folder}/start.pth {copy}")
    comparison = json.loads((result.folder / "comparison.json").read_text())
    assert [entry["name"] for entry in comparison["checkpoints"]] == ["start"]
    assert f"{copy} holds the same network as " in capsys.readouterr().out


def test_a_copy_that_does_not_say_whom_it_knows_does_not_hide_the_one_that_does(twins, capsys):
    model = net.load_checkpoint(twins.folder / "start.pth")
    path = twins.folder / "knows.pth"
    net.save_checkpoint(path, model, config={"train_ids": ["test0a"]})
    flags = f"--checkpoints {twins.folder}/start.pth {path}"
    assert ev.main(evaluation_flags(twins, "hidden", flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: was trained or validated on 1 of the" in line


def test_test_people_in_another_spelling_are_named(twins, capsys):
    path = twins.folder / "spelling.pth"
    torch.manual_seed(2)
    net.save_checkpoint(path, net.build_model("ir_tiny"), config={"train_ids": ["Test0A "]})
    evaluate(twins, "spelling", f"--checkpoints {twins.folder}/start.pth {path}")
    said = capsys.readouterr().out
    assert f"warning: {path}: 1 test people may be people that it has seen" in said
    assert "such as 'test0a': it was trained or validated on 'Test0A '" in said


def test_the_comparison_of_an_earlier_evaluation_is_gone_if_this_one_ends_early(twins, capsys):
    dead = net.build_model("ir_tiny")
    for parameter in dead.parameters():
        torch.nn.init.zeros_(parameter)
    net.save_checkpoint(twins.folder / "dead.pth", dead)
    result = evaluate(twins, "early", f"--metadata {twins.folder}/metadata.csv --by glasses")
    files = {path for path in result.folder.iterdir() if path.is_file()}
    assert {path.name for path in files} == set(ev.COMPARISON_FILES)
    flags = f"--checkpoints {twins.folder}/start.pth {twins.folder}/dead.pth"
    assert ev.main(evaluation_flags(twins, "early", flags)) == 2
    assert (result.folder / "start" / "metrics.json").exists()
    assert not any(path.exists() for path in files)


@pytest.mark.parametrize("has_ended", [True, False])
def test_a_checkpoint_whose_training_has_not_ended_is_named(twins, capsys, has_ended):
    facts = {"config": {"n_val_pairs": 2}}
    if has_ended:
        facts["against_start"] = {}
    path = twins.folder / "tuned.pth"
    torch.manual_seed(1)
    net.save_checkpoint(path, net.build_model("ir_tiny"), **facts)
    evaluate(twins, "tuned", f"--checkpoints {twins.folder}/start.pth {path}")
    said = capsys.readouterr().out
    assert (f"warning: {path}: its training has not ended" in said) == (not has_ended)


# ---- training across sessions --------------------------------------------------------------------
def sessions_of(experiment):
    """Write metadata; returns ({path: session}, the flags that train across these sessions).

    The images of train0b have one session, those of all others three. All have one place.
    """
    session_of = {}
    for name, paths in experiment.images.items():
        for number, path in enumerate(paths):
            session_of[str(path)] = "s0" if name == "train0b" else f"s{number % 3}"
    rows = []
    for path, session in session_of.items():
        rows.append({"path": path, "session": session, "place": "here"})
    write_table(experiment.folder / "metadata.csv", rows)
    return session_of, f"--cross session --metadata {experiment.folder}/metadata.csv"


def test_training_across_sessions_has_positives_of_other_sessions(experiment, run, monkeypatch):
    session_of, flags = sessions_of(experiment)
    positives = []
    step = train_twins.TwinTrainer.step

    def watched_step(self, triplets):
        paths = self.train_set.images.paths
        positives.extend((paths[a], paths[p]) for a, p, _ in triplets.tolist())
        return step(self, triplets)

    monkeypatch.setattr(train_twins.TwinTrainer, "step", watched_step)
    assert run(flags)[0] == 0
    assert positives
    assert all(session_of[anchor] != session_of[positive] for anchor, positive in positives)


def test_the_triplets_across_sessions_are_all_that_there_are(experiment, run):
    session_of, flags = sessions_of(experiment)
    _, log = run(flags)
    config = log["config"]
    n_possible = 0
    for a, b in json.loads(experiment.pairs.read_text()):
        if a not in config["train_ids"]:
            continue
        for person, twin in ((a, b), (b, a)):
            images = [str(path) for path in experiment.images[person]]
            for anchor, positive in itertools.permutations(images, 2):
                if session_of[anchor] != session_of[positive]:
                    n_possible += len(experiment.images[twin])
    assert config["n_train_triplets"] == n_possible
    assert config["recipe"]["cross"] == "session"


def test_training_across_sessions_says_what_is_left(experiment, run, capsys):
    _, flags = sessions_of(experiment)
    run(flags)
    said = capsys.readouterr().out
    assert "triplets have a positive with another session than the anchor; 1 people" in said


def test_the_suggested_evaluation_is_across_sessions_too(experiment, capsys):
    _, flags = sessions_of(experiment)
    assert train_twins.main(experiment.flags(f"{flags} --epochs 1 --seed 1 2", "")) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "evaluate_twins.py" in x]
    assert f" --metadata {experiment.folder}/metadata.csv --cross session " in line


def test_the_suggested_evaluation_takes_the_same_list_of_photographs(experiment, capsys):
    flags = "--epochs 1 --seed 1 2 --id_to_images photos.json --landmarks points.json"
    assert train_twins.main(experiment.flags(flags, "")) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "evaluate_twins.py" in x]
    assert " --id_to_images photos.json --landmarks points.json --checkpoints " in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cross day --metadata {metadata}", "with the columns path, day"),
        ("--cross session --metadata missing.csv", "--metadata missing.csv: No such file"),
        ("--metadata {metadata}", "--metadata is of no use without --cross"),
    ],
)
@pytest.mark.parametrize("folds", ["", "--folds 3"])
def test_wrong_metadata_ends_training_before_its_first_run(
    experiment, capsys, flags, message, folds
):
    sessions_of(experiment)
    flags = flags.format(metadata=experiment.folder / "metadata.csv")
    assert train_twins.main(experiment.flags(f"{folds} {flags}", "")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (experiment.folder / "logs").exists()


def test_a_missing_column_of_any_run_ends_a_sweep_before_the_alignment(
    experiment, capsys, monkeypatch
):
    monkeypatch.setattr(train_twins.TwinTrainer, "align", lambda self: pytest.fail("aligned"))
    _, flags = sessions_of(experiment)
    command = experiment.flags(flags.replace("session", "session day"), "")
    command.remove("--skip_alignment")
    assert train_twins.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "with the columns path, " in line
    assert "day" in line


def test_training_across_a_column_in_which_nobody_has_two_values_is_refused(
    experiment, run, refusal
):
    sessions_of(experiment)
    code, _ = run(f"--cross place --metadata {experiment.folder}/metadata.csv")
    assert code == 2
    assert "--cross place: no pair makes a triplet" in refusal()
    assert not (experiment.folder / "logs").exists()


def test_validation_across_sessions_is_across_sessions_too(experiment, run):
    session_of, flags = sessions_of(experiment)
    _, log = run(flags)
    embeddings = {}
    model = net.load_checkpoint(experiment.start)
    for name in log["config"]["val_ids"]:
        for path in experiment.images[name]:
            embedding, _ = model(net.to_input(np.array(Image.open(path))[None]))
            embeddings[str(path)] = (name, embedding[0].detach())
    labels, scores = [], []
    pairs = [set(pair) for pair in json.loads(experiment.pairs.read_text())]
    for (path_1, (id_1, x)), (path_2, (id_2, y)) in itertools.combinations(embeddings.items(), 2):
        is_genuine = id_1 == id_2 and session_of[path_1] != session_of[path_2]
        if is_genuine or {id_1, id_2} in pairs:
            labels.append(is_genuine)
            scores.append(float(x @ y))
    assert log["epochs"][0]["val_auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-4)


def test_a_run_across_sessions_is_not_resumed_with_other_sessions(experiment, run, refusal):
    _, flags = sessions_of(experiment)
    run(f"{flags} --epochs 1")
    path = experiment.folder / "metadata.csv"
    path.write_text(path.read_text().replace(",s1,", ",s7,", 1))
    code, _ = run(f"{flags} --epochs 2 --resume")
    assert code == 2
    assert "the crops are others than at its start" in refusal()


# ---- cross-validation ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def cross_validation(tmp_path_factory):
    """Three folds of an experiment, each trained for an epoch, and evaluated with their start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("net.Backbone.features", quick_features)
        patch.setattr("train_twins.plot_curves", lambda folder, log: None)
        folder = tmp_path_factory.mktemp("folds")
        experiment = Experiment(folder, [[3, 3]] * 6 + [[3, 2, 3], [3, 3]])
        flags = experiment.flags("--folds 3 --freeze_backbone --epochs 1", "cv")
        assert train_twins.main(flags) == 0
        evaluation = (
            f"--skip_alignment --test_pairs {experiment.pairs} --device cpu "
            f"--aligned_json {experiment.aligned} --output_dir {folder}/out"
        ).split()
        checkpoints = sorted(str(path) for path in (folder / "models").glob("*.pth"))
        names = ["--checkpoints", str(experiment.start), *checkpoints]
        assert ev.main([*evaluation, *names]) == 0
    return SimpleNamespace(
        experiment=experiment,
        checkpoints=checkpoints,
        evaluation=evaluation,
        out=folder / "out",
        contents=[torch.load(path, weights_only=True) for path in checkpoints],
    )


def test_each_run_leaves_out_another_fold_of_whole_families(cross_validation):
    folds = [set(content["config"]["fold_ids"]) for content in cross_validation.contents]
    assert len(folds) == 3
    assert set.union(*folds) == set(cross_validation.experiment.images)
    assert sum(len(fold) for fold in folds) == len(cross_validation.experiment.images)
    for a, b in json.loads(cross_validation.experiment.pairs.read_text()):
        assert all((a in fold) == (b in fold) for fold in folds)


def test_a_run_has_seen_nobody_of_its_fold(cross_validation):
    for content in cross_validation.contents:
        config = content["config"]
        fold_ids = set(config["fold_ids"])
        seen = {*config["train_ids"], *config["val_ids"], *content["seen_ids"]}
        assert not fold_ids & seen
        assert fold_ids | seen == set(cross_validation.experiment.images)
        for name in fold_ids:
            for path in cross_validation.experiment.images[name]:
                digest = hashlib.sha256(np.array(Image.open(path)).tobytes()).hexdigest()
                assert digest not in content["crop_sha256"]


def test_each_pair_is_scored_by_the_run_that_has_not_seen_it(cross_validation, monkeypatch):
    monkeypatch.setattr("net.Backbone.features", quick_features)
    models = [net.load_checkpoint(path) for path in cross_validation.checkpoints]
    rows = read_csv(cross_validation.out / "cv_3folds" / "pair_scores.csv")
    folder = cross_validation.experiment.folder
    for row in rows[::7]:
        (model,) = [model for model in models if row["id_1"] in model.facts["config"]["fold_ids"]]
        crops = [np.array(Image.open(folder / row[path])) for path in ("path_1", "path_2")]
        with torch.no_grad():
            embeddings, _ = model.eval()(net.to_input(np.stack(crops)))
        assert float(row["score"]) == pytest.approx(float(embeddings[0] @ embeddings[1]), abs=1e-5)


def test_general_pairs_are_within_a_fold(cross_validation):
    path = cross_validation.out / "cv_3folds" / "metrics.json"
    counts = json.loads(path.read_text())["counts"]
    images = cross_validation.experiment.images
    family_of = td.find_families(json.loads(cross_validation.experiment.pairs.read_text()))
    expected = 0
    for content in cross_validation.contents:
        for a, b in itertools.combinations(content["config"]["fold_ids"], 2):
            if family_of[a] != family_of[b]:
                expected += len(images[a]) * len(images[b])
    assert counts["general"] == expected
    assert counts["families"] == 8


def test_the_start_is_tested_on_the_same_pairs(cross_validation):
    content = json.loads((cross_validation.out / "comparison.json").read_text())
    assert content["baseline"] == "start"
    names = [checkpoint["name"] for checkpoint in content["checkpoints"]]
    assert names == ["start", "cv_3folds"]
    start = json.loads((cross_validation.out / "start" / "metrics.json").read_text())
    pooled = json.loads((cross_validation.out / "cv_3folds" / "metrics.json").read_text())
    assert start["counts"] == pooled["counts"]
    assert pooled["folds"] == cross_validation.checkpoints


def test_the_page_names_the_run_of_every_fold(cross_validation):
    text = (cross_validation.out / "report.html").read_text()
    for path in cross_validation.checkpoints:
        assert path in text.replace("&#x27;", "'")


def test_a_missing_fold_is_named(cross_validation, capsys):
    some = ["--checkpoints", *cross_validation.checkpoints[:2]]
    assert ev.main([*cross_validation.evaluation, *some]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the runs of folds [3] of 3 are missing" in line


def test_a_test_pair_of_two_folds_is_named(cross_validation, tmp_path, capsys):
    first, second, *_ = [content["config"]["fold_ids"] for content in cross_validation.contents]
    pairs = json.loads(cross_validation.experiment.pairs.read_text())
    divided = [first[0], second[0]]
    (tmp_path / "pairs.json").write_text(json.dumps([*pairs, divided]))
    flags = [*cross_validation.evaluation, "--test_pairs", str(tmp_path / "pairs.json")]
    assert ev.main([*flags, "--checkpoints", *cross_validation.checkpoints]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{' and '.join(divided)} are a test pair, but in different folds" in line


def test_a_run_of_a_fold_is_still_refused_on_the_people_whom_it_has_seen(
    cross_validation, tmp_path, capsys
):
    (first, second), *_ = json.loads(cross_validation.experiment.pairs.read_text())
    contents = zip(cross_validation.checkpoints, cross_validation.contents, strict=True)
    path = next(path for path, content in contents if first in content["config"]["train_ids"])
    (tmp_path / "pairs.json").write_text(json.dumps([[first, second]]))
    flags = [*cross_validation.evaluation, "--test_pairs", str(tmp_path / "pairs.json")]
    assert ev.main([*flags, "--checkpoints", path]) == 2
    assert "was trained or validated on 2 of the 2 test people" in capsys.readouterr().err


def test_folds_do_not_depend_on_the_order_of_the_pairs():
    pairs = [(f"a{i}", f"b{i}") for i in range(20)] + [("a3", "c"), ("b5", "d")]
    expected = td.deal_people_into_folds(pairs, 4, 42)
    turned = [(b, a) for a, b in reversed(pairs)]
    assert td.deal_people_into_folds(turned, 4, 42) == expected
    assert td.deal_people_into_folds(pairs, 4, 43) != expected


def test_more_folds_than_families_are_refused_once(experiment, capsys):
    flags = experiment.flags("--folds 50", "cv")
    assert train_twins.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--folds 50: the pairs make only" in line


# ---- the page to mail ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def page(evaluated):
    """(text, tree) of report.html, which is also well-formed XML."""
    text = (evaluated.out / "report.html").read_text()
    return text, ElementTree.fromstring(text)


def test_the_page_is_well_formed_and_needs_nothing_from_outside(page):
    text, tree = page
    assert tree.tag == "html"
    assert not re.search(r"https?:|@import|url\(", text)
    assert not list(tree.iter("script"))
    assert not list(tree.iter("link"))
    for element in tree.iter():
        for attribute in ("src", "href"):
            assert element.get(attribute, "data:").startswith("data:")


def test_the_page_has_all_pictures_with_captions(page, evaluated):
    _, tree = page
    expected = [evaluated.out / "comparison.png", evaluated.out / "data_percentage.png"]
    for setting in evaluated.settings:
        folder = evaluated.out / setting["checkpoints"][0]
        for name in ("roc_curve", "det_curve", "score_distributions", "hardest_pairs"):
            expected.append(folder / f"{name}.png")
    figures = list(tree.iter("figure"))
    assert len(figures) == len(expected)
    for figure, path in zip(figures, expected, strict=True):
        source = figure.find("img").get("src")
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert data == path.read_bytes()
        assert len(figure.find("figcaption").text) > 40


def test_the_page_answers_with_the_terminals_sentences_and_figures(page, evaluated):
    _, tree = page
    said = evaluated.said.getvalue()
    text = "\n".join(tree.itertext())
    for line in said.splitlines():
        if " against " in line or line.startswith("OVERLAP"):
            assert line.strip() in text
    assert " against " in said
    assert "OVERLAP" in said
    for setting in evaluated.settings:
        low, high = setting["figures"]["auc"]["interval"]
        assert f"{setting['figures']['auc']['value']:.4f} [{low:.4f}, {high:.4f}]" in text


def test_the_page_says_how_it_was_measured(page, evaluated):
    _, tree = page
    text = "\n".join(tree.itertext())
    assert f"python evaluate_twins.py {evaluated.flags}" in text
    assert torch.__version__ in text
    for checkpoint in evaluated.checkpoints:
        assert checkpoint["checkpoint"] in text
