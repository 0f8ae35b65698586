"""How well saved checkpoints tell twins apart: embeddings, pair scores, verification metrics, plots.

    python evaluate_twins.py --test_pairs test_twin_id_pairs.json --id_to_images id_to_images.json \\
      --aligned_folder test_aligned_images --aligned_json id_to_test_aligned_images.json \\
      --checkpoints pretrained/adaface_ir50_ms1mv2.ckpt models/*.pth --output_dir evaluation_results
    python evaluate_twins.py ... --skip_alignment             # the crops of --aligned_json are there already

The last step from photograph to metric. The score of two images is the cosine of their embeddings. Genuine
pairs show one person, twin impostor pairs the two twins of a pair, general impostor pairs people of different
families. A threshold t accepts score >= t; FMR and FNMR are the false match and false non-match rates of
ISO/IEC 19795-1. Every image is embedded once, in float32. `train_twins.py` validates with the same functions.
"""

import csv
import math
import os
import signal
import sys
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from align import (
    InputError,
    Parser,
    add_alignment_arguments,
    align_files,
    answer_flags,
    positive_int,
    read_id_to_images,
    read_pairs,
    replacing,
    run_script,
    seed_number,
    stem_names,
    write_json,
)


def parse_args(argv=None):
    text = "Measure how well checkpoints tell the twins of a test set apart."
    parser = Parser(prog="evaluate_twins.py", description=text)
    add = parser.add_argument
    add("--test_pairs", required=True, metavar="FILE", help='JSON [["ID", "twin\'s ID"], ...]')
    add("--id_to_images", metavar="FILE", help='JSON {"ID": ["photograph", ...]}; not read with --skip_alignment')
    add("--aligned_folder", default="test_aligned_images", metavar="DIR", help="test crops (default %(default)s)")
    text = "list of the test crops, which the alignment writes (default %(default)s)"
    add("--aligned_json", default="id_to_test_aligned_images.json", metavar="FILE", help=text)
    add("--skip_alignment", action="store_true", help="take the crops of --aligned_json as they are")
    add_alignment_arguments(parser)
    text = "networks to compare, the start first; a folder stands for the .pth and .ckpt files in it"
    add("--checkpoints", required=True, nargs="+", metavar="FILE", help=text)
    add("--baseline", metavar="FILE", help="what the others are compared to (default: the first)")
    add("--output_dir", default="evaluation_results", metavar="DIR", help="where results go (default %(default)s)")
    text = "images embedded at once (default 256 on CUDA, 8 on a CPU); changes speed and memory only"
    add("--batch_size", type=positive_int, metavar="N", help=text)
    add("--seed", type=seed_number, default=42, help="of the bootstrap (default 42)")
    add("--flip", action="store_true", help="embed each image and its mirror image, as one embedding")
    text = "evaluate checkpoints on people they were trained or validated on, and say so in every output"
    add("--allow_overlap", action="store_true", help=text)
    args = parser.parse_args(argv)
    if not args.skip_alignment and not args.id_to_images:
        parser.error("--id_to_images is needed unless --skip_alignment is given")
    return args


if __name__ == "__main__":
    answer_flags("evaluate_twins.py", parse_args)

import numpy as np
import torch
from tqdm import tqdm

from net import Ranks, load_checkpoint, read_facts, to_input
from triplet_dataset import (
    TwinImages,
    find_families,
    load_crops,
    read_checked_pairs,
    read_crop,
)

FALSE_ACCEPT_RATES = (0.01, 0.001, 0.0001)  # of twin impostors, for TAR at FAR
GENERAL_MATCH_RATES = (0.001, 0.0001)  # of general impostors, where NIST IR 8439 sets the threshold
LOWER_IS_BETTER = ("eer", "twin_fmr", "fnmr")
NO_PAIR = -2.0  # stands for a score where there is none; a cosine is never so low
GENERAL_KEPT = 500_000  # general impostor scores that are kept of all, unless a threshold needs more

# ---- embeddings and scores --------------------------------------------------------------------------


def embed(model, crops, device, batch_size=None, description=None, flip=False):
    """Embeddings (N, 512) float32 on `device` of uint8 RGB crops (N, 112, 112, 3), without gradients.

    In full float32, whatever precision training uses; the model must be in eval mode on `device`.
    batch_size: images at once, by default 256 on CUDA and 8 on a CPU, where larger ones leave the caches.
    description: label of a progress bar, or None for none. flip: the unit vector of the image's embedding plus that of
    its mirror image, each times its norm, which measures image quality (AdaFace, CVPR 2022): upstream's fusion.
    """
    batch_size = batch_size or (256 if device.type == "cuda" else 8)
    embeddings = torch.empty((len(crops), 512), device=device)
    with torch.inference_mode():
        batches = range(0, len(crops), batch_size)
        for i in tqdm(batches, description, unit="batch", leave=False, disable=None if description else True):
            x = to_input(crops[i : i + batch_size].to(device, non_blocking=True))
            embedding, norm = model(x)
            if flip:
                mirrored, mirrored_norm = model(x.flip(3))
                embedding = torch.nn.functional.normalize(embedding * norm + mirrored * mirrored_norm)
            embeddings[i : i + batch_size] = embedding
    return embeddings


def image_pairs(images):
    """(genuine (G, 2), twin (T, 2)) int64 rows of a TwinImages: all image pairs of one person, of two twins.

    Every unordered pair of images stands once, also for people with several twins.
    """
    within = [np.stack(np.triu_indices(n, 1), 1) + f for f, n in zip(images.first, images.count, strict=True)]
    across = [
        np.stack(np.meshgrid(*(np.arange(f, f + n) for f, n in zip(images.first[p], images.count[p], strict=True))), -1)
        for p in images.pairs
    ]
    return np.concatenate(within), np.concatenate([grid.reshape(-1, 2) for grid in across])


def scores_of(embeddings, rows, chunk=1 << 16):
    """Cosine similarities (K,) float64 of the image pairs `rows` (K, 2); embeddings (N, D) of unit length."""
    rows = torch.from_numpy(rows).to(embeddings.device)
    parts = [(embeddings[r[:, 0]] * embeddings[r[:, 1]]).sum(1) for r in rows.split(chunk)]
    return torch.cat(parts).cpu().numpy().astype(np.float64)


class GeneralScores(NamedTuple):
    """Scores of pairs of different families: as many as decide a threshold, and as many as show the distribution."""

    total: int  # number of all such pairs
    top: np.ndarray  # (K,) the highest scores, descending
    top_families: np.ndarray  # (K, 2)
    sample: np.ndarray  # (S,) ascending, drawn from all; all of them if there are no more than GENERAL_KEPT
    sample_families: np.ndarray  # (S, 2)


def general_scores(embeddings, family, kept=GENERAL_KEPT, chunk=2048):
    """GeneralScores over all image pairs of different families; embeddings (N, D), family (N,) numbers.

    Scores are made `chunk` x `chunk` at a time and never held together. Of the highest, `kept` are kept, or three times
    as many as the largest rate of GENERAL_MATCH_RATES accepts if that is more: the threshold is an exact order
    statistic, also of a resample of families in which fewer of the highest scores count.
    """
    counts = np.bincount(family)
    total = int((counts.sum() ** 2 - (counts**2).sum()) // 2)
    highest = max(kept, int(3 * max(GENERAL_MATCH_RATES) * total))
    share, generator = min(1.0, kept / max(total, 1)), torch.Generator().manual_seed(0)
    family = torch.as_tensor(family, device=embeddings.device)
    empty = torch.empty(0, dtype=torch.int64, device=embeddings.device)
    top, rows = empty.to(embeddings.dtype), torch.stack([empty, empty], 1)
    sample, sample_rows = [top], [rows]
    for i in range(0, len(embeddings), chunk):
        for j in range(i, len(embeddings), chunk):
            block = embeddings[i : i + chunk] @ embeddings[j : j + chunk].T
            apart = family[i : i + chunk, None] != family[None, j : j + chunk]
            block.masked_fill_(~(apart.triu(1) if i == j else apart), NO_PAIR)
            scores, width = block.reshape(-1), block.shape[1]

            def take(index, scores=scores, width=width, corner=(i, j)):
                pairs = torch.stack([corner[0] + index // width, corner[1] + index % width], 1)
                return scores[index], pairs

            taken = torch.arange(len(scores))
            if share < 1:
                taken = torch.randint(len(scores), (math.ceil(share * len(scores)),), generator=generator)
            taken = taken.to(scores.device)
            for parts, new in zip((sample, sample_rows), take(taken[scores[taken] > NO_PAIR]), strict=True):
                parts.append(new)
            floor = top[-1] if len(top) == highest else NO_PAIR
            values, pairs = take((scores > floor).nonzero()[:, 0])
            top, rows = torch.cat([top, values]), torch.cat([rows, pairs])
            best = top.topk(min(highest, len(top)))
            top, rows = best.values, rows[best.indices]
    family = family.cpu().numpy()
    sample, order = torch.cat(sample).cpu().sort()
    return GeneralScores(
        total,
        top.cpu().numpy().astype(np.float64),
        family[rows.cpu().numpy()],
        sample.numpy().astype(np.float64),
        family[torch.cat(sample_rows).cpu()[order].numpy()],
    )


# ---- metrics ----------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """Error counts at every threshold that makes a difference, for R weightings of the pairs at once."""

    thresholds: np.ndarray  # (K,) ascending: each distinct score, and infinity
    false_matches: np.ndarray  # (R, K) weight of the impostor scores >= threshold
    false_non_matches: np.ndarray  # (R, K) weight of the genuine scores < threshold
    genuine: np.ndarray  # (R, 1) weight of all genuine scores
    impostor: np.ndarray  # (R, 1)

    @property
    def fmr(self):
        return self.false_matches / self.impostor

    @property
    def fnmr(self):
        return self.false_non_matches / self.genuine


def weight_below(scores, weights, thresholds, sides=("left",)):
    """(R, K) weight of the scores (N,) below each threshold (K,); weights (R, N).

    Side "right" includes the scores equal to the threshold; several sides are added up.
    """
    if (scores[1:] < scores[:-1]).any():
        order = np.argsort(scores, kind="stable")
        scores, weights = scores[order], weights[:, order]
    total = np.zeros((len(weights), len(scores) + 1), weights.dtype)
    np.cumsum(weights, 1, out=total[:, 1:])
    return sum(total[:, np.searchsorted(scores, thresholds, side)] for side in sides)


def error_rates(genuine, impostor, genuine_weights=None, impostor_weights=None):
    """Rates of genuine (G,) and impostor (I,) scores, both at least one; weights (R, G) and (R, I), else all one."""
    if genuine_weights is None:
        genuine_weights, impostor_weights = np.ones((1, len(genuine)), int), np.ones((1, len(impostor)), int)
    thresholds = np.append(np.unique(np.concatenate([genuine, impostor])), np.inf)
    n_genuine, n_impostor = genuine_weights.sum(1, keepdims=True), impostor_weights.sum(1, keepdims=True)
    matches = n_impostor - weight_below(impostor, impostor_weights, thresholds)
    return Rates(thresholds, matches, weight_below(genuine, genuine_weights, thresholds), n_genuine, n_impostor)


def twin_metrics(rates):
    """{name: (R,) values} of genuine against twin impostor scores; rates (R, K), see verification_metrics.

    NaN for a resample without genuine or without impostor pairs.
    """
    each = np.arange(len(rates.genuine))
    at = np.argmin(np.abs(rates.false_matches * rates.genuine - rates.false_non_matches * rates.impostor), 1)
    right = rates.impostor - rates.false_matches + rates.genuine - rates.false_non_matches
    right = right / (rates.genuine + rates.impostor)
    # Between two thresholds lie the scores equal to the lower one: genuine ones beat the impostors below it.
    equal = np.diff(rates.false_non_matches, axis=1)
    below = 2 * rates.impostor - rates.false_matches[:, :-1] - rates.false_matches[:, 1:]
    result = {
        "eer": (rates.fmr[each, at] + rates.fnmr[each, at]) / 2,
        "eer_threshold": rates.thresholds[at],
        "auc": ((equal * below).sum(1, keepdims=True) / (2 * rates.genuine * rates.impostor))[:, 0],
        "best_accuracy": right.max(1),
        "accuracy_at_eer": right[each, at],
    }
    for far in FALSE_ACCEPT_RATES:  # FMR falls and FNMR rises with the threshold: the first that will do is the best
        result[f"tar_at_far_{far:g}"] = 1 - rates.fnmr[each, np.argmax(rates.fmr <= far, 1)]
    both = ((rates.genuine > 0) & (rates.impostor > 0))[:, 0]
    return {name: np.where(both, value, np.nan) for name, value in result.items()}


def verification_metrics(genuine, impostor):
    """Verification metrics of genuine (G,) against impostor (I,) scores, as a flat dict of floats.

    - "eer", "eer_threshold": at the score where |FMR - FNMR| is least, the lower one on a tie; the EER is the mean
      of both rates there. FMR and FNMR are step functions that need not meet; the comparison is exact.
    - "auc": the probability that a genuine score exceeds an impostor score, ties counting one half.
    - "best_accuracy": the largest share of right decisions over all thresholds; "accuracy_at_eer".
    - "tar_at_far_0.01", "..._0.001", "..._0.0001": the largest 1 - FNMR whose FMR is no more than that; None where
      there are fewer than 1/FAR impostor scores, which cannot resolve it.
    """
    metrics = {name: float(value[0]) for name, value in twin_metrics(error_rates(genuine, impostor)).items()}
    for far in FALSE_ACCEPT_RATES:
        if len(impostor) < 1 / far:
            metrics[f"tar_at_far_{far:g}"] = None
    return metrics


def threshold_above(top, weigh, total, rate):
    """(R,) scores such that a threshold just above each is the lowest whose FMR is at most `rate`.

    top: (K,) impostor scores, descending, the highest of scores of weight `total` (R,); weigh(n): (R, n), the weights
    of the first n of them. Minus infinity where all of `top` may be accepted.
    """
    allowed = np.floor(rate * total + 1e-9)[:, None]
    n = int(4 * allowed.max()) + 100  # usually enough; the rest of `top` is for resamples that leave much of it out
    while True:
        too_many = np.cumsum(weigh(n), 1) > allowed
        reached = too_many.any(1)
        if reached.all() or n >= len(top):
            break
        n *= 4
    return np.where(reached, top[np.argmax(too_many, 1)] if len(top) else -np.inf, -np.inf)


def general_metrics(genuine, twin, general, weights, genuine_family, twin_family, family_sizes):
    """{name: (R,) values} at thresholds set on general impostors, and the AUC of genuine against them.

    weights: (R, F) how often each family counts, family_sizes: (F,) its images. A general pair of families i and j
    counts w_i * w_j times, so copies of one family never form general pairs with each other.
    "general_threshold_<rate>" is the threshold at that general FMR, "twin_fmr_<rate>", "fnmr_<rate>" the rates there.
    """
    genuine_weights, twin_weights = weights[:, genuine_family], weights[:, twin_family]
    images = weights * family_sizes
    total = (images.sum(1) ** 2 - (images**2).sum(1)) // 2
    result = {}

    def weigh(families):
        return weights[:, families[:, 0]] * weights[:, families[:, 1]]

    for rate in GENERAL_MATCH_RATES:
        above = threshold_above(general.top, lambda n: weigh(general.top_families[:n]), total, rate)
        result[f"general_threshold_{rate:g}"] = np.nextafter(above, np.inf)
        refused = np.diagonal(weight_below(genuine, genuine_weights, above, ["right"]))
        kept_out = np.diagonal(weight_below(twin, twin_weights, above, ["right"]))
        result[f"twin_fmr_{rate:g}"] = 1 - kept_out / twin_weights.sum(1)
        result[f"fnmr_{rate:g}"] = refused / genuine_weights.sum(1)
    sample_weights = weigh(general.sample_families)
    below = weight_below(general.sample, sample_weights, genuine, ("left", "right"))
    pairs = genuine_weights.sum(1) * sample_weights.sum(1)
    result["general_auc"] = (genuine_weights * below).sum(1) / (2 * np.where(pairs, pairs, np.nan))
    return result


# ---- one evaluation ---------------------------------------------------------------------------------


class Scores(NamedTuple):
    """What one network says of the test images."""

    genuine: np.ndarray  # (G,) cosine similarities, in the order of TwinEvaluator.genuine
    twin: np.ndarray  # (T,)
    general: GeneralScores


class TwinEvaluator:
    """Evaluates networks on the twin pairs of one test set, whose crops are read once.

    id_to_images: {ID: [path of an aligned crop, ...]}; pairs: [(ID, ID), ...]. `resamples` bootstrap resamples of the
    families, drawn once from the seed, serve all networks, so that their differences are paired. Raises InputError
    when the pairs are wrong (see TwinImages), when a crop cannot be read, and without a genuine or a twin pair.
    The processes of `ranks` (net.Ranks) share the embedding; the first has the scores.
    """

    def __init__(self, id_to_images, pairs, device, batch_size=None, flip=False, seed=42, resamples=1000, ranks=None):
        self.ranks = ranks or Ranks({})
        self.images = TwinImages(id_to_images, pairs)
        self.warnings = list(self.images.warnings)
        empty = int((self.images.count == 0).sum())
        if empty:
            self.warnings.append(f"{empty} of {len(self.images.ids)} people have no crop; their pairs are not tested")
        families = find_families([[self.images.ids[i] for i in pair] for pair in self.images.pairs])
        self.family = np.array([families[name] for name in self.images.ids])[self.images.person]
        self.genuine, self.twin = image_pairs(self.images)
        for rows, what in ((self.genuine, "no person has two images"), (self.twin, "no pair has images of both twins")):
            if len(rows) == 0:
                raise InputError(f"nothing to evaluate: {what} among the test pairs; check the aligned crops")
        self.device, self.batch_size, self.flip = device, batch_size, flip
        _, self.family = np.unique(self.family, return_inverse=True)  # families without a crop do not count
        n = int(self.family.max()) + 1
        self.weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)

    @cached_property
    def crops(self):
        """The crops (K, 112, 112, 3) uint8 RGB of this process's share of `images`, read when first needed."""
        return load_crops(self.images.paths[self.ranks.share(len(self.images.paths))])

    def score(self, model, description="embedding"):
        """Embed every image once with `model` and score all pairs: Scores, or None in all but the first process."""
        model = model.to(self.device, memory_format=torch.channels_last).eval()
        first = self.ranks.rank == 0
        own = embed(model, self.crops, self.device, self.batch_size, description if first else None, self.flip)
        if not torch.isfinite(own).all():
            raise InputError("the network's embeddings are not finite; take another checkpoint")
        embeddings = self.ranks.gather(own)
        return self.compare(embeddings) if first else None

    def compare(self, embeddings):
        """Scores of all pairs, of embeddings (N, 512) of unit length in the order of `images`."""
        general = general_scores(embeddings, self.family)
        return Scores(scores_of(embeddings, self.genuine), scores_of(embeddings, self.twin), general)

    def estimate(self, scores, weights):
        """{name: (R,)} of all metrics, each family counted weights (R, F) times."""
        genuine_family, twin_family = self.family[self.genuine[:, 0]], self.family[self.twin[:, 0]]
        longest = max(len(scores.genuine) + len(scores.twin), len(scores.general.top), len(scores.general.sample))
        parts = []
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample without genuine pairs gives NaN
            for w in np.array_split(weights, -(-len(weights) * longest // 5_000_000)):  # about 40 MB an array
                rates = error_rates(scores.genuine, scores.twin, w[:, genuine_family], w[:, twin_family])
                sizes = np.bincount(self.family)
                general = general_metrics(
                    scores.genuine, scores.twin, scores.general, w, genuine_family, twin_family, sizes
                )
                parts.append({**twin_metrics(rates), **general})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def metrics(self, scores):
        """(figures, samples): {name: float, or None if the pairs cannot resolve it}, {name: (resamples,) array}."""
        figures = self.figures(scores)
        return figures, self.estimate(scores, self.weights)

    def figures(self, scores):
        """{name: float, or None if the pairs cannot resolve it} of all metrics."""
        once = self.estimate(scores, np.ones((1, self.weights.shape[1]), int))
        figures = {name: float(value[0]) for name, value in once.items()}
        for name in figures:
            rate = name.rpartition("_")[2]
            pairs = len(scores.twin) if name.startswith("tar_at_far") else scores.general.total
            if (name == "general_auc" and pairs == 0) or (rate[0].isdigit() and pairs < 1 / float(rate)):
                figures[name] = None
        return figures


def interval(samples, figure):
    """[low, high], the 95 % percentile interval of bootstrap samples, or None for a figure that is None."""
    if figure is None or not np.isfinite(samples).any():
        return None
    return [float(x) for x in np.nanpercentile(samples, (2.5, 97.5))]


def nested(figures):
    """The figures of metrics.json as DESIGN.md lays them out, from the flat ones."""
    result = {key: value for key, value in figures.items() if not key.rpartition("_")[2][0].isdigit()}
    result["tar_at_far"] = {f"{far:g}": figures[f"tar_at_far_{far:g}"] for far in FALSE_ACCEPT_RATES}
    names = {"threshold": "general_threshold", "twin_fmr": "twin_fmr", "fnmr": "fnmr"}
    result["general_threshold"] = {
        f"{rate:g}": {key: figures[f"{name}_{rate:g}"] for key, name in names.items()} for rate in GENERAL_MATCH_RATES
    }
    return result


def differences(figures, samples, baseline_figures, baseline_samples):
    """{name: {"difference", "interval", "verdict"}} of one network to the baseline, on the same resampled families.

    The verdict is "better" or "worse" when the 95 % interval of the difference excludes zero, else "not
    distinguishable". Thresholds have no better or worse and are left out.
    """
    result = {}
    for name, value in figures.items():
        if "threshold" in name or value is None or baseline_figures[name] is None:
            continue
        low, high = interval(samples[name] - baseline_samples[name], value)
        sign = -1 if name.startswith(LOWER_IS_BETTER) else 1
        verdict = "not distinguishable" if low <= 0 <= high else "better" if sign * low > 0 else "worse"
        result[name] = {"difference": value - baseline_figures[name], "interval": [low, high], "verdict": verdict}
    return result


def verdict(change):
    """One sentence from `differences` to the start: better, worse or not distinguishable, on twins and the others."""

    def words(names):
        found = {change[name]["verdict"] for name in names if name in change} - {"not distinguishable"}
        return " and ".join(sorted(found)) or "not distinguishable"

    return (
        f"On the validation people, against the start: {words(('auc', 'eer'))} on twins, "
        f"{words(('general_auc', 'fnmr_0.001'))} on everyone else."
    )


class Result(NamedTuple):
    """One checkpoint's evaluation."""

    name: str
    checkpoint: str
    facts: dict  # what the checkpoint says of its training, {} for upstream's
    scores: Scores
    figures: dict
    samples: dict
    overlap: list  # test IDs that the checkpoint was trained or validated on


def chosen_by_validation(results):
    """The name of the result with the lowest validation EER, of equal ones that with the highest AUC.

    None unless two or more share validation people.
    """
    known = [r for r in results if r.facts.get("metrics", {}).get("val_eer") is not None]
    groups = {tuple(sorted(r.facts.get("config", {}).get("val_ids", []))) for r in known}
    if len(known) < 2 or len(groups) != 1:
        return None
    return min((r.facts["metrics"]["val_eer"], -r.facts["metrics"].get("val_auc", 0), r.name) for r in known)[-1]


# ---- files ------------------------------------------------------------------------------------------


def write_result(folder, evaluator, result):
    """metrics.json, pair_scores.csv and the pictures of one checkpoint into `folder`."""
    images, scores, figures = evaluator.images, result.scores, result.figures
    counts = {"images": len(images.paths), "genuine": len(scores.genuine), "twin": len(scores.twin)}
    content = {
        "checkpoint": result.checkpoint,
        "counts": {**counts, "general": scores.general.total},
        **nested(figures),
        "intervals": {name: interval(result.samples[name], value) for name, value in figures.items()},
        "flip": evaluator.flip,
        "overlap": result.overlap,
    }
    write_json(folder / "metrics.json", content)
    ids = [images.ids[i] for i in images.person]
    with replacing(folder / "pair_scores.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path_1", "path_2", "id_1", "id_2", "kind", "score", "accepted_at_eer"])
        for kind, rows, values in (
            ("genuine", evaluator.genuine, scores.genuine),
            ("twin", evaluator.twin, scores.twin),
        ):
            accepted = (values >= figures["eer_threshold"]).astype(int)
            table.writerows(
                (images.paths[a], images.paths[b], ids[a], ids[b], kind, score, yes)
                for (a, b), score, yes in zip(rows.tolist(), values.tolist(), accepted.tolist(), strict=True)
            )
    plot_roc_and_det(folder / "roc_curve.png", [result], ("roc",))
    plot_roc_and_det(folder / "det_curve.png", [result], ("det",))
    plot_distributions(folder / "score_distributions.png", result)
    plot_hardest(folder / "hardest_pairs.png", evaluator, result)


def write_comparison(folder, results, baseline):
    """comparison.json, comparison.csv, comparison.png and data_percentage.png; returns the comparison."""
    rows = []
    for result in results:
        row = {"name": result.name, "checkpoint": result.checkpoint, "overlap": result.overlap}
        row["metrics"] = result.figures
        row["intervals"] = {name: interval(result.samples[name], value) for name, value in result.figures.items()}
        row["validation"] = result.facts.get("metrics", {})
        if result is not baseline:
            row["to_baseline"] = differences(result.figures, result.samples, baseline.figures, baseline.samples)
        rows.append(row)
    comparison = {"baseline": baseline.name, "chosen_by_validation": chosen_by_validation(results), "checkpoints": rows}
    write_json(folder / "comparison.json", comparison)
    with replacing(folder / "comparison.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        names = list(baseline.figures)
        parts = ("", "_low", "_high", "_difference", "_difference_low", "_difference_high", "_verdict")
        table.writerow(["name", "checkpoint", "n_overlap", *(name + part for name in names for part in parts)])
        for row in rows:
            line = [row["name"], row["checkpoint"], len(row["overlap"])]
            for name in names:
                change = row.get("to_baseline", {}).get(name, {})
                line += [row["metrics"][name], *(row["intervals"][name] or (None, None))]
                line += [change.get("difference"), *change.get("interval", (None, None)), change.get("verdict")]
            table.writerow(line)
    plot_roc_and_det(folder / "comparison.png", results, ("roc", "det"))
    plot_data_percentage(folder / "data_percentage.png", results)
    return comparison


# ---- pictures ---------------------------------------------------------------------------------------

# Okabe and Ito's colours, which people with any colour vision tell apart; line styles serve grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")


def new_figure(width=6.0, height=4.2, rows=1, columns=1):
    """(figure, axes or array of axes) without a window; matplotlib is loaded only here, where it is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def literal(text):
    """Text for a picture as it is: matplotlib would read formulas between dollar signs."""
    return text.replace("$", r"\$")


def save_figure(figure, path, *axes):
    """Write a picture; `axes` get a grid and, outside, a legend."""
    for one in axes:
        one.grid(alpha=0.3)
        one.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary)


def plot_roc_and_det(path, results, kinds):
    """ROC ("roc") and DET ("det") of genuine against twin impostor pairs, one line per result, side by side."""
    figure, all_axes = new_figure(5.2 * len(kinds) + 3, 4.2, 1, len(kinds))
    lowest, bottom = 100 / max(len(result.scores.twin) for result in results), 50.0
    for kind, axes in zip(kinds, np.atleast_1d(all_axes), strict=True):
        for number, result in enumerate(results):
            rates = error_rates(result.scores.genuine, result.scores.twin)
            label = f"{literal(result.name)}\nAUC {result.figures['auc']:.3f}, EER {100 * result.figures['eer']:.1f} %"
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number % len(STYLES)]}
            # An FMR of 0 has no place on a logarithmic axis: the curve ends at one pair.
            fmr, fnmr = np.maximum(100 * rates.fmr[0], lowest), 100 * rates.fnmr[0]
            bottom = min(bottom, max(100 / len(result.scores.genuine), fnmr[np.argmax(fmr <= 50)] / 2))
            axes.plot(fmr, 100 - fnmr if kind == "roc" else fnmr, label=label, drawstyle="steps-post", **style)
        chance = np.geomspace(lowest, 100, 200)
        axes.plot(chance, chance if kind == "roc" else 100 - chance, ":", color="grey", linewidth=1, label="chance")
        axes.set(xscale="log", xlim=(lowest, 100), xlabel="false match rate on twin impostors (%)")
        if kind == "roc":
            axes.set(ylim=(0, 100), ylabel="true accept rate, 1 - FNMR (%)", title="ROC")
        else:
            axes.set(yscale="log", ylim=(bottom, 100), ylabel="false non-match rate (%)", title="DET")
        for axis in (axes.xaxis, axes.yaxis) if kind == "det" else (axes.xaxis,):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")
        axes.grid(alpha=0.3)
    save_figure(figure, path, axes)


def plot_distributions(path, result):
    """Distributions of genuine, twin impostor and general impostor scores, with the thresholds."""
    figure, axes = new_figure(7.6)
    groups = [(result.scores.genuine, "genuine"), (result.scores.twin, "twin impostor")]
    groups += [(result.scores.general.sample, "general impostor")] if result.scores.general.total else []
    low, high = (f(f(values) for values, _ in groups) for f in (min, max))
    bins = np.linspace(low, high if high > low else low + 1e-3, 60)
    for (values, label), colour, style in zip(groups, COLOURS, STYLES, strict=False):
        share = np.full(len(values), 100 / len(values))
        axes.hist(values, bins, weights=share, color=colour, alpha=0.2)
        axes.hist(values, bins, weights=share, histtype="step", color=colour, linestyle=style, label=label)
    axes.axvline(result.figures["eer_threshold"], color="black", linewidth=1, label="threshold at the twin EER")
    at = result.figures["general_threshold_0.001"]
    if at is not None:
        axes.axvline(at, color="black", linewidth=1, linestyle="--", label="threshold at general\nFMR 0.1 %")
    axes.set(
        xlabel="score (cosine similarity)", ylabel="share of the image pairs per bin (%)", title=literal(result.name)
    )
    save_figure(figure, path, axes)


def plot_hardest(path, evaluator, result, columns=4):
    """The crops of wrong decisions at the EER threshold, the farthest from it first: two rows of each kind."""
    figure, axes = new_figure(2.4 * columns, 7.4, 4, columns)
    threshold = result.figures["eer_threshold"]
    kinds = (("twins taken for one person", evaluator.twin, result.scores.twin, -1),)
    kinds += (("one person refused", evaluator.genuine, result.scores.genuine, 1),)
    for k, (title, rows, values, sign) in enumerate(kinds):
        wrong = np.flatnonzero(values >= threshold if sign < 0 else values < threshold)
        order = wrong[np.argsort(sign * values[wrong], kind="stable")][: 2 * columns]
        for place, at in enumerate(axes[2 * k : 2 * k + 2].flat):
            at.set_axis_off()
            if place < len(order):
                a, b = rows[order[place]]
                at.imshow(np.concatenate([read_crop(evaluator.images.paths[i]) for i in (a, b)], 1))
                names = " | ".join(literal(evaluator.images.ids[evaluator.images.person[i]][:16]) for i in (a, b))
                at.set_title(f"{title}\nscore {values[order[place]]:.3f}\n{names}", fontsize=7)
    title = f"{literal(result.name)}: mistakes at the EER threshold {threshold:.3f}, the most confident first"
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def plot_data_percentage(path, results):
    """EER with its interval against the share of triplets, one line per mode and margin; numbers: distinct images."""
    lines = {}
    for result in results:
        config = result.facts.get("config", {})
        if "train_percentage" in config:
            mode = "embedding layer" if config.get("freeze_backbone") else "full network"
            lines.setdefault((mode, config.get("margin")), []).append((config["train_percentage"], result))
    figure, axes = new_figure(7.8)
    for number, ((mode, margin), points) in enumerate(sorted(lines.items(), key=str)):
        points = sorted(points, key=lambda point: point[0])
        eer = np.array([100 * result.figures["eer"] for _, result in points])
        low, high = 100 * np.array([interval(r.samples["eer"], r.figures["eer"]) for _, r in points]).T
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number % len(STYLES)]}
        spread = np.maximum([eer - low, high - eer], 0)
        x = np.array([share for share, _ in points]) * 1.05**number  # side by side where they would cover each other
        axes.errorbar(x, eer, spread, marker="o", capsize=3, label=f"{mode}, margin {margin}", **style)
        for at, value, (_, result) in zip(x, eer, points, strict=True):
            text = f"{result.facts['config'].get('n_touched_images', '?')} images"
            axes.annotate(text, (at, value), xytext=(5, 5), textcoords="offset points", fontsize=7)
    for result in results:
        if "train_percentage" not in result.facts.get("config", {}):
            axes.axhline(
                100 * result.figures["eer"], color="grey", linestyle=":", label=f"{literal(result.name)} (no training)"
            )
    axes.set(xscale="log", xlim=(0.8, 160), title="How much data is enough")
    axes.set_xticks([1, 2, 5, 10, 25, 50, 100], ["1", "2", "5", "10", "25", "50", "100"])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="share of the training triplets (%)", ylabel="EER against twins (%), 95 % interval")
    save_figure(figure, path, axes)


def comparison_table(results, baseline, chosen):
    """Text for the terminal: the figures, the differences to the baseline in words, and how not to use them."""
    columns = [("EER %", "eer"), ("AUC", "auc"), ("best acc %", "best_accuracy"), ("TAR@FAR1%", "tar_at_far_0.01")]
    columns += [("twin FMR %", "twin_fmr_0.001"), ("FNMR %", "fnmr_0.001"), ("general AUC", "general_auc")]
    width = max(len("checkpoint"), *(len(result.name) for result in results))
    lines = [f"{'checkpoint':{width}}  " + "  ".join(f"{title:>11}" for title, _ in columns)]
    for result in results:
        cells = []
        for _, name in columns:
            values = [r.figures[name] for r in results if r.figures[name] is not None]
            value = result.figures[name]
            if value is None:
                cells.append("-")
                continue
            best = value == (min if name.startswith(LOWER_IS_BETTER) else max)(values)
            text = f"{value:.4f}" if name.endswith("auc") else f"{100 * value:.2f}"
            cells.append(text + ("*" if best and len(results) > 1 else " "))
        lines.append(f"{result.name:{width}}  " + "  ".join(f"{cell:>11}" for cell in cells))
    lines.append("Twin FMR and FNMR are at the threshold where the general FMR is 0.1 %; -: too few pairs to say.")
    for result in results:
        if result is not baseline:
            lines += _against(result, baseline)
    for result in results:
        if result.facts.get("improved") is False:
            lines.append(f"{result.name}: its training found NO epoch better than its start on the validation people.")
        if result.overlap:
            lines.append(
                f"OVERLAP: {result.name} has seen {len(result.overlap)} of the test people; its figures flatter."
            )
    if len(results) > 1:
        lines.append(
            "* best of its column on this test set: a description. Choosing by it is selection on the test set."
        )
        lines.append(f"Validation would have chosen: {chosen}" if chosen else "No common validation to choose by.")
    return "\n".join(lines)


def _against(result, baseline):
    change = differences(result.figures, result.samples, baseline.figures, baseline.samples)

    def words(name, label):
        if name not in change:
            return f"{label} -"
        low, high = change[name]["interval"]
        return f"{label} {change[name]['difference']:+.4f} [{low:+.4f}, {high:+.4f}] {change[name]['verdict']}"

    lines = [f"{result.name} against {baseline.name}, difference [95 % interval]:"]
    lines.append("  twins: " + "; ".join([words("auc", "AUC"), words("eer", "EER")]))
    everyone = [words("general_auc", "AUC"), words("fnmr_0.001", "FNMR at general FMR 0.1 %")]
    lines.append("  everyone else: " + "; ".join(everyone))
    if "worse" in [change.get(name, {}).get("verdict") for name in ("general_auc", "fnmr_0.001")]:
        lines.append("  It got WORSE at recognising people in general.")
    return lines


# ---- command line -----------------------------------------------------------------------------------


def main(argv=None):
    """Evaluate; returns the exit code (see align.run_script)."""

    def work():
        evaluate(parse_args(argv))
        Ranks().leave()

    return run_script("evaluate_twins.py", work, "interrupted; finished checkpoints have their results")


def list_checkpoints(names, baseline):
    """The files among `names`, folders opened, the baseline first; each once."""
    files = [baseline] if baseline else []
    for name in names:
        if Path(name).is_dir():
            found = sorted(str(p) for p in Path(name).iterdir() if p.suffix in (".pth", ".ckpt") and p.name[0] != ".")
            if not found:
                raise InputError(f"{name}: no .pth or .ckpt file in this folder")
            files += found
        else:
            files.append(name)
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"{file}: no such checkpoint file")
    unique = {}
    for file in files:
        unique.setdefault(os.path.abspath(file), file)
    return list(unique.values())


def find_overlap(facts, ids):
    """The test IDs that a checkpoint was trained or validated on, by its own account."""
    config = facts.get("config", {})
    return sorted(set(ids) & {*config.get("train_ids", []), *config.get("val_ids", [])})


def evaluate(args):
    """The whole evaluation of the command line; returns the list of Results, the baseline first.

    Of several processes, the first has them and writes; the others return [].
    """
    ranks = Ranks()
    device = ranks.pick_device(args.device)
    pairs = read_pairs(args.test_pairs)
    checkpoints = list_checkpoints(args.checkpoints, args.baseline)
    tested = {name for pair in pairs for name in pair}
    for checkpoint in checkpoints:  # before hours of alignment
        facts = read_facts(checkpoint)
        overlap = find_overlap(facts, tested)
        if overlap and not args.allow_overlap:
            raise InputError(
                f"{checkpoint}: was trained or validated on {len(overlap)} of the {len(tested)} test people: "
                f"{', '.join(overlap)}; test on others, or say --allow_overlap"
            )
        for flag in ("aligned_folder", "aligned_json"):
            trained = facts.get("config", {}).get(flag)
            if trained and not args.skip_alignment and os.path.abspath(trained) == os.path.abspath(getattr(args, flag)):
                raise InputError(
                    f"--{flag} {trained}: {checkpoint} was trained from there; name another for test crops"
                )
    crops = read_id_to_images(args.aligned_json) if args.skip_alignment else align_files(args, pairs, ranks)
    pairs, warnings = read_checked_pairs(args.test_pairs, crops)
    evaluator = TwinEvaluator(crops, pairs, device, args.batch_size, args.flip, args.seed, ranks=ranks)
    for warning in warnings + evaluator.warnings if ranks.rank == 0 else ():
        print(f"warning: {warning}")
    results, names = [], stem_names(checkpoints)
    for checkpoint in checkpoints:
        model, name = load_checkpoint(checkpoint), names[checkpoint]
        scores = evaluator.score(model, f"embedding with {name}")
        if scores is None:
            continue
        overlap = find_overlap(model.facts, evaluator.images.ids)
        results.append(Result(name, checkpoint, model.facts, scores, *evaluator.metrics(scores), overlap))
        write_result(Path(args.output_dir) / name, evaluator, results[-1])
    if ranks.rank > 0:
        return results
    comparison = write_comparison(Path(args.output_dir), results, results[0])
    counts = f"{len(evaluator.genuine)} genuine, {len(evaluator.twin)} twin impostor"
    general = results[0].scores.general.total
    print(f"{len(evaluator.images.paths)} images of {len(evaluator.images.ids)} people, on {device}:")
    print(f"{counts} and {general} general impostor pairs")
    print(comparison_table(results, results[0], comparison["chosen_by_validation"]))
    print(f"results in {args.output_dir}")
    return results


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
