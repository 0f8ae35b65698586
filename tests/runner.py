"""Runs train_twins.main in processes of its own, with the tests' tiny network: for tests of kills and of processes.

    codes = finish(launch(folder, [["--train_pairs", ...], ...], world=2))    # two processes, one run after another
    torchrun --nproc_per_node=2 tests/runner.py '[["--train_pairs", ...], ...]'

The environment says what else: SAVE_MINUTES, in place of the script's; PAUSE=SECONDS before each step; RECORD=FOLDER
trains with SGD and keeps there, as <rank>.pt, the gradients of all steps and the photographs aligned by this process.
"""

import contextlib
import json
import multiprocessing.forkserver
import os
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import tqdm

import align
import net
import train_twins
from tests.conftest import quick_features, sgd


def record(kept):
    """Fill {"steps": [(run, {parameter: gradient}), ...], "aligned": [path, ...]} from now on."""
    step, align_photo = train_twins.TwinTrainer.step, align.align_photo

    def recorded(self, triplets):
        statistics = step(self, triplets)
        gradients = {key: p.grad.clone() for key, p in self.model.named_parameters() if p.requires_grad}
        kept["steps"].append((self.run.name, gradients))
        return statistics

    train_twins.TwinTrainer.step, train_twins.make_optimizer = recorded, sgd
    align.align_photo = lambda job, *rest: kept["aligned"].append(job.source) or align_photo(job, *rest)


def work(commands, environment=(), output=None):
    """Run train_twins.main with each of the commands; returns the last exit code, or ends with it."""
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")) if output else ():
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    tqdm.tqdm.set_lock(threading.RLock())  # not one between processes, which those that are killed would leave behind
    net.Backbone.features, train_twins.plot_curves = quick_features, lambda folder, log: None
    train_twins.SAVE_MINUTES = float(os.environ.get("SAVE_MINUTES", train_twins.SAVE_MINUTES))
    rate_factor, pause, kept = train_twins.rate_factor, float(os.environ.get("PAUSE", 0)), {"steps": [], "aligned": []}
    train_twins.rate_factor = lambda *args: time.sleep(pause) or rate_factor(*args)
    if "RECORD" in os.environ:
        record(kept)
    codes = [train_twins.main(flags) for flags in commands]  # which returns, also in one of several processes
    if "RECORD" in os.environ:
        torch.save(kept, f"{os.environ['RECORD']}/{os.environ.get('RANK', 0)}.pt")
    if output and codes[-1] == 0:
        net.Processes("cpu").collect(None)  # wait for all
    return sys.exit(codes[-1]) if output else codes[-1]


def launch(folder, commands, world=1, **environment):
    """Start `world` processes as torchrun does; their output goes to folder/<rank>.out and .err. Returns them."""
    context = multiprocessing.get_context("forkserver")  # forks from a process that has imported all: starts in no time
    context.set_forkserver_preload(["tests.runner"])
    with contextlib.chdir(Path(net.__file__).parent), socket.create_server(("127.0.0.1", 0)) as server:
        multiprocessing.forkserver.ensure_running()
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    folder.mkdir(exist_ok=True, parents=True)
    ranks = [{**environment, "WORLD_SIZE": str(world), "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(world)]
    processes = [context.Process(target=work, args=(commands, own, f"{folder}/{own['RANK']}")) for own in ranks]
    return [process.start() or process for process in processes]


def finish(processes, seconds=100):
    """The exit codes of processes, which must end within so many seconds."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, until - time.monotonic()))
        process.kill()  # what has ended does not mind
    return [process.exitcode for process in processes]


if __name__ == "__main__":
    net.run_main(lambda: work(json.loads(sys.argv[1])))
