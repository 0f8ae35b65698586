"""How evaluation grows: general impostor scores and the bootstrap on synthetic embeddings. By hand, not in CI.

    python -m tests.bench_evaluation [images ...]

Each size runs in a process of its own, so that its peak memory is its own. The embeddings are random unit vectors with
a common part per family (two twins of equally many images); nothing is embedded or read.
"""

import resource
import subprocess
import sys
import time

import numpy as np
import torch

from evaluate_twins import Scores, TwinEvaluator, general_scores, image_pairs, scores_of
from triplet_dataset import TwinImages


def measure(n_images, per_person=10, resamples=1000):
    """Print a line of the table for one size."""
    n_families = n_images // (2 * per_person)
    images = {f"{f}{t}": [f"/{f}{t}{i}" for i in range(per_person)] for f in range(n_families) for t in "ab"}
    evaluator = object.__new__(TwinEvaluator)
    evaluator.images = TwinImages(images, [(f"{f}a", f"{f}b") for f in range(n_families)])
    evaluator.family = np.repeat(np.arange(n_families), 2 * per_person)
    evaluator.genuine, evaluator.twin = image_pairs(evaluator.images)
    evaluator.weights = np.random.default_rng(0).multinomial(n_families, np.full(n_families, 1 / n_families), resamples)
    torch.manual_seed(0)
    embeddings = torch.randn(len(evaluator.family), 512) + torch.randn(n_families, 512)[evaluator.family]
    embeddings = torch.nn.functional.normalize(embeddings)
    began = time.perf_counter()
    general = general_scores(embeddings, evaluator.family)
    scored = time.perf_counter()
    scores = Scores(scores_of(embeddings, evaluator.genuine), scores_of(embeddings, evaluator.twin), general)
    evaluator.metrics(scores)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    row = (len(evaluator.family), n_families, general.total, scored - began, done - scored, peak)
    print("{:>8,} {:>9,} {:>15,} {:>14.1f} {:>20.1f} {:>9.2f}".format(*row), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(int(sys.argv[2]))
    else:
        print("  images  families   general pairs  all scores (s)  1,000 resamples (s)  peak GiB", flush=True)
        for size in sys.argv[1:] or ("700", "5000", "20000", "50000"):
            subprocess.run([sys.executable, "-m", "tests.bench_evaluation", "--one", size], check=True)
