"""The promises of the README and of the tree."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import net
from tests import demo
from tests.synthetic import draw_person, draw_photo

ROOT = Path(__file__).parent.parent
PRODUCT = {"train_twins.py", "triplet_dataset.py", "triplet_loss.py", "net.py", "align.py", "evaluate_twins.py"}
ORDER = ("net", "triplet_dataset", "align", "evaluate_twins", "train_twins")  # each may import those before it
RUNTIME = {"torch", "torchvision", "numpy", "opencv-python", "pillow", "tqdm", "matplotlib", "face-alignment"}
MODULES = {"torch", "torchvision", "numpy", "cv2", "PIL", "tqdm", "matplotlib", "face_alignment"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("module", [*ORDER, "triplet_loss"])
def test_imports_point_one_way_stand_at_the_top_and_need_only_the_runtime_packages(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    found = set(imports(ROOT / f"{module}.py"))
    allowed = set(ORDER[: ORDER.index(module)]) if module in ORDER else set()
    allowed |= {"triplet_loss"} if module == "train_twins" else set()
    assert found & {*ORDER, "triplet_loss"} <= allowed
    optional = {"pillow_heif"} if module == "align" else set()  # for Apple's photographs, if it is installed
    assert found - {*ORDER, "triplet_loss"} - MODULES - optional <= set(sys.stdlib_module_names)
    kinds = [isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body[1:]]
    assert kinds == sorted(kinds, reverse=True)


def test_the_files_keep_the_sizes_of_the_design():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in PRODUCT}
    assert sum(lines.values()) <= 2500
    assert max(lines.values()) <= 560
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    tests = [len(path.read_text().splitlines()) for path in (ROOT / "tests").glob("test_*.py")]
    assert sum(tests) <= 3600


def test_tree_is_the_agreed_one():
    top = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    generated = {"__pycache__", "demo", "models", "training_logs", "evaluation_results", "pretrained"}
    assert top - generated == PRODUCT | {"requirements.txt", "tests", "README.md", "LICENSE"}


def test_requirements_are_the_eight_packages_without_pins():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {re.split("[<>=]", line)[0] for line in lines} == RUNTIME
    assert all(">=" in line for line in lines)


def test_readme_has_the_two_commands_and_ci_runs_the_second():
    readme = (ROOT / "README.md").read_text()
    assert "pip install -r requirements.txt && python -m tests.demo\n" in readme
    command = "pip install -r tests/requirements.txt && python -m pytest\n"
    assert command in readme
    assert command in (ROOT / ".ci" / "run").read_text()


def test_readme_names_every_flag_that_exists_and_no_other():
    readme = (ROOT / "README.md").read_text()
    known = set()
    for script in ("train_twins.py", "evaluate_twins.py", "align.py"):
        text = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
        known |= set(re.findall(r"--\w+", text.stdout))
    known |= {"--standalone", "--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint"}  # torchrun's
    for script in ("study.py", "bench.py"):
        known |= set(re.findall(r"--\w+", (ROOT / "tests" / script).read_text()))
    assert set(re.findall(r"--\w+", readme)) <= known


def test_readme_code_works(tmp_path, monkeypatch, tiny_model):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    net.save_checkpoint("models/twin_tuned_ir50_full_100pct_margin0.3_epoch10.pth", tiny_model)
    photo, landmarks = draw_photo(draw_person(np.random.default_rng(0)), np.random.default_rng(1))
    Image.fromarray(photo).save("photo.jpg")
    names = {"landmarks": landmarks}
    exec(code, names)
    assert names["embedding"].shape == (1, 512)
    assert names["embedding"].norm().item() == pytest.approx(1, abs=1e-5)


def test_demo_runs_and_training_beats_the_untrained_network(tmp_path, capsys):
    assert demo.main([str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert "SYNTHETIC" in out
    for script in ("align.py", "train_twins.py", "evaluate_twins.py"):
        assert f"$ python {script} " in out
    results = tmp_path / "demo" / "evaluation_results"
    auc = {}
    for folder in results.iterdir():
        if folder.is_dir():
            auc[folder.name] = json.loads((folder / "metrics.json").read_text())["figures"]["auc"]["value"]
    gains = {name: value - auc["untrained"] for name, value in auc.items() if name != "untrained"}
    runs = [f"{mode}_{share}pct" for mode in ("frozen", "full") for share in (100, 10)]
    assert [name for run in runs for name in sorted(gains) if f"_{run}_" in name] == sorted(gains)
    assert all(gain > (0 if "_full_" in name else 0.01) for name, gain in gains.items()), gains
    assert "Validation would have chosen: f" in out
    assert len(list((tmp_path / "demo").rglob("*.png"))) > 460


def test_demo_does_not_delete_what_is_not_a_demo(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert demo.main([str(tmp_path)]) == 2
    assert (tmp_path / "thesis.txt").exists()
