"""Triplets, steps, families, splits, files and crops, against brute force over the definitions."""

import hashlib
import io
import itertools
import json
import math
import time
import tracemalloc
import unicodedata
from argparse import Namespace
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.stats import chi2

import align
import net
import triplet_dataset as td
from net import InputError, to_input
from tests import synthetic


def people(sizes):
    """{ID: [path, ...]} of made-up paths: p0 has sizes[0] images, p1 has sizes[1], and so on."""
    images = {}
    for person, size in enumerate(sizes):
        images[f"p{person}"] = [f"/crops/p{person}/{image}.png" for image in range(size)]
    return images


def couples(n):
    """n pairs: p0 and p1, p2 and p3, ..."""
    return [(f"p{2 * i}", f"p{2 * i + 1}") for i in range(n)]


def brute_force(images, pairs):
    """All triplets by the words of the definition, as paths."""
    triplets = set()
    for a, b in pairs:
        for person, twin in ((a, b), (b, a)):
            for anchor, positive in itertools.permutations(images[person], 2):
                triplets |= {(anchor, positive, negative) for negative in images[twin]}
    return triplets


def paths_of(dataset, rows):
    """[(anchor's path, positive's, negative's), ...] of (K, 3) rows."""
    path = dataset.images.paths
    anchors, positives, negatives = rows.T.tolist()
    triplets = zip(anchors, positives, negatives, strict=True)
    return [(path[a], path[p], path[n]) for a, p, n in triplets]


def all_triplets(dataset):
    """All sampled triplets of a dataset, as paths."""
    return paths_of(dataset, dataset.triplets(np.arange(len(dataset))))


def come_up_equally_often(counts, cells):
    """Whether these cells have equal chances, by a chi-square test at 1 in 10,000."""
    expected = sum(counts.values()) / len(cells)
    statistic = sum((counts[cell] - expected) ** 2 / expected for cell in cells)
    return statistic < chi2.ppf(0.9999, len(cells) - 1)


# ---- triplets ------------------------------------------------------------------------------------


@pytest.fixture(params=range(8))
def random_people(request):
    """(images, pairs, dataset) of seven people, some without images; three are one family."""
    sizes = np.random.default_rng(request.param).integers(0, 6, 7)
    images = people(sizes)
    pairs = [*couples(3), ("p5", "p6"), ("p4", "p6")]
    return images, pairs, td.TwinTripletDataset(images, pairs, seed=request.param)


def test_all_triplets_equal_brute_force(random_people):
    images, pairs, dataset = random_people
    triplets = all_triplets(dataset)
    expected = brute_force(images, pairs)
    assert set(triplets) == expected
    assert len(triplets) == len(expected)


def test_the_length_is_the_number_of_triplets(random_people):
    images, pairs, dataset = random_people
    n = len(brute_force(images, pairs))
    assert len(dataset) == n
    assert dataset.n_possible == n


def test_pairs_without_a_triplet_are_skipped_and_counted(random_people):
    images, pairs, dataset = random_people
    assert dataset.pairs == [pair for pair in pairs if brute_force(images, [pair])]
    assert dataset.n_skipped == len(pairs) - len(dataset.pairs)


def rows_of_all_possible_triplets(dataset):
    """{(anchor's row, positive's, negative's), ...}, by the words of the definition."""
    images = dict(zip(dataset.images.ids, range(len(dataset.images.ids)), strict=True))
    rows = {name: np.flatnonzero(dataset.images.person == i) for name, i in images.items()}
    return brute_force(rows, dataset.pairs)


@pytest.mark.parametrize("percentage", [1, 60, 100])
@pytest.mark.parametrize("pairs", [couples(3), [("p0", "p1"), ("p2", "p0"), ("p1", "p2")]])
def test_triplet_numbers_tell_all_possible_triplets_apart(pairs, percentage):
    dataset = td.TwinTripletDataset(people([4, 3, 5, 1, 2, 2]), pairs, percentage)
    triplets = rows_of_all_possible_triplets(dataset)
    numbers = dataset.triplet_numbers(np.array(sorted(triplets)))
    assert len(triplets) == dataset.n_possible
    assert len(set(numbers.tolist())) == dataset.n_possible


@pytest.mark.parametrize("percentage", [1, 7, 50, 99, 100])
def test_a_percentage_takes_its_share_of_every_pair_without_replacement(percentage):
    images = people([4, 3, 5, 5, 2, 1])
    dataset = td.TwinTripletDataset(images, couples(3), percentage)
    triplets = all_triplets(dataset)
    assert len(set(triplets)) == len(triplets) == len(dataset)
    for pair in couples(3):
        of_the_pair = brute_force(images, [pair])
        n_sampled = len(of_the_pair & set(triplets))
        assert n_sampled == (percentage * len(of_the_pair) + 99) // 100


def test_every_triplet_is_equally_likely_to_be_sampled():
    images = people([2, 3])
    counts = Counter()
    for seed in range(2000):
        dataset = td.TwinTripletDataset(images, couples(1), 25, seed)
        counts.update(all_triplets(dataset))
    assert sum(counts.values()) == 2000 * 5
    assert len(counts) == 18
    assert come_up_equally_often(counts, brute_force(images, couples(1)))


def test_smaller_percentages_are_contained_in_larger_ones():
    samples = []
    for percentage in (5, 10, 30, 75, 100):
        dataset = td.TwinTripletDataset(people([5, 6]), couples(1), percentage, seed=3)
        samples.append(set(all_triplets(dataset)))
    for smaller, larger in itertools.pairwise(samples):
        assert smaller < larger


def sample(pairs, seed):
    """10 % of the triplets of pairs of people with six images each, as paths."""
    return all_triplets(td.TwinTripletDataset(people([6] * 4), pairs, 10, seed))


def test_the_seed_decides_the_sample():
    assert sample(couples(2), seed=1) == sample(couples(2), seed=1)
    assert sample(couples(2), seed=1) != sample(couples(2), seed=2)


def test_other_pairs_and_their_order_do_not_change_the_sample_of_a_pair():
    first, second = couples(2)
    together = set(sample([first, second], seed=1))
    assert together == set(sample([second, first], seed=1))
    assert together == {*sample([first], seed=1), *sample([second], seed=1)}


def test_two_pairs_of_equal_sizes_have_different_samples():
    rows = []
    for pair in couples(2):
        dataset = td.TwinTripletDataset(people([6] * 4), [pair], 10, 1)
        rows.append(dataset.triplets(range(36)).tolist())
    assert rows[0] != rows[1]


def test_a_person_with_one_image_serves_as_negative_only():
    dataset = td.TwinTripletDataset(people([3, 1, 1, 1]), couples(2))
    assert {negative for _, _, negative in all_triplets(dataset)} == {"/crops/p1/0.png"}


def test_images_of_skipped_pairs_are_not_read():
    dataset = td.TwinTripletDataset(people([3, 1, 1, 1]), couples(2))
    assert dataset.pairs == couples(1)
    assert dataset.n_skipped == 1
    assert len(dataset.images.paths) == 4


def test_people_without_a_triplet_are_refused():
    with pytest.raises(InputError, match="no pair makes a triplet"):
        td.TwinTripletDataset(people([1, 1, 5, 0]), couples(2))


@pytest.mark.parametrize("percentage", [0, 101, -1, 1.5, float("nan"), True, "50"])
def test_wrong_percentages_are_refused(percentage):
    with pytest.raises(InputError, match="percentage must be an integer from 1 to 100"):
        td.TwinTripletDataset(people([2, 2]), couples(1), percentage)


def test_a_data_set_of_a_billion_triplets_is_built_in_seconds():
    images = people([80] * 2000)
    tracemalloc.start()
    start = time.process_time()
    dataset = td.TwinTripletDataset(images, couples(1000), 1)
    seconds = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    of_a_pair = 2 * 80 * 79 * 80
    assert dataset.n_possible == 1000 * of_a_pair
    assert len(dataset) == 1000 * ((of_a_pair + 99) // 100)
    assert peak < 500e6
    assert seconds < 5


@pytest.mark.parametrize("percentage", [1, 10, 100])
def test_a_pair_of_a_thousand_images_each_takes_no_memory_per_triplet(percentage):
    tracemalloc.start()
    dataset = td.TwinTripletDataset(people([1000, 1000]), couples(1), percentage)
    for batch_size in (None, 64):
        steps = dataset.steps(1, 96, batch_size)
        assert len(steps[0]) > 0
    n_touched = dataset.count_touched_images()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == 2 * 1000 * 999 * 1000 * percentage // 100
    assert n_touched == 2000
    assert peak < 500e6


def test_ids_that_are_not_utf_8_have_a_sample_of_their_own():
    images = {"caf\udce9": ["/a/0.png", "/a/1.png"], "\udcff": ["/b/0.png", "/b/1.png"]}
    dataset = td.TwinTripletDataset(images, [tuple(images)], 50)
    triplets = all_triplets(dataset)
    assert len(set(triplets)) == 4
    assert set(triplets) < brute_force(images, [tuple(images)])


# ---- the shuffled order of a sample --------------------------------------------------------------


SIZES = [*range(1, 70), 255, 256, 257, 1000, 4097]


def order_of(shuffle, pair):
    """The whole shuffled order of a pair's numbers, as a list."""
    places = np.arange(int(shuffle.sizes[pair]))
    return shuffle.number_at(pair, places).tolist()


def test_a_shuffle_is_a_bijection_for_every_size():
    shuffle = td.Shuffle(SIZES, [[1, size] for size in SIZES])
    for pair, size in enumerate(SIZES):
        assert sorted(order_of(shuffle, pair)) == list(range(size))


def test_the_place_of_a_number_is_the_inverse_of_the_number_at_a_place():
    shuffle = td.Shuffle(SIZES, [[1, size] for size in SIZES])
    for pair, size in enumerate(SIZES):
        places = np.arange(size)
        numbers = shuffle.number_at(pair, places)
        assert np.array_equal(shuffle.place_of(pair, numbers), places)
        assert np.array_equal(shuffle.number_at(pair, shuffle.place_of(pair, places)), places)


def test_a_shuffle_takes_the_places_of_several_pairs_at_once():
    sizes = [5, 1000, 17]
    shuffle = td.Shuffle(sizes, [[1], [2], [3]])
    pairs = np.array([0, 2, 1, 1, 0])
    places = np.array([4, 16, 999, 0, 2])
    expected = []
    for pair, place in zip(pairs, places, strict=True):
        expected.append(order_of(shuffle, pair)[place])
    numbers = shuffle.number_at(pairs, places)
    assert numbers.tolist() == expected
    assert shuffle.place_of(pairs, numbers).tolist() == places.tolist()


def test_a_shuffle_works_on_numbers_beyond_32_bits():
    n = 10**13 + 7
    shuffle = td.Shuffle([n], [[1]])
    places = np.concatenate([np.arange(1000), n - 1 - np.arange(1000)])
    numbers = shuffle.number_at(0, places)
    assert numbers.min() >= 0
    assert numbers.max() < n
    assert len(set(numbers.tolist())) == len(places)
    assert np.array_equal(shuffle.place_of(0, numbers), places)


def test_the_seed_decides_the_shuffled_order():
    shuffle = td.Shuffle([50, 50, 50], [[1, 7], [1, 7], [1, 8]])
    assert order_of(shuffle, 0) == order_of(shuffle, 1)
    assert order_of(shuffle, 0) != order_of(shuffle, 2)


@pytest.mark.parametrize("size", [2, 3, 5, 12, 17])
def test_every_number_is_equally_likely_at_every_place(size):
    n_seeds = 2000
    shuffle = td.Shuffle([size] * n_seeds, [[seed] for seed in range(n_seeds)])
    for place in (0, size // 2, size - 1):
        numbers = shuffle.number_at(np.arange(n_seeds), np.full(n_seeds, place))
        assert come_up_equally_often(Counter(numbers.tolist()), range(size))


@pytest.mark.parametrize("size", [3, 4, 5])
def test_every_two_numbers_are_equally_likely_to_be_sampled_together(size):
    n_seeds = 2000
    shuffle = td.Shuffle([size] * n_seeds, [[seed] for seed in range(n_seeds)])
    seeds = np.arange(n_seeds)
    first = shuffle.number_at(seeds, np.zeros(n_seeds, int))
    second = shuffle.number_at(seeds, np.ones(n_seeds, int))
    samples = Counter(zip(first.tolist(), second.tolist(), strict=True))
    assert come_up_equally_often(samples, list(itertools.permutations(range(size), 2)))


# ---- the images of sampled triplets --------------------------------------------------------------


@pytest.mark.parametrize("percentage", [1, 5, 30, 100])
def test_touched_images_are_those_of_sampled_triplets(percentage, monkeypatch):
    monkeypatch.setattr(td, "TRIPLETS_AT_ONCE", 2)
    dataset = td.TwinTripletDataset(people([4, 3, 2, 5]), couples(2), percentage)
    touched = set(itertools.chain(*all_triplets(dataset)))
    assert dataset.count_touched_images() == len(touched)


# ---- items ---------------------------------------------------------------------------------------


@pytest.fixture
def dataset_of_crops(write_crops):
    """A dataset whose crops are files."""
    aligned, pairs = write_crops([[3, 2]])
    images = td.read_id_to_images(aligned)
    return td.TwinTripletDataset(images, td.read_pairs(pairs, images)[0])


def test_items_are_the_network_inputs_of_the_three_crops(dataset_of_crops):
    triplets = all_triplets(dataset_of_crops)
    for i in (0, len(dataset_of_crops) - 1, -1):
        crops = np.stack([np.array(Image.open(path)) for path in triplets[i]])
        assert torch.equal(torch.stack(dataset_of_crops[i]), to_input(crops))


def test_an_item_behind_the_last_is_an_index_error(dataset_of_crops):
    with pytest.raises(IndexError):
        dataset_of_crops[len(dataset_of_crops)]


def test_pytorchs_loader_makes_batches_of_items(dataset_of_crops):
    batch = next(iter(torch.utils.data.DataLoader(dataset_of_crops, batch_size=4)))
    assert [x.shape for x in batch] == [(4, 3, 112, 112)] * 3


# ---- shuffled steps ------------------------------------------------------------------------------


@pytest.fixture(params=[1, 7, 1000])
def shuffled_epochs(request):
    """(dataset, batch size, epoch 1, epoch 1 again, epoch 2), epochs as ShuffledSteps."""
    dataset = td.TwinTripletDataset(people([4, 5, 3, 3]), couples(2), 40)
    epochs = [td.ShuffledSteps(dataset, epoch, request.param) for epoch in (1, 1, 2)]
    return dataset, request.param, *epochs


def paths_of_steps(steps):
    """The triplets of all steps of an epoch, as a list of paths for each."""
    return [paths_of(steps.dataset, steps[i]) for i in range(len(steps))]


def test_a_shuffled_epoch_visits_every_sampled_triplet_once(shuffled_epochs):
    dataset, _, first, _, second = shuffled_epochs
    for steps in (first, second):
        visited = itertools.chain(*paths_of_steps(steps))
        assert sorted(visited) == sorted(all_triplets(dataset))


def test_all_shuffled_steps_but_the_last_have_the_batch_size(shuffled_epochs):
    dataset, batch_size, first, _, second = shuffled_epochs
    n_steps = math.ceil(len(dataset) / batch_size)
    for steps in (first, second):
        sizes = [len(step) for step in paths_of_steps(steps)]
        assert sizes[:-1] == [batch_size] * (n_steps - 1)


def test_the_order_of_a_shuffled_epoch_is_up_to_its_number(shuffled_epochs):
    _, _, first, same, second = shuffled_epochs
    assert paths_of_steps(first) == paths_of_steps(same)
    assert paths_of_steps(first) != paths_of_steps(second)


def test_a_shuffled_step_does_not_need_those_before_it(shuffled_epochs):
    dataset, _, first, same, _ = shuffled_epochs
    middle = len(first) // 2
    assert paths_of(dataset, same[middle]) == paths_of_steps(first)[middle]


# ---- grouped steps -------------------------------------------------------------------------------


FAMILIES = {  # images per person, pairs
    "equal twins": ([8] * 12, couples(6)),
    "several groups": ([20, 17, 9, 23, 30, 30, 1, 2], couples(4)),
    "families of three": ([10, 12, 8, 5, 4, 3], [*couples(3), ("p0", "p2"), ("p1", "p2")]),
    "one photograph": ([9, 1, 1, 2], couples(2)),
    "hundreds of photographs": ([300, 9, 3, 150], couples(2)),
}


def blocks_of(steps):
    """For each step of GroupedSteps, its blocks: [(pair, (group, twin's group)), ...] of paths."""
    images = steps.dataset.images
    blocks_of_steps = []
    for blocks in steps.steps:
        with_paths = []
        for number, groups in blocks:
            first_rows = images.first[images.pairs[number]]
            paths = []
            for first_row, group in zip(first_rows, groups, strict=True):
                paths.append([images.paths[first_row + position] for position in group])
            with_paths.append((steps.dataset.pairs[number], paths))
        blocks_of_steps.append(with_paths)
    return blocks_of_steps


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("percentage", [3, 100])
def test_grouped_steps_take_all_sampled_triplets_among_the_images_of_their_blocks(
    family, percentage
):
    sizes, pairs = FAMILIES[family]
    dataset = td.TwinTripletDataset(people(sizes), pairs, percentage)
    sampled = set(all_triplets(dataset))
    steps = td.GroupedSteps(dataset, 1, 40)
    for number, blocks in enumerate(blocks_of(steps)):
        expected = set()
        for pair, groups in blocks:
            images = dict(zip(pair, groups, strict=True))
            expected |= brute_force(images, [pair]) & sampled
        assert sorted(paths_of(dataset, steps[number])) == sorted(expected)


class GroupedTwin(NamedTuple):
    """One twin of a pair: all images, and the groups of them that meet the other in an epoch."""

    images: list
    groups: list


@pytest.fixture(scope="module", params=FAMILIES)
def grouped_pairs(request):
    """The two GroupedTwins of each pair."""
    sizes, pairs = FAMILIES[request.param]
    images = people(sizes)
    grouped = {(a, b): (GroupedTwin(images[a], []), GroupedTwin(images[b], [])) for a, b in pairs}
    steps = td.GroupedSteps(td.TwinTripletDataset(images, pairs), 1, 40)
    for blocks in blocks_of(steps):
        for pair, groups in blocks:
            for twin, group in zip(grouped[pair], groups, strict=True):
                twin.groups.append(tuple(group))
    return list(grouped.values())


@pytest.fixture
def grouped_twins(grouped_pairs):
    return list(itertools.chain(*grouped_pairs))


def test_each_image_of_a_person_is_in_one_group(grouped_twins):
    for twin in grouped_twins:
        in_groups = itertools.chain(*set(twin.groups))
        assert sorted(in_groups) == sorted(twin.images)


def test_a_group_has_at_most_eight_images(grouped_twins):
    assert td.GROUP_SIZE == 8
    for twin in grouped_twins:
        assert max(len(group) for group in twin.groups) <= 8


def test_the_groups_of_the_twin_with_fewer_repeat_evenly(grouped_twins):
    for twin in grouped_twins:
        repetitions = Counter(twin.groups).values()
        assert max(repetitions) - min(repetitions) <= 1


def test_a_pair_has_as_many_blocks_as_the_twin_with_more_groups(grouped_pairs):
    for first, second in grouped_pairs:
        n_blocks = max(len(set(first.groups)), len(set(second.groups)))
        assert len(first.groups) == n_blocks
        assert len(second.groups) == n_blocks


def sizes_of_twins_that_differ_little():
    rng = np.random.default_rng(1)
    of_first_twins = rng.integers(5, 60, 20)
    return np.repeat(of_first_twins, 2) + rng.integers(-2, 3, 40)


@pytest.fixture(params=["equal twins", "almost equal twins", "twins of many sizes"])
def epoch_of_twins(request):
    """(images per person, the blocks of each step) of an epoch with 96 images a step."""
    sizes = {
        "equal twins": [20] * 40,
        "almost equal twins": [20, 18] * 20,
        "twins of many sizes": sizes_of_twins_that_differ_little(),
    }[request.param]
    dataset = td.TwinTripletDataset(people(sizes), couples(20))
    return sizes, td.GroupedSteps(dataset, 1, 96).steps


def images_per_step(steps):
    counts = []
    for blocks in steps:
        counts.append(sum(len(group) for _, groups in blocks for group in groups))
    return counts


def test_a_grouped_epoch_embeds_each_image_of_equal_twins_about_once(epoch_of_twins):
    sizes, steps = epoch_of_twins
    assert sum(sizes) <= sum(images_per_step(steps)) <= 1.4 * sum(sizes)


def test_all_grouped_steps_but_the_last_are_full(epoch_of_twins):
    _, steps = epoch_of_twins
    assert max(images_per_step(steps)) <= 96
    assert min(images_per_step(steps)[:-1]) > 96 - 2 * 8  # the next block had no room


def test_a_grouped_step_holds_several_families(epoch_of_twins):
    _, steps = epoch_of_twins
    for blocks in steps[:-1]:
        assert len({pair for pair, _ in blocks}) > 1


def test_all_sampled_triplets_come_up_over_the_epochs():
    dataset = td.TwinTripletDataset(people([12, 9, 5, 17]), couples(2), 10)
    seen = set()
    for epoch in range(80):
        for step in paths_of_steps(td.GroupedSteps(dataset, epoch, 96)):
            seen.update(step)
    assert seen == set(all_triplets(dataset))


def test_grouped_epochs_are_up_to_seed_and_epoch():
    def rows_of_steps(epoch, seed):
        dataset = td.TwinTripletDataset(people([20] * 8), couples(4), 100, seed)
        steps = td.GroupedSteps(dataset, epoch, 40)
        return [steps[i].tolist() for i in range(len(steps))]

    expected = rows_of_steps(epoch=1, seed=42)
    assert rows_of_steps(epoch=1, seed=42) == expected
    assert rows_of_steps(epoch=2, seed=42) != expected
    assert rows_of_steps(epoch=1, seed=7) != expected


@pytest.mark.parametrize(
    ("images_per_batch", "n_steps"), [(16, 10), (31, 10), (32, 5), (47, 5), (48, 4)]
)
def test_a_step_takes_as_many_blocks_as_have_room(images_per_batch, n_steps):
    dataset = td.TwinTripletDataset(people([8] * 20), couples(10))
    assert len(td.GroupedSteps(dataset, 1, images_per_batch)) == n_steps


def test_a_batch_size_chooses_shuffled_steps():
    dataset = td.TwinTripletDataset(people([8] * 20), couples(10))
    assert isinstance(dataset.steps(1, 96, batch_size=8), td.ShuffledSteps)
    assert isinstance(dataset.steps(1, 96), td.GroupedSteps)


# ---- families ------------------------------------------------------------------------------------


def test_families_are_connected_components_numbered_as_they_appear():
    pairs = [("a", "b"), ("c", "d"), ("b", "e"), ("f", "c"), ("g", "h")]
    expected = {"a": 0, "b": 0, "e": 0, "c": 1, "d": 1, "f": 1, "g": 2, "h": 2}
    assert td.find_families(pairs) == expected


@pytest.fixture
def three_siblings():
    """(images, TwinImages) of people of whom one has no image; one other is in no pair."""
    images = people([2, 1, 3, 0])
    pairs = [("p2", "p0"), ("p3", "p1"), ("p1", "p2")]
    return images, td.TwinImages(images | {"x": ["/x.png"]}, pairs)


def test_twin_images_number_people_in_the_order_of_the_pairs(three_siblings):
    _, twin_images = three_siblings
    assert twin_images.ids == ["p2", "p0", "p3", "p1"]
    names = [(twin_images.ids[a], twin_images.ids[b]) for a, b in twin_images.pairs]
    assert names == [("p2", "p0"), ("p3", "p1"), ("p1", "p2")]


def test_twin_images_list_paths_person_after_person(three_siblings):
    images, twin_images = three_siblings
    paths = [path for name in ("p2", "p0", "p3", "p1") for path in images[name]]
    assert twin_images.paths == paths
    assert twin_images.first.tolist() == [0, 3, 5, 5]
    assert twin_images.count.tolist() == [3, 2, 0, 1]


def test_twin_images_know_whose_each_image_is(three_siblings):
    _, twin_images = three_siblings
    owners = [twin_images.ids[person] for person in twin_images.person]
    assert owners == [path.split("/")[2] for path in twin_images.paths]


def test_twin_images_know_the_family_of_each_image(three_siblings):
    _, twin_images = three_siblings
    assert twin_images.family.tolist() == [0] * 6
    two_families = td.TwinImages(people([2, 1, 3, 1]), couples(2))
    assert two_families.family.tolist() == [0, 0, 0, 1, 1, 1, 1]


# ---- splits --------------------------------------------------------------------------------------


def random_pairs(rng):
    """The pairs of 2 to 11 families of two to four siblings."""
    pairs = []
    for family in range(rng.integers(2, 12)):
        n_siblings = rng.choice([2, 2, 2, 3, 4])
        siblings = [f"{family}{letter}" for letter in "abcd"[:n_siblings]]
        pairs += itertools.combinations(siblings, 2)
    return pairs


@pytest.fixture(params=range(25))
def random_split(request):
    """(pairs, share, seed, training pairs, validation pairs)."""
    rng = np.random.default_rng(request.param)
    pairs = random_pairs(rng)
    share = rng.choice([0.01, 0.15, 0.3, 0.5, 0.95])
    return pairs, share, request.param, *td.split_pairs(pairs, share, request.param)


def families_of(side, pairs):
    """The families of the pairs on one side of a split, by their numbers among all pairs."""
    family = td.find_families(pairs)
    return {family[name] for pair in side for name in pair}


def test_each_pair_is_on_one_side_of_a_split(random_split):
    pairs, _, _, train, val = random_split
    assert sorted(train + val) == sorted(pairs)


def test_a_split_keeps_families_whole(random_split):
    pairs, _, _, train, val = random_split
    assert not families_of(train, pairs) & families_of(val, pairs)


def test_each_side_of_a_split_has_a_family(random_split):
    _, _, _, train, val = random_split
    assert train
    assert val


def test_a_split_comes_near_the_share(random_split):
    pairs, share, _, train, val = random_split
    family = td.find_families(pairs)
    largest = max(Counter(family[first] for first, _ in pairs).values())
    is_near = abs(len(val) - share * len(pairs)) <= largest / 2
    smaller_side = min(len(families_of(train, pairs)), len(families_of(val, pairs)))
    assert is_near or smaller_side == 1


def test_a_split_takes_pairs_as_lists_as_json_has_them(random_split):
    pairs, share, seed, train, val = random_split
    assert td.split_pairs([list(pair) for pair in pairs], share, seed) == (train, val)


def test_the_seed_decides_which_families_validate():
    counts = Counter()
    for seed in range(400):
        _, val = td.split_pairs(couples(20), 0.15, seed)
        assert len(val) == 3
        counts.update(val)
    assert come_up_equally_often(counts, couples(20))


def test_a_single_family_has_no_validation():
    pairs = [("a", "b"), ("b", "c"), ("a", "c")]
    assert td.split_pairs(pairs, 0.5, 1) == (pairs, [])


def test_a_share_of_zero_has_no_validation():
    pairs = [("a", "b"), ("b", "c"), ("a", "c"), ("x", "y")]
    assert td.split_pairs(pairs, 0, 1) == (pairs, [])


@pytest.mark.parametrize("seed", range(10))
def test_related_pairs_join_families_without_being_split(seed):
    train, val = td.split_pairs(couples(3), 0.34, seed, related=[("p1", "p2")])
    assert sorted(train + val) == couples(3)
    assert (("p0", "p1") in train) == (("p2", "p3") in train)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
def test_people_who_must_not_validate_never_do(share, seed):
    train, val = td.split_pairs(couples(5), share, seed, never_validate={"p1", "p4", "stranger"})
    assert sorted(train + val) == couples(5)
    assert {("p0", "p1"), ("p4", "p5")} <= set(train)
    assert val


@pytest.mark.parametrize("seed", range(10))
def test_a_person_in_a_related_pair_keeps_the_family_from_validation(seed):
    related = [("p1", "sister")]
    train, val = td.split_pairs(couples(3), 0.5, seed, related, never_validate={"sister"})
    assert ("p0", "p1") in train
    assert val


def test_other_families_validate_as_before_where_nobody_is_kept_from_it():
    expected = td.split_pairs(couples(20), 0.3, 1)
    assert td.split_pairs(couples(20), 0.3, 1, never_validate={"stranger"}) == expected


def test_if_nobody_may_validate_there_is_no_validation():
    everyone = {name for pair in couples(3) for name in pair}
    assert td.split_pairs(couples(3), 0.5, 1, never_validate=everyone) == (couples(3), [])


@pytest.mark.parametrize("share", [-0.1, 1, 2, float("nan")])
def test_wrong_shares_are_refused(share):
    with pytest.raises(InputError, match="validation_split must be at least 0 and below 1"):
        td.split_pairs(couples(2), share, 1)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "expected"),
        (b"{}", "at least one ID"),
        (b'{"a": "x.png"}', "images of ID 'a'"),
        (b'{"a": [1]}', "images of ID 'a'"),
        (b'{"a": ["x"], "a": ["y"]}', "the key 'a' is there twice"),
        (b'{"a": [NaN]}', "the images of ID 'a' must be a list of paths"),
        ('{"é": []}'.encode("utf-16"), "not valid JSON: .*expected"),
    ],
)
def test_wrong_image_lists_are_refused_with_file_entry_and_form(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.json: .*{message}"):
        td.read_id_to_images(tmp_path / "x.json")


def test_a_missing_image_list_is_refused_with_file_and_form(tmp_path):
    message = r'x\.json: .*No such file.*; expected a JSON file, {"ID": '
    with pytest.raises(InputError, match=message):
        td.read_id_to_images(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"expected \[\["),
        ([], "expected .* at least one pair"),
        ([["a", "b"], ["a"]], r"pair 2 is \['a'\]; expected two IDs"),
        ([["a", 1]], r"pair 1 is \['a', 1\]; expected two IDs, both strings"),
        ([["a", "b"], ["b", "b"]], "pair 2: ID 'b' is paired with itself"),
        ([["a", "nobody"]], "pair 1: ID 'nobody' has no images listed"),
    ],
)
def test_wrong_pair_lists_are_refused_with_file_entry_and_form(tmp_path, content, message):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"x\.json: {message}"):
        td.read_pairs(tmp_path / "x.json", {"a": ["x"], "b": []})


def test_repeated_pairs_are_used_once_with_a_count(tmp_path):
    content = [["a", "b"], ["b", "a"], ["a", "b"], ["b", "c"]]
    (tmp_path / "x.json").write_text(json.dumps(content))
    pairs, warnings = td.read_pairs(tmp_path / "x.json", {"a": [], "b": [], "c": []})
    assert pairs == [("a", "b"), ("b", "c")]
    assert warnings == ["2 of 4 pairs repeat an earlier one; each is used once"]


def test_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": ["b/c.png", "/d.png"], "e": []}))
    expected = {"a": [str(tmp_path / "b/c.png"), "/d.png"], "e": []}
    assert td.read_id_to_images(tmp_path / "x.json") == expected


def test_a_byte_order_mark_is_fine(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": ["/d.png"]}), encoding="utf-8-sig")
    assert td.read_id_to_images(tmp_path / "x.json") == {"a": ["/d.png"]}


COMPOSED = unicodedata.normalize("NFC", "Zo\u00eb")
DECOMPOSED = unicodedata.normalize("NFD", "Zo\u00eb")  # as names from a Mac are spelled


@pytest.mark.parametrize("there", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("listed", [COMPOSED, DECOMPOSED])
def test_a_path_with_accents_is_found_in_either_spelling(tmp_path, there, listed):
    (tmp_path / there).mkdir()
    (tmp_path / there / f"{there}.png").write_bytes(b"")
    (tmp_path / "x.json").write_text(json.dumps({"a": [f"{listed}/{listed}.png"]}))
    (path,) = td.read_id_to_images(tmp_path / "x.json")["a"]
    assert path == str(tmp_path / there / f"{there}.png")


def test_of_two_files_that_look_the_same_the_one_that_is_listed_is_taken(tmp_path):
    for name in (COMPOSED, DECOMPOSED):
        (tmp_path / name).write_bytes(b"")
    for name in (COMPOSED, DECOMPOSED):
        assert td.resolve(tmp_path, name) == str(tmp_path / name)


@pytest.mark.parametrize("ending", ["json", "csv"])
@pytest.mark.parametrize("listed", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("paired", [COMPOSED, DECOMPOSED])
def test_an_id_with_accents_is_one_id_in_either_spelling(tmp_path, listed, paired, ending):
    (tmp_path / "images.json").write_text(json.dumps({listed: ["x.png"], "b": ["y.png"]}))
    images = td.read_id_to_images(tmp_path / "images.json")
    assert list(images) == [COMPOSED, "b"]
    content = {"json": json.dumps([[paired, "b"]]), "csv": f"{paired},b\n"}[ending]
    (tmp_path / f"pairs.{ending}").write_text(content, encoding="utf-8")
    assert td.read_pairs(tmp_path / f"pairs.{ending}", images) == ([(COMPOSED, "b")], [])


def test_the_first_line_of_a_csv_file_is_no_title_if_its_ids_are_decomposed(tmp_path):
    (tmp_path / "x.csv").write_text(f"{DECOMPOSED},{DECOMPOSED}2\na,b\n", encoding="utf-8")
    images = dict.fromkeys([COMPOSED, f"{COMPOSED}2", "a", "b"], ())
    pairs, _ = td.read_pairs(tmp_path / "x.csv", images)
    assert pairs == [(COMPOSED, f"{COMPOSED}2"), ("a", "b")]


@pytest.mark.parametrize(("titles", "n_notes"), [("", 0), ("id,twin\n", 1)])
def test_a_first_line_that_is_taken_for_titles_is_said(tmp_path, titles, n_notes):
    (tmp_path / "x.csv").write_text(f"{titles}a,b\n")
    pairs, notes = td.read_pairs(tmp_path / "x.csv", {"a": [], "b": []})
    assert pairs == [("a", "b")]
    assert notes == [f"{tmp_path}/x.csv: the first line, id,twin, is taken for titles"] * n_notes


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_table_in_another_encoding_says_which_one_is_expected(tmp_path, encoding):
    (tmp_path / "x.csv").write_text("Jürgen,Jörg\n", encoding=encoding)
    with pytest.raises(InputError, match=r"x\.csv: .*expected a CSV file in UTF-8"):
        td.read_pairs(tmp_path / "x.csv", {"Jürgen": [], "Jörg": []})


def test_an_id_in_both_spellings_is_refused_for_the_user_to_merge(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({COMPOSED: ["x"], DECOMPOSED: ["y"]}))
    with pytest.raises(InputError, match=r"x\.json: ID .* is there in two spellings; merge"):
        td.read_id_to_images(tmp_path / "x.json")


# ---- folders and tables --------------------------------------------------------------------------


@pytest.fixture
def folder_of_people(tmp_path):
    """Two people with photographs, one with none, and what systems and people leave beside them."""
    names = ["Anna/2.JPG", "Anna/1.png", "Berta/x.webp", "Berta/.DS_Store", "Berta/._x.jpg"]
    names += ["Anna/notes.txt", "Anna/raw/1.jpg", "Carla/readme.md", "group.jpg", ".trash/1.jpg"]
    for name in names:
        path = tmp_path / "people" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path / "people"


def test_a_folder_of_people_lists_each_folder_as_an_id_with_its_images(folder_of_people):
    assert td.read_id_to_images(folder_of_people) == {
        "Anna": [str(folder_of_people / "Anna/1.png"), str(folder_of_people / "Anna/2.JPG")],
        "Berta": [str(folder_of_people / "Berta/x.webp")],
        "Carla": [],
    }


def test_a_folder_of_people_gives_full_paths(folder_of_people, monkeypatch):
    monkeypatch.chdir(folder_of_people.parent)
    expected = td.read_id_to_images(folder_of_people)
    assert td.read_id_to_images("people") == expected


def test_heic_photographs_are_listed_though_nothing_can_read_them(folder_of_people):
    (folder_of_people / "Carla" / "IMG_1.HEIC").write_bytes(b"")
    listed = td.read_id_to_images(folder_of_people)
    assert listed["Carla"] == [str(folder_of_people / "Carla/IMG_1.HEIC")]


def test_all_other_files_of_a_folder_of_people_are_counted(folder_of_people):
    listed = td.read_id_to_images(folder_of_people)
    n_listed = sum(len(images) for images in listed.values())
    n_files = sum(path.is_file() for path in folder_of_people.rglob("*"))
    assert (n_files, n_listed) == (10, 3)
    kinds = td.count_other_files(folder_of_people)
    assert sum(kinds.values()) == 7
    assert kinds == {".jpg": 4, ".txt": 1, ".md": 1, ".DS_Store": 1}


def test_a_folder_without_a_photograph_of_anyone_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    (tmp_path / "Anna").mkdir()
    with pytest.raises(InputError, match="expected a folder for each ID, with photographs in it"):
        td.read_id_to_images(tmp_path)


def test_a_folder_with_a_name_in_both_spellings_is_refused(tmp_path):
    for name in (COMPOSED, DECOMPOSED):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="is there in two spellings; merge the two"):
        td.read_id_to_images(tmp_path)


@pytest.mark.parametrize("titles", ["", "ID,twin's ID\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])  # the byte order mark that Excel writes
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_pairs_are_read_from_a_table_with_or_without_titles(tmp_path, titles, mark, end):
    text = f'{mark}{titles}a,b\n\n"c, the second", 007\nb,a\n'
    (tmp_path / "x.CSV").write_bytes(text.replace("\n", end).encode())
    images = {"a": [], "b": [], "c, the second": [], "007": []}
    pairs, notes = td.read_pairs(tmp_path / "x.CSV", images)
    assert pairs == [("a", "b"), ("c, the second", "007")]
    assert notes[-1] == "1 of 3 pairs repeat an earlier one; each is used once"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a CSV file in UTF-8 of two columns, ID and twin's ID, with at least one"),
        (
            b"ID,twin\n",
            "expected a CSV file in UTF-8 of two columns, ID and twin's ID, with at least one",
        ),
        (b"a;b\nb;a\n", r"pair 1 is \['b;a'\]; expected two IDs"),
        (b"a,b,c\n", r"pair 1 is \['a', 'b', 'c'\]; expected two IDs"),
        (b"a,nobody\n", "pair 1: ID 'nobody' has no images listed"),
        ("a,b\né,b".encode("latin-1"), "expected a CSV file in UTF-8 of two columns"),
    ],
)
def test_wrong_tables_are_refused_with_file_entry_and_form(tmp_path, content, message):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.csv: .*{message}"):
        td.read_pairs(tmp_path / "x.csv", {"a": [], "b": []})


def test_a_missing_table_is_refused_with_its_form(tmp_path):
    with pytest.raises(InputError, match=r"x\.csv: .*No such file.*; expected a CSV file"):
        td.read_pairs(tmp_path / "x.csv", {"a": []})


# ---- lists of crops ------------------------------------------------------------------------------


@pytest.fixture
def listed_crops(tmp_path):
    """Flags for a list of crops, of which one is gone, and for pairs."""
    (tmp_path / "there.png").write_bytes(b"")
    images = {"a": ["there.png", "gone.png"], "b": ["there.png"], "other": ["also_gone.png"]}
    (tmp_path / "aligned.json").write_text(json.dumps(images))
    (tmp_path / "pairs.json").write_text('[["a", "b"]]')
    return Namespace(aligned_json=tmp_path / "aligned.json", pairs=tmp_path / "pairs.json")


def test_listed_crops_that_are_gone_are_passed_over_with_a_count(listed_crops):
    images, pairs, warnings = td.read_people(listed_crops, "aligned_json", "pairs")
    assert [Path(path).name for path in images["a"]] == ["there.png"]
    assert pairs == [("a", "b")]
    assert warnings == ["1 listed crops are gone and are passed over"]


def test_people_whom_the_alignment_has_not_met_are_told_how_to_align_them(listed_crops):
    listed_crops.pairs.write_text('[["a", "nobody"]]')
    message = r"--pairs .*'nobody' is not listed in .*aligned\.json: .*leave out --skip_alignment"
    with pytest.raises(InputError, match=message):
        td.read_people(listed_crops, "aligned_json", "pairs")


# ---- crops ---------------------------------------------------------------------------------------


def random_pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (112, 112, 3), np.uint8)


@pytest.fixture
def path(tmp_path):
    """{name: path of a crop}: A, Aa and Aaa are three files of the same pixels; so are B and Bb."""
    paths = {}
    for name in ("A", "Aa", "Aaa", "B", "Bb", "C"):
        paths[name] = str(tmp_path / f"{name}.png")
        image = Image.fromarray(random_pixels(seed=ord(name[0])))
        comment = PngInfo()
        comment.add_text("name", name)  # so no two files have the same bytes
        image.save(paths[name], pnginfo=comment)
    return paths


def test_crops_are_decoded_and_hashed_by_their_pixels(path):
    crops = td.load_crops(path.values())
    for file in path.values():
        pixels = np.array(Image.open(file))
        row = crops.row[file]
        assert np.array_equal(crops.pixels[row], pixels)
        assert crops.sha256[row] == hashlib.sha256(pixels.tobytes()).hexdigest()


@pytest.fixture
def opened(monkeypatch):
    """A Counter of the files that Pillow has opened."""
    counts = Counter()
    open_image = Image.open

    def open_and_count(file):
        counts[file] += 1
        return open_image(file)

    monkeypatch.setattr(Image, "open", open_and_count)
    return counts


def test_a_crop_that_is_listed_twice_is_read_once(path, opened):
    td.load_crops([path["A"], path["B"], path["Aa"], path["A"]])
    assert opened == {path["A"]: 1, path["B"]: 1, path["Aa"]: 1}


def test_a_dataset_reads_each_crop_once_for_all_items(path, opened):
    pictures = {"a": [path["A"], path["B"]], "b": [path["Aa"]]}
    dataset = td.TwinTripletDataset(pictures, [("a", "b")])
    assert not opened
    for i in range(len(dataset)):
        dataset[i]
    assert opened == {path["A"]: 1, path["B"]: 1, path["Aa"]: 1}


def test_the_pixels_of_a_dataset_are_those_of_its_paths(path):
    pictures = {"a": [path["A"], path["B"]], "b": [path["Aa"]]}
    dataset = td.TwinTripletDataset(pictures, [("a", "b")])
    crops = td.load_crops([path["A"], path["B"], path["Aa"]])
    assert torch.equal(dataset.pixels, crops.pixels)


def test_reading_crops_stops_when_it_is_asked_to(path, opened, monkeypatch):
    monkeypatch.setattr(net.interrupt, "asked", True)
    with pytest.raises(KeyboardInterrupt):
        td.load_crops(path.values())
    assert not opened


@pytest.fixture
def people_of(path):
    """people_of(one=["A", "B"], two=["C"]): the People of a pair, given as the names of crops."""

    def make(**names):
        aligned = {person: [path[name] for name in names[person]] for person in names}
        return td.People(aligned, [tuple(names)])

    return make


def test_a_copy_under_one_id_is_used_once_with_a_count(path, people_of):
    both = people_of(one=["A", "B", "Aa", "A"], two=["C"])
    assert both.id_to_images == {"one": [path["A"], path["B"]], "two": [path["C"]]}
    assert both.warnings == ["2 images are copies of another of their ID; each is used once"]


@pytest.mark.parametrize("others", [["C"], []])
def test_people_without_copies_give_no_warning(people_of, others):
    assert people_of(one=["A", "B"], two=others).warnings == []


def test_a_person_all_of_whose_images_are_one_is_named(people_of):
    warnings = people_of(one=["A", "Aa", "Aaa"], two=["B", "Bb"]).warnings
    assert warnings[0] == "ID 'one': all 3 paths lead to one and the same image"
    assert warnings[1].startswith("3 images are copies")
    assert len(warnings) == 2


def test_one_image_under_two_ids_is_refused_with_both(people_of):
    message = r"Aa\.png: .*ID 'two', but it is the same image as .*/A\.png of ID 'one'"
    with pytest.raises(InputError, match=message):
        people_of(one=["A", "B"], two=["Aa"])


# ---- near copies ---------------------------------------------------------------------------------


def photo_of(person, shot):
    """A crop, a Pillow image, with light and shade of many sizes, as photographs have them.

    Half of it is the person's, half the shot's.
    """
    of_person = np.random.default_rng([person])
    of_shot = np.random.default_rng([person, shot])
    picture = np.full((112, 112), 128.0)
    for cells, strength in ((4, 28), (7, 18), (14, 8), (28, 6)):
        for rng in (of_person, of_shot):
            values = rng.normal(0, strength, (cells, cells))
            picture += cv2.resize(values, (112, 112), interpolation=cv2.INTER_CUBIC)
    coloured = picture[:, :, None] + of_shot.normal(0, 4, (112, 112, 3))
    return Image.fromarray(np.clip(coloured, 0, 255).astype(np.uint8))


def drawn_faces(person, n):
    """n crops of a drawn face; the persons 2 k and 2 k + 1 are twins."""
    family = np.random.default_rng([person // 2])
    drawn = synthetic.draw_person(family)
    if person % 2:
        drawn = synthetic.draw_twin(drawn, family)
    rng = np.random.default_rng([person])
    photos = [synthetic.draw_photo(drawn, rng) for _ in range(n)]
    return [align.align_face(photo, landmarks) for photo, landmarks in photos]


def hash_images(images):
    pixels = np.stack([np.array(image) for image in images])
    return td.perceptual_hashes(torch.from_numpy(pixels))


def saved_as_jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


COPIES = {
    "JPEG": lambda image: saved_as_jpeg(image, 75),
    "small JPEG": lambda image: saved_as_jpeg(image, 30),
    "half the size": lambda image: image.resize((56, 56)).resize((112, 112)),
    "brighter": lambda image: image.point(lambda value: min(255, 1.15 * value + 5)),
    "darker": lambda image: image.point(lambda value: 0.8 * value),
    "messenger": lambda image: saved_as_jpeg(image.resize((80, 80)).resize((112, 112)), 60),
}


@pytest.mark.parametrize("kind", COPIES)
def test_an_image_that_was_changed_on_its_way_is_found(kind):
    originals = [photo_of(person, shot) for person in range(4) for shot in range(3)]
    copied = [COPIES[kind](original) for original in originals]
    assert all(np.any(np.array(a) != np.array(b)) for a, b in zip(originals, copied, strict=True))
    found = td.find_copies(hash_images(copied), hash_images(originals))
    assert found.tolist() == list(range(len(originals)))


def test_different_images_of_one_person_are_no_copies():
    for person in range(4):
        for shots in (drawn_faces(person, 8), [photo_of(person, shot) for shot in range(8)]):
            hashes = hash_images(shots)
            assert td.find_copies(hashes, hashes, earlier=True).tolist() == [-1] * 8


def test_images_of_twins_and_strangers_are_no_copies():
    of_one = hash_images(drawn_faces(0, 8))
    for other in (1, 2, 5):
        assert td.find_copies(of_one, hash_images(drawn_faces(other, 8))).tolist() == [-1] * 8


def test_the_crops_of_tests_are_no_copies_of_each_other(write_crops):
    aligned, _ = write_crops([[5, 4], [4, 4, 3]])
    paths = itertools.chain(*td.read_id_to_images(aligned).values())
    hashes = td.perceptual_hashes(td.load_crops(paths).pixels)
    assert td.find_copies(hashes, hashes, earlier=True).max() == -1


def slow_hash(crop):
    """The 288 bits of a crop, by the words of the definition, in exact fractions."""
    inner = crop[8:-8, 8:-8].astype(int).sum(2)

    def part(rows, columns, i, j):
        """The mean of part (i, j) of a face that is cut into rows times columns parts.

        A pixel that two parts share is in both.
        """
        top, bottom = i * 96 // rows, -(-(i + 1) * 96 // rows)
        left, right = j * 96 // columns, -(-(j + 1) * 96 // columns)
        pixels = inner[top:bottom, left:right]
        return Fraction(int(pixels.sum()), pixels.size)

    bits = []
    for i, j in itertools.product(range(12), range(12)):
        bits.append(part(12, 13, i, j + 1) > part(12, 13, i, j))
    for i, j in itertools.product(range(12), range(12)):
        bits.append(part(13, 12, i + 1, j) > part(13, 12, i, j))
    return bits


def test_a_perceptual_hash_equals_its_definition_bit_for_bit():
    crops = [np.array(photo_of(0, 0)), drawn_faces(3, 1)[0], random_pixels(seed=1)]
    hashes = td.perceptual_hashes(torch.from_numpy(np.stack(crops)))
    assert hashes.shape == (3, 36)
    assert hashes.dtype == torch.uint8
    for crop, packed in zip(crops, hashes, strict=True):
        assert np.unpackbits(packed.numpy()).tolist() == slow_hash(crop)


def test_hashes_do_not_depend_on_the_images_beside_them():
    pixels = torch.from_numpy(np.stack([random_pixels(seed) for seed in range(3)] * 400))
    assert torch.equal(td.perceptual_hashes(pixels)[:3], td.perceptual_hashes(pixels[:3]))
    assert torch.equal(td.perceptual_hashes(pixels)[-3:], td.perceptual_hashes(pixels[:3]))


def test_no_crops_have_no_hashes_and_no_copies():
    nothing = td.perceptual_hashes(torch.zeros((0, 112, 112, 3), dtype=torch.uint8))
    assert nothing.shape == (0, 36)
    assert td.find_copies(nothing, nothing).tolist() == []
    assert td.find_copies(random_hashes(2), nothing).tolist() == [-1, -1]


def random_hashes(n, seed=0):
    bits = np.random.default_rng(seed).integers(0, 256, (n, 36), np.uint8)
    return torch.from_numpy(bits)


def with_flipped_bits(hashes, n):
    """Hashes of which the first n bits are turned round."""
    bits = np.unpackbits(hashes.numpy(), axis=1)
    bits[:, :n] ^= 1
    return torch.from_numpy(np.packbits(bits, axis=1))


@pytest.mark.parametrize(("n_differing", "is_copy"), [(0, 1), (1, 1), (15, 1), (16, 0), (288, 0)])
def test_a_copy_differs_in_fifteen_bits_at_most(n_differing, is_copy):
    assert td.MAX_DIFFERING_BITS == 15
    hashes = random_hashes(1)
    found = td.find_copies(with_flipped_bits(hashes, n_differing), hashes)
    assert found.tolist() == [0 if is_copy else -1]


@pytest.mark.parametrize("earlier", [False, True])
def test_copies_equal_a_slow_loop_over_all_pairs(earlier):
    distinct = random_hashes(1200)
    order = np.random.default_rng(1).integers(0, 1200, 2500)  # several parts of 1,024 rows
    hashes = with_flipped_bits(distinct, 7)[order]
    others = hashes if earlier else distinct
    expected = []
    first_row = {}
    for row, number in enumerate(order.tolist()):
        expected.append(first_row.get(number, -1) if earlier else number)
        first_row.setdefault(number, row)
    assert td.find_copies(hashes, others, earlier).tolist() == expected


@pytest.fixture
def people_of_photos(tmp_path):
    """people_of_photos(one={name: image}, two=...): the People of a pair, whose crops are files."""

    def make(**images):
        aligned = {}
        for person, named in images.items():
            aligned[person] = []
            for name, image in named.items():
                image.save(tmp_path / name)
                aligned[person].append(str(tmp_path / name))
        return td.People(aligned, [tuple(images)])

    return make


@pytest.mark.parametrize("kind", COPIES)
def test_a_near_copy_under_one_id_is_used_once_with_a_count(people_of_photos, kind):
    copied = COPIES[kind](photo_of(0, 0))
    ours = {"0.png": photo_of(0, 0), "1.png": photo_of(0, 1), "again.png": copied}
    both = people_of_photos(one=ours, two={"2.png": photo_of(1, 0)})
    assert [Path(path).name for path in both.id_to_images["one"]] == ["0.png", "1.png"]
    assert both.warnings == ["1 images are copies of another of their ID; each is used once"]


@pytest.mark.parametrize("kind", COPIES)
def test_a_near_copy_under_two_ids_is_refused_with_both_files(people_of_photos, kind):
    copied = COPIES[kind](photo_of(0, 1))
    message = r"again\.png: .*ID 'two', but it is the same image as .*/1\.png of ID 'one'"
    ours = {"0.png": photo_of(0, 0), "1.png": photo_of(0, 1)}
    with pytest.raises(InputError, match=message):
        people_of_photos(one=ours, two={"2.png": photo_of(1, 0), "again.png": copied})


def test_four_recompressions_of_one_photograph_are_one_image(people_of_photos):
    again = {
        f"{quality}.png": saved_as_jpeg(photo_of(0, 0), quality) for quality in (90, 75, 60, 45)
    }
    both = people_of_photos(one=again, two={"2.png": photo_of(1, 0)})
    assert [len(images) for images in both.id_to_images.values()] == [1, 1]
    assert both.warnings[0] == "ID 'one': all 4 paths lead to one and the same image"


def test_no_image_that_is_used_is_a_copy_of_another_and_all_others_are(people_of, monkeypatch):
    """Each image is a copy of the one before it, but not of the one before that, as in a film."""
    film = torch.cat([with_flipped_bits(random_hashes(1), 10 * shot) for shot in range(6)])
    monkeypatch.setattr(td, "perceptual_hashes", lambda pixels: film[: len(pixels)])
    both = people_of(one=["A", "Aa", "Aaa", "B", "Bb"], two=[])
    names = [Path(path).stem for path in both.id_to_images["one"]]
    assert names == ["A", "Aaa", "Bb"]
    assert both.warnings == ["2 images are copies of another of their ID; each is used once"]


def test_people_are_known_again_by_a_copy_of_one_of_their_images(people_of_photos):
    ours = {"0.png": photo_of(0, 0), "1.png": photo_of(0, 1)}
    both = people_of_photos(one=ours, two={"2.png": photo_of(1, 0)})
    assert both.owner == ["one", "one", "two"]
    assert both.people_on(hash_images([photo_of(4, 0), saved_as_jpeg(photo_of(0, 1), 75)])) == {
        "one"
    }
    assert both.people_on(hash_images([photo_of(4, 0)])) == set()
    assert both.people_on(random_hashes(0)) == set()


# ---- files that are crops, and others ------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_grey_palette_and_opaque_crops_are_read_as_rgb(tmp_path, mode):
    crop = Image.fromarray(random_pixels(seed=1)).convert(mode)
    crop.save(tmp_path / "x.png")
    np.testing.assert_array_equal(td.read_crop(tmp_path / "x.png"), np.array(crop.convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (112, 100)), ("L", (100, 112)), ("I;16", (112, 112))]
)
def test_what_is_no_crop_is_refused_with_its_size_and_mode(tmp_path, mode, size):
    Image.new(mode, size).save(tmp_path / "x.png")
    width, height = size
    with Image.open(tmp_path / "x.png") as image:
        shown_mode = image.mode  # Pillow 10 calls I;16 just I
    message = rf"x\.png: {width}x{height} {shown_mode}, but a crop is 112x112 RGB"
    with pytest.raises(InputError, match=message):
        td.read_crop(tmp_path / "x.png")


# ---- positives of other values -------------------------------------------------------------------
@pytest.fixture(params=range(6))
def sessions(request):
    """(images, pairs, {path: session}) of six people; p5 has one session, p2 one image."""
    rng = np.random.default_rng(request.param)
    images = people([5, 4, 1, 6, 3, 4])
    value_of = {path: f"s{rng.integers(3)}" for paths in images.values() for path in paths}
    value_of |= dict.fromkeys(images["p5"], "s1")
    return images, [*couples(3), ("p1", "p3")], value_of


def with_other_values(triplets, value_of):
    """The triplets whose positive has another value than the anchor."""
    return {triplet for triplet in triplets if value_of[triplet[0]] != value_of[triplet[1]]}


def test_with_values_all_triplets_are_those_across_values(sessions):
    images, pairs, value_of = sessions
    dataset = td.TwinTripletDataset(images, pairs, value_of=value_of)
    triplets = all_triplets(dataset)
    assert set(triplets) == with_other_values(brute_force(images, pairs), value_of)
    assert len(set(triplets)) == len(triplets) == dataset.n_possible


def test_percentages_hold_exactly_for_what_the_values_leave(sessions):
    images, pairs, value_of = sessions
    dataset = td.TwinTripletDataset(images, pairs, 30, value_of=value_of)
    expected = 0
    for pair in pairs:
        left = with_other_values(brute_force(images, [pair]), value_of)
        expected += (30 * len(left) + 99) // 100
    assert len(dataset) == expected
    assert len(set(all_triplets(dataset))) == expected


@pytest.mark.parametrize("percentage", [40, 100])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_steps_have_positives_of_other_values_alone(sessions, percentage, batch_size):
    images, pairs, value_of = sessions
    dataset = td.TwinTripletDataset(images, pairs, percentage, value_of=value_of)
    steps = dataset.steps(1, 16, batch_size)
    triplets = [triplet for rows in steps for triplet in paths_of(dataset, rows)]
    assert triplets
    assert set(triplets) <= set(all_triplets(dataset))


def test_a_person_with_one_value_is_a_negative_only():
    images = people([3, 2])
    value_of = dict(zip(images["p0"], "aab", strict=True)) | dict.fromkeys(images["p1"], "a")
    triplets = all_triplets(td.TwinTripletDataset(images, couples(1), value_of=value_of))
    assert {anchor for anchor, _, _ in triplets} == set(images["p0"])
    assert {negative for _, _, negative in triplets} == set(images["p1"])


def test_one_value_everywhere_leaves_no_triplet():
    images = people([3, 2])
    value_of = dict.fromkeys([*images["p0"], *images["p1"]], "a")
    with pytest.raises(InputError, match="one twin needs images with two values"):
        td.TwinTripletDataset(images, couples(1), value_of=value_of)


# ---- folds ---------------------------------------------------------------------------------------
