"""The cost of one checkpoint's bootstrap, against the least that it could be.

    python -m tests.bench_evaluation [images ...]

The least is one cumulative sum over the general pairs for each resample. The embeddings are random
unit vectors with a common part per family of two twins; nothing is read or embedded. By default
there are 1,285 images of 75 families, where the bootstrap should take at most 10 times as long as
the sums. Times are CPU seconds. This is run by hand, not in CI.
"""

import sys
import time

import numpy as np
import torch

from evaluate_twins import TwinEvaluator
from triplet_dataset import TwinImages

IMAGES = 1285
FAMILIES = 75
RESAMPLES = 1000
FEWEST_IMAGES = 5  # of a person
HEADER = "  images  families  general pairs  scores (s)  resamples (s)  sums (s)  ratio"
ROW = "{:>8,} {:>9,} {:>14,} {:>11.2f} {:>14.2f} {:>9.2f} {:>6.1f}"


def make_images(n_images):
    """TwinImages of people with 5 to about 12 images each, in 6 families or more.

    There are as many images per family as in the default data set.
    """
    n_families = max(6, round(n_images * FAMILIES / IMAGES))
    n_people = 2 * n_families
    equal = np.full(n_people, 1 / n_people)
    generator = np.random.default_rng(0)
    counts = FEWEST_IMAGES + generator.multinomial(n_images - FEWEST_IMAGES * n_people, equal)
    images = {}
    for person, count in enumerate(counts):
        images[str(person)] = [f"/{person}/{i}" for i in range(count)]
    pairs = [(str(person), str(person + 1)) for person in range(0, n_people, 2)]
    return TwinImages(images, pairs)


def make_embeddings(evaluator):
    """(N, 512) embeddings of unit length; those of a family resemble each other."""
    torch.manual_seed(0)
    of_family = torch.randn(evaluator.counts["families"], 512)
    of_image = torch.randn(evaluator.counts["images"], 512)
    family = torch.from_numpy(evaluator.family)
    return torch.nn.functional.normalize(of_image + of_family[family])


def sum_as_often_as_resampled(n_pairs):
    """One cumulative sum over so many pairs for each resample."""
    values = np.ones(n_pairs, np.int64)
    sums = np.empty(n_pairs, np.int64)
    for _ in range(RESAMPLES):
        np.cumsum(values, out=sums)


def measure(n_images):
    """The values of a row of the table, for one number of images."""
    evaluator = TwinEvaluator(make_images(n_images), seed=0, resamples=RESAMPLES)
    embeddings = make_embeddings(evaluator)

    began = time.process_time()
    scores = evaluator.score(embeddings)
    scored = time.process_time()
    evaluator.estimate(scores)
    resampled = time.process_time()
    n_general = len(scores["general"])
    sum_as_often_as_resampled(n_general)
    summed = time.process_time()

    scoring = scored - began
    resampling = resampled - scored
    summing = summed - resampled
    ratio = resampling / summing
    n_families = evaluator.counts["families"]
    return n_images, n_families, n_general, scoring, resampling, summing, ratio


if __name__ == "__main__":
    print(HEADER, flush=True)
    for size in sys.argv[1:] or [IMAGES]:
        print(ROW.format(*measure(int(size))), flush=True)
