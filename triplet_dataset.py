"""Twin pairs to triplets: the JSON files, the family-wise split, the sampled triplets, the decoded crops.

    dataset = TwinTripletDataset(id_to_images, pairs, percentage=10, seed=42)
    anchor, positive, negative = dataset[0]     # network inputs, (3, 112, 112) float32 each
    rows = dataset.triplets(np.arange(100))     # the same triplets as (100, 3) rows of dataset.load()

A triplet is (A's image i, A's image j != i, an image of A's twin), ordered, for both twins of a pair; two
twins with n and m images make n(n-1)m + m(m-1)n of them. None is ever listed: triplet number k of a pair is
worked out from k by division, and the sampled share of a pair is the first part of a pseudo-random
permutation of its numbers, itself worked out by arithmetic. A billion triplets cost no memory, the same seed
gives the same triplets on any machine, and 10 % of a pair's triplets contain the 5 % of the same seed.
"""

import hashlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from align import CROP_SIZE, InputError, read_pairs, replacing
from net import to_input

# ---- pseudo-random permutations ---------------------------------------------------------------------


def hash_key(*words):
    """A 64-bit key (uint64) from any words, the same on every machine."""
    text = "\0".join(str(word) for word in words)
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little"))


def permute(position, size, key, inverse=False):
    """Where a keyed pseudo-random permutation of range(size) sends each position; element-wise. Or `inverse`, back.

    position int64 in [0, size), size int64 >= 1, key uint64, broadcast against each other -> int64.
    A Feistel network over a grid of about sqrt(size) by sqrt(size) cells; results that fall beyond `size`
    are sent through again until they fall inside (Black and Rogaway, Ciphers with Arbitrary Finite Domains,
    CT-RSA 2002). Memory is that of the arguments: nothing of length `size` is made.
    """
    position, size, key = np.broadcast_arrays(*(np.asarray(x).astype(np.uint64) for x in (position, size, key)))
    width = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    height = (size + width - np.uint64(1)) // width
    result = position.copy()
    todo = np.arange(result.size)
    flat = result.reshape(-1)  # a view: `flat` and `result` are one array
    size, key, width, height = (x.reshape(-1) for x in (size, key, width, height))

    def turn(value, by, modulus):
        by = by % modulus
        return (value + (modulus - by if inverse else by)) % modulus

    while todo.size:
        w, h, k, small = width[todo], height[todo], key[todo], size[todo] < 1024
        row, column = flat[todo] // w, flat[todo] % w
        # Six rounds mix a large grid; one of 3 x 2 cells needs sixteen until all orders are equally likely.
        rounds = range(16 if small.any() else 6)
        for i in reversed(rounds) if inverse else rounds:
            if i % 2 == 0:
                mixed = turn(column, _mix(row, k, i), w)
                column = mixed if i < 6 else np.where(small, mixed, column)
            else:
                mixed = turn(row, _mix(column, k, i), h)
                row = mixed if i < 6 else np.where(small, mixed, row)
        flat[todo] = row * w + column
        todo = todo[flat[todo] >= size[todo]]
    return result.astype(np.int64)


def _mix(value, key, number):
    """The splitmix64 finaliser (Steele et al., OOPSLA 2014), shifted down so that a sum cannot overflow."""
    z = value + key + np.uint64((number + 1) * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) >> np.uint64(1)


# ---- pairs ------------------------------------------------------------------------------------------


def check_pairs(pairs, id_to_images):
    """The pairs to work with, and one-line warnings about what was left out.

    pairs: [[ID, twin's ID], ...]. A pair listed again, in either order, is dropped with a counted warning;
    a pair whose persons' images make no triplet (one image each, or a person without any) stays, since
    only `count_triplets` can say so. Raises InputError for an empty list, an ID paired with itself and IDs
    that `id_to_images` does not have: each is a slip that silently costs data or spoils labels.
    """
    if not pairs:
        raise InputError("the list of twin pairs is empty: it needs at least one [ID, twin's ID]")
    unique, repeated = {}, 0
    for number, (a, b) in enumerate(pairs, 1):
        if a == b:
            raise InputError(f"pair {number}: ID {a!r} is paired with itself; correct or delete the entry")
        for name in (a, b):
            if name not in id_to_images:
                raise InputError(f"pair {number}: ID {name!r} is not in the image list; add its images or delete it")
        repeated += frozenset((a, b)) in unique
        unique.setdefault(frozenset((a, b)), (a, b))
    warnings = [f"{repeated} of {len(pairs)} pairs are listed more than once; each is used once"] if repeated else []
    return list(unique.values()), warnings


def read_checked_pairs(path, id_to_images):
    """`check_pairs` of a pair file; its errors name the file."""
    pairs = read_pairs(path)
    try:
        return check_pairs(pairs, id_to_images)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


class TwinImages:
    """The distinct images of the people of twin pairs, numbered: the rows of every matrix of embeddings.

    `ids`, the people in the order of the pairs; `paths`, all their images, person after person; `person` (N,),
    the row in `ids` of each image; `first` and `count`, each person's first image and number of images; `pairs`
    (P, 2), the pairs as rows of `ids`; `warnings`, lines for the user about repeated entries.
    Raises InputError for what check_pairs refuses and for an image that is listed under two IDs.
    """

    def __init__(self, id_to_images, pairs):
        pairs, self.warnings = check_pairs(pairs, id_to_images)
        self.ids = list(dict.fromkeys(name for pair in pairs for name in pair))
        images = [list(dict.fromkeys(id_to_images[name])) for name in self.ids]
        repeated = sum(len(id_to_images[name]) for name in self.ids) - sum(len(person) for person in images)
        if repeated:
            self.warnings.append(f"{repeated} images are listed twice under one ID; each is used once")
        self.paths = [path for person in images for path in person]
        self.count = np.array([len(person) for person in images], np.int64)
        self.first = np.cumsum(self.count) - self.count
        self.person = np.repeat(np.arange(len(images)), self.count)
        row = {name: i for i, name in enumerate(self.ids)}
        self.pairs = np.array([(row[a], row[b]) for a, b in pairs], np.int64)
        owner = {}
        for path, person in zip(self.paths, self.person, strict=True):
            other = owner.setdefault(os.path.abspath(path), person)
            if other != person:
                two = f"{self.ids[other]!r} and {self.ids[person]!r}"
                raise InputError(f"{path}: listed under {two}; keep it under the one whose image it is")


def count_triplets(n, m):
    """Number of ordered triplets of two twins with n and m images: n(n-1)m + m(m-1)n."""
    return n * (n - 1) * m + m * (m - 1) * n


def usable_pairs(pairs, id_to_images):
    """The pairs whose images make at least one triplet."""
    count = {name: len(set(id_to_images[name])) for pair in pairs for name in pair}
    return [(a, b) for a, b in pairs if count_triplets(count[a], count[b])]


def find_families(pairs):
    """{ID: family number}, a family being a connected component of the pair graph; numbered as they appear."""
    parent = {}

    def root(name):
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for a, b in pairs:
        parent[root(b)] = root(a)
    numbers = {}
    return {name: numbers.setdefault(root(name), len(numbers)) for name in parent}


def split_pairs(pairs, validation_split, seed, related=()):
    """Split pairs into (train_pairs, val_pairs) by whole families, so that no ID stands on both sides.

    The number of validation pairs is the one nearest to `validation_split` * len(pairs) that whole families
    can make (the lower on a tie), with at least one family on each side; which families is up to the seed.
    With a single family, or a share of 0, val_pairs is empty. `related`: further pairs that bind people into
    one family without being split themselves, for instance pairs with too few images.
    Raises InputError unless 0 <= validation_split < 1.
    """
    if not 0 <= validation_split < 1:
        raise InputError(f"validation_split must be at least 0 and below 1, not {validation_split}")
    pairs = [tuple(pair) for pair in pairs]
    families = find_families([*pairs, *related])
    members = {}
    for pair in pairs:
        members.setdefault(families[pair[0]], []).append(pair)
    if validation_split == 0 or len(members) < 2:
        return pairs, []
    groups = list(members.values())
    order = permute(np.arange(len(groups)), len(groups), hash_key("split", seed))
    groups = [groups[i] for i in order]
    by_size = {}
    for group in groups:
        by_size.setdefault(len(group), []).append(group)

    # Which totals can families make? A set of totals is an integer whose bit t says that t can be made;
    # k families of one size go in as chunks of 1, 2, 4, ... of them.
    steps, reachable = [], 1
    for size, same in by_size.items():
        left, chunk = len(same), 1
        while left:
            take = min(chunk, left)
            steps.append((reachable, size, take))
            reachable |= reachable << (size * take)
            left, chunk = left - take, chunk * 2
    target = validation_split * len(pairs)
    total = min(
        (t for t in range(1, len(pairs)) if reachable >> t & 1),
        key=lambda t: (abs(t - target), t),
    )
    validation = set()
    for before, size, take in reversed(steps):
        if not before >> total & 1:  # this total could not be made without the chunk, so it is part of it
            total -= size * take
            for _ in range(take):
                validation.update(by_size[size].pop())
    return [p for p in pairs if p not in validation], [p for p in pairs if p in validation]


# A picture of any size is told from its header to be no crop; Pillow's remark on large ones would be a second line.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# ---- crops ------------------------------------------------------------------------------------------


def read_crop(path):
    """(112, 112, 3) uint8 RGB array of an aligned crop. Raises InputError unless the file is just that."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such aligned crop; run the alignment stage again")
    try:
        with Image.open(path) as image:
            mode, size = image.mode, image.size
            if (mode, size) == ("RGB", (CROP_SIZE, CROP_SIZE)):
                return np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: unreadable crop ({error}); align it again with --realign") from error
    raise InputError(f"{path}: {size[0]}x{size[1]} {mode}, but a crop is 112x112 RGB; run the alignment stage on it")


def load_crops(paths, cache=None):
    """(N, 112, 112, 3) uint8 RGB tensor of all crops, each file read once, with a progress bar.

    cache: the beginning of a file name. Then the tensor is a read-only memory map of `<cache>crops-<key>.npy`, which is
    made if it is not there; the key is of all paths, sizes and times of change. It need not fit into memory, and
    processes share it.
    """
    shape = (len(paths), CROP_SIZE, CROP_SIZE, 3)
    if cache is None:
        crops = np.empty(shape, np.uint8)
        _read_crops(paths, crops)
        return torch.from_numpy(crops)
    facts = [(os.path.abspath(path), *_size_and_time(path)) for path in paths]
    path = f"{cache}crops-{hashlib.sha256(repr(facts).encode('utf-8', 'surrogatepass')).hexdigest()[:16]}.npy"
    if not os.path.exists(path):
        with new_array(path, np.uint8, shape) as crops:
            _read_crops(paths, crops)
    return map_array(path, np.uint8, shape)


def _size_and_time(path):
    try:
        info = os.stat(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no such aligned crop; run the alignment stage again") from error
    return info.st_size, info.st_mtime_ns


def _read_crops(paths, crops):
    """Fill `crops`; the threads write into it, so that no decoded crop waits in memory."""

    def read(row):
        crops[row] = read_crop(paths[row])

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        bar = tqdm(total=len(paths), desc="reading crops", unit="crop", leave=False, disable=None)
        try:
            with bar:
                for start in range(0, len(paths), 4096):  # nor a million tasks
                    for _ in pool.map(read, range(start, min(start + 4096, len(paths)))):
                        bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # say what is wrong now, not after reading the rest
            raise


@contextmanager
def new_array(path, dtype, shape):
    """Yield a memory-mapped array to fill; it becomes the file `path` (.npy) when the block ends without error."""
    with replacing(path) as temporary:
        array = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # not on macOS. Writing to a map on a full disk would kill the process
            with open(temporary, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))
        yield array
        array.flush()


def map_array(path, dtype, shape):
    """The array in a .npy file as a read-only memory-mapped tensor. Raises InputError unless it is of this kind."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it, it will be made again") from error
    if array.dtype != dtype or array.shape != tuple(shape):
        raise InputError(f"{path}: holds {array.dtype} {array.shape}; delete it, it will be made again")
    with warnings.catch_warnings():  # that the tensor must not be written to: no one does
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


# ---- triplets ---------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Images that are embedded together because many triplets lie among them; see TwinTripletDataset.grouped_epoch."""

    size: int  # number of images
    pairs: list  # numbers of the pairs whose sampled triplets it holds
    part: tuple | None = None  # of one pair: (anchor is in the second twin, part, part of the person, part of the twin)


class TwinTripletDataset(Dataset):
    """The sampled triplets of twin pairs.

    id_to_images: {ID: [path of an aligned crop, ...]}; pairs: [[ID, twin's ID], ...]; percentage: integer
    1..100, the share of each pair's triplets, `(percentage * maximum + 99) // 100` of them.
    `[i]` is (anchor, positive, negative), each a (3, 112, 112) float32 network input (see net.to_input).

    Attributes: `pairs`, [(ID, ID), ...], those that make triplets; `images`, their TwinImages;
    `n_skipped`, the number of the others; `n_possible`, all triplets at 100 %; `warnings`, lines for the user.

    Raises InputError for what TwinImages refuses, for a percentage out of range, and when no pair makes a
    triplet.
    """

    def __init__(self, id_to_images, pairs, percentage=100, seed=42):
        if type(percentage) is bool or not isinstance(percentage, int | np.integer) or not 1 <= percentage <= 100:
            raise InputError(f"percentage must be an integer from 1 to 100, not {percentage}")
        images = TwinImages(id_to_images, pairs)
        self.seed, self.warnings = seed, list(images.warnings)
        maxima = [count_triplets(int(images.count[a]), int(images.count[b])) for a, b in images.pairs]
        self.pairs = [(images.ids[a], images.ids[b]) for (a, b), n in zip(images.pairs, maxima, strict=True) if n]
        self.n_skipped = len(images.pairs) - len(self.pairs)
        if not self.pairs:
            raise InputError("no pair makes a triplet: one twin needs two images and the other at least one")
        if self.n_skipped:
            total = len(images.pairs)
            self.warnings.append(f"{self.n_skipped} of {total} pairs have too few images for a triplet; skipped")
            images = TwinImages(id_to_images, self.pairs)
        self.images = images

        # Per pair: both persons' first row and number of images, possible triplets, key; and where it ends.
        maxima = [maximum for maximum in maxima if maximum]  # Python's integers, which do not overflow
        self._first, self._count = images.first[images.pairs], images.count[images.pairs]
        self._maximum = np.array(maxima, np.int64)
        self._key = np.array([hash_key("triplets", seed, a, b) for a, b in self.pairs], np.uint64)
        self._end = np.cumsum([(int(percentage) * maximum + 99) // 100 for maximum in maxima])
        self.n_possible = sum(maxima)
        self._blocks = None
        self._crops, self._decoded = None, np.zeros(len(images.paths), bool)

    def __len__(self):
        return int(self._end[-1])

    def triplets(self, numbers):
        """(K,) triplet numbers in [0, len) -> (K, 3) int64 rows of `images.paths` (and of `load()`)."""
        numbers = np.asarray(numbers, np.int64)
        pair = np.searchsorted(self._end, numbers, side="right")
        position = numbers - np.where(pair > 0, self._end[pair - 1], 0)
        k = permute(position, self._maximum[pair], self._key[pair])

        (n, m), (first, other) = self._count[pair].T, self._first[pair].T
        swapped = k >= n * (n - 1) * m  # the second part of the numbers has its anchor in the second twin
        k = k - np.where(swapped, n * (n - 1) * m, 0)
        n, m = np.where(swapped, m, n), np.where(swapped, n, m)
        first, other = np.where(swapped, other, first), np.where(swapped, first, other)

        anchor, rest = np.divmod(k, (n - 1) * m)
        positive, negative = np.divmod(rest, m)
        positive = positive + (positive >= anchor)
        return np.stack([first + anchor, first + positive, other + negative], 1)

    def epoch(self, epoch, batch_size, start=0):
        """Yield the (B, 3) triplets of each step of an epoch, from step `start` on: every sampled triplet once.

        They are shuffled by seed and epoch alone; the last step may be smaller.
        """
        size, key = len(self), hash_key("epoch", self.seed, epoch)
        window = max(1, 65536 // batch_size) * batch_size  # many steps worked out at once, few held
        for begin in range(start * batch_size, size, window):
            positions = np.arange(begin, min(begin + window, size))
            rows = self.triplets(permute(positions, size, key))
            yield from (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))

    def grouped_epoch(self, epoch, images_per_step):
        """The steps of an epoch that embeds few images for many triplets: a list of lists of blocks.

        A block is a group of images with all sampled triplets inside it (`block_triplets`): a family's, if it has no
        more than `images_per_step` images, else a pair's, else a part of a pair. A step takes blocks in the order of
        seed and epoch as long as its images are no more than that. So every sampled triplet is visited once.
        Raises InputError for fewer than 3 images per step, which hold no triplet.
        """
        if self._blocks is None or self._blocks[0] != images_per_step:
            if images_per_step < 3:
                raise InputError(f"a step of {images_per_step} images holds no triplet; it needs at least 3")
            self._blocks = images_per_step, self._cut_into_blocks(images_per_step)
        blocks = self._blocks[1]
        order = permute(np.arange(len(blocks)), len(blocks), hash_key("blocks", self.seed, epoch))
        steps, room = [], 0
        for block in (blocks[i] for i in order):
            if block.size > room:
                steps.append([])
                room = images_per_step
            steps[-1].append(block)
            room -= block.size
        return steps

    def _cut_into_blocks(self, budget):
        families = find_families(self.pairs)
        members = {}
        for pair, (name, _) in enumerate(self.pairs):
            members.setdefault(families[name], []).append(pair)
        blocks = []
        for pairs in members.values():
            people = np.unique(self.images.pairs[pairs])
            size = int(self.images.count[people].sum())
            blocks += [Block(size, pairs)] if size <= budget else [b for p in pairs for b in self._cut_pair(p, budget)]
        return blocks

    def _cut_pair(self, pair, budget):
        """The blocks of one pair: itself, or if it is too large, every choice of up to three parts of its images.

        Anchor and positive lie in two parts of a person or both in one, the negative in a part of the twin, so every
        triplet lies in one of the choices.
        """
        counts = self._count[pair]
        if counts.sum() <= budget:
            return [Block(int(counts.sum()), [pair])]
        # A third of the budget each, as even as possible: parts of one image more than that cost whole further steps.
        parts = [np.array_split(np.arange(n), -(-n // (budget // 3))) for n in counts]
        blocks = []
        for swapped in (False, True):
            own, other = (parts[1], parts[0]) if swapped else (parts[0], parts[1])
            for i, one in enumerate(own):
                for two in own[i + (len(one) == 1) :]:  # one image is not anchor and positive
                    size = len(one) + (two is not one) * len(two)
                    blocks += [Block(size + len(rest), [pair], (swapped, one, two, rest)) for rest in other]
        return blocks

    def block_triplets(self, block):
        """(K, 3) int64 rows of `images.paths`: the sampled triplets of a block of `grouped_epoch`."""
        if block.part is None:
            begins = [self._end[pair - 1] if pair else 0 for pair in block.pairs]
            ranges = [np.arange(begin, self._end[pair]) for begin, pair in zip(begins, block.pairs, strict=True)]
            return self.triplets(np.concatenate(ranges))
        (pair,), (swapped, one, two, rest) = block.pairs, block.part
        (n, m), (first, other) = self._count[pair][:: -1 if swapped else 1], self._first[pair][:: -1 if swapped else 1]
        choices = [(one, two)] if one is two else [(one, two), (two, one)]
        grids = [np.stack(np.meshgrid(a, p, rest, indexing="ij"), -1).reshape(-1, 3) for a, p in choices]
        anchor, positive, negative = np.concatenate([grid[grid[:, 0] != grid[:, 1]] for grid in grids]).T
        # The number of each triplet among the pair's, as `triplets` reads it, and its place in the permutation: the
        # sampled ones are those in the permutation's first part.
        number = (anchor * (n - 1) + positive - (positive > anchor)) * m + negative + swapped * m * (m - 1) * n
        place = permute(number, self._maximum[pair], self._key[pair], inverse=True)
        sampled = place < self._end[pair] - (self._end[pair - 1] if pair else 0)
        return np.stack([first + anchor, first + positive, other + negative], 1)[sampled]

    def by_pair(self, chunk=1 << 17):
        """Yield (rows, triplets) over all sampled triplets, pair by pair.

        rows (n + m,) are the pair's images; triplets (K, 3), K <= chunk, index into `rows`. So the loss over
        millions of triplets takes one small matrix of distances per pair.
        """
        for pair, end in enumerate(self._end):
            begin = self._end[pair - 1] if pair else 0
            (first, other), (n, m) = self._first[pair], self._count[pair]
            rows = np.concatenate([np.arange(first, first + n), np.arange(other, other + m)])
            for start in range(begin, end, chunk):
                triplets = self.triplets(np.arange(start, min(start + chunk, end)))
                own = (triplets >= first) & (triplets < first + n)
                yield rows, np.where(own, triplets - first, triplets - other + n)

    def touched(self):
        """(images, IDs): how many distinct ones stand in at least one sampled triplet."""
        seen = np.zeros(len(self.images.paths), bool)
        for pair, end in enumerate(self._end):
            begin = self._end[pair - 1] if pair else 0
            ranges = [slice(first, first + n) for first, n in zip(self._first[pair], self._count[pair], strict=True)]
            for start in range(begin, end, 1024):  # in a random order: all images are soon seen
                seen[self.triplets(np.arange(start, min(start + 1024, end)))] = True
                if all(seen[own].all() for own in ranges):
                    break
        return int(seen.sum()), len(np.unique(self.images.person[seen]))

    def load(self):
        """Decode all crops, once; returns them as (N, 112, 112, 3) uint8 RGB tensor, rows as `images.paths`."""
        if self._crops is None or not self._decoded.all():
            self._crops = load_crops(self.images.paths)
            self._decoded[:] = True
        return self._crops

    def __getitem__(self, i):
        if not -len(self) <= i < len(self):
            raise IndexError(f"triplet {i} of {len(self)}")
        rows = self.triplets([i % len(self)])[0]
        if self._crops is None:
            self._crops = torch.empty((len(self.images.paths), CROP_SIZE, CROP_SIZE, 3), dtype=torch.uint8)
        for row in rows[~self._decoded[rows]]:
            self._crops[row] = torch.from_numpy(read_crop(self.images.paths[row]))
            self._decoded[row] = True
        return tuple(to_input(self._crops[torch.from_numpy(rows)]))
