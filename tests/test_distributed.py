"""Several processes do what one does: the same steps, figures and files.

They run on the CPU, with gloo and a tiny network.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import net
import train_twins
from tests import runner
from tests.conftest import Experiment, assert_equal_weights, without_timing
from tests.runner import finish, launch
from tests.synthetic import write_photos

FAMILIES = [[3, 2], [2, 2, 2], [2, 3], [3, 3], [4, 3]]
WEIGHTS = "--quadruplet_weight 0.5 --drift_weight 1 --identity_weight 0.1"
TERMS = f"--learning_rate 0.002 {WEIGHTS} --train_percentage 61"
RUNS = {
    "full_shuffled": f"--batch_size 17 {TERMS}",  # the last step has one triplet
    "full_grouped": f"--images_per_batch 16 {TERMS}",
    "frozen_shuffled": f"--freeze_backbone --batch_size 17 {TERMS}",
    "frozen_grouped": f"--freeze_backbone --images_per_batch 16 {TERMS}",
    "single_family": "--validation_split 0 --epochs 1 --distance euclidean",
}
INTERRUPTED = "train_twins.py: interrupted; --resume goes on from the last saved epoch"


class Comparison(Experiment):
    """The runs of RUNS and one from photographs, by any number of processes.

    Each number of processes has a folder of that name.
    """

    def __init__(self, folder):
        super().__init__(folder, FAMILIES)
        write_photos(folder / "photos", 3, 2, seed=1)
        self.done = {}

    def place(self, world):
        """The flags of a folder of its own, with a copy of the list of the crops."""
        own = self.folder / str(world)
        own.mkdir(exist_ok=True)
        aligned = self.folder / f"train{world}.json"
        shutil.copy(self.aligned, aligned)
        return f"--output_dir {own}/models --log_dir {own}/logs --aligned_json {aligned}"

    def runs(self, world):
        """The runs that so many processes are tried with.

        More processes than a step has images are tried with the runs that have such steps.
        """
        if world < 4:
            return RUNS
        return {name: flags for name, flags in RUNS.items() if "shuffled" in name}

    def commands(self, world):
        place = self.place(world)
        commands = [
            self.flags(f"{flags} {place}", name) for name, flags in self.runs(world).items()
        ]
        return [*commands, self.command_from_photographs(world)]

    def command_from_photographs(self, world):
        photos = self.folder / "photos"
        own = self.folder / str(world)
        flags = self.flags(
            f"{self.place(world)} --epochs 1 --train_pairs {photos}/pairs.json "
            f"--id_to_images {photos}/id_to_images.json --landmarks {photos}/landmarks.json "
            f"--aligned_folder {own}/crops --aligned_json {own}/crops.json",
            "both_stages",
        )
        flags.remove("--skip_alignment")
        return flags

    def run(self, world):
        """What so many processes do, which they do when this is first asked.

        {"logs": {run: ...}, "weights": {run: ...}, "trained": {run: ...}, "kept": [what the runner
        recorded of each process]}. The checkpoint has the average of the weights as its own, the
        state to go on from has the trained ones.
        """
        if world not in self.done:
            own = self.folder / str(world)
            codes = finish(launch(own, self.commands(world), world, RECORD=str(own)))
            assert codes == [0] * world, (own / "0.err").read_text()
            logs = {}
            weights = {}
            trained = {}
            for name in (*self.runs(world), "both_stages"):
                path = own / "logs" / name / "training_log.json"
                logs[name] = json.loads(path.read_text())
                checkpoint = torch.load(logs[name]["best_checkpoint"], weights_only=True)
                weights[name] = checkpoint["state_dict"]
                state = torch.load(path.with_name("last.pth"), weights_only=True)
                trained[name] = state["state_dict"]
            self.done[world] = {
                "logs": logs,
                "weights": weights,
                "trained": trained,
                "kept": records(own, world),
            }
        return self.done[world]


def records(folder, world):
    """What the runner recorded of each process."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return Comparison(tmp_path_factory.mktemp("processes"))


def comparable(log):
    """What of a log depends neither on the clock nor on places."""
    content = without_timing(log)
    content.pop("against_start")  # it is made of the figures in the entries
    for flag in ("aligned_json", "aligned_folder"):
        content["config"].pop(flag)
    return content


def assert_same_log(log, reference):
    """Logs agree in all but the clock, places and rounding."""
    content, expected = comparable(log), comparable(reference)
    entries, expected_entries = content.pop("epochs"), expected.pop("epochs")
    assert content == expected
    for entry, expected_entry in zip(entries, expected_entries, strict=True):
        assert entry == pytest.approx(expected_entry, abs=1e-6)


# ---- the same result -----------------------------------------------------------------------------
@pytest.mark.parametrize("world", [2, 3, 5])
def test_gradients_are_those_of_one_process(comparison, world):
    several = comparison.run(world)
    (record,) = comparison.run(1)["kept"]
    expected_steps = [(name, step) for name, step in record["steps"] if name in several["logs"]]
    assert len(expected_steps) > 10
    for kept in several["kept"]:
        steps = zip(kept["steps"], expected_steps, strict=True)
        for (name, gradients), (expected_name, expected) in steps:
            assert name == expected_name
            assert_equal_weights(gradients, expected, 2e-5)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_figures_are_those_of_one_process(comparison, world):
    one, several = comparison.run(1), comparison.run(world)
    for name, log in several["logs"].items():
        assert log["config"]["processes"] == world
        assert_same_log(log, one["logs"][name])


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("kind", ["weights", "trained"])
def test_weights_are_those_of_one_process(comparison, world, kind):
    one, several = comparison.run(1), comparison.run(world)
    for name, weights in several[kind].items():
        assert_equal_weights(weights, one[kind][name], 1e-5)


# The last step of a shuffled epoch has the three images of a triplet.
@pytest.mark.parametrize("world", [2, 3, 5])
def test_photographs_are_shared(comparison, world):
    parts = [set(kept["aligned"]) for kept in comparison.run(world)["kept"]]
    assert all(parts)
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 12


@pytest.mark.parametrize("world", [2, 3, 5])
def test_crops_are_those_of_one_process(comparison, world):
    comparison.run(1)
    comparison.run(world)
    one = comparison.folder / "1" / "crops"
    several = comparison.folder / str(world) / "crops"
    files = [path.relative_to(one) for path in one.rglob("*.png")]
    assert len(files) == 12 + 1  # and the contact sheet
    for path in files:
        assert (one / path).read_bytes() == (several / path).read_bytes()
    assert one.with_suffix(".json").read_text() == several.with_suffix(".json").read_text()


# ---- messages and exit codes ---------------------------------------------------------------------
@pytest.mark.parametrize("world", [2, 3, 5])
def test_messages_are_told_once(comparison, world):
    comparison.run(world)
    own = comparison.folder / str(world)
    out = (own / "0.out").read_text()
    n_runs = len(comparison.runs(world)) + 1
    assert out.count("training pairs and") == n_runs
    assert out.count("epoch 0:") == n_runs
    assert out.count("12 photographs of") == 1
    for rank in range(1, world):
        assert (own / f"{rank}.out").read_text() == ""


def error_lines(folder, world):
    """The lines of all processes on stderr that are the script's: PyTorch may speak too."""
    errors = [(folder / f"{rank}.err").read_text() for rank in range(world)]
    return [line for line in "".join(errors).splitlines() if re.match(r"\w+(\.py)?: ", line)]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_an_error_that_all_meet_is_told_once(comparison, world):
    folder = comparison.folder / f"dead{world}"
    place = f"--output_dir {folder}/models --log_dir {folder}/logs"
    command = comparison.flags(f"--learning_rate 1e6 {place}", "dead")
    assert finish(launch(folder, [command], world)) == [2] * world
    (line,) = error_lines(folder, world)
    assert line.startswith("train_twins.py: ")
    assert "--learning_rate below 1e+06" in line


def test_main_returns_1_in_all_processes_when_a_run_of_a_sweep_fails(comparison):
    folder = comparison.folder / "failed_sweep"
    place = f"--output_dir {folder}/models --log_dir {folder}/logs"
    # The runs of a sweep begin with the lowest rate, so the one that fails is the last.
    sweep = comparison.flags(f"--learning_rate 3e-4 1e6 --epochs 1 {place}", "")
    assert finish(launch(folder, [sweep], 2)) == [1, 1]
    out = (folder / "0.out").read_text()
    (line,) = [line for line in out.splitlines() if line.startswith("FAILED: ")]
    assert "learning_rate1e+06" in line
    assert "evaluate_twins.py --checkpoints" in out


def test_a_program_goes_on_after_main_when_a_run_of_a_sweep_failed(comparison):
    folder = comparison.folder / "program"
    place = f"--output_dir {folder}/models --log_dir {folder}/logs"
    sweep = comparison.flags(f"--learning_rate 3e-4 1e6 --epochs 1 {place}", "")
    another = comparison.flags(f"--epochs 1 {place}", "another")
    assert finish(launch(folder, [sweep, another], 2)) == [0, 0]
    assert (folder / "logs" / "another" / "training_log.json").exists()


# ---- stopped -------------------------------------------------------------------------------------
def saved_epochs(experiment, name):
    """The epochs that a run's state to resume from has; none without a state."""
    if not (experiment.folder / "logs" / name / "last.pth").exists():
        return []
    return [entry["epoch"] for entry in experiment.state(name)["log"]["epochs"]]


def test_a_process_that_dies_does_not_hang_the_others_and_any_number_goes_on(comparison):
    flags = f"--batch_size 8 --epochs 3 {TERMS}"
    folder = comparison.folder
    (folder / "record").mkdir()
    record = {"RECORD": str(folder / "record")}
    assert finish(launch(folder, [comparison.flags(flags, "whole")], **record)) == [0]

    command = comparison.flags(flags, "parts")
    processes = launch(folder, [command], 2, PAUSE="0.1", SAVE_SECONDS="0", **record)
    while len(saved_epochs(comparison, "parts")) < 2 and processes[0].is_alive():
        time.sleep(0.01)
    processes[1].kill()
    killed = time.monotonic()
    codes = finish(processes, 60)
    assert time.monotonic() - killed < 30
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, -signal.SIGKILL)  # it ended by itself
    assert saved_epochs(comparison, "parts") == [0, 1]

    left = folder / "left"
    shutil.copytree(folder / "logs" / "parts", left / "logs")
    shutil.copytree(folder / "models", left / "models")
    for world in (1, 3):
        shutil.copytree(left / "logs", folder / "logs" / "parts", dirs_exist_ok=True)
        shutil.copytree(left / "models", folder / "models", dirs_exist_ok=True)
        command = comparison.flags(f"{flags} --resume", "parts")
        assert finish(launch(folder, [command], world, **record)) == [0] * world
        assert_same_log(comparison.log("parts"), comparison.log("whole"))
        assert_equal_weights(comparison.weights("parts"), comparison.weights("whole"), 1e-5)
        trained, expected = (comparison.state(name)["state_dict"] for name in ("parts", "whole"))
        assert_equal_weights(trained, expected, 1e-5)


def test_one_process_that_is_interrupted_stops_all_at_the_same_step(comparison):
    folder = comparison.folder / "stopped"
    folder.mkdir()
    command = comparison.flags("--batch_size 8 --epochs 9", "stopped")
    processes = launch(folder, [command], 2, PAUSE="0.1", SAVE_SECONDS="0", RECORD=str(folder))
    while not saved_epochs(comparison, "stopped") and processes[0].is_alive():
        time.sleep(0.01)
    time.sleep(0.3)  # into the first epoch, which takes a second
    processes[1].terminate()
    assert finish(processes, 30) == [130, 130]
    assert error_lines(folder, 2) == [INTERRUPTED]
    assert saved_epochs(comparison, "stopped") == [0]
    first, second = (len(kept["steps"]) for kept in records(folder, 2))
    assert first == second > 0


run_commands = runner.work  # a test puts the next function in its place


def run_commands_with_a_signal(commands, environment, output):
    """Like runner.work, but the second process gets SIGTERM while it validates epoch 1."""
    validate = train_twins.TwinTrainer.validate

    def interrupted_validate(self, epoch):
        if epoch == 1 and self.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, epoch)

    train_twins.TwinTrainer.validate = interrupted_validate
    run_commands(commands, environment, output)


def test_one_process_that_is_interrupted_while_it_validates_stops_all_after_the_epoch(
    comparison, monkeypatch
):
    monkeypatch.setattr(runner, "work", run_commands_with_a_signal)
    folder = comparison.folder / "validating"
    command = comparison.flags("--epochs 3", "validating")
    assert finish(launch(folder, [command], 2, SAVE_SECONDS="0"), 30) == [130, 130]
    assert error_lines(folder, 2) == [INTERRUPTED]
    assert saved_epochs(comparison, "validating") == [0, 1]


def test_torchrun_ends_with_all_done(comparison):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    runner = ["--nproc_per_node=2", "tests/runner.py"]
    commands = json.dumps([comparison.flags("--epochs 1", "torchrun")])
    done = subprocess.run(
        [*torchrun, *runner, commands],
        cwd=Path(net.__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stopped by --epochs") == 1
    assert comparison.log("torchrun")["config"]["processes"] == 2
