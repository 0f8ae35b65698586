import contextlib
import csv
import importlib
import io
import json
import os
import signal
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import align
import evaluate_twins
import net
import train_twins
from tests.synthetic import set_batchnorm_statistics, write_photos

# As in tests/runner.py, so that runs in other processes end with the same bits as runs in this one.
torch.set_num_threads(1)

# A network of AdaFace's kind, small enough that a test trains it in a second. Its channels are
# not (8, 8, 16, 16): the backward pass of Conv2d(8, 16, 1, stride=2) on channels_last corrupts
# the heap in PyTorch 2.14 on CPUs with AVX-512.
net.ARCHITECTURES["ir_tiny"] = net.Architecture((1, 1, 1, 1), (16, 16, 32, 32), False, False)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# ---- crops and networks --------------------------------------------------------------------------
@pytest.fixture
def write_crops(tmp_path):
    return crop_writer(tmp_path)


def crop_writer(folder):
    """A function that writes crops: write([[3, 2], [2, 2, 2]]) -> (aligned JSON, pairs JSON).

    Each list is a family, and its numbers are the images of each person. Crops are coloured
    noise: a colour per family, a texture per person, a weaker texture and noise per image. The
    images of a person differ too much to be copies of each other.
    """

    def write(families, name="train", seed=0):
        rng = np.random.default_rng(seed)
        rng_of_images = np.random.default_rng([seed, 1])
        images = {}
        pairs = []
        for f, sizes in enumerate(families):
            colour = rng.uniform(60, 190, 3)
            names = [f"{name}{f}{'abc'[i]}" for i in range(len(sizes))]
            for i, first in enumerate(names):
                pairs += [[first, second] for second in names[i + 1 :]]
            for person, size in zip(names, sizes, strict=True):
                texture = np.kron(rng.normal(0, 25, (7, 7, 3)), np.ones((16, 16, 1)))
                images[person] = []
                for i in range(size):
                    shade = np.kron(rng_of_images.normal(0, 6, (14, 14, 1)), np.ones((8, 8, 1)))
                    noise = rng.normal(0, 15, (112, 112, 3))
                    crop = np.clip(colour + texture + shade + noise, 0, 255).astype(np.uint8)
                    path = folder / f"{name}_aligned" / person / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(crop).save(path)
                    images[person].append(path.relative_to(folder).as_posix())
        aligned_json = folder / f"{name}.json"
        pairs_json = folder / f"{name}_pairs.json"
        aligned_json.write_text(json.dumps(images))
        pairs_json.write_text(json.dumps(pairs))
        return aligned_json, pairs_json

    return write


@pytest.fixture
def tiny_model():
    """A tiny network whose BatchNorm layers have statistics as after training, not 0 and 1."""
    model = net.build_model("ir_tiny")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def assert_equal_weights(weights, reference, tolerance=0.0):
    """Two state dicts are equal: bit for bit, or up to a difference of `tolerance`."""
    assert weights.keys() == reference.keys()
    for key, value in weights.items():
        torch.testing.assert_close(value, reference[key], atol=tolerance, rtol=tolerance, msg=key)


# ---- runs of train_twins.py ----------------------------------------------------------------------
FAMILIES = [[3, 2], [2, 2, 2], [2, 3], [3, 3], [1, 1]]  # the last makes no triplet
SHUFFLED = "--batch_size 8"
GROUPED = "--images_per_batch 16 --train_percentage 60"  # like SHUFFLED, several steps an epoch


def quick_features(self, x):
    """Backbone.features of a picture an eighth as wide.

    Every layer takes part, in a hundredth of the time.
    """
    small = torch.nn.functional.avg_pool2d(x, 8)
    return self.body(self.input_layer(small)).expand(-1, -1, 7, 7)


def sgd(model, learning_rate, weight_decay):
    """In place of train_twins.make_optimizer: Adam would make whole steps of rounding noise."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD([{"params": trained, "rate_factor": 1}], lr=learning_rate)


class Experiment:
    """Crops of twins, a tiny network to start from, and what runs on them leave in `folder`."""

    def __init__(self, folder, families=FAMILIES):
        self.folder = folder
        self.start = folder / "start.pth"
        self.aligned, self.pairs = crop_writer(folder)(families)
        listed = json.loads(self.aligned.read_text())
        self.images = {name: [folder / path for path in paths] for name, paths in listed.items()}
        crops = self._change_the_light()
        torch.manual_seed(0)
        model = net.build_model("ir_tiny")
        set_batchnorm_statistics(model, torch.from_numpy(np.stack(crops)), torch.device("cpu"))
        net.save_checkpoint(self.start, model)

    def _change_the_light(self):
        """Make people easily confused; returns all crops."""
        rng = np.random.default_rng(1)
        crops = []
        for path in (path for paths in self.images.values() for path in paths):
            light = np.kron(rng.normal(0, 45, (7, 7, 3)), np.ones((16, 16, 1)))
            crop = np.clip(np.array(Image.open(path)) + light, 0, 255).astype(np.uint8)
            Image.fromarray(crop).save(path)
            crops.append(crop)
        return crops

    def flags(self, more="", name="run"):
        """The flags of a short run, as a list; `more` comes last and decides.

        name: the run's name; "" for the one that the program makes.
        """
        run_name = f"--run_name {name}" if name else ""
        return (
            f"--train_pairs {self.pairs} --skip_alignment --aligned_json {self.aligned} "
            f"--arch ir_tiny --device cpu --pretrained {self.start} "
            f"--output_dir {self.folder}/models --log_dir {self.folder}/logs {run_name} "
            "--epochs 2 --validation_split 0.3 --learning_rate 3e-4 --precision fp32 "
            f"--quadruplet_weight 0 --drift_weight 0 {more}"
        ).split()

    def change_a_crop(self):
        Image.new("RGB", (112, 112), (1, 2, 3)).save(self.images["train0a"][0])

    def log(self, name="run"):
        """The content of a run's training_log.json, None if there is none."""
        path = self.folder / "logs" / name / "training_log.json"
        return json.loads(path.read_text()) if path.exists() else None

    def state(self, name="run"):
        """The content of a run's last.pth, from which --resume would go on."""
        return torch.load(self.folder / "logs" / name / "last.pth", weights_only=True)

    def checkpoint(self, name="run"):
        """The content of the one checkpoint that a run has left."""
        (path,) = (self.folder / "models").glob(f"twin_tuned_irtiny_{name}_epoch*.pth")
        return torch.load(path, weights_only=True)

    def weights(self, name="run"):
        """The state dict of the one checkpoint that a run has left, with the network's own keys."""
        state = self.checkpoint(name)["state_dict"]
        return {key.removeprefix("model."): value for key, value in state.items()}

    def files(self):
        """{path: (bytes, time of change)} of all that runs have written, but for their locks."""
        files = {}
        for folder in (self.folder / "logs", self.folder / "models"):
            for path in folder.rglob("*"):
                if path.is_file() and not path.name.endswith(".lock"):
                    files[path] = (path.read_bytes(), path.stat().st_mtime_ns)
        return files


def without_timing(log):
    """What of a training log follows from settings and data alone.

    Left out are the clock, names, places and the number of processes.
    """
    left_out = ("command", "run_name", "output_dir", "log_dir", "resume", "overwrite", "processes")
    config = {key: value for key, value in log["config"].items() if key not in left_out}
    epochs = []
    for entry in log["epochs"]:
        epochs.append({key: value for key, value in entry.items() if key != "timing"})
    result = {"config": config, "epochs": epochs}
    for key in ("best_epoch", "stopped", "against_start"):
        result[key] = log.get(key)
    return result


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.setattr("net.Backbone.features", quick_features)
    monkeypatch.setattr("train_twins.WARM_UP_STEPS", 1)  # the runs of tests have few steps
    # Pictures take longer than the tiny network.
    monkeypatch.setattr("train_twins.plot_curves", lambda folder, log: None)
    return Experiment(tmp_path)


@pytest.fixture
def run(experiment):
    """run("--epochs 2", ...) -> (exit code, content of training_log.json)."""

    def start(flags="", name="run"):
        code = train_twins.main(experiment.flags(flags, name))
        return code, experiment.log(name)

    return start


@pytest.fixture
def interrupt(run, monkeypatch):
    """interrupt("--epochs 2", 3): a run that gets SIGINT in its third step and ends with `code`.

    The state is saved at the end of every epoch.
    """

    def start(flags, after, name="run", code=130):
        step = train_twins.TwinTrainer.step
        steps = []

        def counted_step(self, triplets):
            steps.append(triplets)
            if len(steps) == after:
                os.kill(os.getpid(), signal.SIGINT)
            return step(self, triplets)

        with monkeypatch.context() as patch:
            patch.setattr(train_twins.TwinTrainer, "step", counted_step)
            patch.setattr(train_twins, "SAVE_SECONDS", 0)
            assert run(flags, name)[0] == code
        assert len(steps) == after

    return start


@pytest.fixture
def refusal(capsys):
    """refusal() -> the one line on stderr, without the script's name."""

    def read():
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("train_twins.py: ")

    return read


# ---- the three scripts ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with three photographs of each of four people, as write_photos leaves it."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 2, 3, seed=5)
    return folder


@pytest.fixture
def script_flags(tmp_path, write_crops, tiny_model, photos):
    """{script: {flag: value}} that works; all that the scripts write goes to tmp_path/out."""
    aligned, pairs = write_crops([[3, 2], [2, 2]])
    start = tmp_path / "start.pth"
    net.save_checkpoint(start, tiny_model)
    out = tmp_path / "out"
    crops = {"--skip_alignment": None, "--aligned_json": aligned, "--device": "cpu"}
    return {
        "align.py": {
            "--id_to_images": photos / "id_to_images.json",
            "--landmarks": photos / "landmarks.json",
            "--pairs": photos / "pairs.json",
            "--aligned_folder": out / "crops",
            "--aligned_json": out / "aligned.json",
        },
        "train_twins.py": {
            **crops,
            "--train_pairs": pairs,
            "--arch": "ir_tiny",
            "--pretrained": start,
            "--output_dir": out / "models",
            "--log_dir": out / "logs",
            "--epochs": 1,
        },
        "evaluate_twins.py": {
            **crops,
            "--test_pairs": pairs,
            "--checkpoints": start,
            "--output_dir": out / "results",
        },
    }


@pytest.fixture
def run_script(script_flags):
    """run("align.py", {"--pairs": path}) -> exit code with the script's flags and these changes."""

    def start(script, changes=()):
        flags = script_flags[script] | dict(changes)
        arguments = []
        for flag, value in flags.items():
            arguments.append(flag)
            if value is not None:
                arguments.append(str(value))
        module = importlib.import_module(script.removesuffix(".py"))
        return module.main(arguments)

    return start


@pytest.fixture
def refuses(tmp_path, run_script, capfd, recwarn):
    """refuses("align.py", {"--pairs": path}, *words): the script refuses that, and writes nothing.

    It does so in one line on stderr, which holds the words.
    """

    def check(script, changes, *words):
        assert run_script(script, changes) == 2
        warnings = "".join(f"{warning.message}\n" for warning in recwarn)
        error = warnings + capfd.readouterr().err
        assert error.endswith("\n")
        assert len(error.splitlines()) == 1, error
        assert error.startswith(f"{script}: ")
        missing = [word for word in words if word not in error]
        assert missing == [], error
        written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert written == []

    return check


# ---- evaluation ----------------------------------------------------------------------------------
EVALUATED = ("start.ckpt", "models/a.pth", "models/b.pth", "models/leak.pth", "other/a.pth")
# Thresholds that training found with b.pth, and those of its epoch 0, the network it started from.
THRESHOLDS = {"val_eer_threshold": 0.93, "val_general_threshold_0.001": 0.97}
START_THRESHOLDS = {"val_eer_threshold": 0.9, "val_general_threshold_0.001": 0.98}
SEEN = ["test0a", "test1c"]  # test people that leak.pth was trained on


def variant(model, seed):
    """A copy of a network with another embedding layer."""
    other = net.build_model("ir_tiny").eval()
    other.load_state_dict(model.state_dict())
    noise = torch.randn(512, 32 * 49, generator=torch.manual_seed(seed))
    other.output_layer[3].weight.data += 0.02 * noise
    return other


def tuned(seed=1, train_ids=("x",), **recipe):
    """The config that training writes beside the weights, as far as evaluation reads it."""
    return {
        "train_ids": list(train_ids),
        "val_ids": ["y", "z"],
        "seed": seed,
        "n_touched_images": 90,
        "n_train_images": 100,
        "n_train_pairs": 12,
        "n_val_pairs": 3,
        "recipe": {
            "freeze_backbone": True,
            "train_percentage": 10,
            "margin": 0.3,
            "weights_sha256": "elsewhere",
            **recipe,
        },
    }


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory):
    """One evaluation of upstream's start and four tuned networks.

    models/b.pth and other/a.pth differ in the seed alone, two files share a stem, and
    models/leak.pth has seen test people.
    """
    folder = tmp_path_factory.mktemp("evaluation")
    aligned = write_test_people(folder)
    start = write_tuned_networks(folder)
    out = folder / "out"
    flags = (
        f"--test_pairs {folder}/test_pairs.json --skip_alignment --aligned_json {aligned} "
        f"--output_dir {out} --device cpu --allow_overlap --baseline {folder}/start.ckpt "
        f"--checkpoints {folder}/models {folder}/other/a.pth"
    )
    figures = {}
    plot_figure = evaluate_twins.plot_figure

    @contextlib.contextmanager
    def keep_figure(path, *arguments, **options):
        with plot_figure(path, *arguments, **options) as grid:
            yield grid
        figures[path.parent.name, path.name] = np.atleast_1d(grid).flat[0].figure

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(evaluate_twins, "plot_figure", keep_figure)
        assert evaluate_twins.main(flags.split()) == 0

    content = json.loads((out / "comparison.json").read_text())
    checkpoints = content.pop("checkpoints")
    metrics = {}
    for entry in checkpoints:
        metrics[entry["name"]] = json.loads((out / entry["name"] / "metrics.json").read_text())
    return SimpleNamespace(
        folder=folder,
        aligned=aligned,
        start=start,
        out=out,
        flags=flags,
        figures=figures,
        said=said,
        settings=content.pop("settings"),
        content=content,
        checkpoints=checkpoints,
        metrics=metrics,
        pairs=read_csv(out / "b" / "pair_scores.csv"),
        table=read_csv(out / "comparison.csv"),
    )


def write_test_people(folder):
    """Crops of eight families, one of them listed twice; returns the path of their list."""
    families = [[4, 4], [3, 3, 2], [4, 3], [4, 4], [4, 3], [3, 4], [5, 4], [3, 0]]
    aligned, _ = crop_writer(folder)(families, "test")
    images = json.loads(aligned.read_text())
    copy = "test_aligned/again.png"
    (folder / copy).write_bytes((folder / images["test0a"][0]).read_bytes())
    images["test0a"].append(copy)
    aligned.write_text(json.dumps(images))
    return aligned


def write_tuned_networks(folder):
    """Write the files of EVALUATED; returns the network that the others started from."""
    torch.manual_seed(0)
    start = net.build_model("ir_tiny").eval()
    state = {f"model.{key}": value for key, value in start.state_dict().items()}
    torch.save({"state_dict": state}, folder / "start.ckpt")
    percentages = (10, 20, 30, 20)
    validation_aucs = (0.7, 0.9, 0.8, 0.85)
    for number, name in enumerate(EVALUATED[1:]):
        config = tuned(
            seed=number,
            train_ids=SEEN if "leak" in name else ["x"],
            train_percentage=percentages[number],
            weights_sha256=net.weights_sha256(start),
        )
        metrics = {"val_auc": validation_aucs[number]}
        if name == "models/b.pth":
            metrics |= THRESHOLDS
        net.save_checkpoint(
            folder / name,
            variant(start, number),
            config=config,
            metrics=metrics,
            start_metrics=START_THRESHOLDS,
        )
    (folder / "models" / "notes.txt").write_text("no checkpoint")
    return start


def read_csv(path):
    """The rows of a table, as dicts."""
    return list(csv.DictReader(path.read_text().splitlines()))


# ---- the detector --------------------------------------------------------------------------------
@pytest.fixture
def stand_in(monkeypatch):
    """align.FaceDetector without a network; the list of its calls.

    It finds a face in the middle, none in dark photographs, several in photographs of odd height.
    """
    calls = []

    class StandIn:
        def __init__(self, device="cpu"):
            self.looks = Counter()
            calls.append(str(device))

        def __call__(self, image):
            calls.append(image.shape)
            if image.mean() < 20:
                self.looks["fine"] += 1
                return None, False
            self.looks["coarse"] += 1
            height, width, _ = image.shape
            middle = np.array([width, height]) / 2
            face = align.TEMPLATE - 56 + middle
            return face, height % 2 == 1

    monkeypatch.setattr(align, "FaceDetector", StandIn)
    return calls
