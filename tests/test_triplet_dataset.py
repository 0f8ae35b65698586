"""JSON files, families, splits, crops, triplets and steps, against brute force over the definitions."""

import hashlib
import itertools
import json
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2

import triplet_dataset as td
from net import InputError, to_input


def people(sizes):
    """{ID: [path, ...]} of made-up paths, IDs p0, p1, ..."""
    return {f"p{i}": [f"/crops/p{i}/{k}.png" for k in range(n)] for i, n in enumerate(sizes)}


def couples(n):
    """n pairs: p0 and p1, p2 and p3, ..."""
    return [(f"p{2 * i}", f"p{2 * i + 1}") for i in range(n)]


def brute_force(images, pairs):
    """All triplets by the words of the definition."""
    triplets = set()
    for pair in pairs:
        for person, twin in (pair, pair[::-1]):
            for anchor, positive in itertools.permutations(images[person], 2):
                triplets |= {(anchor, positive, negative) for negative in images[twin]}
    return triplets


def listed(dataset, rows=None):
    """[(anchor's path, positive's, negative's), ...] of rows of triplets, by default of all that are sampled."""
    rows = dataset.triplets(np.arange(len(dataset))) if rows is None else rows
    return [tuple(dataset.images.paths[i] for i in row) for row in rows]


def uniform(counts, cells, draws):
    """Whether each of `cells` came up about equally often, by a chi-square test at 1 in 10,000."""
    expected = draws / len(cells)
    return sum((counts[c] - expected) ** 2 / expected for c in cells) < chi2.ppf(0.9999, len(cells) - 1)


# ---- triplets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_all_triplets_equal_brute_force(seed):
    images = people(np.random.default_rng(seed).integers(0, 6, 7))
    pairs = [*couples(3), ("p5", "p6"), ("p4", "p6")]  # the last three people are one family
    expected = brute_force(images, pairs)
    dataset = td.TwinTripletDataset(images, pairs, seed=seed)
    got = listed(dataset)
    assert len(got) == len(dataset) == dataset.n_possible == len(expected)
    assert set(got) == expected
    assert dataset.pairs == [pair for pair in pairs if brute_force(images, [pair])]
    assert dataset.n_skipped == len(pairs) - len(dataset.pairs)


@pytest.mark.parametrize("percentage", [1, 7, 50, 99, 100])
def test_a_percentage_takes_its_share_of_every_pair_without_replacement(percentage):
    images = people([4, 3, 5, 5, 2, 1])
    dataset = td.TwinTripletDataset(images, couples(3), percentage)
    got = listed(dataset)
    assert len(set(got)) == len(got) == len(dataset)
    for pair in couples(3):
        maximum = brute_force(images, [pair])
        assert len(maximum & set(got)) == (percentage * len(maximum) + 99) // 100


def test_every_triplet_is_equally_likely_to_be_sampled():
    images, counts = people([2, 3]), Counter()
    for seed in range(2000):
        counts.update(listed(td.TwinTripletDataset(images, couples(1), 25, seed)))
    assert len(counts) == 18
    assert uniform(counts, brute_force(images, couples(1)), 2000 * 5)


def test_smaller_percentages_are_contained_in_larger_ones():
    samples = [set(listed(td.TwinTripletDataset(people([5, 6]), couples(1), p, seed=3))) for p in (5, 10, 30, 75, 100)]
    assert all(small < large for small, large in itertools.pairwise(samples))


def test_the_seed_decides_the_sample_and_other_pairs_do_not():
    images, pairs = people([6] * 4), couples(2)
    one, same, other = (listed(td.TwinTripletDataset(images, pairs, 10, seed)) for seed in (1, 1, 2))
    assert one == same != other
    alone = [td.TwinTripletDataset(images, [pair], 10, 1) for pair in pairs]
    backwards = td.TwinTripletDataset(images, pairs[::-1], 10, 1)
    assert set(one) == set(listed(backwards)) == {*listed(alone[0]), *listed(alone[1])}
    assert alone[0].triplets(range(36)).tolist() != alone[1].triplets(range(36)).tolist()  # nor are they the same


def test_a_person_with_one_image_serves_as_negative_only():
    dataset = td.TwinTripletDataset(people([3, 1, 1, 1]), couples(2))
    assert {negative for _, _, negative in listed(dataset)} == {"/crops/p1/0.png"}
    assert (dataset.pairs, dataset.n_skipped) == (couples(1), 1)
    assert len(dataset.images.paths) == 4  # images of skipped pairs are not even read
    with pytest.raises(InputError, match="no pair makes a triplet"):
        td.TwinTripletDataset(people([1, 1, 5, 0]), couples(2))


@pytest.mark.parametrize("percentage", [0, 101, -1, 1.5, float("nan"), True, "50"])
def test_wrong_percentages_are_refused(percentage):
    with pytest.raises(InputError, match="percentage must be an integer from 1 to 100"):
        td.TwinTripletDataset(people([2, 2]), couples(1), percentage)


def test_a_data_set_of_a_billion_triplets_is_built_in_seconds():
    images = people([80] * 2000)
    tracemalloc.start()
    began = time.process_time()
    dataset = td.TwinTripletDataset(images, couples(1000), 1)
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert dataset.n_possible == 1000 * 2 * 80 * 79 * 80
    assert len(dataset) == 1000 * ((2 * 80 * 79 * 80 + 99) // 100)
    assert peak < 500e6
    assert seconds < 5


def test_pair_by_pair_gives_the_same_triplets():
    dataset = td.TwinTripletDataset(people([4, 3, 2, 5]), [*couples(2), ("p1", "p3")], 30)
    got = np.concatenate([rows[triplets] for rows, triplets in dataset.by_pair(chunk=10)])
    assert listed(dataset, got) == listed(dataset)
    assert dataset.count_touched_images() == len({path for triplet in listed(dataset) for path in triplet})


def test_items_are_the_network_inputs_of_the_three_crops(write_crops):
    aligned, pairs = write_crops([[3, 2]])
    images = td.read_id_to_images(aligned)
    dataset = td.TwinTripletDataset(images, td.read_pairs(pairs, images)[0])
    for i in (0, len(dataset) - 1, -1):
        crops = [np.array(Image.open(path)) for path in listed(dataset)[i]]
        assert torch.equal(torch.stack(dataset[i]), to_input(np.stack(crops)))
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
    assert [x.shape for x in batch] == [(4, 3, 112, 112)] * 3


# ---- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_a_shuffled_epoch_visits_every_sampled_triplet_once_in_another_order(batch_size):
    dataset = td.TwinTripletDataset(people([4, 5, 3, 3]), couples(2), 40)
    epochs = [td.ShuffledSteps(dataset, epoch, batch_size) for epoch in (1, 1, 2)]
    first, same, second = ([listed(dataset, steps[i]) for i in range(len(steps))] for steps in epochs)
    for visited in (first, second):
        assert sorted(itertools.chain(*visited)) == sorted(listed(dataset))
        assert [len(step) for step in visited[:-1]] == [batch_size] * (-(-len(dataset) // batch_size) - 1)
    assert first == same != second
    assert listed(dataset, epochs[1][len(epochs[1]) // 2]) == first[len(first) // 2]  # any step without those before


def blocks_of(dataset, step):
    """[(pair, (paths of one twin's hand, paths of the other's)), ...] of a step of GroupedSteps.steps."""
    images, found = dataset.images, []
    for pair, hands in step:
        firsts = images.first[images.pairs[pair]]
        paths = [[images.paths[first + k] for k in hand] for first, hand in zip(firsts, hands, strict=True)]
        found.append((dataset.pairs[pair], paths))
    return found


FAMILIES = {  # images per person, pairs
    "equal twins": ([8] * 12, couples(6)),
    "several hands": ([20, 17, 9, 23, 30, 30, 1, 2], couples(4)),
    "families of three": ([10, 12, 8, 5, 4, 3], [*couples(3), ("p0", "p2"), ("p1", "p2")]),
    "one photograph": ([9, 1, 1, 2], couples(2)),
    "hundreds of photographs": ([300, 9, 3, 150], couples(2)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("percentage", [3, 100])
def test_grouped_steps_take_all_sampled_triplets_among_the_images_of_their_blocks(family, percentage):
    sizes, pairs = FAMILIES[family]
    dataset = td.TwinTripletDataset(people(sizes), pairs, percentage)
    steps, sampled = td.GroupedSteps(dataset, 1, 40), set(listed(dataset))
    for number, step in enumerate(steps.steps):
        expected = set()
        for pair, twins in blocks_of(dataset, step):
            expected |= brute_force(dict(zip(pair, twins, strict=True)), [pair]) & sampled
        assert sorted(listed(dataset, steps[number])) == sorted(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_images_of_a_person_are_dealt_into_hands_and_the_smaller_twin_lends_them_again(family):
    sizes, pairs = FAMILIES[family]
    dataset, hands = td.TwinTripletDataset(people(sizes), pairs), {pair: ([], []) for pair in pairs}
    for step in td.GroupedSteps(dataset, 1, 40).steps:
        for pair, twins in blocks_of(dataset, step):
            for dealt, hand in zip(hands[pair], twins, strict=True):
                dealt.append(tuple(hand))
    for pair, both in hands.items():
        for name, dealt in zip(pair, both, strict=True):
            assert sorted(itertools.chain(*set(dealt))) == sorted(people(sizes)[name])  # each image in one hand
            assert max(map(len, dealt)) <= td.HAND_SIZE == 8
            assert np.ptp(list(Counter(dealt).values())) <= 1
        assert len(both[0]) == len(both[1]) == max(len(set(dealt)) for dealt in both)


def test_a_grouped_epoch_embeds_each_image_of_equal_twins_about_once():
    rng = np.random.default_rng(1)
    for sizes in ([20] * 40, [20, 18] * 20, np.repeat(rng.integers(5, 60, 20), 2) + rng.integers(-2, 3, 40)):
        dataset = td.TwinTripletDataset(people(sizes), couples(20))
        steps = td.GroupedSteps(dataset, 1, 96).steps
        embedded = [sum(len(hand) for _, hands in step for hand in hands) for step in steps]
        assert sum(sizes) <= sum(embedded) <= 1.4 * sum(sizes)
        assert min(embedded[:-1]) > 96 - 2 * 8  # the next block had no room
        assert min(len({pair for pair, _ in step}) for step in steps[:-1]) > 1  # several families


def test_all_sampled_triplets_come_up_over_the_epochs():
    dataset = td.TwinTripletDataset(people([12, 9, 5, 17]), couples(2), 10)
    steps = (td.GroupedSteps(dataset, epoch, 96) for epoch in range(80))
    seen = Counter(triplet for epoch in steps for i in range(len(epoch)) for triplet in listed(dataset, epoch[i]))
    assert set(seen) == set(listed(dataset))


def test_grouped_epochs_are_up_to_seed_and_epoch():
    def epoch(number, seed=42):
        steps = td.GroupedSteps(td.TwinTripletDataset(people([20] * 8), couples(4), 100, seed), number, 40)
        return [steps[i].tolist() for i in range(len(steps))]

    assert epoch(1) == epoch(1)
    assert epoch(1) != epoch(2)
    assert epoch(1) != epoch(1, seed=7)


def test_a_step_with_room_for_no_block_is_refused_in_one_line():
    dataset = td.TwinTripletDataset(people([8] * 20), couples(10))
    assert [len(td.GroupedSteps(dataset, 1, room)) for room in (16, 31, 32, 47, 48)] == [10, 10, 5, 5, 4]
    with pytest.raises(InputError, match=r"^--images_per_batch must be at least 16.*$"):
        td.GroupedSteps(dataset, 1, 15)


# ---- families and splits --------------------------------------------------------------------------------------------


def test_families_are_connected_components_numbered_as_they_appear():
    families = td.find_families([("a", "b"), ("c", "d"), ("b", "e"), ("f", "c"), ("g", "h")])
    assert families == {"a": 0, "b": 0, "e": 0, "c": 1, "d": 1, "f": 1, "g": 2, "h": 2}


def test_twin_images_number_people_and_paths_in_the_order_of_the_pairs():
    images = td.TwinImages(people([2, 1, 3, 0]) | {"x": ["/x.png"]}, [("p2", "p0"), ("p3", "p1"), ("p1", "p2")])
    assert images.ids == ["p2", "p0", "p3", "p1"]
    assert images.paths == [path for name in images.ids for path in people([2, 1, 3, 0])[name]]
    assert [images.ids[i] for i in images.person] == [path.split("/")[2] for path in images.paths]
    assert (images.first.tolist(), images.count.tolist()) == ([0, 3, 5, 5], [3, 2, 0, 1])
    assert [tuple(images.ids[i] for i in pair) for pair in images.pairs] == [("p2", "p0"), ("p3", "p1"), ("p1", "p2")]
    assert images.family.tolist() == [0] * 6
    assert td.TwinImages(people([2, 1, 3, 1]), couples(2)).family.tolist() == [0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("seed", range(25))
def test_a_split_keeps_families_whole_and_comes_near_the_share(seed):
    rng, pairs = np.random.default_rng(seed), []
    for family in range(rng.integers(2, 12)):
        names = [f"{family}{letter}" for letter in "abcd"[: rng.choice([2, 2, 2, 3, 4])]]
        pairs += itertools.combinations(names, 2)
    share = rng.choice([0.01, 0.15, 0.3, 0.5, 0.95])
    train, val = td.split_pairs(pairs, share, seed)
    assert sorted(train + val) == sorted(pairs)
    family = td.find_families(pairs)
    sides = [{family[name] for pair in side for name in pair} for side in (train, val)]
    assert all(sides)
    assert not sides[0] & sides[1]
    largest = max(Counter(family[a] for a, _ in pairs).values())
    assert abs(len(val) - share * len(pairs)) <= largest / 2 or min(map(len, sides)) == 1
    assert (train, val) == td.split_pairs([list(pair) for pair in pairs], share, seed)  # lists, as in JSON


def test_the_seed_decides_which_families_validate():
    validations = [td.split_pairs(couples(20), 0.15, seed)[1] for seed in range(400)]
    assert {len(val) for val in validations} == {3}
    assert uniform(Counter(pair for val in validations for pair in val), couples(20), 400 * 3)


def test_a_single_family_has_no_validation():
    pairs = [("a", "b"), ("b", "c"), ("a", "c")]
    assert td.split_pairs(pairs, 0.5, 1) == (pairs, [])
    assert td.split_pairs([*pairs, ("x", "y")], 0, 1)[1] == []


def test_related_pairs_bind_families_without_being_split():
    for seed in range(10):
        train, val = td.split_pairs(couples(3), 0.34, seed, related=[("p1", "p2")])
        assert sorted(train + val) == couples(3)
        assert (("p0", "p1") in train) == (("p2", "p3") in train)


@pytest.mark.parametrize("share", [-0.1, 1, 2, float("nan")])
def test_wrong_shares_are_refused(share):
    with pytest.raises(InputError, match="validation_split must be at least 0 and below 1"):
        td.split_pairs(couples(2), share, 1)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "expected"),
        ("{}", "at least one ID"),
        ('{"a": "x.png"}', "images of ID 'a'"),
        ('{"a": [1]}', "images of ID 'a'"),
        ('{"a": ["x"], "a": ["y"]}', "key 'a' stands there twice"),
        ('{"a": [NaN]}', "the images of ID 'a' must be a list of paths"),
        ('{"é": []}'.encode("utf-16"), "not valid JSON: .*expected"),
        (None, 'No such file.*; expected a JSON file, {"ID": '),
    ],
)
def test_wrong_image_lists_are_refused_with_file_entry_and_form(tmp_path, text, message):
    if text is not None:
        (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=rf"x\.json: .*{message}"):
        td.read_id_to_images(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"expected \[\["),
        ([], "expected .* at least one pair"),
        ([["a", "b"], ["a"]], r"pair 2 is \['a'\]; expected two IDs"),
        ([["a", 1]], "pair 1 .*both strings"),
        ([["a", "b"], ["b", "b"]], "pair 2: ID 'b' is paired with itself"),
        ([["a", "nobody"]], "pair 1: ID 'nobody' has no images listed"),
    ],
)
def test_wrong_pair_lists_are_refused_with_file_entry_and_form(tmp_path, content, message):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"x\.json: {message}"):
        td.read_pairs(tmp_path / "x.json", {"a": ["x"], "b": []})


def test_repeated_pairs_are_used_once_with_a_count(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([["a", "b"], ["b", "a"], ["a", "b"], ["b", "c"]]))
    pairs, warnings = td.read_pairs(tmp_path / "x.json", dict.fromkeys("abc"))
    assert pairs == [("a", "b"), ("b", "c")]
    assert warnings == ["2 of 4 pairs are listed more than once; each is used once"]


def test_paths_are_relative_to_the_file_and_a_byte_order_mark_is_fine(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": ["b/c.png", "/d.png"], "e": []}), encoding="utf-8-sig")
    assert td.read_id_to_images(tmp_path / "x.json") == {"a": [str(tmp_path / "b/c.png"), "/d.png"], "e": []}


def test_json_is_written_whole_or_not_at_all(tmp_path):
    td.write_json(tmp_path / "x.json", {"a": [0.5, None]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        td.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert td.read_json(tmp_path / "x.json", "") == {"a": [0.5, None]}


# ---- crops ----------------------------------------------------------------------------------------------------------


def write_noise(folder, names):
    """Write one random crop per name, the same for the same capital letter; returns {name: path}."""
    paths = {name: str(folder / f"{name}.png") for name in names}
    for name, path in paths.items():
        pixels = np.random.default_rng(ord(name[0])).integers(0, 256, (112, 112, 3), np.uint8)
        Image.fromarray(pixels).save(path, compress_level=len(name))  # other bytes, same pixels
    return paths


def test_every_crop_is_read_once_and_hashed_by_its_pixels(tmp_path, monkeypatch):
    paths = [*write_noise(tmp_path, ["A", "B", "Aa"]).values()]
    decoded = [np.array(Image.open(path)) for path in paths]
    opened, open_ = Counter(), Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.update([path]) or open_(path))
    crops = td.load_crops([*paths, paths[0]])
    assert opened == Counter(paths)
    for path, pixels in zip(paths, decoded, strict=True):
        assert np.array_equal(crops.pixels[crops.row[path]], pixels)
        assert crops.sha256[crops.row[path]] == hashlib.sha256(pixels.tobytes()).hexdigest()
    dataset = td.TwinTripletDataset({"a": paths[:2], "b": paths[2:]}, [("a", "b")])
    assert all(dataset[i] for i in range(len(dataset)))
    assert torch.equal(dataset.pixels, crops.pixels)
    assert opened == Counter(paths * 2)  # once more for all items together


def test_an_image_is_what_its_pixels_are(tmp_path):
    path = write_noise(tmp_path, ["A", "Aa", "Aaa", "B", "Bb", "C"])

    def distinct(**lists):
        people = td.People({name: [path[k] for k in names] for name, names in lists.items()}, [tuple(lists)])
        return people.id_to_images, people.warnings

    images, warnings = distinct(one=["A", "B", "Aa", "A"], two=["C"])
    assert images == {"one": [path["A"], path["B"]], "two": [path["C"]]}
    assert warnings == ["2 images are the same as another of their ID; each is used once"]
    assert distinct(one=["A", "B"], two=["C"])[1] == distinct(one=["A", "B"], two=[])[1] == []
    warnings = distinct(one=["A", "Aa", "Aaa"], two=["B", "Bb"])[1]
    assert warnings[0] == "ID 'one': one and the same image under all 3 paths"
    assert warnings[1].startswith("3 images are the same")
    with pytest.raises(InputError, match=r"Aa\.png: .*ID 'two': the same image as .*/A\.png of ID 'one'"):
        distinct(one=["A", "B"], two=["Aa"])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_grey_palette_and_opaque_crops_are_read_as_rgb(tmp_path, mode):
    crop = Image.fromarray(np.random.default_rng(1).integers(0, 256, (112, 112, 3), np.uint8)).convert(mode)
    crop.save(tmp_path / "x.png")
    np.testing.assert_array_equal(td.read_crop(tmp_path / "x.png"), np.array(crop.convert("RGB")))


@pytest.mark.parametrize(("mode", "size"), [("RGB", (112, 100)), ("L", (100, 112)), ("I;16", (112, 112))])
def test_what_is_no_crop_is_refused_with_its_size_and_mode(tmp_path, mode, size):
    Image.new(mode, size).save(tmp_path / "x.png")
    with pytest.raises(InputError, match=rf"x\.png: {size[0]}x{size[1]} {mode}, but a crop is 112x112 RGB"):
        td.read_crop(tmp_path / "x.png")
