import contextlib
import csv
import importlib
import io
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import align
import net
from tests.synthetic import set_batchnorm_statistics, write_photos

# A network of AdaFace's kind, small enough that a test trains it in a second. Not (8, 8, 16, 16): the backward pass of
# Conv2d(8, 16, 1, stride=2) on channels_last corrupts the heap in PyTorch 2.14 on CPUs with AVX-512.
net.ARCHITECTURES["ir_tiny"] = ((1, 1, 1, 1), (16, 16, 32, 32), False, False)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def write_crops(tmp_path):
    return crop_writer(tmp_path)


def crop_writer(folder):
    """write_crops([[3, 2], [2, 2, 2]]) -> (aligned JSON, pairs JSON): one family per list, images per person.

    Crops are coloured noise: a colour per family, a texture per person, noise per image.
    """

    def write(families, name="train", seed=0):
        rng = np.random.default_rng(seed)
        images, pairs = {}, []
        for f, sizes in enumerate(families):
            colour = rng.uniform(60, 190, 3)
            names = [f"{name}{f}{'abc'[i]}" for i in range(len(sizes))]
            pairs += [[a, b] for i, a in enumerate(names) for b in names[i + 1 :]]
            for person, size in zip(names, sizes, strict=True):
                texture = np.kron(rng.normal(0, 25, (7, 7, 3)), np.ones((16, 16, 1)))
                images[person] = []
                for i in range(size):
                    crop = np.clip(colour + texture + rng.normal(0, 15, (112, 112, 3)), 0, 255).astype(np.uint8)
                    path = folder / f"{name}_aligned" / person / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(crop).save(path)
                    images[person].append(path.relative_to(folder).as_posix())
        (folder / f"{name}.json").write_text(json.dumps(images))
        (folder / f"{name}_pairs.json").write_text(json.dumps(pairs))
        return folder / f"{name}.json", folder / f"{name}_pairs.json"

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


# ---- runs of train_twins.py -----------------------------------------------------------------------------------------

FAMILIES = [[3, 2], [2, 2, 2], [2, 3], [3, 3], [1, 1]]  # the last makes no triplet
SHUFFLED, GROUPED = "--batch_size 8", "--images_per_batch 16 --train_percentage 60"  # of several steps an epoch


def quick_features(self, x):
    """Backbone.features of a picture an eighth as wide: every layer takes part, in a hundredth of the time."""
    small = self.body(self.input_layer(torch.nn.functional.avg_pool2d(x, 8)))
    return small.expand(-1, -1, 7, 7)


def sgd(model, learning_rate, weight_decay):
    """In place of train_twins.make_optimizer: unlike Adam it makes no whole steps of rounding noise."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate)


class Experiment:
    """Crops of twins, a tiny network to start from, and what runs of train_twins.py on them leave in `folder`."""

    def __init__(self, folder, families=FAMILIES):
        self.folder, self.start = folder, folder / "start.pth"
        self.aligned, self.pairs = crop_writer(folder)(families)
        self.images = {name: [folder / p for p in some] for name, some in json.loads(self.aligned.read_text()).items()}
        rng, crops = np.random.default_rng(1), []
        for path in [path for paths in self.images.values() for path in paths]:
            light = np.kron(rng.normal(0, 45, (7, 7, 3)), np.ones((16, 16, 1)))  # so that people are easily confused
            crops.append(np.clip(np.array(Image.open(path)) + light, 0, 255).astype(np.uint8))
            Image.fromarray(crops[-1]).save(path)
        torch.manual_seed(0)
        model = net.build_model("ir_tiny")
        set_batchnorm_statistics(model, torch.from_numpy(np.stack(crops)), torch.device("cpu"))
        net.save_checkpoint(self.start, model)

    def flags(self, more="", name="run"):
        """The flags of a short run of this name ("": of its default one), as a list; `more` comes last and decides."""
        named = f"--run_name {name}" if name else ""
        return (
            f"--train_pairs {self.pairs} --skip_alignment --aligned_json {self.aligned} --arch ir_tiny --device cpu "
            f"--pretrained {self.start} --output_dir {self.folder}/models --log_dir {self.folder}/logs "
            f"{named} --epochs 2 --validation_split 0.3 --learning_rate 3e-4 --precision fp32 "
            f"--schedule constant --quadruplet_weight 0 --drift_weight 0 {more}"
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

    def weights(self, name="run"):
        """The state dict of the one checkpoint that a run has left."""
        (path,) = (self.folder / "models").glob(f"twin_tuned_irtiny_{name}_epoch*.pth")
        return {key[6:]: value for key, value in torch.load(path, weights_only=True)["state_dict"].items()}

    def files(self):
        """{path: (bytes, time of change)} of all that runs have written."""
        folders = (self.folder / "logs", self.folder / "models")
        paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def without_timing(log):
    """What of a training log is up to settings and data alone: not the clock, names, places, number of processes."""
    other = ("run_name", "output_dir", "log_dir", "resume", "overwrite", "processes")
    config = {key: value for key, value in log["config"].items() if key not in other}
    epochs = [{k: v for k, v in entry.items() if k != "timing"} for entry in log["epochs"]]
    rest = {key: log.get(key) for key in ("best_epoch", "stopped", "against_start")}
    return {"config": config, "epochs": epochs, **rest}


def assert_equal_weights(weights, reference, tolerance=0.0):
    """Two state dicts are equal: bit for bit, or but for a difference of `tolerance`."""
    assert weights.keys() == reference.keys()
    for key, value in weights.items():
        torch.testing.assert_close(value, reference[key], atol=tolerance, rtol=tolerance, msg=key)


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.setattr("net.Backbone.features", quick_features)
    monkeypatch.setattr("train_twins.plot_curves", lambda *args: None)  # pictures take longer than the tiny network
    return Experiment(tmp_path)


@pytest.fixture
def run(experiment):
    """run("--epochs 2", ...) -> (exit code, content of training_log.json)."""
    import train_twins

    def start(flags="", name="run"):
        return train_twins.main(experiment.flags(flags, name)), experiment.log(name)

    return start


@pytest.fixture
def interrupt(run, monkeypatch):
    """interrupt("--epochs 2", 3): a run that SIGINT meets in its third step, which ends with `code`."""
    import train_twins

    def start(flags, after, name="run", code=130):
        factor, steps = train_twins.rate_factor, []

        def counted(*args):
            steps.append(args)
            if len(steps) == after:
                os.kill(os.getpid(), signal.SIGINT)
            return factor(*args)

        with monkeypatch.context() as patch:
            patch.setattr(train_twins, "rate_factor", counted)
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


# ---- the three scripts


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
    net.save_checkpoint(tmp_path / "start.pth", tiny_model)
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
        "train_twins.py": crops
        | {
            "--train_pairs": pairs,
            "--arch": "ir_tiny",
            "--pretrained": tmp_path / "start.pth",
            "--output_dir": out / "models",
            "--log_dir": out / "logs",
            "--epochs": 1,
        },
        "evaluate_twins.py": crops
        | {"--test_pairs": pairs, "--checkpoints": tmp_path / "start.pth", "--output_dir": out / "results"},
    }


@pytest.fixture
def run_script(script_flags):
    """run("align.py", {"--pairs": path}) -> exit code of the script with its flags and these changes."""

    def start(script, changes=()):
        values = script_flags[script] | dict(changes)
        return importlib.import_module(script.removesuffix(".py")).main(
            [str(x) for item in values.items() for x in item if x is not None]
        )

    return start


@pytest.fixture
def refuses(tmp_path, run_script, capfd, recwarn):
    """refuses("align.py", {"--pairs": path}, *words): the script refuses that in one line holding the words."""

    def check(script, changes, *words):
        assert run_script(script, changes) == 2
        error = "".join([*(f"{warning.message}\n" for warning in recwarn), capfd.readouterr().err])
        assert error.count("\n") == len(error.splitlines()) == 1, error
        assert error.startswith(f"{script}: ")
        assert [word for word in words if word not in error] == [], error
        assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []

    return check


# ---- evaluation and the detector


def variant(model, seed):
    """A copy of a network with another embedding layer."""
    other = net.build_model("ir_tiny").eval()
    other.load_state_dict(model.state_dict())
    other.output_layer[3].weight.data += 0.02 * torch.randn(512, 32 * 49, generator=torch.manual_seed(seed))
    return other


def tuned(**config):
    """What training writes beside the weights, as far as evaluation reads it."""
    ids = {"train_ids": ["x"], "val_ids": ["y", "z"], "pretrained": "elsewhere/start.ckpt", "seed": 1}
    return {**ids, "train_percentage": 10, "freeze_backbone": True, "margin": 0.3, "n_touched_images": 90, **config}


EVALUATED = ("start.ckpt", "models/a.pth", "models/b.pth", "models/leak.pth", "other/a.pth")


THRESHOLDS = {"val_eer_threshold": 0.93, "val_general_threshold_0.001": 0.97}  # that training found with b.pth
START_THRESHOLDS = {"val_eer_threshold": 0.9, "val_general_threshold_0.001": 0.98}  # and in its epoch 0
SEEN = ["test0a", "test1c"]  # test people that leak.pth was trained on


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """One evaluation of upstream's start and four tuned networks: b.pth and other/a.pth differ in the seed alone, two
    share a stem, one has seen test people."""
    import evaluate_twins

    folder = tmp_path_factory.mktemp("evaluation")
    aligned, _ = crop_writer(folder)([[4, 4], [3, 3, 2], [4, 3], [4, 4], [4, 3], [3, 4], [5, 4], [3, 0]], "test")
    images, again = json.loads(aligned.read_text()), "test_aligned/again.png"
    (folder / again).write_bytes((folder / images["test0a"][0]).read_bytes())
    aligned.write_text(json.dumps(images | {"test0a": [*images["test0a"], again]}))
    torch.manual_seed(0)
    start = net.build_model("ir_tiny").eval()
    torch.save({"state_dict": {f"model.{key}": x for key, x in start.state_dict().items()}}, folder / "start.ckpt")
    for number, name in enumerate(EVALUATED[1:]):
        config = tuned(train_percentage=(10, 20, 30, 20)[number], train_ids=SEEN if "leak" in name else ["x"])
        config["pretrained"] = str(folder / "start.ckpt")
        facts = {"config": {**config, "seed": number}, "metrics": {"val_auc": (0.7, 0.9, 0.8, 0.85)[number]}}
        facts["metrics"] |= THRESHOLDS if name == "models/b.pth" else {}
        net.save_checkpoint(folder / name, variant(start, number), **facts, start_metrics=START_THRESHOLDS)
    (folder / "models" / "notes.txt").write_text("no checkpoint")
    figures, savefig = {}, Figure.savefig

    def keep(figure, path, **options):
        figures[path.parent.name, path.name.split(".", 2)[2]] = figure  # the temporary name is .<process>.<name>
        savefig(figure, path, **options)

    flags = f"--test_pairs {folder}/test_pairs.json --skip_alignment --aligned_json {aligned} --output_dir {folder}/out"
    flags += f" --device cpu --allow_overlap --baseline {folder}/start.ckpt --checkpoints {folder}/models"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(Figure, "savefig", keep)
        assert evaluate_twins.main([*flags.split(), f"{folder}/other/a.pth"]) == 0
    out, content = folder / "out", json.loads((folder / "out" / "comparison.json").read_text())
    checkpoints, settings = content.pop("checkpoints"), content.pop("settings")
    metrics = {entry["name"]: json.loads((out / entry["name"] / "metrics.json").read_text()) for entry in checkpoints}
    files = (out / "b" / "pair_scores.csv", out / "comparison.csv")
    pairs, table = ([*csv.DictReader(file.read_text().splitlines())] for file in files)
    return SimpleNamespace(**locals())


@pytest.fixture
def stand_in(monkeypatch):
    """align.FaceDetector without a network: a face in the middle, none in dark photographs, several in odd heights."""
    calls = []

    class StandIn:
        def __init__(self, device):
            calls.append(str(device))

        def __call__(self, image):
            calls.append(image.shape)
            face = align.TEMPLATE + np.array(image.shape[1::-1]) / 2 - 56
            return (None, False) if image.mean() < 20 else (face, image.shape[0] % 2 == 1)

    monkeypatch.setattr(align, "FaceDetector", StandIn)
    return calls
