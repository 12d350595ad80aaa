"""What a user installs: both artefacts are built from a clean clone and tried outside the checkout.

`make dist` names the folder of artefacts that are already built (DIST_FOLDER), and tests those.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import nbformat
import pytest
from test_repository import NBS, PAPERS, TOP, files_of, run, settings

from shuffle_nb.runner.catalogue import slug_of

pytestmark = pytest.mark.xdist_group("distribution")
DATA = ("**/*.safetensors", "**/*.json", "**/py.typed")


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """The folder that holds one sdist and one wheel; the wheel is built from the sdist."""
    if "DIST_FOLDER" in os.environ:
        return TOP / os.environ["DIST_FOLDER"]
    folder = tmp_path_factory.mktemp("artefacts")
    clone = folder / "clone"
    tracked = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, tracked.split("\0")):
        if (TOP / name).is_file():  # what a commit of the tree as it is would hold
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / name, clone / name)
    run(sys.executable, "-m", "build", "--no-isolation", "-o", folder / "dist", cwd=clone)
    return folder / "dist"


@pytest.fixture(scope="module")
def environment(artefacts, tmp_path_factory):
    """A new environment that holds the wheel; it borrows this one's libraries, not this package.

    A line in a .pth file puts our site-packages on the path without running the .pth files in it,
    and so without the editable installation of the checkout.
    """
    return installed(next(artefacts.glob("*.whl")), tmp_path_factory.mktemp("wheel"))


def installed(artefact, folder):
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    ours = Path(pytest.__file__).parents[1]
    (site / "borrowed.pth").write_text(f"{ours}\n", encoding="utf-8")
    options = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    if artefact.suffix != ".whl":
        options += ["--no-build-isolation"]
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, *options, artefact)
    return folder


def package_of(environment):
    (package,) = environment.glob("lib/python*/site-packages/shuffle_nb")
    return package


def test_sdist_can_be_built_and_tested(artefacts):
    (sdist,) = artefacts.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in ("settings.ini", "constraints.txt", "Makefile", "nbs/styles.css", "CITATION.cff"):
        assert name in held
    tests = {path.relative_to(TOP).as_posix() for path in TOP.glob("tests/**/*.py")}
    assert tests <= held


def test_sdist_installs(artefacts, tmp_path):
    (sdist,) = artefacts.glob("*.tar.gz")
    package = package_of(installed(sdist, tmp_path / "environment"))
    assert files_of(NBS, "**/*.ipynb") == files_of(package / "nbs", "**/*.ipynb")


def test_wheel_carries_every_notebook_and_all_data(environment, tmp_path):
    package = package_of(environment)
    assert files_of(NBS, "**/*.ipynb") == files_of(package / "nbs", "**/*.ipynb")
    for pattern in DATA:
        ours = {path.relative_to(TOP / "shuffle_nb") for path in TOP.glob(f"shuffle_nb/{pattern}")}
        assert ours and ours == {path.relative_to(package) for path in package.glob(pattern)}
    program = (
        "import shuffle_nb, shuffle_nb.runner.cli as c; print(shuffle_nb.__file__, c.__file__)"
    )
    loaded = run(environment / "bin" / "python", "-c", program, cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(package) for file in loaded)


def test_entry_points():
    points = importlib.metadata.distribution("shuffle_nb").entry_points
    assert {(p.group, p.value) for p in points} == {
        ("console_scripts", "shuffle_nb.__main__:main"),
        ("nbdev", "shuffle_nb._modidx:d"),
    }


def test_trained_weights_load_outside_the_checkout(environment, tmp_path):
    program = """
from shuffle_nb.diffusion.tiny_diffusion import load_tiny_dit, load_tiny_edm
print(*(not model.training for model in (load_tiny_edm(16), load_tiny_edm(8), load_tiny_dit())))
"""
    assert run(environment / "bin" / "python", "-c", program, cwd=tmp_path) == "True True True\n"


def test_the_command_lists_runs_and_copies_notebooks(environment, tmp_path):
    command = environment / "bin" / "shuffle-nb"
    listed = run(command, "list", cwd=tmp_path, COLUMNS="200")
    assert all(slug_of(path) in listed for path in PAPERS)

    printed = run(command, "run", "runner/catalogue", cwd=tmp_path, COLUMNS="200")
    executed = nbformat.read(tmp_path / "runs" / "catalogue.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code"), printed

    run(command, "lab", "--no-launch", cwd=tmp_path)
    copied = {copy.name for copy in tmp_path.glob("lab/**/*.ipynb")}
    assert copied >= {path.name for path in PAPERS}


def test_the_command_without_its_extra_says_what_to_install():
    program = (
        "import sys; sys.modules['typer'] = None; from shuffle_nb.__main__ import main; main()"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100
    )
    assert printed.returncode == 2 and not printed.stdout
    assert printed.stderr == (
        "shuffle-nb: running notebooks needs typer, which is not installed: "
        "pip install 'shuffle_nb[notebooks]'\n"
    )


def test_a_core_needs_few_packages():
    """`pip install shuffle_nb` brings what importing a core needs, and no notebook machinery."""
    core = {requirement.split(">")[0] for requirement in settings["requirements"].split()}
    assert len(core) <= 7
    assert not core & {"matplotlib", "jupyterlab", "scikit-learn", "dask", "papermill", "pandas"}


def test_facts_stand_once():
    """Citation and changelog name the version of settings.ini."""
    assert f"version: {settings['version']}\n" in (TOP / "CITATION.cff").read_text("utf-8")
