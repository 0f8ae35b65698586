"""From twin pairs to training steps: people, families, split, decoded crops, sampled triplets.

    dataset = TwinTripletDataset(id_to_images, pairs, percentage=10, seed=42)
    anchor, positive, negative = dataset[0]           # network inputs, (3, 112, 112) each
    rows = dataset.triplets(np.arange(100))           # (100, 3) rows of dataset.pixels
    steps = GroupedSteps(dataset, epoch=1, images_per_batch=96)
    rows = steps[0]                                   # (T, 3) rows of the first step

A triplet is (A's image i, A's image j != i, an image of A's twin), for both twins of a pair.
Triplets are numbered, never stored. Of each pair, a percentage takes the beginning of one seeded,
shuffled order of its numbers, so the 5 % sample lies inside the 10 % sample of the same seed.
"""

import hashlib
import math
import os
import reprlib
import unicodedata
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from net import (
    CROP_SIZE,
    InputError,
    interrupt,
    progress,
    read_csv_rows,
    read_flag,
    read_json,
    to_input,
)

# Two crops are copies if at most this many of the 288 bits of their perceptual hashes differ.
# Among 2,040 real crops, those of different people differ in at least 40 bits. Of copies saved as
# JPEG of quality 20, or at half the size, 95 of 100 differ in at most 15.
MAX_DIFFERING_BITS = 15
HEIC_SUFFIXES = (".heic", ".heif", ".hif")  # of photographs that Pillow reads with pillow-heif
GROUP_SIZE = 8  # images of a person that meet in a grouped step, at most
TRIPLETS_AT_ONCE = 1 << 16  # that `count_touched_images` has in memory, at most


# ---- the files that describe a data set ----------------------------------------------------------
def resolve(folder, path):
    """The full path of an entry in a JSON file that lies in `folder`.

    If there is no such file, a path written on Windows is tried with slashes, and a name with
    accents in its other spelling: Macs write them decomposed (NFD), other systems composed (NFC).
    """
    spellings = [path, path.replace("\\", "/")]
    for form in ("NFC", "NFD"):
        spellings += [unicodedata.normalize(form, spelling) for spelling in spellings[:2]]
    candidates = [os.path.normpath(os.path.join(folder, spelling)) for spelling in spellings]
    for candidate in dict.fromkeys(candidates):
        if os.path.exists(candidate):
            return candidate
    return candidates[0]


def compose_accents(name):
    """An ID with its accents composed (NFC), so that both spellings of a name are one ID."""
    return unicodedata.normalize("NFC", name)


def read_id_to_images(path):
    """{ID: [path, ...]} of a JSON file {"ID": ["path", ...]}, or of a folder (see list_people).

    Relative paths start at the file's own folder. Raises InputError for any other content.
    """
    if os.path.isdir(path):
        folder = path
        content = list_people(path)
    else:
        folder = os.path.dirname(os.path.abspath(path))
        content = read_json(path, '{"ID": ["path", ...], ...} with at least one ID')
    id_to_images = {}
    for name, images in content.items():
        is_list = isinstance(images, list)
        if not is_list or not all(isinstance(image, str) and image for image in images):
            raise InputError(f"{path}: the images of ID {name!r} must be a list of paths")
        spelling = compose_accents(name)
        if spelling in id_to_images:
            raise InputError(f"{path}: ID {name!r} is there in two spellings; merge the two")
        id_to_images[spelling] = [resolve(folder, image) for image in images]
    return id_to_images


def list_people(folder):
    """{ID: [path, ...]} of a folder: each folder in it is an ID and holds its images."""
    id_to_images = {}
    for person in sorted(Path(folder).iterdir()):
        if person.is_dir() and not person.name.startswith("."):
            images = sorted(path for path in person.iterdir() if is_image(path))
            id_to_images[person.name] = [os.path.abspath(image) for image in images]
    if not any(id_to_images.values()):
        raise InputError(f"{folder}: expected a folder for each ID, with photographs in it")
    return id_to_images


def is_image(path):
    """Whether a file is an image by its name; those that systems leave behind are not."""
    is_hidden = path.name.startswith(".")  # .DS_Store, ._photo.jpg
    suffix = path.suffix.lower()
    # HEIC counts even if nothing can read it here: the aligner says what to install. Pillow
    # registers PDF too, which it can write but not read.
    suffixes = {*Image.registered_extensions(), *HEIC_SUFFIXES} - {".pdf"}
    return not is_hidden and suffix in suffixes


def count_other_files(folder):
    """Counter of the files in a folder of people that `list_people` does not take, by kind.

    A kind is the ending of a file's name, or its whole name if it has none.
    """
    listed = {image for images in list_people(folder).values() for image in images}
    kinds = Counter()
    for path in Path(folder).rglob("*"):
        if path.is_file() and os.path.abspath(path) not in listed:
            kinds[path.suffix.lower() or path.name] += 1
    return kinds


def read_csv_pairs(path, id_to_images):
    """([[ID, ID], ...], [note, ...]) of a CSV file of two columns, with titles or without.

    The first line is taken for titles, and left out, if nothing in it is an ID of `id_to_images`.
    """
    expected = "expected a CSV file in UTF-8 of two columns, ID and twin's ID"
    rows = read_csv_rows(path, expected)
    notes = []
    if rows and not any(compose_accents(name) in id_to_images for name in rows[0]):
        notes.append(f"{path}: the first line, {','.join(rows[0])}, is taken for titles")
        rows = rows[1:]
    if not rows:
        raise InputError(f"{path}: {expected}, with at least one pair")
    return rows, notes


def read_pairs(path, id_to_images, missing="has no images listed; add them or delete the pair"):
    """([(ID, ID), ...], [warning, ...]) of a JSON file [["ID", "twin's ID"], ...], or a CSV file.

    A pair that is listed twice, in whichever order of its IDs, is used once. Raises InputError
    for an empty list, an ID that is paired with itself, and an ID that `id_to_images` does not
    have. missing: how the message about such an ID ends.
    """
    if str(path).lower().endswith(".csv"):
        content, notes = read_csv_pairs(path, id_to_images)
    else:
        content = read_json(path, '[["ID", "twin\'s ID"], ...] with at least one pair', list)
        notes = []
    pairs = {}
    for number, entry in enumerate(content, 1):
        pair = parse_pair(f"{path}: pair {number}", entry, id_to_images, missing)
        pairs.setdefault(frozenset(pair), pair)
    n_repeated = len(content) - len(pairs)
    if n_repeated:
        counts = f"{n_repeated} of {len(content)} pairs"
        notes.append(f"{counts} repeat an earlier one; each is used once")
    return list(pairs.values()), notes


def parse_pair(where, entry, id_to_images, missing):
    """(ID, ID) of an entry of a pair list; InputError if it is no pair of two listed people.

    where: how the message begins. missing: how it ends for an ID that is not listed.
    """
    is_pair = isinstance(entry, list) and len(entry) == 2
    if not is_pair or not all(isinstance(name, str) for name in entry):
        raise InputError(f"{where} is {reprlib.repr(entry)}; expected two IDs, both strings")
    first, second = (compose_accents(name) for name in entry)
    if first == second:
        message = f"ID {first!r} is paired with itself; correct or delete the entry"
        raise InputError(f"{where}: {message}")
    for name in (first, second):
        if name not in id_to_images:
            raise InputError(f"{where}: ID {name!r} {missing}")
    return first, second


def read_people(args, images_flag, pairs_flag):
    """({ID: [path, ...]}, [(ID, ID), ...], [warning, ...]) of the files that two flags name.

    images_flag: "id_to_images" or "aligned_json"; crops of the latter that are gone are left out.
    """
    id_to_images = read_flag(args, images_flag, read_id_to_images)
    if images_flag != "aligned_json":
        pairs, notes = read_flag(args, pairs_flag, read_pairs, id_to_images)
        return id_to_images, pairs, notes
    missing = (
        f"is not listed in {args.aligned_json}: if its photographs have not been aligned, leave "
        "out --skip_alignment; else delete the pair"
    )
    pairs, notes = read_flag(args, pairs_flag, read_pairs, id_to_images, missing)
    existing, n_gone = find_existing_crops(id_to_images, pairs)
    # If all are gone, they stay in the list, and load_crops names the first as missing.
    if n_gone and any(existing.values()):
        notes.append(f"{n_gone} listed crops are gone and are passed over")
        id_to_images |= existing
    return id_to_images, pairs, notes


def find_existing_crops(id_to_images, pairs):
    """({ID: [path, ...]} of the files that exist, how many do not), for the people of the pairs."""
    existing = {}
    n_gone = 0
    for name in {name for pair in pairs for name in pair}:
        existing[name] = [path for path in id_to_images[name] if os.path.exists(path)]
        n_gone += len(id_to_images[name]) - len(existing[name])
    return existing, n_gone


# ---- people, families, crops ---------------------------------------------------------------------
def find_families(pairs):
    """{ID: number of its family}: the connected components of the pairs, in order of appearance."""
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


def deal_into_folds(sizes, n_folds, seed):
    """(F,) the fold of each of F families, from 0 to n_folds - 1.

    Families come in an order that the seed decides, and each goes to the fold with the smallest
    sum of `sizes` (F,) so far.
    """
    folds = np.zeros(len(sizes), np.int64)
    filled = np.zeros(n_folds)
    for family in np.random.default_rng(seed).permutation(len(sizes)):
        folds[family] = filled.argmin()
        filled[folds[family]] += sizes[family]
    return folds


def deal_people_into_folds(pairs, n_folds, seed):
    """{ID: fold, from 1 to n_folds}: whole families, with about as many pairs in each fold.

    The people, the pairs and the seed decide, not the order of the list. Raises InputError if there
    are fewer families than folds.
    """
    family_of = find_families(sorted(tuple(sorted(pair)) for pair in pairs))
    n_pairs = np.bincount([family_of[first] for first, _ in pairs])
    if len(n_pairs) < n_folds:
        message = f"the pairs make only {len(n_pairs)} families; take no more folds than families"
        raise InputError(f"--folds {n_folds}: {message}")
    folds = deal_into_folds(n_pairs, n_folds, seed)
    return {name: int(folds[family]) + 1 for name, family in family_of.items()}


def split_pairs(
    pairs: list,
    validation_split: float,
    seed: int,
    related: list | tuple = (),
    never_validate: set | tuple = (),
) -> tuple[list, list]:
    """Split pairs into (train_pairs, val_pairs) by whole families, so that no ID is on both sides.

    Families are taken in the seed's order; one goes to validation if that brings the share of
    validation pairs nearer to `validation_split`, in [0, 1). Each side gets at least one family.
    With a single family, or a validation_split of 0, val_pairs is empty. related: further pairs,
    which are not split themselves, but join people to families. never_validate: IDs whose families
    stay in train_pairs; if these are all families, val_pairs is empty.
    """
    if not 0 <= validation_split < 1:
        raise InputError(f"validation_split must be at least 0 and below 1, not {validation_split}")
    pairs = [tuple(pair) for pair in pairs]
    family_of = find_families([*pairs, *related])
    families = {}
    for pair in pairs:
        families.setdefault(family_of[pair[0]], []).append(pair)
    if validation_split == 0 or len(families) < 2:
        return pairs, []

    # `pairs` stand before `related`, so their families have the numbers 0 to len(families) - 1.
    shuffled = np.random.default_rng(seed).permutation(len(families))
    kept_from_validation = {family_of[name] for name in never_validate if name in family_of}
    candidates = [families[number] for number in shuffled if number not in kept_from_validation]
    n_missing = validation_split * len(pairs)  # below 0 if there are too many
    validation = []
    for family in candidates:
        is_nearer = abs(n_missing - len(family)) < abs(n_missing)
        if is_nearer and len(validation) < len(families) - 1:
            validation.append(family)
            n_missing -= len(family)
    if candidates and not validation:
        validation = [min(candidates, key=len)]
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
    `family_of_person`: that number of each person, also of those without an image.
    `pairs` (P, 2): the pairs, as indices of `ids`.
    """

    def __init__(self, id_to_images, pairs):
        self.ids = list(dict.fromkeys(name for pair in pairs for name in pair))
        self.paths = []
        counts = []
        for name in self.ids:
            images = list(dict.fromkeys(id_to_images[name]))
            self.paths += images
            counts.append(len(images))
        self.count = np.array(counts, np.int64)
        self.first = np.cumsum(self.count) - self.count
        self.person = np.repeat(np.arange(len(self.ids)), self.count)
        family_of = find_families(pairs)
        self.family_of_person = np.array([family_of[name] for name in self.ids], np.int64)
        self.family = np.repeat(self.family_of_person, self.count)
        index = {name: i for i, name in enumerate(self.ids)}
        indices = [(index[a], index[b]) for a, b in pairs]
        self.pairs = np.array(indices, np.int64).reshape(-1, 2)  # also without a pair

    def count_triplets(self, positives):
        """(P, 2) how many triplets of each pair have its first, and its second twin as anchor.

        positives: the Positives of these images.
        """
        n_positives = positives.count[self.pairs]
        n_negatives = self.count[self.pairs[:, ::-1]]
        return n_positives * n_negatives


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
        if os.sep == "/" and "\\" in str(path):
            hint = "its path was written on Windows, so run the alignment stage here"
        raise InputError(f"{path}: no such aligned crop; {hint}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        message = f"unreadable crop ({error}); run the alignment stage again"
        raise InputError(f"{path}: {message}") from error
    raise InputError(
        f"{path}: {description}, but a crop is 112x112 RGB; run the alignment stage on it"
    )


class Crops(NamedTuple):
    """Decoded crops.

    `pixels` (N, 112, 112, 3): uint8 RGB. `row`: {path: its row in `pixels`}. `sha256`: [the
    SHA-256 of each row's pixels, in hexadecimal digits, ...].
    """

    pixels: torch.Tensor
    row: dict
    sha256: list


def load_crops(paths):
    """The Crops of files, each read once, with a progress bar; InputError if one is no crop."""
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


def perceptual_hashes(pixels):
    """(N, 112, 112, 3) uint8 crops -> (N, 36) uint8 tensor: 288 bits, nearly equal for copies.

    144 bits say where the face grows brighter from left to right: each compares a cell of a grid of
    12 rows and 13 columns with the cell to its left. The other 144 say so from top to bottom (a
    difference hash). Saving again, resizing and other light change few of them.
    """
    hashes = []
    for chunk in pixels.split(1024):
        inner = chunk[:, 8:-8, 8:-8].float()  # the border differs between copies
        face = inner.mean(3)[:, None]  # grey, (B, 1, 96, 96)
        across = F.adaptive_avg_pool2d(face, (12, 13)).diff(dim=3) > 0
        down = F.adaptive_avg_pool2d(face, (13, 12)).diff(dim=2) > 0
        bits = torch.cat([across.flatten(1), down.flatten(1)], 1)
        hashes.append(torch.from_numpy(np.packbits(bits.numpy(), axis=1)))
    return torch.cat(hashes)


def find_copies(hashes, others, earlier=False):
    """(N,): for each of `hashes` (N, 36), the index of its first copy in `others` (M, 36), or -1.

    earlier: `others` are `hashes` themselves; each row is compared only with the rows before it.
    """

    def signs(packed):
        """Bits as -1 and 1: the product of two rows is how many agree minus how many differ."""
        bits = np.unpackbits(packed.numpy(), axis=1)
        return torch.from_numpy(bits).float() * 2 - 1

    found = torch.full((len(hashes),), -1)
    if len(others) == 0:
        return found
    other_signs = signs(others)
    for start in range(0, len(hashes), 1024):
        chunk = signs(hashes[start : start + 1024])
        n_differing = (chunk.shape[1] - chunk @ other_signs.T) / 2
        is_copy = n_differing <= MAX_DIFFERING_BITS
        if earlier:
            is_copy = is_copy.tril(start - 1)  # in row i of the chunk, columns below start + i
        first = is_copy.int().argmax(1)
        found[start : start + len(chunk)] = torch.where(is_copy.any(1), first, -1)
    return found


class People:
    """The people of twin pairs and their crops, decoded once: what all training runs share.

    aligned: {ID: [path of a crop, ...]}. An image is what its pixels are: a copy under the same
    ID, also one that was saved again or resized, is used once, with a warning; InputError if two
    IDs have the same image.

    `pairs`: [(ID, ID), ...]. `id_to_images`: {ID: [path, ...]}, each image once. `crops`: of all
    paths; `hashes` (N, 36) and `owner` [ID, ...] are the perceptual hash and the person of each.
    `warnings`: for the user; they begin with `notes`, the warnings of read_people. `features`: the
    cache of train_twins.backbone_features.
    """

    def __init__(self, aligned, pairs, notes=()):
        self.pairs = pairs
        self.warnings = list(notes)
        self.features = {}
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        self.crops = load_crops([path for name in names for path in aligned[name]])
        self.hashes = perceptual_hashes(self.crops.pixels)
        first_copy = find_copies(self.hashes, self.hashes, earlier=True).tolist()
        paths = list(self.crops.row)
        self.owner = [None] * len(paths)
        self.id_to_images = {}
        n_copies = 0
        for name in names:
            rows = [self.crops.row[path] for path in aligned[name]]
            distinct = []
            for row in rows:
                self._set_owner(row, name, first_copy[row])
                is_listed_twice = row in distinct
                # Only a copy of an image that is kept is left out. A copy of one that was left out
                # may differ enough from the kept one.
                is_copy = first_copy[row] >= 0 and self._is_copy_of_any(row, distinct)
                if not is_listed_twice and not is_copy:
                    distinct.append(row)
            self.id_to_images[name] = [paths[row] for row in distinct]
            n_copies += len(rows) - len(distinct)
            if len(distinct) == 1 and len(rows) > 2:
                warning = f"ID {name!r}: all {len(rows)} paths lead to one and the same image"
                self.warnings.append(warning)
        if n_copies:
            self.warnings.append(
                f"{n_copies} images are copies of another of their ID; each is used once"
            )

    def _set_owner(self, row, name, first_copy):
        """Note that an image shows a person; InputError if it is another person's already.

        first_copy: the first row that has the same image, -1 if none before `row` has it.
        """
        original = row if first_copy < 0 else first_copy
        owner = self.owner[original]
        if owner not in (None, name):
            paths = list(self.crops.row)
            raise InputError(
                f"{paths[row]}: listed under ID {name!r}, but it is the same image as "
                f"{paths[original]} of ID {owner!r}; keep it under the one that it shows"
            )
        self.owner[row] = name

    def _is_copy_of_any(self, row, others):
        """Whether the image in a row is a copy of one in the rows `others`."""
        return bool(find_copies(self.hashes[[row]], self.hashes[others])[0] >= 0)

    def people_on(self, hashes):
        """The set of IDs of which an image is a near copy of one of `hashes` (M, 36)."""
        copies = find_copies(self.hashes, hashes)
        return {owner for owner, copy in zip(self.owner, copies.tolist(), strict=True) if copy >= 0}

    def rows(self, paths):
        """(N,) int64 rows of `crops.pixels`."""
        return torch.tensor([self.crops.row[path] for path in paths], dtype=torch.int64)


# ---- triplets ------------------------------------------------------------------------------------
class Positives:
    """The (anchor, positive) pairs of images, numbered person after person, anchor after anchor.

    A positive is any other image of the anchor's person; with `value_of`, {path: value}, it also
    has another value than the anchor. Images of a person with one value must be consecutive rows
    of `images`.

    `value_number` (N,): equal for images of a person with one value; without `value_of`, different
    for all images. `before` (N + 1,): how many of the pairs have their anchor before each image.
    `begin`, `count`: of each person, the number of their first pair, and how many they have.
    """

    def __init__(self, images: TwinImages, value_of: dict | None = None):
        n_images = len(images.paths)
        self.value_number = np.arange(n_images)
        if value_of:
            values = np.array([value_of[path] for path in images.paths])
            is_new = np.ones(n_images, bool)
            is_same_person = images.person[1:] == images.person[:-1]
            is_same_value = values[1:] == values[:-1]
            is_new[1:] = ~(is_same_person & is_same_value)
            self.value_number = np.cumsum(is_new) - 1
        # The images with an anchor's value, it among them, are excluded from its positives.
        n_images_of_value = np.bincount(self.value_number)
        first_of_value = np.cumsum(n_images_of_value) - n_images_of_value
        self._n_excluded = n_images_of_value[self.value_number]
        self._first_excluded = first_of_value[self.value_number]
        self._first_of_person = images.first[images.person]
        n_positives = images.count[images.person] - self._n_excluded
        self.before = np.append(0, np.cumsum(n_positives))
        self.begin = self.before[images.first]
        self.count = self.before[images.first + images.count] - self.begin

    def pair_at(self, number):
        """(anchors, positives), rows of the images, of the pairs with these numbers."""
        anchor = np.searchsorted(self.before, number, side="right") - 1
        place = number - self.before[anchor]  # among the anchor's positives
        positive = self._first_of_person[anchor] + place
        is_after_excluded = positive >= self._first_excluded[anchor]
        return anchor, positive + self._n_excluded[anchor] * is_after_excluded

    def number_of(self, anchor, positive):
        """The inverse of `pair_at`."""
        is_after_excluded = positive >= self._first_excluded[anchor]
        n_skipped = self._n_excluded[anchor] * is_after_excluded
        place = positive - self._first_of_person[anchor] - n_skipped  # among the anchor's positives
        return self.before[anchor] + place


class TwinTripletDataset(Dataset):
    """The sampled triplets of twin pairs; `[i]` is (anchor, positive, negative).

    Each of the three is a network input, (3, 112, 112) float32, as `net.to_input` makes it.
    id_to_images: {ID: [path of an aligned crop, ...]}. pairs: [[ID, twin's ID], ...]. percentage:
    an integer from 1 to 100; of every pair with `maximum` triplets, `(percentage * maximum + 99)
    // 100` are sampled. value_of: {path: value}; if it is given, a positive has another value than
    its anchor, such as another session, and `maximum` counts the triplets that this leaves. Raises
    InputError for another percentage, or if there is no triplet at all.

    `pairs`: those that make triplets; `n_skipped`: how many others there are; `images`:
    TwinImages of `pairs`, each person's images in the order of their values; `positives`: the
    Positives of `images`; `n_possible`: how many triplets there are to sample from.
    """

    def __init__(
        self,
        id_to_images: dict,
        pairs: list,
        percentage: int = 100,
        seed: int = 42,
        value_of: dict | None = None,
    ) -> None:
        if type(percentage) is not int or not 1 <= percentage <= 100:
            raise InputError(f"percentage must be an integer from 1 to 100, not {percentage}")
        self.percentage = percentage
        self.seed = seed
        self.has_values = value_of is not None
        if self.has_values:
            names = {name for pair in pairs for name in pair}
            id_to_images = {name: sorted(id_to_images[name], key=value_of.get) for name in names}
        everyone = TwinImages(id_to_images, pairs)
        n_triplets = everyone.count_triplets(Positives(everyone, value_of)).sum(1)
        self.pairs = [tuple(pair) for pair, n in zip(pairs, n_triplets, strict=True) if n]
        self.n_skipped = len(pairs) - len(self.pairs)
        if not self.pairs:
            reason = "one twin needs two images and the other at least one"
            if self.has_values:
                reason = "one twin needs images with two values and the other at least one image"
            raise InputError(f"no pair makes a triplet: {reason}")
        self.images = TwinImages(id_to_images, self.pairs)
        self.positives = Positives(self.images, value_of)
        # Of both twins of each pair, (P, 2): the first row and the number of images, and where
        # their (anchor, positive) pairs begin.
        self._first = self.images.first[self.images.pairs]
        self._count = self.images.count[self.images.pairs]
        self._begin_of_positives = self.positives.begin[self.images.pairs]
        # Of each pair, (P,): how many triplets have the first twin as anchor, and where the sampled
        # ones of both begin and end.
        n_triplets = self.images.count_triplets(self.positives)
        self._n_with_first_as_anchor = n_triplets[:, 0]
        maximum = n_triplets.sum(1)
        n_sampled = (percentage * maximum + 99) // 100
        self._end = np.cumsum(n_sampled)
        self._begin = self._end - n_sampled
        self.n_possible = int(maximum.sum())
        # Seeded by the IDs, so a pair's sample does not depend on what other pairs there are.
        codes = [zlib.crc32(f"{a}\0{b}".encode(errors="surrogatepass")) for a, b in self.pairs]
        self._shuffle = Shuffle(maximum, [[seed, code] for code in codes])

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
        crops = load_crops(self.images.paths)
        if len(crops.row) < len(self.images.paths):  # the rows would not be those of the paths
            raise InputError("a crop is listed under two IDs; keep it under the right one")
        return crops.pixels

    def triplets(self, numbers):
        """(K,) numbers of sampled triplets, in [0, len) -> (K, 3) int64 rows of `images.paths`."""
        numbers = np.asarray(numbers, np.int64)
        pair = np.searchsorted(self._end, numbers, side="right")
        place = numbers - self._begin[pair]
        within_pair = place
        if self.percentage < 100:  # the sample begins the shuffled order of the pair's triplets
            within_pair = self._shuffle.number_at(pair, place)
        # From here on the inverse of `_number_within_pair`.
        anchor_twin = (within_pair >= self._n_with_first_as_anchor[pair]).astype(np.int64)
        negative_twin = 1 - anchor_twin
        number = within_pair - anchor_twin * self._n_with_first_as_anchor[pair]
        image_pair, place_of_negative = np.divmod(number, self._count[pair, negative_twin])
        begin = self._begin_of_positives[pair, anchor_twin]
        anchor, positive = self.positives.pair_at(begin + image_pair)
        negative = self._first[pair, negative_twin] + place_of_negative
        return np.stack([anchor, positive, negative], 1)

    def _number_within_pair(self, triplets, pair, anchor_twin):
        """(K, 3) int64 rows -> (K,) numbers of these triplets among all of their pair.

        pair: the pair's number. anchor_twin: which of its twins all anchors show, 0 for the first
        or 1. The triplets of the first twin come before those of the second. For each (anchor,
        positive) pair of one twin follow all images of the other, as negatives.
        """
        anchor, positive, negative = triplets.T
        negative_twin = 1 - anchor_twin
        image_pair = self.positives.number_of(anchor, positive)
        image_pair -= self._begin_of_positives[pair, anchor_twin]
        place_of_negative = negative - self._first[pair, negative_twin]
        number = image_pair * self._count[pair, negative_twin] + place_of_negative
        return anchor_twin * self._n_with_first_as_anchor[pair] + number

    def triplet_numbers(self, triplets):
        """(K, 3) int64 rows -> (K,) int64 numbers, a different one for each triplet."""
        n_images = len(self.images.paths)
        return np.ravel_multi_index(triplets.T, (n_images, n_images, n_images))

    def triplets_among(self, pair, groups):
        """The sampled triplets of a pair that use only some images: (K, 3) int64 rows.

        pair: the pair's number. groups: for each of its two twins, the positions of these images
        among the twin's own.
        """
        n_sampled = self._end[pair] - self._begin[pair]
        found = []
        for anchor_twin, negative_twin in ((0, 1), (1, 0)):
            anchors = self._first[pair, anchor_twin] + groups[anchor_twin]
            negatives = self._first[pair, negative_twin] + groups[negative_twin]
            grid = np.meshgrid(anchors, anchors, negatives, indexing="ij")
            triplets = np.stack(grid, -1).reshape(-1, 3)
            anchor_value, positive_value = self.positives.value_number[triplets[:, :2]].T
            triplets = triplets[anchor_value != positive_value]
            if self.percentage < 100:
                number = self._number_within_pair(triplets, pair, anchor_twin)
                triplets = triplets[self._shuffle.place_of(pair, number) < n_sampled]
            found.append(triplets)
        return np.concatenate(found)

    def count_touched_images(self):
        """How many distinct images are part of at least one sampled triplet."""
        if self.percentage == 100:
            return len(self.images.paths)
        touched = np.zeros(len(self.images.paths), bool)
        for start in range(0, len(self), TRIPLETS_AT_ONCE):
            numbers = np.arange(start, min(start + TRIPLETS_AT_ONCE, len(self)))
            touched[self.triplets(numbers)] = True
            if touched.all():  # a small share of many triplets touches all images soon
                break
        return int(touched.sum())

    def steps(self, epoch, images_per_batch, batch_size=None):
        """The steps of an epoch: ShuffledSteps if there is a `batch_size`, else GroupedSteps."""
        if batch_size:
            return ShuffledSteps(self, epoch, batch_size)
        return GroupedSteps(self, epoch, images_per_batch)


class Shuffle:
    """For each pair, a seeded shuffled order of the numbers 0 to n - 1, computed and not stored.

    A Feistel network of keyed hashes permutes the numbers of 2 * half_bits bits, the fewest that
    hold n - 1. A result that is not below n is permuted again, until it is (cycle walking: Black
    and Rogaway, CT-RSA 2002). So the order of a billion triplets takes no memory, and has an
    inverse.
    """

    ROUNDS = 6

    def __init__(self, sizes, seeds):
        """sizes (P,): n of each pair; seeds: P lists of ints."""
        self.sizes = np.asarray(sizes, np.uint64)
        n_bits = [int(n - 1).bit_length() for n in sizes]
        half_bits = [max(1, math.ceil(n / 2)) for n in n_bits]
        self.half_bits = np.array(half_bits, np.uint64)
        keys = [np.random.SeedSequence(seed).generate_state(self.ROUNDS) for seed in seeds]
        self.keys = np.array(keys, np.uint64)

    def number_at(self, pair, place):
        """The numbers at places (K,) of the shuffled orders; pair: (K,) or one pair's number."""
        return self._walk(pair, place, range(self.ROUNDS), self._round)

    def place_of(self, pair, number):
        """The inverse of `number_at`."""
        return self._walk(pair, number, range(self.ROUNDS)[::-1], self._inverse_round)

    def _walk(self, pair, values, rounds, one_round):
        """Permute values (K,), each of them again until it is below the n of its pair."""
        values = np.asarray(values).astype(np.uint64)
        pair = np.broadcast_to(pair, values.shape)
        unfinished = np.arange(len(values))
        while len(unfinished):
            their_pair = pair[unfinished]
            bits = self.half_bits[their_pair]
            mask = (np.uint64(1) << bits) - np.uint64(1)
            left = values[unfinished] >> bits
            right = values[unfinished] & mask
            for r in rounds:
                left, right = one_round(left, right, self.keys[their_pair, r], mask)
            values[unfinished] = (left << bits) | right
            unfinished = unfinished[values[unfinished] >= self.sizes[their_pair]]
        return values.astype(np.int64)

    def _round(self, left, right, key, mask):
        return right, left ^ (keyed_hash(right, key) & mask)

    def _inverse_round(self, left, right, key, mask):
        return right ^ (keyed_hash(left, key) & mask), left


def keyed_hash(values, key):
    """A hash of uint64 numbers and a key: the finaliser of SplitMix64 (Steele et al., 2014)."""
    x = values + key * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---- the steps of an epoch -----------------------------------------------------------------------
class ShuffledSteps:
    """The steps of an epoch that uses each sampled triplet once, shuffled by seed and epoch.

    `[i]` is a step's (T, 3) int64 rows; T is `batch_size`, but for the last step.
    """

    def __init__(self, dataset, epoch, batch_size):
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = Shuffle([len(dataset)], [[dataset.seed, epoch]])

    def __len__(self):
        return math.ceil(len(self.dataset) / self.batch_size)

    def __getitem__(self, i):
        start = range(0, len(self.dataset), self.batch_size)[i]  # a range raises IndexError
        stop = min(start + self.batch_size, len(self.dataset))
        numbers = self.shuffle.number_at(0, np.arange(start, stop))
        return self.dataset.triplets(numbers)


class GroupedSteps:
    """The steps of an epoch that embeds each image about once.

    For each pair, the images of either twin are split at random into groups of at most GROUP_SIZE.
    Each group meets one group of the other twin; the shorter list of groups repeats. Two groups
    that meet are a block. Blocks are shuffled, and a step takes blocks as long as its images are
    no more than `images_per_batch`.
    `[i]` is the (T, 3) int64 rows of all sampled triplets inside a step's blocks. Everything
    follows from the seed and the epoch.
    """

    def __init__(self, dataset, epoch, images_per_batch):
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
        # Inside a block there may be no triplet of a small sample, or no two values of a person.
        none_is_empty = dataset.percentage == 100 and not dataset.has_values
        blocks = []
        for pair, (n, m) in enumerate(dataset.images.count[dataset.images.pairs]):
            first = split_at_random(n, generator)
            second = split_at_random(m, generator)
            for i in range(max(len(first), len(second))):
                groups = (first[i % len(first)], second[i % len(second)])
                if none_is_empty or len(dataset.triplets_among(pair, groups)):
                    blocks.append((pair, groups))
        return blocks

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, i):
        parts = [self.dataset.triplets_among(pair, groups) for pair, groups in self.steps[i]]
        return np.concatenate(parts)


def split_at_random(n, generator):
    """The numbers 0 to n - 1 in random groups of at most GROUP_SIZE, of nearly equal sizes."""
    return np.array_split(generator.permutation(n), math.ceil(n / GROUP_SIZE))
