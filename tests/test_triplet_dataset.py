import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2

import align
import triplet_dataset as td
from net import InputError, to_input


def people(sizes, prefix="p"):
    """{ID: [path, ...]} of made-up paths, IDs p0, p1, ..."""
    return {f"{prefix}{i}": [f"/crops/{prefix}{i}/{k}.png" for k in range(n)] for i, n in enumerate(sizes)}


def brute_force(images, pairs):
    """All triplets by the words of the definition."""
    triplets = set()
    for a, b in pairs:
        for person, twin in ((a, b), (b, a)):
            for anchor, positive in itertools.permutations(images[person], 2):
                triplets |= {(anchor, positive, negative) for negative in images[twin]}
    return triplets


def listed(dataset):
    rows = dataset.triplets(np.arange(len(dataset)))
    return [tuple(dataset.images.paths[i] for i in row) for row in rows]


# ---- permutations


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 12, 100, 1023, 1024, 1025, 5000])
def test_permute_is_a_permutation(size):
    for seed in range(3):
        assert sorted(td.permute(np.arange(size), size, td.hash_key(seed))) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 8, 13])
def test_all_orders_are_equally_likely(size):
    n, first = 20000, min(size, 3)
    keys = np.array([td.hash_key("k", i) for i in range(n)], np.uint64)
    columns = [td.permute(np.full(n, i), size, keys) for i in range(first)]
    seen = Counter(zip(*(c.tolist() for c in columns), strict=True))
    cells = list(itertools.permutations(range(size), first))
    statistic = sum((seen[c] - n / len(cells)) ** 2 for c in cells) / (n / len(cells))
    assert statistic < chi2.ppf(0.9999, len(cells) - 1)


def test_large_permutations_are_uniform():
    values = td.permute(np.arange(50000), 10**9, td.hash_key(1))
    assert len(set(values.tolist())) == 50000
    counts = np.bincount(values // 10**7, minlength=100)
    assert ((counts - 500) ** 2 / 500).sum() < chi2.ppf(0.9999, 99)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02


def test_permute_gives_these_values_on_every_machine():
    assert td.permute(np.arange(6), 10**6, td.hash_key("triplets", 42)).tolist() == [
        135413,
        652698,
        627770,
        628727,
        985803,
        228056,
    ]
    images = people([3, 2])
    rows = td.TwinTripletDataset(images, [("p0", "p1")], 50, seed=7).triplets(np.arange(9))
    expected = [[3, 4, 1], [1, 2, 4], [4, 3, 0], [3, 4, 2], [0, 1, 4], [4, 3, 1], [1, 0, 3], [1, 0, 4], [0, 2, 3]]
    assert rows.tolist() == expected


# ---- triplets


@pytest.mark.parametrize("seed", range(8))
def test_all_triplets_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    images = people(rng.integers(0, 6, 9))
    names = list(images)
    pairs = [
        (names[0], names[1]),
        (names[2], names[3]),
        (names[4], names[5]),
        (names[5], names[6]),
        (names[4], names[6]),
    ]
    expected = brute_force(images, pairs)
    if not expected:
        with pytest.raises(InputError, match="no pair makes a triplet"):
            td.TwinTripletDataset(images, pairs)
        return
    dataset = td.TwinTripletDataset(images, pairs, seed=seed)
    got = listed(dataset)
    assert len(got) == len(dataset) == dataset.n_possible == len(expected)
    assert set(got) == expected
    assert dataset.n_skipped == sum(not brute_force(images, [pair]) for pair in pairs)


@pytest.mark.parametrize("percentage", [1, 7, 50, 99, 100])
def test_percentage_takes_its_share_of_every_pair_without_replacement(percentage):
    images = people([4, 3, 5, 5, 2, 1])
    pairs = [("p0", "p1"), ("p2", "p3"), ("p4", "p5")]
    dataset = td.TwinTripletDataset(images, pairs, percentage)
    got = listed(dataset)
    assert len(set(got)) == len(got)
    for pair in pairs:
        maximum = brute_force(images, [pair])
        assert len(maximum & set(got)) == (percentage * len(maximum) + 99) // 100


def test_every_triplet_is_equally_likely_to_be_sampled():
    images, n = people([2, 3]), 4000
    counts = Counter()
    for seed in range(n):
        counts.update(listed(td.TwinTripletDataset(images, [("p0", "p1")], 25, seed)))
    cells = brute_force(images, [("p0", "p1")])
    expected = n * 5 / len(cells)
    assert len(cells) == 18
    assert sum((counts[c] - expected) ** 2 / expected for c in cells) < chi2.ppf(0.9999, len(cells))


def test_smaller_percentages_are_contained_in_larger_ones():
    images = people([5, 6])
    sets = [set(listed(td.TwinTripletDataset(images, [("p0", "p1")], p, seed=3))) for p in (10, 30, 100)]
    assert sets[0] < sets[1] < sets[2]


def test_seed_decides_the_sample():
    images = people([6, 6])
    one, same, other = (listed(td.TwinTripletDataset(images, [("p0", "p1")], 10, seed)) for seed in (1, 1, 2))
    assert one == same
    assert set(one) != set(other)


def test_one_image_serves_as_negative_only():
    images = people([3, 1])
    assert {negative for _, _, negative in listed(td.TwinTripletDataset(images, [("p0", "p1")]))} == {images["p1"][0]}
    dataset = td.TwinTripletDataset(people([3, 1, 1, 1]), [("p0", "p1"), ("p2", "p3")])
    assert dataset.n_skipped == 1
    assert any("1 of 2 pairs have too few images" in warning for warning in dataset.warnings)
    assert len(dataset.images.paths) == 4  # images of skipped pairs are not even read


def test_a_billion_triplets_cost_no_memory():
    import tracemalloc

    images = people([80] * 2000)
    pairs = [(f"p{i}", f"p{i + 1}") for i in range(0, 2000, 2)]
    tracemalloc.start()
    dataset = td.TwinTripletDataset(images, pairs)
    rows = dataset.triplets(np.arange(0, len(dataset), 10**6))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(dataset) == 1000 * 2 * 80 * 79 * 80
    assert peak < 120e6  # of 8 GB for a list of their numbers
    person = dataset.images.person[rows]
    assert (person[:, 0] == person[:, 1]).all()
    assert (person[:, 0] // 2 == person[:, 2] // 2).all()
    assert (person[:, 0] != person[:, 2]).all()
    assert (rows[:, 0] != rows[:, 1]).all()


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_an_epoch_visits_every_triplet_once_in_another_order(batch_size):
    dataset = td.TwinTripletDataset(people([4, 5, 3, 3]), [("p0", "p1"), ("p2", "p3")], 40)
    stored = sorted(map(tuple, dataset.triplets(np.arange(len(dataset))).tolist()))
    first, second = (np.concatenate(list(dataset.epoch(e, batch_size))).tolist() for e in (1, 2))
    assert sorted(map(tuple, first)) == sorted(map(tuple, second)) == stored
    assert first != second


def test_epoch_windows_join_without_loss():
    dataset = td.TwinTripletDataset(people([40, 40]), [("p0", "p1")])  # more triplets than one window
    rows = np.concatenate(list(dataset.epoch(1, 1000)))
    assert len(dataset) > 65536
    assert len(np.unique(rows @ [6400, 80, 1])) == len(rows) == len(dataset)


def test_pair_by_pair_gives_the_same_triplets():
    dataset = td.TwinTripletDataset(people([4, 3, 2, 5]), [("p0", "p1"), ("p2", "p3"), ("p1", "p3")], 30)
    got = np.concatenate([rows[triplets] for rows, triplets in dataset.by_pair(chunk=10)])
    assert got.tolist() == dataset.triplets(np.arange(len(dataset))).tolist()


def test_touched_counts_distinct_images_and_people():
    dataset = td.TwinTripletDataset(people([9, 9, 5, 5]), [("p0", "p1"), ("p2", "p3")], 1)
    rows = dataset.triplets(np.arange(len(dataset)))
    expected = len(np.unique(rows)), len(np.unique(dataset.images.person[rows]))
    assert dataset.touched() == expected
    assert expected[0] < 28
    assert td.TwinTripletDataset(people([3, 2]), [("p0", "p1")]).touched() == (5, 2)


def test_items_are_the_network_inputs_of_the_three_crops(write_crops):
    aligned, pairs = write_crops([[3, 2]])
    images = align.read_id_to_images(aligned)
    dataset = td.TwinTripletDataset(images, align.read_pairs(pairs), 100)
    for i in (0, len(dataset) - 1, -1):
        row = dataset.triplets([i % len(dataset)])[0]
        expected = to_input(np.stack([np.array(Image.open(dataset.images.paths[r])) for r in row]))
        assert torch.equal(torch.stack(dataset[i]), expected)
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
    assert [x.shape for x in batch] == [(4, 3, 112, 112)] * 3


@pytest.mark.parametrize("reserves", [True, False])
def test_a_crop_file_holds_the_crops_also_where_no_space_can_be_reserved(write_crops, tmp_path, monkeypatch, reserves):
    aligned, _ = write_crops([[3, 2]])
    paths = [path for images in align.read_id_to_images(aligned).values() for path in images]
    if not reserves:  # as on macOS
        monkeypatch.delattr(td.os, "posix_fallocate")
    first = td.load_crops(paths, f"{tmp_path}/train.")
    monkeypatch.setattr(td, "read_crop", None)  # from here on the file alone is read
    for crops in (first, td.load_crops(paths, f"{tmp_path}/train.")):
        for crop, path in zip(crops, paths, strict=True):
            assert np.array_equal(crop, np.array(Image.open(path)))


def test_every_crop_is_read_once(write_crops, monkeypatch):
    aligned, pairs = write_crops([[3, 2]])
    dataset = td.TwinTripletDataset(align.read_id_to_images(aligned), align.read_pairs(pairs))
    reads, read = Counter(), td.read_crop
    monkeypatch.setattr(td, "read_crop", lambda path: reads.update([path]) or read(path))
    for _ in range(2):
        for i in range(len(dataset)):
            dataset[i]
    assert set(reads.values()) == {1}
    assert dataset.load().dtype == torch.uint8
    assert len(reads) == 5
    assert dataset.load() is dataset.load()


# ---- pairs and splits


def test_repeated_pairs_and_images_are_counted_warnings():
    images = people([2, 2, 2])
    images["p0"] = images["p0"] * 2
    dataset = td.TwinTripletDataset(images, [("p0", "p1"), ("p1", "p0"), ("p0", "p1"), ("p1", "p2")])
    assert dataset.warnings == [
        "2 of 4 pairs are listed more than once; each is used once",
        "2 images are listed twice under one ID; each is used once",
    ]
    assert set(listed(dataset)) == brute_force(people([2, 2, 2]), [("p0", "p1"), ("p1", "p2")])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "the list of twin pairs is empty"),
        ([("p0", "p1"), ("p1", "p1")], "pair 2: ID 'p1' is paired with itself"),
        ([("p0", "p9")], "pair 1: ID 'p9' is not in the image list"),
    ],
)
def test_wrong_pairs_are_refused(pairs, message):
    with pytest.raises(InputError, match=message):
        td.TwinTripletDataset(people([2, 2]), pairs)


def test_an_image_of_two_people_is_refused():
    images = people([2, 2])
    images["p1"].append("/crops/p0/../p0/0.png")
    with pytest.raises(InputError, match="listed under 'p0' and 'p1'"):
        td.TwinTripletDataset(images, [("p0", "p1")])


@pytest.mark.parametrize("percentage", [0, 101, -1, 1.5, float("nan"), True, "50"])
def test_wrong_percentages_are_refused(percentage):
    with pytest.raises(InputError, match="percentage must be an integer"):
        td.TwinTripletDataset(people([2, 2]), [("p0", "p1")], percentage)


def test_families_are_connected_components():
    families = td.find_families([("a", "b"), ("c", "d"), ("b", "e"), ("f", "c")])
    groups = {}
    for name, family in families.items():
        groups.setdefault(family, set()).add(name)
    assert sorted(map(sorted, groups.values())) == [["a", "b", "e"], ["c", "d", "f"]]


def random_pairs(rng):
    pairs = []
    for family in range(rng.integers(2, 12)):
        names = [f"{family}{letter}" for letter in "abcd"[: rng.choice([2, 2, 2, 3, 4])]]
        pairs += itertools.combinations(names, 2)
    return pairs


@pytest.mark.parametrize("seed", range(25))
def test_split_keeps_families_whole_and_comes_nearest_to_the_share(seed):
    rng = np.random.default_rng(seed)
    pairs, share = random_pairs(rng), rng.choice([0.01, 0.15, 0.3, 0.5, 0.95])
    train, val = td.split_pairs(pairs, share, seed)
    assert sorted(train + val) == sorted(pairs)
    assert train
    assert val
    assert not {name for pair in train for name in pair} & {name for pair in val for name in pair}
    families = td.find_families(pairs)
    sizes = list(Counter(families[a] for a, _ in pairs).values())
    totals = {sum(c) for k in range(1, len(sizes)) for c in itertools.combinations(sizes, k)}
    assert abs(len(val) - share * len(pairs)) == min(abs(t - share * len(pairs)) for t in totals)
    assert (train, val) == td.split_pairs(pairs, share, seed)


def test_the_seed_decides_which_families_validate():
    pairs = [(f"{i}a", f"{i}b") for i in range(20)]
    validations = [td.split_pairs(pairs, 0.15, seed)[1] for seed in range(400)]
    counts = Counter(pair for val in validations for pair in val)
    assert {len(val) for val in validations} == {3}
    assert len(counts) == 20
    assert max(counts.values()) < 2.2 * min(counts.values())


def test_pairs_may_be_lists_as_in_json():
    train, val = td.split_pairs([["a", "b"], ["c", "d"], ["e", "f"]], 0.3, 1)
    assert (len(train), len(val)) == (2, 1)


def test_a_single_family_has_no_validation():
    pairs = [("a", "b"), ("b", "c"), ("a", "c")]
    assert td.split_pairs(pairs, 0.5, 1) == (pairs, [])
    assert td.split_pairs([*pairs, ("x", "y")], 0.0, 1)[1] == []


def test_unusable_pairs_still_bind_families():
    pairs = [("a", "b"), ("c", "d"), ("e", "f")]
    train, _ = td.split_pairs(pairs, 0.34, 0, related=[("b", "c")])
    assert (("a", "b") in train) == (("c", "d") in train)


@pytest.mark.parametrize("share", [-0.1, 1, 2, float("nan")])
def test_wrong_shares_are_refused(share):
    with pytest.raises(InputError, match="validation_split"):
        td.split_pairs([("a", "b"), ("c", "d")], share, 1)


def test_splitting_a_hundred_thousand_pairs_is_quick():
    train, val = td.split_pairs([(f"{i}a", f"{i}b") for i in range(100_000)], 0.15, 1)
    assert (len(train), len(val)) == (85_000, 15_000)


# ---- files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "expected"),
        ("{}", "at least one ID"),
        ('{"a": "x.png"}', "images of ID 'a'"),
        ('{"a": [1]}', "images of ID 'a'"),
        ('{"a": [""]}', "images of ID 'a'"),
        ('{"a": ["x"], "a": ["y"]}', "key 'a' stands there twice"),
        ('{"a": [NaN]}', "NaN is not a number"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_wrong_image_lists_are_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=rf"x\.json: .*{message}") as caught:
        align.read_id_to_images(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_not_utf8(tmp_path):
    (tmp_path / "x.json").write_bytes('{"a": ["é"]}'.encode("utf-16"))
    with pytest.raises(InputError, match="not UTF-8"):
        align.read_id_to_images(tmp_path / "x.json")
    with pytest.raises(InputError, match="No such file"):
        align.read_id_to_images(tmp_path / "y.json")


@pytest.mark.parametrize("text", ["{}", "[]", '[["a"]]', '[["a", 1]]', '["ab"]', '[["a", "b", "c"]]'])
def test_wrong_pair_lists_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"x\.json: (expected|pair 1)"):
        align.read_pairs(tmp_path / "x.json")


def test_paths_are_relative_to_the_file_and_a_byte_order_mark_is_fine(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": ["b/c.png", "/d.png"]}), encoding="utf-8-sig")
    assert align.read_id_to_images(tmp_path / "x.json") == {"a": [str(tmp_path / "b/c.png"), "/d.png"]}


def save(path, mode="RGB", size=(112, 112)):
    Image.new(mode, size).save(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such aligned crop"),
        (lambda p: p.mkdir(), "no such aligned crop"),
        (lambda p: p.write_bytes(b""), "unreadable crop"),
        (lambda p: (save(p), p.write_bytes(p.read_bytes()[:60])), "unreadable crop"),
        (lambda p: save(p, "RGB", (112, 100)), "112x100 RGB, but a crop is"),
        (lambda p: save(p, "L"), "112x112 L, but a crop is"),
    ],
)
def test_wrong_crops_are_refused(tmp_path, make, message):
    make(tmp_path / "x.png")
    with pytest.raises(InputError, match=rf"x\.png: .*{message}|{message}"):
        td.read_crop(tmp_path / "x.png")


# ---- grouped steps


@pytest.mark.parametrize("seed", range(12))
def test_grouped_steps_visit_every_sampled_triplet_once_within_the_budget(seed):
    rng = np.random.default_rng(seed)
    images, pairs = {}, []
    for family in range(rng.integers(1, 6)):
        names = [f"{family}{letter}" for letter in "abc"[: rng.integers(2, 4)]]
        images |= {name: [f"/{name}/{k}" for k in range(rng.integers(2, 9))] for name in names}
        pairs += itertools.combinations(names, 2)
    dataset = td.TwinTripletDataset(images, pairs, int(rng.choice([1, 10, 37, 100])), seed)
    wanted = Counter(map(tuple, dataset.triplets(np.arange(len(dataset))).tolist()))
    for budget in (3, 4, 7, 12, 40):
        visited = Counter()
        for blocks in dataset.grouped_epoch(1, budget):
            triplets = np.concatenate([dataset.block_triplets(block) for block in blocks])
            assert len(np.unique(triplets)) <= budget
            visited.update(map(tuple, triplets.tolist()))
        assert visited == wanted
        assert set(visited.values()) == {1}


def test_grouped_epochs_differ_and_repeat():
    dataset = td.TwinTripletDataset(people([4] * 20), [(f"p{i}", f"p{i + 1}") for i in range(0, 20, 2)])
    orders = [[[b.pairs for b in step] for step in dataset.grouped_epoch(epoch, 16)] for epoch in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert [len(step) for step in orders[0]] == [2] * 5  # two families of eight images a step
    with pytest.raises(InputError, match="at least 3"):
        dataset.grouped_epoch(1, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 100, 1023, 1025, 5000])
def test_permute_goes_back(size):
    for seed in range(3):
        there = td.permute(np.arange(size), size, td.hash_key(seed))
        assert td.permute(there, size, td.hash_key(seed), inverse=True).tolist() == list(range(size))


def test_an_epoch_can_begin_at_any_step():
    dataset = td.TwinTripletDataset(people([7, 6]), [("p0", "p1")])
    whole = list(dataset.epoch(3, 16))
    for start in (0, 1, 5, len(whole)):
        rest = list(dataset.epoch(3, 16, start))
        assert len(rest) == len(whole) - start
        assert all(np.array_equal(a, b) for a, b in zip(rest, whole[start:], strict=True))
