"""Runs train_twins.main with the tests' tiny network, in processes of its own.

    codes = finish(launch(folder, [["--train_pairs", ...], ...], world=2))
    torchrun --nproc_per_node=2 tests/runner.py '[["--train_pairs", ...], ...]'

Each process runs the commands one after another. It is used by tests that kill processes and by
tests of several processes. The environment says what else a process does:

    SAVE_SECONDS=N    saves the state at epochs' ends every N seconds, instead of the script's own
    PAUSE=N           sleeps N seconds before each step
    RECORD=FOLDER     trains with SGD, and writes <rank>.pt there: the gradients of all steps and
                      the photographs that this process aligned
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


def pause_before_steps(seconds):
    """Make every training step begin with a pause."""
    step = train_twins.TwinTrainer.step

    def slow_step(self, triplets):
        time.sleep(seconds)
        return step(self, triplets)

    train_twins.TwinTrainer.step = slow_step


def record(kept):
    """From now on, fill kept["steps"] and kept["aligned"].

    They become [(run, {parameter: gradient}), ...] and [path of a photograph, ...].
    """
    step = train_twins.TwinTrainer.step
    align_photo = align.align_photo

    def recorded_step(self, triplets):
        statistics = step(self, triplets)
        gradients = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                gradients[name] = parameter.grad.clone()
        kept["steps"].append((self.run.name, gradients))
        return statistics

    def recorded_align_photo(job, *rest):
        kept["aligned"].append(job.source)
        return align_photo(job, *rest)

    train_twins.TwinTrainer.step = recorded_step
    train_twins.make_optimizer = sgd
    align.align_photo = recorded_align_photo


def redirect(stream_number, path):
    """Send what this process writes to a stream (1 is stdout, 2 is stderr) to a file."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream_number)


def work(commands, environment=(), output=None):
    """Run train_twins.main with each of the commands; returns the last exit code.

    With `output`, a path without suffix, stdout and stderr go there, and the process ends with that
    code.
    """
    os.environ.update(environment)
    if output:
        redirect(1, f"{output}.out")
        redirect(2, f"{output}.err")
    torch.set_num_threads(1)
    # tqdm's own lock is shared by processes, and a process that is killed would leave it locked.
    tqdm.tqdm.set_lock(threading.RLock())
    net.Backbone.features = quick_features
    train_twins.plot_curves = lambda folder, log: None
    train_twins.WARM_UP_STEPS = 1
    if "SAVE_SECONDS" in os.environ:
        train_twins.SAVE_SECONDS = float(os.environ["SAVE_SECONDS"])
    if "PAUSE" in os.environ:
        pause_before_steps(float(os.environ["PAUSE"]))
    kept = {"steps": [], "aligned": []}
    if "RECORD" in os.environ:
        record(kept)
    codes = [train_twins.main(flags) for flags in commands]
    if "RECORD" in os.environ:
        torch.save(kept, f"{os.environ['RECORD']}/{os.environ.get('RANK', 0)}.pt")
    if not output:
        return codes[-1]
    if codes[-1] == 0:
        net.Processes("cpu").wait()
    return sys.exit(codes[-1])


def launch(folder, commands, world=1, **environment):
    """Start `world` processes as torchrun does; returns them.

    Their output goes to folder/<rank>.out and folder/<rank>.err.
    """
    # The fork server has imported everything, so a process starts in no time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runner"])
    with contextlib.chdir(Path(net.__file__).parent):
        multiprocessing.forkserver.ensure_running()
    with socket.create_server(("127.0.0.1", 0)) as server:
        _, port = server.getsockname()
    folder.mkdir(exist_ok=True, parents=True)
    processes = []
    for rank in range(world):
        own_environment = {
            **environment,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        arguments = (commands, own_environment, f"{folder}/{rank}")
        process = context.Process(target=work, args=arguments)
        process.start()
        processes.append(process)
    return processes


def finish(processes, seconds=100):
    """The exit codes of processes, which must end within so many seconds."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, until - time.monotonic()))
        process.kill()  # one that has ended does not mind
    return [process.exitcode for process in processes]


if __name__ == "__main__":
    net.run_main(lambda: work(json.loads(sys.argv[1])))
