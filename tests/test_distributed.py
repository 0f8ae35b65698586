"""Several processes do what one does: the same steps, figures and files. Gloo on the CPU, a tiny network."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import net
from tests.synthetic import write_photos

RUNNER = Path(__file__).parent / "runner.py"
FAMILIES = [[3, 2], [2, 2, 2], [2, 3], [3, 3], [4, 3]]
MODES = [("shuffled", "full", 0), ("shuffled", "frozen", 1), ("grouped", "full", 1), ("grouped", "frozen", 0)]


def start(commands, processes=1, **environment):
    """A process that runs [(script, "flags"), ...] one after the other, in so many ranks."""
    commands = json.dumps([(script, flags.split()) for script, flags in commands])
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *several, RUNNER, commands]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ours(text):
    """The lines that the scripts wrote themselves, without torchrun's."""
    return [line for line in text.splitlines() if re.match(r"(train|evaluate)_twins.py: ", line)]


def without_timing(log):
    """A training log without what may differ: clock, names and number of processes."""
    config = {k: v for k, v in log["config"].items() if k not in ("processes", "output_dir", "log_dir", "resume")}
    epochs = [{k: v for k, v in entry.items() if k != "timing"} for entry in log["epochs"]]
    return config, epochs, log["best_epoch"], log["stopped"]


def assert_same_log(log, reference, tolerance=1e-6):
    (config, epochs, *rest), (config_1, epochs_1, *rest_1) = without_timing(log), without_timing(reference)
    assert (config, rest) == (config_1, rest_1)
    for a, b in zip(epochs, epochs_1, strict=True):
        assert a == pytest.approx(b, abs=tolerance)


class Data:
    """Crops, photographs and a start for the runs of all numbers of processes; `flags(name)` of one."""

    def __init__(self, folder, write_crops):
        self.folder = folder
        self.aligned, self.pairs = write_crops(FAMILIES)
        write_photos(folder / "photos", 3, 2, seed=1)
        torch.manual_seed(0)
        model = net.build_model("ir_tiny")
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        net.save_checkpoint(folder / "start.pth", model)

    def flags(self, name, world, more=""):
        data = f"--train_pairs {self.pairs} --skip_alignment --aligned_json {self.aligned} --validation_split 0.3"
        places = f"--output_dir {self.folder}/{world}/models --log_dir {self.folder}/{world}/logs --run_name {name}"
        start = f"--arch ir_tiny --pretrained {self.folder}/start.pth --device cpu"
        return f"{data} {places} {start} {more}"

    def commands(self, world):
        """One run in every mode, both stages from photographs, an evaluation from photographs."""
        result = []
        for batching, mode, keep in MODES:
            # The last of two steps has one of the 102 triplets, so all ranks but one have none.
            size = "--batch_size 101" if batching == "shuffled" else "--batching grouped --images_per_batch 13"
            more = f"--freeze_backbone {mode == 'frozen'} --keep {keep} {size} --epochs 2 --learning_rate 0.002"
            more += " --no_cache" if keep else f" --aligned_json {self.copy(world)}"
            result.append(("train_twins", self.flags(f"{batching}-{mode}-{keep}", world, more)))
        photos, own = self.folder / "photos", self.folder / str(world)
        common = f"--id_to_images {photos}/id_to_images.json --landmarks {photos}/landmarks.json --device cpu "
        common += f"--aligned_folder {own}/%s_crops --aligned_json {own}/%s_crops.json "
        train = f"--train_pairs {photos}/pairs.json --arch ir_tiny --pretrained {self.folder}/start.pth --epochs 1 "
        train += f"--output_dir {own}/models --log_dir {own}/logs --run_name both"
        result.append(("train_twins", common.replace("%s", "train") + train))
        test = f"--test_pairs {photos}/pairs.json --checkpoints {self.folder}/start.pth {own}/models --allow_overlap "
        result.append(("evaluate_twins", common.replace("%s", "test") + test + f"--output_dir {own}/results"))
        return result

    def copy(self, world):
        """A list of the crops by another name, so that each number of processes makes its own caches."""
        path = self.folder / f"train{world}.json"
        shutil.copy(self.aligned, path)
        return path

    def run(self, world):
        record = self.folder / str(world) / "record"
        record.mkdir(parents=True)
        process = start(self.commands(world), world, RECORD=str(record))
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        return out, err


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from tests.conftest import crop_writer

    folder = tmp_path_factory.mktemp("ranks")
    return Data(folder, crop_writer(folder))


@pytest.fixture(scope="module")
def alone(data):
    return data.run(1)


@pytest.fixture(scope="module", params=[2, 3])
def several(data, alone, request):
    """(data, number of processes, what they printed), after all runs."""
    return data, request.param, data.run(request.param)


def load(data, world, name):
    log = json.loads((data.folder / str(world) / "logs" / name / "training_log.json").read_text())
    weights = torch.load(data.folder / str(world) / "logs" / name / "last.pth", weights_only=True)["state_dict"]
    steps = [
        torch.load(data.folder / str(world) / "record" / f"{name}.{rank}.pt", weights_only=False)
        for rank in range(world)
    ]
    return log, weights, steps


def test_gradients_weights_and_log_are_those_of_one_process(several):
    data, world, _ = several
    largest = {"gradient": 0.0, "weight": 0.0, "figure": 0.0}
    for mode in MODES:
        name = "{}-{}-{}".format(*mode)
        log, weights, steps = load(data, world, name)
        log_1, weights_1, (steps_1,) = load(data, 1, name)
        assert log["config"]["processes"] == world
        log["config"]["aligned_json"] = log_1["config"]["aligned_json"]
        for rank in steps:
            for (_, gradients), (_, gradients_1) in zip(rank, steps_1, strict=True):
                for key, gradient in gradients_1.items():
                    scale = max(1.0, gradient.abs().max().item())
                    difference = (gradients[key] - gradient).abs().max().item() / scale
                    largest["gradient"] = max(largest["gradient"], difference)
                    assert difference < 2e-5, (name, key)
        for key, value in weights_1.items():
            largest["weight"] = max(largest["weight"], (weights[key] - value).abs().max().item())
            torch.testing.assert_close(weights[key], value, atol=1e-5, rtol=1e-5)
        assert_same_log(log, log_1)
        for a, b in zip(without_timing(log)[1], without_timing(log_1)[1], strict=True):
            largest["figure"] = max([largest["figure"], *(abs(a[k] - b[k]) for k in a if a[k] is not None)])
    print(world, "processes, largest differences to one:", largest)


def test_every_sampled_triplet_is_visited_once_and_a_rank_without_any_takes_part(several):
    data, world, _ = several
    idle = 0
    for mode in MODES:
        log, _, steps = load(data, world, "{}-{}-{}".format(*mode))
        assert len({len(rank) for rank in steps}) == 1
        n_steps, n = len(steps[0]) // 2, log["config"]["n_train_triplets"]
        for epoch in range(2):
            part = slice(epoch * n_steps, (epoch + 1) * n_steps)
            visited = [tuple(t) for rank in steps for triplets, _ in rank[part] for t in triplets.tolist()]
            assert len(visited) == len(set(visited)) == n
        idle += sum(len(triplets) == 0 for rank in steps for triplets, _ in rank)
    assert idle > 0


def test_alignment_and_evaluation_are_those_of_one_process(several):
    data, world, _ = several
    one, many = data.folder / "1", data.folder / str(world)
    for stage in ("train", "test"):
        files = sorted(path.relative_to(one) for path in one.glob(f"{stage}_crops/**/*"))
        assert files == sorted(path.relative_to(many) for path in many.glob(f"{stage}_crops/**/*"))
        for path in files:
            if path.suffix == ".png":
                assert (one / path).read_bytes() == (many / path).read_bytes()
        assert (one / f"{stage}_crops.json").read_text() == (many / f"{stage}_crops.json").read_text()
        reports = [
            json.loads((folder / f"{stage}_crops" / "alignment_report.json").read_text().replace(str(folder), ""))
            for folder in (one, many)
        ]
        assert reports[0] == reports[1]
    names = sorted(path.name for path in (one / "results").iterdir())
    assert names == sorted(path.name for path in (many / "results").iterdir())
    both = [json.loads((folder / "results" / "comparison.json").read_text()) for folder in (one, many)]
    for a, b in zip(*(comparison["checkpoints"] for comparison in both), strict=True):
        assert a["name"] == b["name"]
        assert a["metrics"] == pytest.approx(b["metrics"], abs=1e-6)
        tables = [
            list(csv.DictReader((folder / "results" / a["name"] / "pair_scores.csv").open())) for folder in (one, many)
        ]
        for row, other in zip(*tables, strict=True):
            assert float(row["score"]) == pytest.approx(float(other["score"]), abs=1e-6)


def test_messages_are_told_once(several):
    _, _, (out, _) = several
    lines = [line for line in out.splitlines() if re.search(r"training and|epoch 0:|photographs of|results in", line)]
    assert len([line for line in lines if "training and" in line]) == len(MODES) + 1
    assert len([line for line in lines if "epoch 0:" in line]) == len(MODES) + 1
    assert len([line for line in lines if "photographs of" in line]) == 2
    assert len([line for line in lines if "results in" in line]) == 1
