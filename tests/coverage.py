"""How often do the 95 % intervals hold the truth? On simulated families whose truth is known.

    python -m tests.coverage                        # all of it: some ten minutes of a core
    python -m tests.coverage --model hard --families 29 --repetitions 100

The embedding of an image is the direction of a sum of three random vectors: one that the family
has in common, one of the person, one of the image. How far twins differ varies from family to
family, and how much the images of a person scatter varies from person to person, so the pairs of
a family depend on each other as real ones do. A person has 1, 2, 3 or 6 images. "hard" resembles
the look-alikes of tests/STUDY.md, "easy" has errors that are rare.

The truth is the mean of the figures of many large simulations. A repetition draws a test set, and
counts whether the interval of each figure holds the truth: the percentiles of the bootstrap over
families, and the interval that `compare` gives. This is run by hand, not in CI.
"""

import argparse
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

import evaluate_twins
from evaluate_twins import TwinEvaluator, compare, interval
from triplet_dataset import TwinImages

DIMENSIONS = 48
IMAGES_PER_PERSON = (1, 2, 3, 6)
SCATTER = 0.3  # standard deviation of the logarithm of both spreads below
LARGE_SIMULATIONS = 10
FAMILIES_OF_LARGE = 3000
GENERAL_PAIRS = 100_000  # that a repetition scores at most, to save time: a sample of all


class Model(NamedTuple):
    """Standard deviations of two of the three random vectors; that of the family's vector is 1.

    They are those of a typical family and of a typical person; SCATTER says how far others differ.
    """

    person: float  # how far twins are apart
    image: float  # how far the images of a person are apart


MODELS = {"hard": Model(1, 3**0.5), "easy": Model(3**0.5, 2**0.5)}
# A strict and a lenient threshold, fixed beforehand. They have the names of the thresholds that
# training finds with its validation people, so that TwinEvaluator takes them as such.
THRESHOLDS = {"val_general": 0.51, "val_eer": 0.2}
FIGURES = {
    "auc": "twin AUC",
    "eer": "twin EER",
    "tar_at_far_0.01": "TAR at FAR 1 %",
    "twin_fmr_0.001": "twin FMR at general FMR 0.1 %",
    "fnmr_0.001": "FNMR at general FMR 0.1 %",
    "twin_fmr_val_general": "twin FMR at a strict threshold",
    "fnmr_val_general": "FNMR at a strict threshold",
    "general_fmr_val_general": "general FMR at a strict threshold",
    "fnmr_val_eer": "FNMR at a lenient threshold",
    "general_auc": "general AUC",
}


def draw_families(model, n_families, generator):
    """(TwinImages, (N, D) embeddings of unit length) of families of two twins."""
    images = {}
    pairs = []
    vectors = []
    for family in range(n_families):
        centre = generator.normal(size=DIMENSIONS)
        spread = model.person * np.exp(SCATTER * generator.normal())
        pair = [f"{family}a", f"{family}b"]
        pairs.append(pair)
        for name in pair:
            person = centre + spread * generator.normal(size=DIMENSIONS)
            noise = model.image * np.exp(SCATTER * generator.normal())
            n_images = generator.choice(IMAGES_PER_PERSON)
            images[name] = [f"/{name}/{number}" for number in range(n_images)]
            vectors.append(person + noise * generator.normal(size=(n_images, DIMENSIONS)))
    embeddings = torch.from_numpy(np.concatenate(vectors)).float()
    return TwinImages(images, pairs), torch.nn.functional.normalize(embeddings)


def true_figures(model):
    """{name: float} of FIGURES, from large simulations."""
    results = []
    for number in range(LARGE_SIMULATIONS):
        generator = np.random.default_rng([0, number])
        images, embeddings = draw_families(model, FAMILIES_OF_LARGE, generator)
        evaluator = TwinEvaluator(images, number, resamples=1)
        figures = evaluator.figures(evaluator.score(embeddings), THRESHOLDS)
        results.append([figures[name] for name in FIGURES])
    return dict(zip(FIGURES, np.mean(results, 0).tolist(), strict=True))


def intervals_that_hold(model, truth, n_families, args):
    """{name: (K, 2) bool}: whether the percentiles, and the interval of `compare`, hold the truth.

    K is the number of repetitions in which the figure exists.
    """
    holds = {name: [] for name in FIGURES}
    for number in range(args.repetitions):
        generator = np.random.default_rng([n_families, number])
        images, embeddings = draw_families(model, n_families, generator)
        evaluator = TwinEvaluator(images, number, args.resamples)
        estimate = evaluator.estimate(evaluator.score(embeddings), THRESHOLDS)
        entries = compare([estimate])
        for name in FIGURES:
            if estimate.figures[name] is None:
                continue
            answers = []
            for low, high in (interval(estimate.samples[name]), entries[name]["interval"]):
                answers.append(low <= truth[name] <= high)
            holds[name].append(answers)
    return {name: np.array(answers) for name, answers in holds.items()}


def describe(holds):
    """The coverage of the percentiles and of `compare` in percent, with Monte-Carlo errors."""
    texts = []
    for share in holds.mean(0):
        error = np.sqrt(share * (1 - share) / len(holds))
        texts.append(f"{100 * share:.1f} ± {100 * error:.1f}")
    return " → ".join(texts)


def print_table(name, args):
    """Print the table of one model."""
    truth = true_figures(MODELS[name])
    columns = []
    for n_families in args.families:
        with mock.patch.object(evaluate_twins, "MAX_GENERAL_PAIRS", GENERAL_PAIRS):
            columns.append(intervals_that_hold(MODELS[name], truth, n_families, args))
    sizes = [f"{n} families" for n in args.families]
    print(f"\n| {name}: figure | truth | {' | '.join(sizes)} |")
    print("| --- " * (2 + len(sizes)) + "|")
    for figure, title in FIGURES.items():
        cells = [describe(holds[figure]) for holds in columns]
        print(f"| {title} | {truth[figure]:.2g} | {' | '.join(cells)} |", flush=True)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="tests.coverage", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", nargs="+", choices=MODELS, default=list(MODELS))
    add("--families", type=int, nargs="+", default=[29, 75, 200])
    add("--repetitions", type=int, default=400)
    add("--resamples", type=int, default=300)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    for name in args.model:
        print_table(name, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
