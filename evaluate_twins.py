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
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from align import Parser, add_alignment_arguments, align_files, positive_int, stem_names
from net import InputError, load_checkpoint, pick_device, replacing, to_input
from triplet_dataset import TwinImages, find_families, load_crops, read_id_to_images, read_pairs, write_json

FALSE_ACCEPT_RATES = (0.01, 0.001, 0.0001)  # of twin impostors, for TAR at FAR
GENERAL_MATCH_RATES = (0.001, 0.0001)  # of general impostors, where NIST IR 8439 sets the threshold

# ---- embeddings and scores --------------------------------------------------------------------------


def embed(model, crops, device, batch_size=None, description=None):
    """Embeddings (N, 512) float32 on `device` of uint8 RGB crops (N, 112, 112, 3), without gradients.

    In full float32, whatever precision training uses; the model must be in eval mode on `device`.
    batch_size: images at once, by default 256 on CUDA and 32 elsewhere, where larger batches leave the caches.
    description: label of a progress bar, or None for none.
    """
    batch_size = batch_size or (256 if device.type == "cuda" else 32)
    embeddings = torch.empty((len(crops), 512), device=device)
    with torch.inference_mode():
        batches = range(0, len(crops), batch_size)
        for i in tqdm(batches, description, unit="batch", leave=False, disable=None if description else True):
            x = to_input(crops[i : i + batch_size].to(device, non_blocking=True))
            embeddings[i : i + batch_size] = model(x)[0]
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


def general_scores(embeddings, family, highest, chunk=4096):
    """(number of pairs, their `highest` scores in descending order) over all pairs of different families.

    embeddings (N, D), family (N,). Scores are made `chunk` rows at a time and only the highest are kept, so an
    exact threshold at a small FMR takes little memory.
    """
    family = torch.as_tensor(family, device=embeddings.device)
    kept, total = torch.empty(0, device=embeddings.device), 0
    for i in range(0, len(embeddings), chunk):
        for j in range(i, len(embeddings), chunk):
            different = family[i : i + chunk, None] != family[None, j : j + chunk]
            if i == j:
                different = different.triu(1)
            scores = (embeddings[i : i + chunk] @ embeddings[j : j + chunk].T)[different]
            total += len(scores)
            kept = torch.cat([kept, scores])
            kept = kept.topk(min(highest, len(kept))).values
    return total, kept.cpu().numpy().astype(np.float64)


# ---- metrics ----------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """Error counts at every threshold that makes a difference: each distinct score, and above all of them."""

    thresholds: np.ndarray  # (K,) ascending, the last one infinite
    false_matches: np.ndarray  # (K,) impostor scores >= threshold
    false_non_matches: np.ndarray  # (K,) genuine scores < threshold
    n_genuine: int
    n_impostor: int

    @property
    def fmr(self):
        return self.false_matches / self.n_impostor

    @property
    def fnmr(self):
        return self.false_non_matches / self.n_genuine


def error_rates(genuine, impostor):
    """Rates of genuine (G,) and impostor (I,) scores, both at least one."""
    genuine, impostor = np.sort(genuine), np.sort(impostor)
    thresholds = np.append(np.unique(np.concatenate([genuine, impostor])), np.inf)
    matches = len(impostor) - np.searchsorted(impostor, thresholds, "left")
    return Rates(thresholds, matches, np.searchsorted(genuine, thresholds, "left"), len(genuine), len(impostor))


def verification_metrics(genuine, impostor):
    """Verification metrics of genuine (G,) against impostor (I,) scores, as a dict of floats.

    - "eer", "eer_threshold": at the score where |FMR - FNMR| is least, the lower one on a tie; the EER is the mean
      of both rates there. FMR and FNMR are step functions that need not meet; the comparison is exact.
    - "auc": the probability that a genuine score exceeds an impostor score, ties counting one half.
    - "best_accuracy": the largest share of right decisions over all thresholds; "accuracy_at_eer".
    - "tar_at_far": {"0.01", "0.001", "0.0001"}: the largest 1 - FNMR whose FMR is no more than that; None where there
      are fewer than 1/FAR impostor scores, which cannot resolve it.
    """
    rates = error_rates(genuine, impostor)
    g, i = rates.n_genuine, rates.n_impostor
    at = int(np.argmin(np.abs(rates.false_matches * g - rates.false_non_matches * i)))
    right = (i - rates.false_matches + g - rates.false_non_matches) / (g + i)
    impostor = np.sort(impostor)
    below = np.searchsorted(impostor, genuine, "left") + np.searchsorted(impostor, genuine, "right")
    return {
        "eer": float(rates.fmr[at] + rates.fnmr[at]) / 2,
        "eer_threshold": float(rates.thresholds[at]),
        "auc": float(below.sum()) / (2 * g * i),
        "best_accuracy": float(right.max()),
        "accuracy_at_eer": float(right[at]),
        "tar_at_far": {f"{far:g}": _tar_at(rates, far) for far in FALSE_ACCEPT_RATES},
    }


def _tar_at(rates, far):
    if rates.n_impostor < 1 / far:
        return None
    return float(1 - rates.fnmr[rates.fmr <= far].min())


def threshold_at_fmr(highest, total, rate):
    """The lowest threshold whose FMR is at most `rate`, from the highest of `total` impostor scores.

    highest: descending, at least floor(rate * total) + 1 of them unless there are fewer scores than that.
    Thresholds are scores, as in Rates; the score above which nothing more may be accepted is exclusive, so the
    threshold is the next float64 above it. None when total < 1 / rate.
    """
    if total < 1 / rate:
        return None
    allowed = int(rate * total + 1e-9)
    return float(np.nextafter(highest[allowed], np.inf)) if allowed < total else float(highest[-1])


# ---- one evaluation ---------------------------------------------------------------------------------


class Scores(NamedTuple):
    """What one network says of the test images."""

    genuine: np.ndarray  # (G,) cosine similarities, in the order of TwinEvaluator.genuine
    twin: np.ndarray  # (T,)
    n_general: int
    general: np.ndarray  # the highest general impostor scores, descending


class TwinEvaluator:
    """Evaluates networks on the twin pairs of one test set, whose crops are read once.

    id_to_images: {ID: [path of an aligned crop, ...]}; pairs: [(ID, ID), ...]. Raises InputError when the pairs
    are wrong (see TwinImages), when a crop cannot be read, and without a genuine or a twin impostor pair.
    """

    def __init__(self, id_to_images, pairs, device, batch_size=None):
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
        self.device, self.batch_size = device, batch_size
        self.crops = load_crops(self.images.paths)

    def score(self, model, description="embedding"):
        """Embed every image once with `model` and score all pairs: Scores."""
        model = model.to(self.device, memory_format=torch.channels_last).eval()
        embeddings = embed(model, self.crops, self.device, self.batch_size, description)
        pairs = len(self.family) * (len(self.family) - 1) // 2
        n_general, general = general_scores(embeddings, self.family, int(max(GENERAL_MATCH_RATES) * pairs) + 1)
        return Scores(scores_of(embeddings, self.genuine), scores_of(embeddings, self.twin), n_general, general)

    def metrics(self, scores):
        """The content of metrics.json, but for the checkpoint's name: counts and all rates (see README)."""
        counts = {
            "images": len(self.images.paths),
            "genuine": len(scores.genuine),
            "twin": len(scores.twin),
            "general": scores.n_general,
        }
        general = {}
        for rate in GENERAL_MATCH_RATES:
            t = threshold_at_fmr(scores.general, scores.n_general, rate)
            general[f"{rate:g}"] = {
                "threshold": t,
                "twin_fmr": None if t is None else float((scores.twin >= t).mean()),
                "fnmr": None if t is None else float((scores.genuine < t).mean()),
            }
        return {"counts": counts, **verification_metrics(scores.genuine, scores.twin), "general_threshold": general}

    def write(self, folder, checkpoint, scores, metrics):
        """metrics.json, pair_scores.csv, roc_curve.png and score_distributions.png into `folder`."""
        folder = Path(folder)
        write_json(folder / "metrics.json", {"checkpoint": str(checkpoint), **metrics})
        with (
            replacing(folder / "pair_scores.csv") as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as f,
        ):
            table = csv.writer(f)
            table.writerow(["path_1", "path_2", "id_1", "id_2", "kind", "score", "accepted_at_eer"])
            ids, paths, person = self.images.ids, self.images.paths, self.images.person
            for kind, rows, values in (("genuine", self.genuine, scores.genuine), ("twin", self.twin, scores.twin)):
                accepted = values >= metrics["eer_threshold"]
                for (a, b), score, yes in zip(rows.tolist(), values.tolist(), accepted.tolist(), strict=True):
                    table.writerow([paths[a], paths[b], ids[person[a]], ids[person[b]], kind, f"{score:.6f}", int(yes)])
        name = Path(checkpoint).stem
        plot_roc(folder / "roc_curve.png", {name: (scores, metrics)})
        plot_distributions(folder / "score_distributions.png", name, scores, metrics)


# ---- pictures ---------------------------------------------------------------------------------------

# Okabe and Ito's colours, which people with any colour vision tell apart; line styles serve grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")


def new_figure(width=6.0, height=4.2):
    """(figure, axes) without a window; matplotlib is loaded only here, where it is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def save_figure(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary)


def plot_roc(path, evaluations):
    """ROC of genuine against twin impostor pairs; evaluations: {name: (scores, metrics)}."""
    figure, axes = new_figure()
    lowest = 1.0
    for number, (name, (scores, metrics)) in enumerate(evaluations.items()):
        rates = error_rates(scores.genuine, scores.twin)
        lowest = min(lowest, 1 / len(scores.twin))
        label = f"{name}\nAUC {metrics['auc']:.3f}, EER {100 * metrics['eer']:.1f} %"
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number % len(STYLES)]}
        # The last point of FMR 0 cannot be drawn on a logarithmic axis; the curve ends at one pair.
        fmr = np.maximum(rates.fmr, 1 / rates.n_impostor)
        axes.plot(100 * fmr, 100 * (1 - rates.fnmr), label=label, drawstyle="steps-post", **style)
    chance = np.geomspace(lowest, 1, 100)
    axes.plot(100 * chance, 100 * chance, color="grey", linewidth=1, linestyle=":", label="chance")
    axes.set(xscale="log", xlim=(100 * lowest, 100), ylim=(0, 100))
    axes.set(xlabel="false match rate on twin impostors (%)", ylabel="true accept rate, 1 - FNMR (%)")
    axes.set_title("Telling twins apart: ROC")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    figure.set_figwidth(8.2)
    save_figure(figure, path)


def plot_distributions(path, name, scores, metrics):
    """Distributions of genuine and twin impostor scores with the EER threshold."""
    figure, axes = new_figure()
    low, high = min(scores.genuine.min(), scores.twin.min()), max(scores.genuine.max(), scores.twin.max())
    bins = np.linspace(low, high if high > low else low + 1e-3, 60)
    for values, label, colour, style in (
        (scores.genuine, "genuine", COLOURS[0], "-"),
        (scores.twin, "twin impostor", COLOURS[1], "--"),
    ):
        share = np.full(len(values), 100 / len(values))
        axes.hist(values, bins, weights=share, color=colour, alpha=0.25)
        axes.hist(values, bins, weights=share, histtype="step", color=colour, linestyle=style, label=label)
    axes.axvline(metrics["eer_threshold"], color="black", linewidth=1, label="EER threshold")
    axes.set(xlabel="score (cosine similarity)", ylabel="share of the image pairs per bin (%)", title=name)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.set_figwidth(7.2)
    save_figure(figure, path)


def comparison_table(rows):
    """Text table of [(name, metrics), ...]; the best value of each column carries a star."""
    columns = [
        ("EER %", lambda m: m["eer"], 100, min),
        ("AUC", lambda m: m["auc"], 1, max),
        ("best acc %", lambda m: m["best_accuracy"], 100, max),
        ("TAR@FAR1%", lambda m: m["tar_at_far"]["0.01"], 100, max),
        ("TAR@0.1%", lambda m: m["tar_at_far"]["0.001"], 100, max),
        ("twin FMR %", lambda m: m["general_threshold"]["0.001"]["twin_fmr"], 100, min),
        ("FNMR %", lambda m: m["general_threshold"]["0.001"]["fnmr"], 100, min),
    ]
    width = max(len("checkpoint"), *(len(name) for name, _ in rows))
    lines = [f"{'checkpoint':{width}}  " + "  ".join(f"{title:>10}" for title, *_ in columns)]
    best = []
    for _, value, _, choose in columns:
        known = [value(m) for _, m in rows if value(m) is not None]
        best.append(choose(known) if known else None)
    for name, metrics in rows:
        cells = []
        for (_, value, scale, _), top in zip(columns, best, strict=True):
            v = value(metrics)
            text = "-" if v is None else f"{scale * v:.{4 if scale == 1 else 2}f}"
            cells.append(f"{text + ('*' if v is not None and v == top and len(rows) > 1 else ' '):>10}")
        lines.append(f"{name:{width}}  " + "  ".join(cells))
    lines.append("Twin FMR and FNMR are at the threshold where the general FMR is 0.1 %; -: too few pairs to say.")
    if len(rows) > 1:
        lines.append("* best of its column on this test set: a description, not a way to choose a checkpoint.")
    return "\n".join(lines)


# ---- command line -----------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(
        prog="evaluate_twins.py", description="Measure how well checkpoints tell the twins of a test set apart."
    )
    parser.add_argument("--test_pairs", required=True, metavar="FILE", help='JSON [["ID", "twin\'s ID"], ...]')
    parser.add_argument("--id_to_images", metavar="FILE", help='JSON {"ID": ["photograph", ...]}')
    parser.add_argument(
        "--aligned_folder", default="test_aligned_images", metavar="DIR", help="test crops (default %(default)s)"
    )
    parser.add_argument(
        "--aligned_json",
        default="id_to_test_aligned_images.json",
        metavar="FILE",
        help="list of the test crops, written by the alignment (default %(default)s)",
    )
    parser.add_argument(
        "--checkpoints", required=True, nargs="+", metavar="FILE", help="networks to compare, the start first"
    )
    parser.add_argument("--output_dir", default="evaluation_results", metavar="DIR", help="default %(default)s")
    parser.add_argument("--skip_alignment", action="store_true", help="take the crops of --aligned_json as they are")
    add_alignment_arguments(parser)
    parser.add_argument(
        "--batch_size",
        type=positive_int,
        metavar="N",
        help="images embedded at once (default 256 on CUDA, 32 on a CPU); changes speed and memory only",
    )
    parser.add_argument("--seed", type=int, default=42, help="of everything random (default 42)")
    args = parser.parse_args(argv)
    if not args.skip_alignment and not args.id_to_images:
        parser.error("--id_to_images is needed unless --skip_alignment is given")
    return args


def main(argv=None):
    """Evaluate; returns the exit code: 0 done, 2 wrong input (one line on stderr), 130 interrupted."""
    try:
        args = parse_args(argv)
        evaluate(args)
    except (InputError, OSError) as error:
        print(f"evaluate_twins.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluate_twins.py: interrupted; finished checkpoints have their results", file=sys.stderr)
        return 130
    return 0


def evaluate(args):
    """The whole evaluation of the command line; returns [(folder name, metrics), ...]."""
    device = pick_device(args.device)
    pairs = read_pairs(args.test_pairs)
    for checkpoint in args.checkpoints:
        if not Path(checkpoint).is_file():
            raise InputError(f"{checkpoint}: no such checkpoint file")
    if args.skip_alignment:
        crops = read_id_to_images(args.aligned_json)
    else:
        crops = align_files(
            args.id_to_images,
            pairs,
            args.aligned_folder,
            args.aligned_json,
            args.landmarks,
            str(device),
            args.max_workers,
            args.realign,
        )
    evaluator = TwinEvaluator(crops, pairs, device, args.batch_size)
    for warning in evaluator.warnings:
        print(f"warning: {warning}")
    rows, evaluations = [], {}
    for checkpoint, name in stem_names(dict.fromkeys(args.checkpoints)).items():
        scores = evaluator.score(load_checkpoint(checkpoint), f"embedding with {name}")
        metrics = evaluator.metrics(scores)
        evaluator.write(Path(args.output_dir) / name, checkpoint, scores, metrics)
        rows.append((name, metrics))
        evaluations[name] = scores, metrics
    plot_roc(Path(args.output_dir) / "comparison.png", evaluations)
    counts = rows[0][1]["counts"]
    print(
        f"{counts['images']} images of {len(evaluator.images.ids)} people: {counts['genuine']} genuine, "
        f"{counts['twin']} twin impostor and {counts['general']} general impostor pairs, on {device}"
    )
    print(comparison_table(rows))
    print(f"results in {args.output_dir}")
    return rows


if __name__ == "__main__":
    sys.exit(main())
