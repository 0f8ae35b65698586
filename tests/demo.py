"""The whole way on synthetic faces: photographs, crops, a sweep of four runs, their comparison.

    python -m tests.demo [folder]

Writes into ./demo unless another folder is named; takes a few minutes on two CPU cores. The faces
are drawn (see tests/synthetic.py) and the network starts from random weights, so the figures show
that the commands work and that training finds what tells drawn twins apart; they say nothing
about people or about AdaFace.
"""

import argparse
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch

import align
import evaluate_twins
import train_twins
from net import build_model, save_checkpoint
from tests.synthetic import set_batchnorm_statistics, write_photos
from triplet_dataset import load_crops, read_id_to_images

MARKER = "made by tests.demo"  # an empty file that tells a demo's folder from all others


def prepare_folder(folder):
    """Make an empty folder for the demo; returns whether that could be done.

    An earlier demo is deleted, nothing else.
    """
    is_used = folder.exists() and any(folder.iterdir())
    if is_used and not (folder / MARKER).exists():
        return False
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    return True


def run_script(module, command):
    """Print a command line and run it through the script's main, in this process."""
    print(f"\n$ python {module.__name__}.py {command}", flush=True)
    code = module.main(shlex.split(command))
    if code:
        sys.exit(code)


def align_photographs(folder, part):
    """Stage 1 for the training or the test people; part: train or test."""
    q = shlex.quote(folder.as_posix())
    run_script(
        align,
        f"--id_to_images {q}/{part}/id_to_images.json --landmarks {q}/{part}/landmarks.json "
        f"--aligned_folder {q}/{part}_aligned_images "
        f"--aligned_json {q}/id_to_{part}_aligned_images.json",
    )


def write_start(folder):
    """Write untrained.pth: random weights, with BatchNorm statistics of two crops per person."""
    torch.manual_seed(0)
    model = build_model("ir_18")
    id_to_images = read_id_to_images(folder / "id_to_train_aligned_images.json")
    paths = [path for images in id_to_images.values() for path in images[:2]]
    set_batchnorm_statistics(model, load_crops(paths).pixels, torch.device("cpu"))
    save_checkpoint(folder / "untrained.pth", model)


def train_sweep(folder, device):
    """Train in both modes on 10 % and on all triplets."""
    q = shlex.quote(folder.as_posix())
    run_script(
        train_twins,
        f"--train_pairs {q}/train/pairs.json "
        f"--skip_alignment --aligned_json {q}/id_to_train_aligned_images.json "
        f"--arch ir_18 --pretrained {q}/untrained.pth "
        f"--output_dir {q}/models --log_dir {q}/training_logs --device {device} "
        "--freeze_backbone True False --train_percentage 10 100 --images_per_batch 32 "
        "--epochs 3 --learning_rate 5e-4 "
        "--drift_weight 0",  # random weights have nothing worth keeping
    )


def compare_networks(folder, device):
    """Compare all trained networks with the untrained one on other people."""
    q = shlex.quote(folder.as_posix())
    paths = sorted((folder / "models").glob("*.pth"))
    models = shlex.join(path.as_posix() for path in paths)
    run_script(
        evaluate_twins,
        f"--test_pairs {q}/test/pairs.json "
        f"--skip_alignment --aligned_json {q}/id_to_test_aligned_images.json "
        f"--checkpoints {q}/untrained.pth {models} "
        f"--output_dir {q}/evaluation_results --device {device}",
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.demo", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "folder", nargs="?", default="demo", help="where everything is written (default demo)"
    )
    parser.add_argument("--pairs", type=int, default=36, help="training families (default 36)")
    parser.add_argument("--device", default="cpu", help="auto, cuda, cuda:N or cpu (default cpu)")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    folder = Path(args.folder)
    if not prepare_folder(folder):
        print(f"{folder} is not empty and not a demo: name another folder", file=sys.stderr)
        return 2

    print("Drawing photographs of twins: SYNTHETIC faces, with known landmarks.")
    write_photos(folder / "train", args.pairs, 4, seed=1, triple=True)
    write_photos(folder / "test", 20, 4, seed=2, prefix="other")
    align_photographs(folder, "train")
    align_photographs(folder, "test")
    print("\nThe network to start from is an ir_18 with RANDOM weights.")
    print("AdaFace's weights are not in this repository.")
    write_start(folder)
    train_sweep(folder, args.device)
    compare_networks(folder, args.device)

    seconds = time.perf_counter() - began
    print(f"\nDone in {seconds:.0f} s, on synthetic faces and from random weights. Look at:")
    for path in sorted(folder.rglob("*.png")):
        if "aligned_images" not in path.as_posix():
            print(f"  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
