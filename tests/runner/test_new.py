"""A draft of a paper: it takes nothing away, and keeps every rule from the start."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shuffle_nb.runner.new import draft_files

TOP = Path(__file__).parents[2]
FILES = ["settings.ini", "pyproject.toml", "README.md", "_quarto.yml", "CHANGELOG.md"]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one small family; the notebooks of the others would only cost time."""
    top = tmp_path / "checkout"
    top.mkdir()
    for name in FILES:
        shutil.copy2(TOP / name, top)
    no_papers = shutil.ignore_patterns("__pycache__", "[0-9][0-9]_*.ipynb")
    shutil.copytree(TOP / "nbs" / "mobile", top / "nbs" / "mobile", ignore=no_papers)
    shutil.copytree(TOP / "nbs" / "runner" / "_new", top / "nbs" / "runner" / "_new")
    for name in ("index.ipynb", "papers.ipynb", "nbdev.yml", "styles.css"):
        shutil.copy2(TOP / "nbs" / name, top / "nbs")
    (top / "nbs" / "_quarto.yml").symlink_to("../_quarto.yml")
    package = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(TOP / "shuffle_nb", top / "shuffle_nb", ignore=package)
    (top / "tests" / "device").mkdir(parents=True)
    for path in TOP.glob("tests/*.py"):
        shutil.copy2(path, top / "tests")
    shutil.copy2(TOP / "tests" / "device" / "device_check.py", top / "tests" / "device")
    return top


def run(top, *words):
    """Run Python on a checkout, as if it were installed from there."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=top,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(top)},
    )
    return done.returncode, done.stdout + done.stderr


def test_a_draft_keeps_every_rule_of_the_repository(checkout):
    code, printed = run(checkout, "-m", "shuffle_nb", "new", "mobile", "small_trick")
    assert code == 0, printed
    assert "small_trick: 1 of 1 claims hold" in printed
    made = [
        "nbs/mobile/01_small_trick.ipynb",
        "tests/mobile/test_small_trick.py",
        "tests/mobile/wrong_answers_small_trick.py",
        "tests/device/small_trick.py",
    ]
    assert all((checkout / path).is_file() and path in printed for path in made)
    assert (checkout / "shuffle_nb" / "mobile" / "small_trick.py").is_file()
    assert "mobile.small_trick" in (checkout / "shuffle_nb" / "_modidx.py").read_text()

    tests = ["tests/test_repository.py", "tests/test_notebooks.py", "tests/mobile"]
    code, printed = run(checkout, "-m", "pytest", "-q", "-k", "small_trick", *tests)
    assert code == 0, printed
    assert int(printed.split(" passed")[0].split()[-1]) >= 15, printed
    program = "import sys; sys.path[:0] = ['tests/device']; import small_trick as s; s.CORES[0]"
    assert run(checkout, "-c", program)[0] == 0
    code, printed = run(checkout, "-m", "ruff", "check", *made)
    assert code == 0, printed
    code, printed = run(checkout, "-m", "ruff", "format", "--check", *made)
    assert code == 0, printed

    before = {path: (checkout / path).read_bytes() for path in made}
    code, printed = run(checkout, "-m", "shuffle_nb", "new", "mobile", "small_trick")
    assert (code, printed) == (2, "shuffle-nb: there is a notebook 'small_trick' already\n")
    assert before == {path: (checkout / path).read_bytes() for path in made}


@pytest.fixture
def root(tmp_path):
    """A checkout as bare as can be, in which no tests are."""
    shutil.copytree(TOP / "nbs" / "runner" / "_new", tmp_path / "nbs" / "runner" / "_new")
    return tmp_path / "nbs"


@pytest.mark.parametrize(
    ("family", "slug", "message"),
    [
        ("mobile", "Big", "a name is made of small letters, digits and _, got 'Big'"),
        ("mobile", "01_a", "a name is made of small letters"),
        ("mobile", "class", "a name is made of small letters"),
        ("../mobile", "a", "a name is made of small letters"),
        ("runner", "a", "papers stand in families, not in runner"),
        ("mobile", "taken", "there is a notebook 'taken' already"),
        ("mobile", "tested", "tests/mobile/test_tested.py is there already"),
    ],
)
def test_names_that_cannot_be_or_are_taken(root, write, family, slug, message):
    write(name="03_taken", folder=root / "shuffles")
    path = root.parent / "tests" / "mobile" / "test_tested.py"
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(ValueError, match=message):
        draft_files(root, family, slug)


def test_an_installed_package_has_no_place_for_a_draft(root):
    with pytest.raises(ValueError, match="new needs a checkout of the library"):
        draft_files(root, "mobile", "a")


def test_a_draft_takes_the_next_number_and_the_categories_of_its_family(root, write):
    (root.parent / "tests").mkdir()
    write(name="04_other", folder=root / "shuffles")
    notebook, *_ = files = draft_files(root, "shuffles", "my_paper")
    assert notebook == root / "shuffles" / "05_my_paper.ipynb"
    assert "categories: [shuffles, shuffle]" in files[notebook]
    assert all("new_slug" not in text and "new_family" not in text for text in files.values())
