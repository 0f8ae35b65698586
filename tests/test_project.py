"""The promises of the README, of the tree and of the public names."""

import ast
import contextlib
import importlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import align
import evaluate_twins
import net
import train_twins
from evaluate_twins import (
    METRICS,
    OPERATING_POINTS,
    TABLE_COLUMNS,
    Checkpoint,
    Estimate,
    Setting,
    compare,
    comparison_table,
)
from tests import bench, bench_alignment, demo, study
from tests.synthetic import draw_person, draw_photo

ROOT = Path(__file__).parent.parent
# The modules of the product; each may import those before it.
ORDER = ("net", "triplet_dataset", "align", "evaluate_twins", "train_twins")
PRODUCT = (*ORDER, "triplet_loss")
SCRIPTS = ("align.py", "evaluate_twins.py", "train_twins.py")
TREE = {f"{module}.py" for module in PRODUCT} | {
    "requirements.txt",
    "tests",
    "README.md",
    "LICENSE",
}
PACKAGES = {
    "torch",
    "torchvision",
    "numpy",
    "opencv-python",
    "pillow",
    "tqdm",
    "matplotlib",
    "face-alignment",
}
PACKAGE_MODULES = {
    "torch",
    "torchvision",
    "numpy",
    "cv2",
    "PIL",
    "tqdm",
    "matplotlib",
    "face_alignment",
}
OPTIONAL_MODULES = {"align": {"pillow_heif"}}  # for Apple's photographs, if it is installed


# ---- imports -------------------------------------------------------------------------------------
def parse_module(module):
    return ast.parse((ROOT / f"{module}.py").read_text())


def is_import(node):
    return isinstance(node, ast.Import | ast.ImportFrom)


def imports_of(module):
    """The top-level names of all modules that a module of the product imports, wherever it does."""
    names = set()
    for node in ast.walk(parse_module(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("module", PRODUCT)
def test_imports_within_the_product_point_one_way(module):
    allowed = set()
    if module in ORDER:
        allowed |= set(ORDER[: ORDER.index(module)])
    if module == "train_twins":
        allowed.add("triplet_loss")
    assert imports_of(module) & set(PRODUCT) <= allowed


@pytest.mark.parametrize("module", PRODUCT)
def test_the_product_needs_only_its_runtime_packages(module):
    foreign = imports_of(module) - set(PRODUCT) - PACKAGE_MODULES
    foreign -= OPTIONAL_MODULES.get(module, set())
    assert foreign <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", PRODUCT)
def test_imports_stand_at_the_top(module):
    _docstring, *statements = parse_module(module).body
    kinds = [is_import(statement) for statement in statements]
    n_imports = sum(kinds)
    assert all(kinds[:n_imports])


def test_requirements_are_the_eight_packages_without_pins():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {re.split("[<>=]", line)[0] for line in lines} == PACKAGES
    assert all(">=" in line for line in lines)


# ---- the tree ------------------------------------------------------------------------------------
needs_git = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="not a git checkout, so nobody knows what belongs to it"
)


def git(folder, *arguments):
    """What a git command prints, in a repository that may belong to another user."""
    command = ["git", "-c", "safe.directory=*", "-C", str(folder), *arguments]
    # Within a hook, variables of git would lead every command to the hook's own repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return result.stdout


def tracked_files(folder):
    """The paths of all files that git tracks in a repository, relative to it."""
    names = git(folder, "ls-files", "-z").split("\0")
    return [Path(name) for name in names if name]


def top_level(folder):
    """What git tracks at the top level of a repository, but for files that begin with a dot."""
    names = {path.parts[0] for path in tracked_files(folder)}
    return {name for name in names if not name.startswith(".")}


@pytest.fixture
def checkout(tmp_path):
    """A copy of all tracked files, in a repository of its own."""
    folder = tmp_path / "checkout"
    for path in tracked_files(ROOT):
        if (ROOT / path).is_file():  # one may have been deleted, and not yet committed
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, folder / path)
    git(folder, "init")
    git(folder, "add", "--all")
    return folder


@needs_git
def test_tree_is_the_agreed_one():
    assert top_level(ROOT) == TREE


@needs_git
def test_a_further_file_in_the_repository_is_noticed(checkout):
    (checkout / "helpers.py").touch()
    git(checkout, "add", "helpers.py")
    assert top_level(checkout) == TREE | {"helpers.py"}


@needs_git
def test_environment_and_data_inside_the_checkout_are_not_taken_for_the_tree(checkout):
    venv.create(checkout / "venv")  # as README says
    for name in ("id_to_images.json", "train_twin_id_pairs.json", "notes.txt"):
        (checkout / name).write_text("{}")
    for name in ("photographs", "models", "my_results"):
        (checkout / name).mkdir()
        (checkout / name / "1.png").touch()
    assert top_level(checkout) == TREE


# ---- public names --------------------------------------------------------------------------------
# What other people's code imports: {name: its parameters, after which only optional ones may come}.
PUBLIC = {
    "net.build_model": ["name"],
    "net.to_input": ["crops"],
    "net.load_checkpoint": ["path"],
    "net.save_checkpoint": ["path", "model", "**facts"],
    "triplet_loss.TripletLoss": ["margin=0.3", "distance='cosine'"],
    "triplet_loss.TripletLoss.forward": ["self", "anchor", "positive", "negative"],
    "triplet_dataset.TwinTripletDataset": [
        "id_to_images",
        "pairs",
        "percentage=100",
        "seed=42",
    ],
    "triplet_dataset.TwinTripletDataset.__len__": ["self"],
    "triplet_dataset.TwinTripletDataset.__getitem__": ["self", "i"],
    "triplet_dataset.split_pairs": ["pairs", "validation_split", "seed"],
    "align.align_face": ["image", "landmarks"],
    "align.read_photo": ["path"],
    "train_twins.TwinTrainer": ["args"],
    "train_twins.TwinTrainer.align": ["self"],
    "train_twins.TwinTrainer.train": ["self"],
    "evaluate_twins.TwinEvaluator": ["images"],
    "evaluate_twins.TwinEvaluator.score": ["self", "embeddings"],
    "evaluate_twins.TwinEvaluator.figures": ["self", "scores"],
    "evaluate_twins.TwinEvaluator.estimate": ["self", "scores"],
    "align.main": ["argv=None"],
    "train_twins.main": ["argv=None"],
    "evaluate_twins.main": ["argv=None"],
}


def find_public(name):
    """The class or function of a name in PUBLIC."""
    module, *attributes = name.split(".")
    found = importlib.import_module(module)
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


def is_optional(parameter):
    return parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_exists_and_is_called_as_the_design_says(name):
    parameters = inspect.signature(find_public(name)).parameters.values()
    spelt = [str(parameter.replace(annotation=parameter.empty)) for parameter in parameters]
    n_agreed = len(PUBLIC[name])
    assert spelt[:n_agreed] == PUBLIC[name]
    assert all(is_optional(parameter) for parameter in list(parameters)[n_agreed:])


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_carries_type_hints(name):
    public = find_public(name)
    signature = inspect.signature(public)
    without_hint = []
    for parameter in signature.parameters.values():
        if parameter.name == "self" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        if parameter.annotation is parameter.empty:
            without_hint.append(parameter.name)
    assert without_hint == []
    if not inspect.isclass(public):
        assert signature.return_annotation is not signature.empty


# ---- README --------------------------------------------------------------------------------------
README = (ROOT / "README.md").read_text()
FLAG = r"--\w+"
TORCHRUN_FLAGS = {
    "--standalone",
    "--nnodes",
    "--nproc_per_node",
    "--rdzv_backend",
    "--rdzv_endpoint",
}


def test_readme_has_the_command_of_the_demo():
    assert "pip install -r requirements.txt && python -m tests.demo\n" in README


def test_readme_has_the_command_of_the_tests_and_ci_runs_it():
    command = "pip install -r tests/requirements.txt && python -m pytest\n"
    assert command in README
    assert command in (ROOT / ".ci" / "run").read_text()


@pytest.fixture(scope="module")
def help_texts():
    """{script: what its --help prints}."""
    texts = {}
    for script in SCRIPTS:
        command = [sys.executable, ROOT / script, "--help"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        texts[script] = result.stdout
    return texts


def help_text_of(main):
    """What a main prints for --help."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main(["--help"])
    return printed.getvalue()


def test_readme_names_no_flag_that_does_not_exist(help_texts):
    texts = list(help_texts.values())
    for module in (bench, bench_alignment, demo, study):
        texts.append(help_text_of(module.main))
    known = set(re.findall(FLAG, " ".join(texts))) | TORCHRUN_FLAGS
    assert set(re.findall(FLAG, README)) - known == set()


def test_every_flag_has_a_line_in_help_to_which_readme_refers(help_texts, monkeypatch):
    # With this the scripts' parsers can be had: they return themselves in place of settings.
    monkeypatch.setattr(net.Parser, "parse_args", lambda parser, argv=None: parser)
    parsers = {
        "align.py": align.parse_args(),
        "evaluate_twins.py": evaluate_twins.parse_args(),
        "train_twins.py": train_twins.build_parser(),
    }
    without_line = []
    for script, parser in parsers.items():
        listed = re.findall(FLAG, help_texts[script])
        for action in parser._actions:
            flag = action.option_strings[-1]
            if flag not in listed or not action.help:
                without_line.append((script, flag))
    assert without_line == []
    assert "`--help`" in README


def test_readme_code_gives_an_embedding(tmp_path, monkeypatch, tiny_model, stand_in):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = "".join(blocks)
    (checkpoint,) = re.findall(r'load_checkpoint\("(.+?)"', code)
    (photograph,) = re.findall(r'read_photo\("(.+?)"', code)
    photo, _ = draw_photo(draw_person(np.random.default_rng(0)), np.random.default_rng(1))
    monkeypatch.chdir(tmp_path)
    net.save_checkpoint(checkpoint, tiny_model)
    Image.fromarray(photo).save(photograph)
    names = {}
    exec(code, names)
    assert names["crop"].shape == (112, 112, 3)
    assert names["embedding"].shape == (1, 512)
    assert names["embedding"].norm().item() == pytest.approx(1, abs=1e-5)


# ---- README's example ----------------------------------------------------------------------------
class Table(NamedTuple):
    """The lines of a comparison's table."""

    header: str
    rows: list
    others: list


def split_table(lines):
    """The Table in the lines that evaluate_twins.comparison_table makes."""
    header, *rest = lines
    is_note = [line.startswith("Twin FMR and FNMR are") for line in rest]
    n_rows = is_note.index(True)
    return Table(header, rest[:n_rows], rest[n_rows:])


def readme_example():
    """README's first example table, which begins with the header and ends with its block.

    The line that the program prints next, "results in ...", may also follow.
    """
    found = re.search(r"^(setting  .*?)^(```|results in )", README, re.DOTALL | re.MULTILINE)
    return split_table(found[1].splitlines())


def made_up_setting(name, baseline=None, auc=0.8, general_auc=0.9, thresholds=False, overlap=()):
    """A Setting of one checkpoint with these areas and other figures that mean nothing.

    thresholds: whether validation people have given it thresholds. overlap: test IDs it has seen.
    """
    figures = dict.fromkeys(METRICS, 0.25)
    figures["auc"] = auc
    figures["general_auc"] = general_auc
    spread = np.linspace(-0.01, 0.01, 5)
    samples = {metric: value + spread for metric, value in figures.items()}
    if not thresholds:
        for metric in METRICS:
            if metric.endswith(tuple(OPERATING_POINTS)):
                figures[metric] = None
    estimate = Estimate(figures, samples, 29)
    against = baseline.checkpoints[0].estimate if baseline else None
    checkpoint = Checkpoint("models/a.pth", "a", {}, "", "", list(overlap), estimate=estimate)
    if thresholds:
        checkpoint.families = [{"ids": "1 + 2", "twin_auc": 0.5}] * 3
    return Setting(name, {}, [checkpoint], compare([estimate], against))


def plain_comparison(n_settings, chosen):
    """The Table of so many settings, with only the lines that every table has."""
    start = made_up_setting("start")
    others = [made_up_setting(f"run{number}", start) for number in range(1, n_settings)]
    return split_table(comparison_table([start, *others], chosen).splitlines())


def comparison_of_all_kinds():
    """A Table that has each kind of line, but for the choice that validation makes."""
    start = made_up_setting("start", thresholds=True)
    better = made_up_setting("better", start, auc=0.9, thresholds=True)
    worse = made_up_setting("worse", start, general_auc=0.7, overlap=["90001"])
    return split_table(comparison_table([start, better, worse], None).splitlines())


def form_of_cell(cell):
    """A figure with # for each digit after a point, and nothing for those before it."""
    return re.sub(r"\d", "#", re.sub(r"\d+\.", ".", cell.strip()))


def form_of_line(line):
    """A line below the rows with placeholders for names, verdicts and numbers."""
    line = re.sub(r"^\S.* \(.+?\) against [^:]+:", "NAME (NAMES) against NAME:", line)
    line = re.sub(r"^  .+, at the validation people's", "  NAME, at the validation people's", line)
    line = re.sub(r"^  .+, hardest families: .+", "  NAME, hardest families: FAMILIES.", line)
    line = re.sub(r"^OVERLAP: \S+", "OVERLAP: NAME", line)
    line = re.sub(r"have chosen: .+\.$", "have chosen: NAME.", line)
    line = re.sub(r"\b(better|worse|not distinguishable) on", "VERDICT on", line)
    return re.sub(r"[+-]?\d[\d.]*(e-?\d+)?", "#", line)


def check_row(row, titles, program_row):
    """Assert that a row's figures stand below their titles and have the program's decimals."""
    cell_width = len(titles) // len(TABLE_COLUMNS)
    figures = row[-len(titles) :]
    program_figures = program_row[-len(titles) :]
    for start in range(0, len(titles), cell_width):
        cell = figures[start : start + cell_width]
        program_cell = program_figures[start : start + cell_width]
        assert cell == cell.strip().rjust(cell_width)
        assert form_of_cell(cell) in (form_of_cell(program_cell), "-")


def test_readme_example_has_the_form_of_the_programs_output():
    example = readme_example()
    chosen = "run" if any("have chosen:" in line for line in example.others) else None
    plain = plain_comparison(len(example.rows), chosen)
    titles = plain.header.removeprefix("setting")
    assert example.header.endswith(titles)
    for row in example.rows:
        check_row(row, titles, plain.rows[0])

    forms = [form_of_line(line) for line in example.others]
    forms_of_every_table = [form_of_line(line) for line in plain.others]
    optional_forms = {form_of_line(line) for line in comparison_of_all_kinds().others}
    assert [form for form in forms if form in forms_of_every_table] == forms_of_every_table
    assert set(forms) - set(forms_of_every_table) <= optional_forms


def test_readme_example_compares_the_settings_that_it_shows():
    example = readme_example()
    name_width = len(example.header) - len(plain_comparison(1, None).header) + len("setting")
    start, *others = [row[:name_width].rstrip() for row in example.rows]
    below = "\n".join(example.others)
    compared = re.findall(r"^(\S.*) \(.+?\) against ([^:]+):", below, re.MULTILINE)
    assert compared == [(name, start) for name in others]
    chosen = re.findall(r"have chosen: (.+)\.$", below, re.MULTILINE)
    assert set(chosen) <= {start, *others}


# ---- the demo ------------------------------------------------------------------------------------
class Demo(NamedTuple):
    """What one call of the demo has left and said."""

    folder: Path
    out: str


@pytest.fixture(scope="module")
def finished_demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert demo.main([str(folder)]) == 0
    return Demo(folder, printed.getvalue())


def test_demo_says_that_its_faces_are_synthetic(finished_demo):
    assert "SYNTHETIC" in finished_demo.out


@pytest.mark.parametrize("script", SCRIPTS)
def test_demo_shows_its_commands(finished_demo, script):
    assert f"$ python {script} " in finished_demo.out


def test_training_in_the_demo_beats_the_untrained_network(finished_demo):
    auc = {}
    for path in (finished_demo.folder / "evaluation_results").glob("*/metrics.json"):
        auc[path.parent.name] = json.loads(path.read_text())["figures"]["auc"]["value"]
    untrained = auc.pop("untrained")
    runs = ("_frozen_100pct_", "_frozen_10pct_", "_full_100pct_", "_full_10pct_")
    assert len(auc) == len(runs)
    for run, name in zip(runs, sorted(auc), strict=True):
        assert run in name
        smallest_gain = 0.01 if "_frozen_" in run else 0
        assert auc[name] - untrained > smallest_gain


def test_demo_says_what_validation_would_have_chosen(finished_demo):
    assert "Validation would have chosen: f" in finished_demo.out


def test_demo_leaves_its_crops_and_pictures(finished_demo):
    assert len(list(finished_demo.folder.rglob("*.png"))) > 460


def test_demo_does_not_delete_what_is_not_a_demo(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert demo.main([str(tmp_path)]) == 2
    assert (tmp_path / "thesis.txt").exists()
