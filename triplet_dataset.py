"""From twin pairs to training steps: people, families, split, decoded crops, sampled triplets.

    dataset = TwinTripletDataset(id_to_images, pairs, percentage=10, seed=42)
    anchor, positive, negative = dataset[0]           # network inputs, (3, 112, 112) each
    rows = dataset.triplets(np.arange(100))           # (100, 3) rows of dataset.pixels
    steps = GroupedSteps(dataset, epoch=1, images_per_batch=96)
    rows = steps[0]                                   # (T, 3) rows of the first step

A triplet is (A's image i, A's image j != i, an image of A's twin), for both twins of a pair.
Triplets are numbered, never stored. A percentage takes a prefix of one seeded permutation of the
numbers, so the 5 % sample lies inside the 10 % sample of the same seed.
"""

import hashlib
import math
import os
import reprlib
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from net import CROP_SIZE, InputError, interrupt, progress, read_flag, read_json, to_input

GROUP_SIZE = 8  # images of a person that meet in a grouped step, at most
TRIPLETS_AT_ONCE = 1 << 20  # in one part of `by_pair`, at most


# ---- the files that describe a data set ----------------------------------------------------------
def resolve(folder, path):
    """The full path of an entry in a JSON file that lies in `folder`.

    A path written on Windows is read with slashes if a file exists only there.
    """
    resolved = os.path.normpath(os.path.join(folder, path))
    if "\\" in path and not os.path.exists(resolved):
        with_slashes = os.path.normpath(os.path.join(folder, path.replace("\\", "/")))
        if os.path.exists(with_slashes):
            return with_slashes
    return resolved


def read_id_to_images(path):
    """{"ID": ["path", ...]} -> {ID: [path, ...]}; relative paths start at the file's own folder."""
    content = read_json(path, '{"ID": ["path", ...], ...} with at least one ID')
    folder = os.path.dirname(os.path.abspath(path))
    id_to_images = {}
    for name, images in content.items():
        is_list = isinstance(images, list)
        if not is_list or not all(isinstance(image, str) and image for image in images):
            raise InputError(f"{path}: the images of ID {name!r} must be a list of paths")
        id_to_images[name] = [resolve(folder, image) for image in images]
    return id_to_images


def read_pairs(path, id_to_images):
    """[["ID", "twin's ID"], ...] -> ([(ID, ID), ...], [warning, ...]).

    A pair that is listed twice, in whichever order of its IDs, is used once. Raises InputError
    for an empty list, an ID that is paired with itself, and an ID that `id_to_images` does not
    have.
    """
    content = read_json(path, '[["ID", "twin\'s ID"], ...] with at least one pair', list)
    pairs = {}
    for number, pair in enumerate(content, 1):
        check_pair(f"{path}: pair {number}", pair, id_to_images)
        pairs.setdefault(frozenset(pair), tuple(pair))
    repeated = len(content) - len(pairs)
    if not repeated:
        return list(pairs.values()), []
    warning = f"{repeated} of {len(content)} pairs are listed more than once; each is used once"
    return list(pairs.values()), [warning]


def check_pair(where, pair, id_to_images):
    """Raise InputError for an entry that is no pair of two listed people; `where` begins it."""
    is_pair = isinstance(pair, list) and len(pair) == 2
    if not is_pair or not all(isinstance(name, str) for name in pair):
        raise InputError(f"{where} is {reprlib.repr(pair)}; expected two IDs, both strings")
    first, second = pair
    if first == second:
        message = f"ID {first!r} is paired with itself; correct or delete the entry"
        raise InputError(f"{where}: {message}")
    for name in pair:
        if name not in id_to_images:
            message = f"ID {name!r} has no images listed; add them or delete the pair"
            raise InputError(f"{where}: {message}")


def read_people(args, images_flag, pairs_flag):
    """({ID: [path, ...]}, [(ID, ID), ...], [warning, ...]) of the files that two flags name."""
    id_to_images = read_flag(args, images_flag, read_id_to_images)
    pairs, notes = read_flag(args, pairs_flag, read_pairs, id_to_images)
    return id_to_images, pairs, notes


# ---- people, families, crops ---------------------------------------------------------------------
def find_families(pairs):
    """{ID: family number}; families, connected components of the pairs, count as they appear."""
    neighbours = {}
    for a, b in pairs:
        neighbours.setdefault(a, []).append(b)
        neighbours.setdefault(b, []).append(a)
    family = {}
    count = 0
    for start in neighbours:
        if start in family:
            continue
        waiting = [start]
        while waiting:
            name = waiting.pop()
            if name not in family:
                family[name] = count
                waiting += neighbours[name]
        count += 1
    return family


def split_pairs(
    pairs: list, validation_split: float, seed: int, related: list | tuple = ()
) -> tuple[list, list]:
    """Split pairs into (train_pairs, val_pairs) by whole families, so that no ID is on both sides.

    Families are taken in the seed's order; one goes to validation if that brings the share of
    validation pairs nearer to `validation_split`, in [0, 1). Each side gets at least one family.
    With a single family, or a validation_split of 0, val_pairs is empty. related: further pairs,
    which are not split themselves, but join people to families.
    """
    if not 0 <= validation_split < 1:
        message = f"must be at least 0 and below 1, not {validation_split}"
        raise InputError(f"validation_split {message}")
    pairs = [tuple(pair) for pair in pairs]
    family_of = find_families([*pairs, *related])
    families = {}
    for pair in pairs:
        families.setdefault(family_of[pair[0]], []).append(pair)
    if validation_split == 0 or len(families) < 2:
        return pairs, []

    shuffled = np.random.default_rng(seed).permutation(len(families))
    families = [families[number] for number in shuffled]
    n_wanted = validation_split * len(pairs)
    validation = []
    for family in families:
        is_nearer = abs(n_wanted - len(family)) < abs(n_wanted)
        if is_nearer and len(validation) < len(families) - 1:
            validation.append(family)
            n_wanted -= len(family)
    if not validation:
        validation = [min(families, key=len)]
    chosen = {pair for family in validation for pair in family}
    train_pairs = [pair for pair in pairs if pair not in chosen]
    val_pairs = [pair for pair in pairs if pair in chosen]
    return train_pairs, val_pairs


class TwinImages:
    """The images of the people of twin pairs, numbered: the rows of every matrix of embeddings.

    `ids`: the people, in the order of the pairs.
    `paths` (N,): all images, person after person.
    `first`, `count`: the first image and the number of images of each person.
    `person` (N,): the person on each image, as an index of `ids`.
    `family` (N,): the number of that person's family.
    `pairs` (P, 2): the pairs, as indices of `ids`.
    """

    def __init__(self, id_to_images, pairs):
        self.ids = list(dict.fromkeys(name for pair in pairs for name in pair))
        family = find_families(pairs)
        self.paths = []
        counts = []
        families = []
        for name in self.ids:
            images = list(dict.fromkeys(id_to_images[name]))
            self.paths += images
            counts.append(len(images))
            families.append(family[name])
        self.count = np.array(counts, np.int64)
        self.first = np.cumsum(self.count) - self.count
        self.person = np.repeat(np.arange(len(self.ids)), self.count)
        self.family = np.repeat(np.array(families, np.int64), self.count)
        index = {name: i for i, name in enumerate(self.ids)}
        self.pairs = np.array([(index[a], index[b]) for a, b in pairs], np.int64)


def read_crop(path):
    """The (112, 112, 3) uint8 RGB array of an aligned crop.

    A crop may also be grey, palette or opaque RGBA. Raises InputError for any other file.
    """
    try:
        with Image.open(path) as image:
            description = f"{image.width}x{image.height} {image.mode}"
            is_crop = image.size == (CROP_SIZE, CROP_SIZE)
            if is_crop and image.mode in ("RGB", "L", "P", "LA", "RGBA"):
                lowest_alpha, _ = image.convert("RGBA").getextrema()[3]
                if lowest_alpha == 255:
                    return np.array(image.convert("RGB"))
                description = "partly transparent"
    except FileNotFoundError:
        hint = "run the alignment stage again"
        if "\\" in path:
            hint = "its path was written on Windows"
        raise InputError(f"{path}: no such aligned crop; {hint}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        message = f"unreadable crop ({error}); align it again with --realign"
        raise InputError(f"{path}: {message}") from error
    raise InputError(
        f"{path}: {description}, but a crop is 112x112 RGB; run the alignment stage on it"
    )


class Crops(NamedTuple):
    """Decoded crops: `pixels` (N, 112, 112, 3) uint8 RGB, {path: its row}, and each row's hash."""

    pixels: torch.Tensor
    row: dict
    sha256: list


def load_crops(paths):
    """The Crops of files, each read once, with a progress bar; raises InputError for no crop."""
    row = {path: i for i, path in enumerate(dict.fromkeys(paths))}
    pixels = np.empty((len(row), CROP_SIZE, CROP_SIZE, 3), np.uint8)

    def read(path):
        interrupt.raise_if_asked()
        pixels[row[path]] = read_crop(path)
        return hashlib.sha256(pixels[row[path]]).hexdigest()

    # Pillow's own warnings are ignored: read_crop says what is wrong.
    with ThreadPoolExecutor() as pool, warnings.catch_warnings(action="ignore"):
        hashes = pool.map(read, row)
        sha256 = list(progress(hashes, "reading crops", "crop", total=len(row)))
    return Crops(torch.from_numpy(pixels), row, sha256)


class People:
    """The people of twin pairs and their crops, decoded once: what all training runs share.

    aligned: {ID: [path of a crop, ...]}. An image is what its pixels are: a copy under the same
    ID is used once, with a warning; InputError if two IDs have the same image.

    `pairs`; `id_to_images` {ID: [path, ...]}, each image once; `crops`, of all paths; `owner` {hash
    of an image: (ID, path)}; `warnings`, for the user; `features`, the cache of
    train_twins.backbone_features.
    """

    def __init__(self, aligned, pairs, warnings=()):
        self.pairs = pairs
        self.warnings = list(warnings)
        self.features = {}
        self.owner = {}
        self.id_to_images = {}
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        self.crops = load_crops([path for name in names for path in aligned[name]])
        for name in names:
            self.id_to_images[name] = self._distinct_images(name, aligned[name])
        n_listed = sum(len(aligned[name]) for name in names)
        n_distinct = sum(len(paths) for paths in self.id_to_images.values())
        if n_listed > n_distinct:
            self.warnings.append(
                f"{n_listed - n_distinct} images are the same as another of their ID; "
                "each is used once"
            )

    def _distinct_images(self, name, paths):
        """The first path of each distinct image among a person's paths."""
        distinct = []
        for path in paths:
            image = self.crops.sha256[self.crops.row[path]]
            first_name, first_path = self.owner.setdefault(image, (name, path))
            if first_name != name:
                raise InputError(
                    f"{path}: listed under ID {name!r}, but it is the same image as {first_path} "
                    f"of ID {first_name!r}; keep it under the one whose image it is"
                )
            if first_path not in distinct:
                distinct.append(first_path)
        if len(distinct) == 1 and len(paths) > 2:
            warning = f"ID {name!r}: all {len(paths)} paths lead to one and the same image"
            self.warnings.append(warning)
        return distinct

    def rows(self, paths):
        """(N,) int64 rows of `crops.pixels`."""
        return torch.tensor([self.crops.row[path] for path in paths], dtype=torch.int64)


# ---- triplets ------------------------------------------------------------------------------------
def count_triplets(n, m):
    """The number of ordered triplets of two twins with n and m images: n(n-1)m + m(m-1)n."""
    return n * (n - 1) * m + m * (m - 1) * n


class TwinTripletDataset(Dataset):
    """The sampled triplets of twin pairs; `[i]` is (anchor, positive, negative).

    Each of the three is a network input, (3, 112, 112) float32, as `net.to_input` makes it.
    id_to_images: {ID: [path of an aligned crop, ...]}. pairs: [[ID, twin's ID], ...]. percentage:
    an integer from 1 to 100; of every pair with `maximum` triplets, `(percentage * maximum + 99)
    // 100` are sampled. Raises InputError for another percentage, or if there is no triplet at
    all.

    `pairs`: those that make triplets; `n_skipped`: how many others there are; `images`:
    TwinImages of `pairs`; `n_possible`: how many triplets there are to sample from.
    """

    def __init__(
        self, id_to_images: dict, pairs: list, percentage: int = 100, seed: int = 42
    ) -> None:
        if type(percentage) is not int or not 1 <= percentage <= 100:
            raise InputError(f"percentage must be an integer from 1 to 100, not {percentage}")
        self.percentage = percentage
        self.seed = seed
        count = {name: len(set(id_to_images[name])) for pair in pairs for name in pair}
        self.pairs = [(a, b) for a, b in pairs if count_triplets(count[a], count[b])]
        self.n_skipped = len(pairs) - len(self.pairs)
        if not self.pairs:
            reason = "one twin needs two images and the other at least one"
            raise InputError(f"no pair makes a triplet: {reason}")
        self.images = TwinImages(id_to_images, self.pairs)
        # Of both twins of each pair, (P, 2): the first row and the number of images.
        self._first = self.images.first[self.images.pairs]
        self._count = self.images.count[self.images.pairs]
        # Of each pair, (P,): the possible triplets, and where its sampled ones begin and end.
        self._maximum = count_triplets(self._count[:, 0], self._count[:, 1])
        n_sampled = (percentage * self._maximum + 99) // 100
        self._end = np.cumsum(n_sampled)
        self._begin = self._end - n_sampled
        self.n_possible = int(self._maximum.sum())

    def __len__(self) -> int:
        return int(self._end[-1])

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        number = range(len(self))[i]  # a range knows negative numbers and raises IndexError
        (rows,) = self.triplets([number])
        anchor, positive, negative = to_input(self.pixels[torch.from_numpy(rows)])
        return anchor, positive, negative

    @cached_property
    def pixels(self):
        """All crops, (N, 112, 112, 3) uint8 RGB, decoded once; rows as `images.paths`."""
        return load_crops(self.images.paths).pixels

    @cached_property
    def _sample(self):
        """(len,) numbers of the sampled triplets within their pair, pair after pair, ascending.

        They are drawn when they are first used.
        """
        samples = []
        sizes = self._end - self._begin
        for (a, b), maximum, size in zip(self.pairs, self._maximum, sizes, strict=True):
            numbers = np.arange(maximum)
            if size < maximum:
                # Seeded by the IDs, so a pair's sample does not depend on what other pairs
                # there are.
                names = zlib.crc32(f"{a}\0{b}".encode())
                generator = np.random.default_rng([self.seed, names])
                numbers = np.sort(generator.permutation(maximum)[:size])
            samples.append(numbers.astype(np.min_scalar_type(maximum)))
        return np.concatenate(samples)

    def triplets(self, numbers):
        """(K,) numbers of sampled triplets, in [0, len) -> (K, 3) int64 rows of `images.paths`."""
        numbers = np.asarray(numbers, np.int64)
        pair = np.searchsorted(self._end, numbers, side="right")
        if self.percentage == 100:
            within_pair = numbers - self._begin[pair]
        else:
            within_pair = self._sample[numbers].astype(np.int64)
        # The triplets whose anchor is in the first twin come first.
        n, m = self._count[pair].T
        n_of_first = n * (n - 1) * m
        is_second = within_pair >= n_of_first
        number = within_pair - n_of_first * is_second
        n_own = np.where(is_second, m, n)
        n_twin = np.where(is_second, n, m)
        first, second = self._first[pair].T
        first_own = np.where(is_second, second, first)
        first_twin = np.where(is_second, first, second)
        # number = (anchor * (n_own - 1) + positive) * n_twin + negative; positives skip the anchor.
        rest, negative = np.divmod(number, n_twin)
        anchor, positive = np.divmod(rest, n_own - 1)
        positive += positive >= anchor
        return np.stack([first_own + anchor, first_own + positive, first_twin + negative], 1)

    @cached_property
    def _pair_keys(self):
        """(ascending keys, order) to look up pairs by the people of anchor and negative.

        A pair has two keys, one for either twin as the anchor's person. `order` holds the pair's
        number, plus the number of pairs for the second of them.
        """
        n_people = len(self.images.ids)
        first, second = self.images.pairs.T
        keys = np.concatenate([first * n_people + second, second * n_people + first])
        order = np.argsort(keys)
        return keys[order], order

    def possible_numbers(self, triplets):
        """(K, 3) int64 rows -> (K,) numbers of these triplets, in [0, n_possible).

        The numbers go over all possible triplets, sampled or not.
        """
        anchor, positive, negative = triplets.T
        keys, order = self._pair_keys
        n_people = len(self.images.ids)
        key = self.images.person[anchor] * n_people + self.images.person[negative]
        found = order[np.searchsorted(keys, key)]
        pair = found % len(self.pairs)
        own = found // len(self.pairs)  # 0 if the anchor is in the pair's first twin, else 1
        twin = 1 - own
        n_own, n_twin = self._count[pair, own], self._count[pair, twin]
        a = anchor - self._first[pair, own]
        p = positive - self._first[pair, own]
        p -= p > a  # its position among the images besides the anchor
        within_half = (a * (n_own - 1) + p) * n_twin + negative - self._first[pair, twin]
        half = own * n_twin * (n_twin - 1) * n_own  # of a first twin's triplets, which come first
        begin = np.cumsum(self._maximum) - self._maximum
        return begin[pair] + half + within_half

    def triplets_among(self, pair, groups):
        """The sampled triplets of a pair that use only some images: (K, 3) int64 rows.

        pair: the pair's number. groups: for each of its two twins, the positions of these images
        among the twin's own.
        """
        sampled = None
        if self.percentage < 100:
            sampled = self._sample[self._begin[pair] : self._end[pair]]
        found = []
        offset = 0  # triplets whose anchor is in the first twin come first
        for own, twin in ((0, 1), (1, 0)):
            n, m = self._count[pair, own], self._count[pair, twin]
            grid = np.meshgrid(groups[own], groups[own], groups[twin], indexing="ij")
            anchor, positive, negative = (axis.ravel() for axis in grid)
            keep = anchor != positive
            anchor, positive, negative = anchor[keep], positive[keep], negative[keep]
            if sampled is not None:
                position = positive - (positive > anchor)  # among the images besides the anchor
                number = offset + (anchor * (n - 1) + position) * m + negative
                keep = is_in_sorted(number, sampled)
                anchor, positive, negative = anchor[keep], positive[keep], negative[keep]
            first_own, first_twin = self._first[pair, own], self._first[pair, twin]
            rows = [first_own + anchor, first_own + positive, first_twin + negative]
            found.append(np.stack(rows, 1))
            offset = n * (n - 1) * m
        return np.concatenate(found)

    def by_pair(self):
        """Yield all sampled triplets, pair by pair, as (rows, triplets).

        rows: the distinct images of these triplets; triplets (K, 3): indices of `rows`. A pair with
        more than TRIPLETS_AT_ONCE triplets comes in several parts.
        """
        for begin, end in zip(self._begin, self._end, strict=True):
            for start in range(begin, end, TRIPLETS_AT_ONCE):
                numbers = np.arange(start, min(start + TRIPLETS_AT_ONCE, end))
                rows, index = np.unique(self.triplets(numbers), return_inverse=True)
                yield rows, index.reshape(-1, 3)

    def count_touched_images(self):
        """How many distinct images are part of at least one sampled triplet."""
        if self.percentage == 100:
            return len(self.images.paths)
        touched = np.zeros(len(self.images.paths), bool)
        for rows, _ in self.by_pair():
            touched[rows] = True
        return int(touched.sum())

    def steps(self, epoch, images_per_batch, batch_size=None):
        """The steps of an epoch: ShuffledSteps if there is a `batch_size`, else GroupedSteps."""
        if batch_size:
            return ShuffledSteps(self, epoch, batch_size)
        return GroupedSteps(self, epoch, images_per_batch)


def is_in_sorted(values, sorted_array):
    """For each value, whether it is in an ascending array; faster here than numpy's isin."""
    places = np.searchsorted(sorted_array, values)
    return sorted_array.take(places, mode="clip") == values


# ---- the steps of an epoch -----------------------------------------------------------------------
class ShuffledSteps:
    """The steps of an epoch that uses each sampled triplet once, shuffled by seed and epoch.

    `[i]` is a step's (T, 3) int64 rows; T is `batch_size`, but for the last step.
    """

    def __init__(self, dataset, epoch, batch_size):
        self.dataset = dataset
        self.batch_size = batch_size
        n = len(dataset)
        numbers = np.arange(n, dtype=np.min_scalar_type(n))
        self.order = np.random.default_rng([dataset.seed, epoch]).permutation(numbers)

    def __len__(self):
        return math.ceil(len(self.order) / self.batch_size)

    def __getitem__(self, i):
        start = range(0, len(self.order), self.batch_size)[i]
        return self.dataset.triplets(self.order[start : start + self.batch_size])


class GroupedSteps:
    """The steps of an epoch that embeds each image about once.

    Each person's images are split at random into groups of at most GROUP_SIZE. Each group meets
    one group of the twin; the shorter list repeats. Two groups that meet are a block. Blocks are
    shuffled, and a step takes blocks as long as its images are no more than `images_per_batch`.
    `[i]` is the (T, 3) int64 rows of all sampled triplets inside a step's blocks. Everything
    follows from the seed and the epoch. Raises InputError if a block would not fit into a step.
    """

    def __init__(self, dataset, epoch, images_per_batch):
        if images_per_batch < 2 * GROUP_SIZE:
            message = f"must be at least {2 * GROUP_SIZE}, a group of each of two twins"
            raise InputError(f"--images_per_batch {message}")
        self.dataset = dataset
        generator = np.random.default_rng([dataset.seed, epoch])
        blocks = self._make_blocks(generator)
        self.steps = []
        room = 0
        for i in generator.permutation(len(blocks)):
            pair, groups = blocks[i]
            size = sum(len(group) for group in groups)
            if size > room:
                self.steps.append([])
                room = images_per_batch
            self.steps[-1].append((pair, groups))
            room -= size

    def _make_blocks(self, generator):
        """[(pair number, (group of the first twin, group of the second)), ...], none empty."""
        dataset = self.dataset
        blocks = []
        for pair, counts in enumerate(dataset.images.count[dataset.images.pairs]):
            first, second = (
                np.array_split(generator.permutation(n), math.ceil(n / GROUP_SIZE)) for n in counts
            )
            for i in range(max(len(first), len(second))):
                groups = (first[i % len(first)], second[i % len(second)])
                # A small sample may have no triplet inside a block.
                if dataset.percentage == 100 or len(dataset.triplets_among(pair, groups)):
                    blocks.append((pair, groups))
        return blocks

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, i):
        parts = [self.dataset.triplets_among(pair, groups) for pair, groups in self.steps[i]]
        return np.concatenate(parts)
