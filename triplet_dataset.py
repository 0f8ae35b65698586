"""Twin pairs to triplets: the JSON files, the family-wise split, the decoded crops, the sampled triplets, the steps.

    dataset = TwinTripletDataset(id_to_images, pairs, percentage=10, seed=42)
    anchor, positive, negative = dataset[0]                         # network inputs, (3, 112, 112) float32 each
    rows = dataset.triplets(np.arange(100))                         # the same as (100, 3) rows of dataset.pixels
    steps = GroupedSteps(dataset, epoch=1, images_per_batch=96)     # steps[0]: (T, 3) rows again

A triplet is (A's image i, A's image j != i, an image of A's twin), for both twins of a pair; number k of a pair is
worked out by division, and the sampled share begins a random permutation, so 10 % contain the 5 % of the same seed.
"""

import csv
import hashlib
import json
import os
import reprlib
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from net import CROP_SIZE, InputError, progress, replacing, to_input

HAND_SIZE = 8  # images of a person that meet in a grouped step


def read_json(path, expected, kind=dict):
    """A JSON file's object (or array, kind=list), not empty: UTF-8, byte order mark or not, no key twice.

    `expected` describes the right content for the messages of InputError, raised for anything else.
    """

    def unique(entries):
        result = dict(entries)
        if len(result) < len(entries):
            twice = next(key for i, (key, _) in enumerate(entries) if key in dict(entries[:i]))
            raise ValueError(f"key {twice!r} stands there twice; merge the two entries")
        return result

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=unique)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; expected a JSON file, {expected}") from error
    except ValueError as error:  # also what is not UTF-8
        raise InputError(f"{path}: not valid JSON: {error}; expected {expected}") from error
    if not isinstance(content, kind) or not content:
        raise InputError(f"{path}: expected {expected}")
    return content


def write_json(path, content):
    """Write `content` as JSON, atomically; NaN is refused (ValueError), since JSON has none."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path, rows):
    """Write dicts with the same keys as a table, atomically."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def resolve(folder, path):
    """`path` as it is meant in a file that lies in `folder`; with the other separator if it exists only so."""
    path, other = (os.path.normpath(os.path.join(folder, p)) for p in (path, path.replace("\\", "/")))
    return other if "\\" in path and os.path.exists(other) and not os.path.exists(path) else path


def read_id_to_images(path):
    """{"ID": ["path", ...]} -> {ID: [path, ...]}, relative paths taken from the file's own folder."""
    content = read_json(path, '{"ID": ["path", ...], ...} with at least one ID')
    for name, images in content.items():
        if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
            raise InputError(f"{path}: the images of ID {name!r} must be a list of paths")
    folder = os.path.dirname(os.path.abspath(path))
    return {name: [resolve(folder, image) for image in images] for name, images in content.items()}


def read_pairs(path, id_to_images):
    """[["ID", "twin's ID"], ...] -> ([(ID, ID), ...], [warning, ...]); each pair once, in whichever order it stands.

    Raises InputError for an empty list, an ID paired with itself and IDs that `id_to_images` does not have.
    """
    content, pairs = read_json(path, '[["ID", "twin\'s ID"], ...] with at least one pair', list), {}
    for number, pair in enumerate(content, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise InputError(f"{path}: pair {number} is {reprlib.repr(pair)}; expected two IDs, both strings")
        a, b = pair
        if a == b:
            raise InputError(f"{path}: pair {number}: ID {a!r} is paired with itself; correct or delete the entry")
        if unknown := [name for name in pair if name not in id_to_images]:
            raise InputError(f"{path}: pair {number}: ID {unknown[0]!r} has no images listed; add them or delete it")
        pairs.setdefault(frozenset(pair), (a, b))
    note = f"{len(content) - len(pairs)} of {len(content)} pairs are listed more than once; each is used once"
    return list(pairs.values()), [note] * (len(pairs) < len(content))


def find_families(pairs):
    """{ID: family number}, a family being a connected component of the pair graph; numbered as they appear."""
    members = {}
    for a, b in pairs:
        together = [*members.get(a, [a]), *(name for name in members.get(b, [b]) if name not in members.get(a, [a]))]
        members |= dict.fromkeys(together, together)
    numbers = {}
    return {name: numbers.setdefault(members[name][0], len(numbers)) for pair in pairs for name in pair}


def split_pairs(pairs, validation_split, seed, related=()):
    """Split pairs into (train_pairs, val_pairs) by whole families, so that no ID stands on both sides.

    Families, in the seed's order, go to validation if that brings its share nearer to `validation_split`, in [0, 1); at
    least one stands on each side, but with one family, or 0, val_pairs is empty. `related`: pairs that bind people too.
    """
    if not 0 <= validation_split < 1:
        raise InputError(f"validation_split must be at least 0 and below 1, not {validation_split}")
    pairs = [tuple(pair) for pair in pairs]
    family_of = find_families([*pairs, *related])  # those of `pairs` are 0, 1, ...
    count = len({family_of[a] for a, _ in pairs})
    if validation_split == 0 or count < 2:
        return pairs, []
    order = np.random.default_rng(seed).permutation(count)
    families = [[pair for pair in pairs if family_of[pair[0]] == number] for number in order]
    missing, validation = validation_split * len(pairs), []
    for family in families:
        if abs(missing - len(family)) < abs(missing) and len(validation) < len(families) - 1:
            validation.append(family)
            missing -= len(family)
    chosen = {pair for family in validation or [min(families, key=len)] for pair in family}
    return [pair for pair in pairs if pair not in chosen], [pair for pair in pairs if pair in chosen]


class TwinImages:
    """The images of the people of twin pairs, numbered: the rows of every matrix of embeddings.

    `ids`, the people in the order of the pairs; `first` and `count`, each one's first image and number of images;
    `paths`, all images, person after person; `person` and `family` (N,), the row in `ids` and the family of each;
    `pairs` (P, 2), the pairs as rows of `ids`.
    """

    def __init__(self, id_to_images, pairs):
        self.ids = list(dict.fromkeys(name for pair in pairs for name in pair))
        images = [list(dict.fromkeys(id_to_images[name])) for name in self.ids]
        self.paths = [path for person in images for path in person]
        self.count = np.array([len(person) for person in images], np.int64)
        self.first = np.cumsum(self.count) - self.count
        self.person = np.repeat(np.arange(len(images)), self.count)
        row = {name: i for i, name in enumerate(self.ids)}
        self.pairs = np.array([(row[a], row[b]) for a, b in pairs], np.int64)
        family = find_families(pairs)
        self.family = np.array([family[name] for name in self.ids], np.int64)[self.person]


def read_crop(path):
    """(112, 112, 3) uint8 RGB array of a crop: RGB, grey, palette or opaque RGBA; InputError for any other file."""
    try:
        with Image.open(path) as image:
            kind = f"{image.width}x{image.height} {image.mode}"
            if image.size == (CROP_SIZE, CROP_SIZE) and image.mode in ("RGB", "L", "P", "LA", "RGBA"):
                if image.convert("RGBA").getextrema()[3][0] == 255:
                    return np.array(image.convert("RGB"))
                kind = "partly transparent"
    except FileNotFoundError:
        windows = "; its path was written on Windows" if "\\" in path else "; run the alignment stage again"
        raise InputError(f"{path}: no such aligned crop{windows}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: unreadable crop ({error}); align it again with --realign") from error
    raise InputError(f"{path}: {kind}, but a crop is 112x112 RGB; run the alignment stage on it")


class Crops(NamedTuple):
    """Decoded crops: `pixels` (N, 112, 112, 3) uint8 RGB, `row` {path: row}, `sha256` [hash of each row, ...]."""

    pixels: torch.Tensor
    row: dict
    sha256: list


def load_crops(paths):
    """The Crops of files, each read once, with a progress bar. Raises InputError for one that is no crop."""
    row = {path: i for i, path in enumerate(dict.fromkeys(paths))}
    pixels = np.empty((len(row), CROP_SIZE, CROP_SIZE, 3), np.uint8)

    def read(path):
        pixels[row[path]] = read_crop(path)
        return hashlib.sha256(pixels[row[path]]).hexdigest()

    with ThreadPoolExecutor() as pool, warnings.catch_warnings(action="ignore"):  # read_crop says what is wrong
        found = list(progress(pool.map(read, row), "reading crops", "crop", total=len(row)))
    return Crops(torch.from_numpy(pixels), row, found)


class People:
    """The people of twin pairs and their crops, decoded once: what all training runs on them share.

    `pairs`; `id_to_images` {ID: [path, ...]}, each image (its pixels) once; `crops`; `owner` {hash: (ID, path)};
    `features`, of a frozen backbone; `warnings`. aligned: {ID: [path, ...]}. InputError if two IDs share an image.
    """

    def __init__(self, aligned, pairs, notes=()):
        aligned, repeated = {name: aligned[name] for pair in pairs for name in pair}, 0
        self.pairs, self.id_to_images, self.features, self.owner, self.warnings = pairs, {}, {}, {}, list(notes)
        self.crops = load_crops([path for paths in aligned.values() for path in paths])
        for name, paths in aligned.items():
            firsts = [self.owner.setdefault(self.crops.sha256[self.crops.row[path]], (name, path)) for path in paths]
            for path, (first_name, first_path) in zip(paths, firsts, strict=True):
                if first_name != name:
                    two = f"ID {name!r}: the same image as {first_path} of ID {first_name!r}"
                    raise InputError(f"{path}: listed under {two}; keep it under the one whose image it is")
            distinct = self.id_to_images[name] = list(dict.fromkeys(path for _, path in firsts))
            repeated += len(paths) - len(distinct)
            if len(distinct) == 1 and len(paths) > 2:
                self.warnings.append(f"ID {name!r}: one and the same image under all {len(paths)} paths")
        if repeated:
            self.warnings.append(f"{repeated} images are the same as another of their ID; each is used once")

    def rows(self, paths):
        """(N,) int64 rows of `crops.pixels`."""
        return torch.tensor([self.crops.row[path] for path in paths], dtype=torch.int64)


def count_triplets(n, m):
    """Number of ordered triplets of two twins with n and m images: n(n-1)m + m(m-1)n."""
    return n * (n - 1) * m + m * (m - 1) * n


class TwinTripletDataset(Dataset):
    """The sampled triplets of twin pairs; `[i]` is (anchor, positive, negative), (3, 112, 112) float32 network inputs.

    id_to_images: {ID: [path of an aligned crop, ...]}; pairs: [[ID, twin's ID], ...]; percentage: integer 1..100, the
    share of each pair's triplets, `(percentage * maximum + 99) // 100`. Raises InputError for another, and without a
    triplet. `pairs`: those that make triplets, `images`: their TwinImages; `n_skipped` others; `n_possible` triplets.
    """

    def __init__(self, id_to_images, pairs, percentage=100, seed=42):
        if type(percentage) is not int or not 1 <= percentage <= 100:
            raise InputError(f"percentage must be an integer from 1 to 100, not {percentage}")
        count = {name: len(set(id_to_images[name])) for pair in pairs for name in pair}
        self.pairs = [(a, b) for a, b in pairs if count_triplets(count[a], count[b])]
        self.n_skipped = len(pairs) - len(self.pairs)
        if not self.pairs:
            raise InputError("no pair makes a triplet: one twin needs two images and the other at least one")
        self.images, self.percentage, self.seed = TwinImages(id_to_images, self.pairs), percentage, seed
        # Per pair: both persons' first row and number of images, possible triplets; and where its sampled ones end.
        self._first, self._count = self.images.first[self.images.pairs], self.images.count[self.images.pairs]
        self._maximum = count_triplets(*self._count.T)
        self._end = np.cumsum((percentage * self._maximum + 99) // 100)
        self._begin = np.append(0, self._end[:-1])
        self.n_possible = int(self._maximum.sum())

    def __len__(self):
        return int(self._end[-1])

    @cached_property
    def _sample(self):
        """(len,) numbers of the sampled triplets among their pair's, pair after pair, ascending; drawn when used."""
        parts = []
        for (a, b), maximum, size in zip(self.pairs, self._maximum, self._end - self._begin, strict=True):
            # By IDs, so that a pair's triplets do not depend on which other pairs there are.
            generator = np.random.default_rng([self.seed, zlib.crc32(f"{a}\0{b}".encode())])
            numbers = generator.permutation(maximum)[:size] if size < maximum else np.arange(maximum)
            parts.append(np.sort(numbers).astype(np.min_scalar_type(maximum)))
        return np.concatenate(parts)

    def triplets(self, numbers):
        """(K,) triplet numbers in [0, len) -> (K, 3) int64 rows of `images.paths` (and of `pixels`)."""
        numbers = np.asarray(numbers, np.int64)
        pair = np.searchsorted(self._end, numbers, side="right")
        k = numbers - self._begin[pair] if self.percentage == 100 else self._sample[numbers].astype(np.int64)
        counts, firsts = self._count[pair].T, self._first[pair].T
        half = counts[0] * (counts[0] - 1) * counts[1]
        swapped = k >= half  # the second part of the numbers has its anchor in the second twin
        (n, m), (first, other) = (np.where(swapped, x[::-1], x) for x in (counts, firsts))
        anchor, rest = np.divmod(k - half * swapped, (n - 1) * m)
        positive, negative = np.divmod(rest, m)
        return np.stack([first + anchor, first + positive + (positive >= anchor), other + negative], 1)

    def triplets_among(self, pair, hands):
        """(K, 3) int64 rows of the sampled triplets of a pair among its two twins' images `hands`, numbered from 0."""
        (n, m), (first, other), found = self._count[pair], self._first[pair], []
        for swapped, (own, twins) in enumerate((hands, hands[::-1])):
            anchor, positive, negative = (x.ravel() for x in np.meshgrid(own, own, twins, indexing="ij"))
            kept = anchor != positive
            if self.percentage < 100:  # the numbers, as `triplets` reads them, must be sampled ones
                number = (anchor * (n - 1) + positive - (positive > anchor)) * m + negative + swapped * m * (m - 1) * n
                sampled = self._sample[self._begin[pair] : self._end[pair]]
                kept &= sampled.take(sampled.searchsorted(number), mode="clip") == number
            found.append(np.stack([first + anchor, first + positive, other + negative], 1)[kept])
            (n, m), (first, other) = (m, n), (other, first)  # so m(m-1)n above is the first half's size
        return np.concatenate(found)

    def by_pair(self, chunk=1 << 20):
        """Yield (rows, triplets (K, 3) among these rows), K <= chunk, over all sampled triplets, pair by pair."""
        for begin, end in zip(self._begin, self._end, strict=True):
            for start in range(begin, end, chunk):
                rows, index = np.unique(self.triplets(np.arange(start, min(start + chunk, end))), return_inverse=True)
                yield rows, index.reshape(-1, 3)

    def steps(self, epoch, images_per_batch, batch_size=None):
        """The epoch's steps, (T, 3) rows each: ShuffledSteps of `batch_size` triplets, without that GroupedSteps."""
        return ShuffledSteps(self, epoch, batch_size) if batch_size else GroupedSteps(self, epoch, images_per_batch)

    def count_touched_images(self):
        """How many distinct images stand in at least one sampled triplet."""
        if self.percentage == 100:
            return len(self.images.paths)
        return len({row for rows, _ in self.by_pair() for row in rows.tolist()})

    @cached_property
    def pixels(self):
        """All crops, decoded once, (N, 112, 112, 3) uint8 RGB, rows as `images.paths`."""
        return load_crops(self.images.paths).pixels

    def __getitem__(self, i):
        (rows,) = self.triplets([range(len(self))[i]])  # a range knows the negative ones and raises IndexError
        return tuple(to_input(self.pixels[torch.from_numpy(rows)]))


class ShuffledSteps:
    """An epoch's steps `[i]`, (T, 3) int64 rows of images: each sampled triplet once, shuffled by seed and epoch."""

    def __init__(self, dataset, epoch, batch_size):
        n = len(dataset)
        order = np.random.default_rng([dataset.seed, epoch]).permutation(np.arange(n, dtype=np.min_scalar_type(n)))
        self.steps = range(0, n, batch_size)
        self.parts = lambda start: [dataset.triplets(order[start : start + batch_size])]

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, i):
        return np.concatenate(self.parts(self.steps[i]))


class GroupedSteps(ShuffledSteps):
    """The steps of an epoch that embeds each image about once, with all sampled triplets among a step's images.

    Each person's images are dealt at random into hands of at most HAND_SIZE; a hand of one twin and one of the other
    are a block (the twin with fewer hands lends them again); blocks are shuffled, and a step takes as many as fit
    into `images_per_batch` images. All is up to seed and epoch. `[i]`: (T, 3) int64 rows.
    """

    def __init__(self, dataset, epoch, images_per_batch):
        if images_per_batch < 2 * HAND_SIZE:
            raise InputError(f"--images_per_batch must be at least {2 * HAND_SIZE}, a hand of each of two twins")
        generator = np.random.default_rng([dataset.seed, epoch])
        blocks = []
        for pair, counts in enumerate(dataset.images.count[dataset.images.pairs]):
            hands = [np.array_split(generator.permutation(n), -(-n // HAND_SIZE)) for n in counts]
            blocks += [(pair, [h[i % len(h)] for h in hands]) for i in range(max(map(len, hands)))]
        if dataset.percentage < 100:
            blocks = [block for block in blocks if len(dataset.triplets_among(*block))]
        self.steps, room = [], 0
        self.parts = lambda blocks: [dataset.triplets_among(*block) for block in blocks]
        for pair, hands in (blocks[i] for i in generator.permutation(len(blocks))):
            size = sum(map(len, hands))
            if size > room:
                self.steps.append([])
                room = images_per_batch
            self.steps[-1].append((pair, hands))
            room -= size
