"""Several processes do what one does: the same steps, figures and files. Gloo on the CPU, a tiny network."""

import json
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
from tests.conftest import Experiment, assert_equal_weights, without_timing
from tests.runner import finish, launch
from tests.synthetic import write_photos

FAMILIES = [[3, 2], [2, 2, 2], [2, 3], [3, 3], [4, 3]]
TERMS = "--learning_rate 0.002 --quadruplet_weight 0.5 --drift_weight 1 --train_percentage 61"
RUNS = {
    "full_shuffled": f"--batch_size 17 {TERMS}",  # the last step has one triplet
    "full_grouped": f"--images_per_batch 16 {TERMS}",
    "frozen_shuffled": f"--freeze_backbone --batch_size 17 {TERMS}",
    "frozen_grouped": f"--freeze_backbone --images_per_batch 16 {TERMS}",
    "single_family": "--validation_split 0 --epochs 1 --distance euclidean",
}


class Comparison(Experiment):
    """The runs of RUNS and one from photographs, by any number of processes, each in a folder of that number."""

    def __init__(self, folder):
        super().__init__(folder, FAMILIES)
        write_photos(folder / "photos", 3, 2, seed=1)
        self.done = {}

    def place(self, world):
        """The flags of a folder of its own, with a list of the crops of another name: with features of its own."""
        own = self.folder / str(world)
        own.mkdir(exist_ok=True)
        shutil.copy(self.aligned, self.folder / f"train{world}.json")
        return f"--output_dir {own}/models --log_dir {own}/logs --aligned_json {self.folder}/train{world}.json"

    def runs(self, world):
        """More processes than a step has images are tried with the runs that have such steps."""
        return {name: flags for name, flags in RUNS.items() if world < 4 or "shuffled" in name}

    def commands(self, world):
        place, photos, own = self.place(world), self.folder / "photos", self.folder / str(world)
        commands = [self.flags(f"{flags} {place}", name) for name, flags in self.runs(world).items()]
        stage_1 = self.flags(
            f"{place} --train_pairs {photos}/pairs.json --id_to_images {photos}/id_to_images.json --epochs 1 "
            f"--landmarks {photos}/landmarks.json --aligned_folder {own}/crops --aligned_json {own}/crops.json",
            "both_stages",
        )
        return [*commands, [flag for flag in stage_1 if flag != "--skip_alignment"]]

    def run(self, world):
        """{"logs", "weights": {run: ...}, "kept": [what the runner recorded of each process]}; run when first asked."""
        if world not in self.done:
            own, commands = self.folder / str(world), self.commands(world)
            codes = finish(launch(own, commands, world, RECORD=str(own)))
            assert codes == [0] * world, (own / "0.err").read_text()
            names = [*self.runs(world), "both_stages"]
            logs = {n: json.loads((own / "logs" / n / "training_log.json").read_text()) for n in names}
            best = {n: torch.load(logs[n]["best_checkpoint"], weights_only=True)["state_dict"] for n in names}
            kept = [torch.load(own / f"{rank}.pt", weights_only=True) for rank in range(world)]
            self.done[world] = {"logs": logs, "weights": best, "kept": kept}
        return self.done[world]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return Comparison(tmp_path_factory.mktemp("processes"))


def assert_same_log(log, reference):
    """Logs agree in all but the clock, places and rounding."""
    a, b = without_timing(log), without_timing(reference)
    for entry, other in zip(a.pop("epochs"), b.pop("epochs"), strict=True):
        assert entry == pytest.approx(other, abs=1e-6)
    for part in (a, b):
        part.pop("against_start", None)
        part["config"] = {k: v for k, v in part["config"].items() if k not in ("aligned_json", "aligned_folder")}
    assert a == b


@pytest.mark.parametrize("world", [2, 3, 5])
def test_gradients_weights_and_figures_are_those_of_one_process(comparison, world):
    one, several = comparison.run(1), comparison.run(world)
    steps = [(name, gradients) for name, gradients in one["kept"][0]["steps"] if name in several["logs"]]
    assert len(steps) > 10
    for kept in several["kept"]:
        for (name, gradients), (expected_name, expected) in zip(kept["steps"], steps, strict=True):
            assert name == expected_name
            assert_equal_weights(gradients, expected, 2e-5)
    for name in several["logs"]:
        assert several["logs"][name]["config"]["processes"] == world
        assert_same_log(several["logs"][name], one["logs"][name])
        assert_equal_weights(several["weights"][name], one["weights"][name], 1e-5)


@pytest.mark.parametrize("world", [2, 3, 5])  # the last step of a shuffled epoch has the three images of a triplet
def test_photographs_are_shared_and_give_the_crops_of_one_process(comparison, world):
    comparison.run(1)
    parts = [set(kept["aligned"]) for kept in comparison.run(world)["kept"]]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 12
    one, several = (comparison.folder / str(n) / "crops" for n in (1, world))
    files = [path.relative_to(one) for path in one.rglob("*.png")]
    assert len(files) == 12 + 1  # and the contact sheet
    assert all((one / path).read_bytes() == (several / path).read_bytes() for path in files)
    assert one.with_suffix(".json").read_text() == several.with_suffix(".json").read_text()


@pytest.mark.parametrize("world", [2, 3, 5])
def test_messages_are_told_once(comparison, world):
    comparison.run(world)
    own = comparison.folder / str(world)
    out = (own / "0.out").read_text()
    runs = len(comparison.runs(world)) + 1
    for text, times in (("training and", runs), ("epoch 0:", runs), ("12 photographs of", 1)):
        assert len(re.findall(text, out)) == times
    assert all((own / f"{rank}.out").read_text() == "" for rank in range(1, world))
    assert (
        finish(launch(own, [comparison.flags(f"--learning_rate 1e6 {comparison.place(world)}", "dead")], world))
        == [2] * world
    )
    lines = [line for rank in range(world) for line in (own / f"{rank}.err").read_text().splitlines()]
    (line,) = [line for line in lines if line.startswith("train_twins.py: ")]  # PyTorch may speak too
    assert "--learning_rate below 1e+06" in line


def test_a_process_that_dies_does_not_hang_the_others_and_any_number_goes_on(comparison):
    flags = f"--batch_size 8 --epochs 3 {TERMS}"
    (comparison.folder / "record").mkdir()
    record = {"RECORD": str(comparison.folder / "record")}
    assert finish(launch(comparison.folder, [comparison.flags(flags, "whole")], **record)) == [0]
    last = comparison.folder / "logs" / "parts" / "last.pth"
    processes = launch(
        comparison.folder, [comparison.flags(flags, "parts")], 2, PAUSE="0.1", SAVE_MINUTES="0", **record
    )
    while not last.exists() and processes[0].is_alive():
        time.sleep(0.01)
    processes[1].kill()
    killed = time.monotonic()
    codes = finish(processes, 60)
    assert time.monotonic() - killed < 30
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, -signal.SIGKILL)  # it ended by itself
    state = last.read_bytes()
    for world in (1, 3):
        last.write_bytes(state)
        command = comparison.flags(f"{flags} --resume", "parts")
        assert finish(launch(comparison.folder, [command], world, **record)) == [0] * world
        assert_same_log(comparison.log("parts"), comparison.log("whole"))
        assert_equal_weights(comparison.weights("parts"), comparison.weights("whole"), 1e-5)


def test_one_process_that_is_interrupted_stops_all_at_the_same_step(comparison):
    flags = comparison.flags("--batch_size 8 --epochs 9", "stopped")
    processes = launch(comparison.folder, [flags], 2, PAUSE="0.1")
    while comparison.log("stopped") is None and processes[0].is_alive():
        time.sleep(0.01)
    time.sleep(0.3)  # into the first epoch, which takes a second
    processes[1].terminate()
    assert finish(processes, 30) == [130, 130]
    assert (comparison.folder / "0.err").read_text().count("interrupted; what was done is saved") == 1
    assert comparison.state("stopped")["progress"]["step"] > 0


def test_torchrun_ends_with_all_done(comparison):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "tests/runner.py"]
    command += [json.dumps([comparison.flags("--epochs 1", "torchrun")])]
    done = subprocess.run(
        command, cwd=Path(net.__file__).parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stopped by epochs") == 1
    assert comparison.log("torchrun")["config"]["processes"] == 2
