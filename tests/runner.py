"""Runs the scripts' mains in a process of its own, with the tests' tiny network, for tests of processes and of kills.

    python tests/runner.py '[["train_twins", ["--train_pairs", ...]], ...]'     # exits with the last code

The environment says what else: RECORD=FOLDER trains with SGD and keeps there, as <run name>.<rank>.pt, the triplets and
the gradients of the steps; LIMIT=BYTES is how much memory may be used beyond what PyTorch has taken, and crops are
then made up instead of read; PAUSE=SECONDS slows each step down; PIDS=FOLDER gets <rank>.pid; BREAK=RANK fails alone.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import evaluate_twins
import net
import train_twins
import triplet_dataset
from tests import conftest  # noqa: F401  registers the tiny network


def record(folder):
    """Train with SGD, which unlike Adam does not turn rounding noise into full steps, and keep what steps did."""
    record.kept = {}
    take_step, save_best = train_twins.TwinTrainer._step, train_twins.TwinTrainer._finish_epoch

    def step(self, triplets, count, rate):
        result = take_step(self, triplets, count, rate)
        grads = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.requires_grad}
        record.kept.setdefault(self.run_name, []).append((triplets.copy(), grads))
        return result

    def finish(self, entry):
        save_best(self, entry)
        torch.save(record.kept.get(self.run_name, []), f"{folder}/{self.run_name}.{self.ranks.rank}.pt")

    def sgd(model, rate, decay):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)

    train_twins.TwinTrainer._step, train_twins.TwinTrainer._finish_epoch = step, finish
    train_twins.make_optimizer = sgd


def limit_memory(size):
    """Allow `size` bytes beyond what is taken now; crops are noise, so that no thousand files need to be made."""
    triplet_dataset.read_crop = lambda path: np.random.default_rng(len(path)).integers(0, 256, (112, 112, 3), np.uint8)
    triplet_dataset._size_and_time = lambda path: (0, 0)
    p = torch.zeros(1, requires_grad=True)  # what PyTorch loads and starts when it first trains
    p.sum().backward()
    torch.optim.AdamW([p], fused=True).step()
    (taken,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(taken) + size,) * 2)


def features(self, x):
    """Backbone.features of a picture an eighth as wide: every layer takes part, in a hundredth of the time."""
    small = self.body(self.input_layer(torch.nn.functional.avg_pool2d(x, 8)))
    return small.expand(-1, -1, 7, 7)


def slowly(function, seconds):
    def slow(*args):
        time.sleep(seconds)
        return function(*args)

    return slow


def break_off(self):
    raise train_twins.InputError("only rank 1 met this")


if __name__ == "__main__":
    net.Backbone.features = features
    for name in net.ARCHITECTURES.keys() - {"ir_tiny"}:  # a checkpoint is compared with each
        del net.ARCHITECTURES[name]
    train_twins.signal.signal(train_twins.signal.SIGTERM, train_twins.signal.default_int_handler)
    leave, net.Ranks.leave = net.Ranks.leave, lambda self: self.collect(None)  # the same processes go on
    torch.set_num_threads(1)
    train_twins.plot_curves = lambda folder, log: None  # pictures take longer than the tiny network
    for name in ("plot_roc_and_det", "plot_distributions", "plot_hardest", "plot_data_percentage"):
        setattr(evaluate_twins, name, lambda *args: None)
    if "RECORD" in os.environ:
        record(os.environ["RECORD"])
    rank = os.environ.get("RANK", "0")
    if "PIDS" in os.environ:
        Path(os.environ["PIDS"], f"{rank}.pid").write_text(str(os.getpid()))
    if "PAUSE" in os.environ:
        train_twins.rate_factor = slowly(train_twins.rate_factor, float(os.environ["PAUSE"]))
    if os.environ.get("BREAK") == rank:
        train_twins.TwinTrainer._write_start = break_off
    if "LIMIT" in os.environ:
        limit_memory(int(os.environ["LIMIT"]))
    for script, argv in json.loads(sys.argv[1]):
        code = {"train_twins": train_twins, "evaluate_twins": evaluate_twins}[script].main(argv)
    if code == 0:
        leave(net.Ranks())
    sys.exit(code)
