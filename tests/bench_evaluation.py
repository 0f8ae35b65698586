"""What the bootstrap of one checkpoint costs, against the least it could: one cumulative sum per resample.

    python -m tests.bench_evaluation [images ...]

By hand, not in CI; times are CPU seconds. The embeddings are random unit vectors with a common part per family, two
twins with some 9 images each; nothing is read or embedded. By default 1,285 images of 75 families, where the ratio of
the bootstrap to the sums is to be at most 10.
"""

import sys
import time

import numpy as np
import torch

from evaluate_twins import TwinEvaluator
from triplet_dataset import TwinImages

IMAGES, FAMILIES, RESAMPLES = 1285, 75, 1000


def make_images(n_images):
    """TwinImages of people with 5 to about 12 images; families in proportion, at least 6."""
    n_families = max(6, round(n_images * FAMILIES / IMAGES))
    people = 2 * n_families
    counts = 5 + np.random.default_rng(0).multinomial(n_images - 5 * people, np.full(people, 1 / people))
    images = {str(p): [f"/{p}/{i}" for i in range(n)] for p, n in enumerate(counts)}
    return TwinImages(images, [(str(p), str(p + 1)) for p in range(0, people, 2)])


def measure(n_images):
    """Print a line of the table for one size: CPU seconds, and the bootstrap in cumulative sums."""
    evaluator = TwinEvaluator(make_images(n_images), seed=0, resamples=RESAMPLES)
    torch.manual_seed(0)
    family = torch.from_numpy(evaluator.family)
    common = torch.randn(evaluator.counts["families"], 512)
    embeddings = torch.nn.functional.normalize(torch.randn(n_images, 512) + common[family])

    began = time.process_time()
    scores = evaluator.score(embeddings)
    scored = time.process_time()
    evaluator.estimate(scores)
    resampled = time.process_time()
    values, out = np.ones(len(scores["general"]), np.int64), np.empty(len(scores["general"]), np.int64)
    for _ in range(RESAMPLES):
        np.cumsum(values, out=out)
    sums = time.process_time() - resampled

    row = (n_images, evaluator.counts["families"], len(values), scored - began, resampled - scored, sums)
    print("{:>8,} {:>9,} {:>14,} {:>11.2f} {:>14.2f} {:>9.2f}".format(*row), f"{(resampled - scored) / sums:>6.1f}")


if __name__ == "__main__":
    print("  images  families  general pairs  scores (s)  resamples (s)  sums (s)  ratio", flush=True)
    for size in sys.argv[1:] or (IMAGES,):
        measure(int(size))
