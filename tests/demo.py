"""The whole way on synthetic faces: photographs, crops, a sweep of four runs, their comparison.

    python -m tests.demo [folder]

Writes into ./demo unless another folder is named; takes a few minutes on two CPU cores. The faces are drawn
(see tests/synthetic.py) and the network starts from random weights, so the figures show that the commands
work and that training finds what tells drawn twins apart; they say nothing about people or about AdaFace.
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

MARKER = "made by tests.demo"


def run(module, command):
    """Print a command line and run it through the script's main, in this process."""
    print(f"\n$ python {module.__name__}.py {command}", flush=True)
    code = module.main(shlex.split(command))
    if code:
        sys.exit(code)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="demo", help="where everything is written (default demo)")
    parser.add_argument("--pairs", type=int, default=36, help="training families (default 36)")
    parser.add_argument("--device", default="cpu", help="auto, cuda, cuda:N or cpu (default cpu)")
    args = parser.parse_args(argv)
    began, home = time.perf_counter(), Path(args.folder)
    if home.exists() and any(home.iterdir()) and not (home / MARKER).exists():
        print(f"{home} is not empty and not a demo: name another folder", file=sys.stderr)
        return 2
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    (home / MARKER).touch()

    print("Drawing photographs of twins: SYNTHETIC faces, with known landmarks.")
    write_photos(home / "train", args.pairs, 4, seed=1, triple=True)
    write_photos(home / "test", 20, 4, seed=2, prefix="other")
    q = shlex.quote(home.as_posix())
    for part in ("train", "test"):
        run(
            align,
            f"--id_to_images {q}/{part}/id_to_images.json --landmarks {q}/{part}/landmarks.json "
            f"--aligned_folder {q}/{part}_aligned_images --aligned_json {q}/id_to_{part}_aligned_images.json",
        )
    print("\nThe network to start from: an ir_18 with RANDOM weights (AdaFace's are not in this repository).")
    torch.manual_seed(0)
    model = build_model("ir_18")
    crops = read_id_to_images(home / "id_to_train_aligned_images.json")
    crops = load_crops([path for person in crops.values() for path in person[:2]]).pixels
    set_batchnorm_statistics(model, crops, torch.device("cpu"))
    save_checkpoint(home / "untrained.pth", model)

    run(
        train_twins,
        f"--train_pairs {q}/train/pairs.json --skip_alignment --aligned_json {q}/id_to_train_aligned_images.json "
        f"--arch ir_18 --pretrained {q}/untrained.pth --output_dir {q}/models --log_dir {q}/training_logs "
        f"--device {args.device} --freeze_backbone True False --train_percentage 10 100 --images_per_batch 32 "
        "--epochs 2 --learning_rate 1e-4 --schedule constant "
        "--drift_weight 0",  # random weights have nothing worth keeping
    )
    models = " ".join(shlex.quote(path.as_posix()) for path in sorted((home / "models").glob("*.pth")))
    run(
        evaluate_twins,
        f"--test_pairs {q}/test/pairs.json --skip_alignment --aligned_json {q}/id_to_test_aligned_images.json "
        f"--checkpoints {q}/untrained.pth {models} --output_dir {q}/evaluation_results --device {args.device}",
    )
    print(f"\nDone in {time.perf_counter() - began:.0f} s, on synthetic faces and from random weights. Look at:")
    for found in sorted(home.rglob("*.png")):
        if "aligned_images" not in found.as_posix():
            print(f"  {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
