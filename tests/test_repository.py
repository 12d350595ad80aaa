"""The repository keeps its own rules: clean, in sync, light, one-way, and whole inside a wheel."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from itertools import chain
from pathlib import Path

import nbformat
import pytest
import yaml
from nbconvert import MarkdownExporter
from packaging.requirements import Requirement

from shuffle_nb.runner.catalogue import (
    is_paper,
    papers,
    read_cells,
    read_paper,
    reading_minutes,
    slug_of,
)

sys.path.insert(0, str(Path(__file__).parent))
import readme

TOP = Path(__file__).parents[1]
NBS = TOP / "nbs"
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted([*NBS.glob("*.ipynb"), *NBS.glob("*/*.ipynb")])
NUMBERED = [path for path in NOTEBOOKS if re.match(r"\d+_", path.name)]
PAPERS = [path for path in NOTEBOOKS if is_paper(path, NBS)]
PAGES = [TOP / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
MODULES = sorted(path for path in (TOP / "shuffle_nb").glob("*/*.py") if path.name != "__init__.py")
SITE_PAGES = {  # page names drop the number that orders a folder
    path.relative_to(NBS).with_name(f"{slug_of(path)}.html").as_posix() for path in NOTEBOOKS
}
WEIGHTS = sorted((TOP / "shuffle_nb").rglob("*.safetensors"))
LAYERS = ("foundations", "runner")  # folders that are no family of papers

ROOMS = [
    "The idea",
    "Build it",
    "Does it hold?",
    "Experiment",
    "What it costs",
    "Claims",
    "Explore",
    "Exercises",
    "Where to go next",
]
HEAVY = [
    *["matplotlib", "sklearn", "skimage", "pandas", "networkx", "datasets"],
    *["IPython", "ipykernel", "ipywidgets", "jupyter_client", "nbformat", "nbclient", "papermill"],
    *["dask", "distributed", "typer", "rich"],
]

settings = configparser.ConfigParser(delimiters=["="])
settings.read(TOP / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]


def name_of(path):
    return path.relative_to(TOP).as_posix()


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=name_of)


def run(*command, cwd=TOP, expect=0, **environment):
    """Run a command and return what it printed, standard error included."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=500,
    )
    ended = f"{command[0]} ended with {process.returncode}"
    assert process.returncode == expect, f"{ended}\n{process.stdout}"
    return process.stdout


@pytest.fixture
def project(tmp_path):
    """A copy of all that makes the package, to work on."""
    return copy_project(tmp_path / "project")


def copy_project(target):
    target.mkdir()
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "_quarto.yml"):
        shutil.copy2(TOP / name, target / name)
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for folder in ("nbs", "shuffle_nb"):
        shutil.copytree(TOP / folder, target / folder, symlinks=True, ignore=skip)
    return target


def files_of(folder, pattern):
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.glob(pattern)
        if "__pycache__" not in path.parts
    }


def assert_same(committed, made, advice):
    assert sorted(committed) == sorted(made), advice
    differing = [name for name in committed if committed[name] != made[name]]
    assert not differing, f"{', '.join(differing)}: {advice}"


# In sync -------------------------------------------------------------------------------------


def test_notebooks_are_clean(project):
    run(BIN / "nbdev_clean", cwd=project)
    assert_same(
        files_of(NBS, "**/*.ipynb"), files_of(project / "nbs", "**/*.ipynb"), "run nbdev_clean"
    )


def test_modules_are_in_sync_with_notebooks(project):
    package = project / "shuffle_nb"
    shutil.rmtree(package)
    package.mkdir()
    for name in ("__init__.py", "__main__.py"):
        shutil.copy2(TOP / "shuffle_nb" / name, package)
    run(BIN / "nbdev_export", cwd=project)
    assert_same(
        files_of(TOP / "shuffle_nb", "**/*.py"), files_of(package, "**/*.py"), "run nbdev_export"
    )


def test_readme_is_in_sync_with_the_home_page():
    assert (TOP / "README.md").read_text(encoding="utf-8") == readme.readme(), "run make readme"


def test_readme_lists_every_paper():
    text = (TOP / "README.md").read_text(encoding="utf-8")
    pages = {path: f"/{path.parent.name}/{slug_of(path)}.html)" for path in PAPERS}
    missing = [name_of(path) for path, page in pages.items() if page not in text]
    assert not missing, f"shuffle-nb refresh index, then make readme: {', '.join(missing)}"


def test_docs_settings_are_in_sync():
    site = yaml.safe_load((NBS / "nbdev.yml").read_text(encoding="utf-8"))["website"]
    assert site["site-url"] == settings["doc_host"] + settings["doc_baseurl"]
    assert (site["title"], site["description"]) == (settings["title"], settings["description"])
    assert site["repo-url"] == settings["git_url"]


def test_versions_are_in_sync():
    init = (TOP / "shuffle_nb" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{settings["version"]}"' in init
    assert f"## [{settings['version']}]" in (TOP / "CHANGELOG.md").read_text(encoding="utf-8")


def test_ruff_is_content():
    run(BIN / "ruff", "check", ".")
    run(BIN / "ruff", "format", "--check", ".")


def test_every_requirement_is_pinned():
    lines = (TOP / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {normal(name): version for name, version in pins.items()}
    required = settings["requirements"].split() + settings["dev_requirements"].split()
    for requirement in map(Requirement, required):
        assert normal(requirement.name) in pins, f"run make constraints: no {requirement.name}"
        assert requirement.specifier.contains(pins[normal(requirement.name)]), str(requirement)


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


# One rule for finding things -----------------------------------------------------------------


def test_names_are_unique():
    slugs = [slug_of(path) for path in NUMBERED]
    assert sorted(set(slugs)) == sorted(slugs)


def test_catalogue_holds_the_papers_and_nothing_else():
    in_a_family = [path for path in NUMBERED if path.parent.name not in LAYERS]
    expected = [path for path in in_a_family if not path.name.startswith("00_")]
    assert sorted(paper.path for paper in papers()) == expected


@each(NUMBERED)
def test_the_same_path_three_times(path):
    family, slug, module = path.parent.name, slug_of(path), module_of(path)
    # A set-up need not say its family twice: click_through/00_click_data is click_through.data.
    assert module == slug or (path.name.startswith("00_") and slug.endswith(f"_{module}"))
    assert (TOP / "shuffle_nb" / family / f"{module}.py").is_file()
    assert (TOP / "tests" / family / f"test_{slug}.py").is_file()


def module_of(path):
    """The module that a notebook exports to; the cell that installs on Colab may come first."""
    exports = rf"^#\| default_exp {path.parent.name}\.(\w+)$"
    return re.search(exports, "\n".join(sources(path, "code")[:2]), flags=re.M)[1]


@cache
def cells_of(path):
    return read_cells(path)


def sources(path, kind):
    return [cell["source"] for cell in cells_of(path) if cell["cell_type"] == kind]


def tagged(path, tag):
    return [cell for cell in cells_of(path) if tag in cell["metadata"].get("tags", [])]


# A notebook, room by room --------------------------------------------------------------------


@each(PAPERS)
def test_title_cell_has_all_facts(path):
    paper = read_paper(path)
    assert re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv), "- arxiv: identifier"
    assert paper.title and paper.summary and paper.authors and paper.venue
    assert 1950 < paper.year < 2100 and 0 < paper.minutes < 240
    facts = re.findall(r"^- (.+)$", sources(path, "markdown")[0], flags=re.M)
    assert isinstance(yaml.safe_load("\n".join(facts)), dict), "the docs read the facts as YAML"
    family = "shuffle" if path.parent.name == "shuffles" else path.parent.name
    assert family in paper.categories, "the family is a category, in the singular what shuffles"
    assert {"paper", "see", "need"} <= {fact.split(":")[0] for fact in facts}
    assert paper.minutes == reading_minutes(cells_of(path)), "shuffle-nb refresh counts minutes"


def test_a_category_holds_two_papers_or_is_a_family():
    counted = Counter(category for paper in papers() for category in paper.categories)
    families = {path.parent.name for path in PAPERS}
    lonely = {name for name, count in counted.items() if count < 2} - families
    assert not lonely and "shuffles" not in counted


@each(PAPERS)
def test_a_bare_colab_installs_what_the_notebook_needs(path):
    first = sources(path, "code")[0]
    assert first.startswith("#| hide\n") and "google.colab" in first
    assert "shuffle_nb[notebooks]" in first


@each(PAPERS)
def test_parameters_are_one_cell_of_plain_values(path):
    (cell,) = tagged(path, "parameters")
    statements = ast.parse(cell["source"]).body
    assert all(isinstance(statement, ast.Assign | ast.AnnAssign) for statement in statements)
    values = {}
    for statement in statements:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
        values[target.id] = ast.literal_eval(statement.value)
    assert (values["device"], values["scale"]) == ("auto", "laptop")
    assert all(isinstance(seed, int) for seed in values["seeds"])


@each(PAPERS)
def test_rooms_are_all_there_and_in_order(path):
    headings = [
        line[3:].strip()
        for source in sources(path, "markdown")
        for line in source.splitlines()
        if line.startswith("## ")
    ]
    assert headings == ROOMS


@each(PAPERS)
def test_code_is_shown_where_it_teaches(path):
    code = sources(path, "code")
    assert any(source.startswith("#| exports\n") for source in code)
    solutions = tagged(path, "solution")
    assert len(solutions) >= 2, "two exercises or more, each with a worked solution"
    assert all(cell["source"].startswith("#| code-fold: true") for cell in solutions)
    assert any("Predict first" in source for source in sources(path, "markdown"))


@each(NOTEBOOKS)
def test_cells_that_import_hold_nothing_else(path):
    """The docs build executes them, and would execute the rest as well."""
    for source in sources(path, "code"):
        body = ast.parse(python_of(source)).body
        kinds = {isinstance(statement, ast.Import | ast.ImportFrom) for statement in body}
        assert len(kinds) < 2, f"imports and other code in one cell:\n{source}"


def python_of(source):
    """A cell without the lines that only IPython understands."""
    lines = source.splitlines()
    if lines and lines[0].startswith("%%"):
        return ""
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


@each(PAPERS)
def test_stored_outputs_are_those_of_a_whole_run(path):
    outputs = list(chain.from_iterable(cell.get("outputs", []) for cell in cells_of(path)))
    kinds = set(chain.from_iterable(output.get("data", {}) for output in outputs))
    assert "image/png" in kinds, "figures"
    assert "application/vnd.shuffle-nb.claims+json" in kinds, "claims"


@each(NOTEBOOKS)
def test_stored_outputs_hold_no_errors_and_no_paths(path):
    local = [str(TOP), sys.prefix, str(Path.home()) + "/", tempfile.gettempdir() + "/"]
    for cell in cells_of(path):
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", f"stored error:\n{cell['source']}"
            assert output.get("name") != "stderr", f"stored stderr:\n{cell['source']}"
        seen = json.dumps([cell["source"], without_images(cell)])
        for place in local:
            assert place not in seen, f"{place} stands in or under\n{cell['source']}"
        machine = re.search(r"(?<![\w.])/(?:home|root|Users|mnt)/\w+", seen)
        assert not machine, f"{machine[0]} stands in or under\n{cell['source']}"


def without_images(cell):
    return [
        {kind: data for kind, data in output.get("data", {}).items() if "image" not in kind}
        or output.get("text")
        for output in cell.get("outputs", [])
    ]


# Arrows point one way, imports are light -----------------------------------------------------


def imported(source, package):
    """The modules of this library that a piece of code imports, relative imports resolved."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: -(node.level - 1) or None] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    parts = [name.split(".") for name in names if name.startswith("shuffle_nb.")]
    return {tuple(part[1:3]) for part in parts if len(part) > 2}


def check_arrows(folder, own, targets, first_lines=""):
    set_ups = {module_of(path) for path in NBS.glob("*/00_*.ipynb")}
    for family, slug in targets - {(folder, own)}:
        if folder == "foundations":
            assert family == "foundations", f"foundations import {family}.{slug}"
        elif folder == "runner":
            assert family in LAYERS, f"the runner imports {family}.{slug}"
        elif family != "foundations" and not (family == folder and slug in set_ups):
            assert slug in first_lines, (
                f"{folder}.{own} imports {family}.{slug} and does not say so"
            )


def first_lines_of(folder, slug):
    found = [path for path in NUMBERED if (path.parent.name, module_of(path)) == (folder, slug)]
    return "\n".join(chain.from_iterable(sources(path, "markdown")[:2] for path in found))


@each(MODULES)
def test_arrows_of_a_module_point_one_way(path):
    folder, own = path.parent.name, path.stem
    targets = imported(path.read_text(encoding="utf-8"), f"shuffle_nb.{folder}")
    check_arrows(folder, own, targets, first_lines_of(folder, own))


@each(NUMBERED)
def test_arrows_of_a_notebook_point_one_way(path):
    folder, own = path.parent.name, module_of(path)
    code = "\n".join(map(python_of, sources(path, "code")))
    check_arrows(folder, own, imported(code, ""), first_lines_of(folder, own))


def test_imports_are_light(record_property):
    """A script that uses a paper pays for PyTorch, einops and jaxtyping only."""
    modules = [path for path in MODULES if path.parent.name not in LAYERS]
    modules += [path for path in MODULES if path.name in ("training.py", "claims.py", "costs.py")]
    names = [f"shuffle_nb.{path.parent.name}.{path.stem}" for path in modules]
    program = f"""
import importlib, json, sys, time
def load(name):
    began, known = time.perf_counter(), set(sys.modules)
    importlib.import_module(name)
    new = {{module.split('.')[0] for module in set(sys.modules) - known}}
    return time.perf_counter() - began, sorted(new & set({HEAVY!r}))
print(json.dumps({{name: load(name) for name in ['torch', *{names!r}]}}))
"""
    loaded = json.loads(run(sys.executable, "-c", program).splitlines()[-1])
    for name, (seconds, heavy) in loaded.items():
        record_property(f"seconds to import {name}", f"{seconds:5.2f}")
        assert name == "torch" or not heavy, f"{name} loads {', '.join(heavy)}"


# Docs ----------------------------------------------------------------------------------------


def pandoc(text, *options):
    import pypandoc

    process = subprocess.run(
        [pypandoc.get_pandoc_path(), *options],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0 and not process.stderr, process.stderr
    return process.stdout


@each(NOTEBOOKS)
def test_cell_options_are_yaml(path):
    """Quarto stops at an option block that is none, such as an unquoted second colon."""
    for source in sources(path, "code"):
        block = re.match(r"(?:#\|.*\n?)*", source)[0].splitlines()
        lines = [line[2:].strip() for line in block]
        options = [line for line in lines if re.match(r"[\w-]+:( |$)", line)]
        assert isinstance(yaml.safe_load("\n".join(options) or "{}"), dict), "\n".join(block)


@each(NOTEBOOKS)
def test_markdown_and_formulas_are_understood(path):
    notebook = nbformat.read(path, as_version=4)
    markdown, _ = MarkdownExporter().from_notebook_node(notebook)
    pandoc(markdown, "--from=markdown", "--to=html5", "--mathml", "--fail-if-warnings")
    prose = pandoc("\n\n".join(sources(path, "markdown")), "--from=markdown", "--to=json")
    stray = [word for word in re.findall(r'"t":"Str","c":"([^"]*)"', prose) if "$" in word]
    assert not stray, f"a dollar sign that opens or closes no formula: {stray}"


@each(NOTEBOOKS + PAGES)
def test_links_lead_somewhere(path):
    text = (
        "\n".join(sources(path, "markdown"))
        if path.suffix == ".ipynb"
        else path.read_text(encoding="utf-8")
    )
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    for target in re.findall(r"\]\(<?([^)\s>]+)>?[^)]*\)", prose):
        here = f"{settings['git_url']}/blob/{settings['branch']}/"
        site = f"{settings['doc_host']}{settings['doc_baseurl']}/"
        if target.startswith(here):
            assert (TOP / target.removeprefix(here)).exists(), target
        elif target.startswith(site):
            assert target.removeprefix(site).split("#")[0] in {"", *SITE_PAGES}, target
        elif target.startswith("#"):
            assert target[1:] in anchors(text), f"no heading for {target}"
        elif not re.match(r"\w+:", target):
            assert (path.parent / target.split("#")[0]).exists(), target


def anchors(markdown):
    headings = re.findall(r"^#+ (.+)$", markdown, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_quarto_configuration_has_one_copy():
    link = NBS / "_quarto.yml"
    assert link.is_symlink() and link.readlink() == Path("../_quarto.yml")
    quarto = yaml.safe_load((TOP / "_quarto.yml").read_text(encoding="utf-8"))
    assert quarto["metadata-files"] == ["nbdev.yml"]
    assert (NBS / quarto["format"]["html"]["css"]).is_file()
    assert (NBS / quarto["website"]["favicon"]).is_file() and (NBS / "404.qmd").is_file()
    assert f"shuffle_nb {settings['version']}," in quarto["website"]["page-footer"]["left"]
    for entry in quarto["website"]["navbar"]["left"]:
        assert (NBS / entry["href"]).is_file(), entry


def test_sidebar_reaches_every_page():
    quarto = yaml.safe_load((TOP / "_quarto.yml").read_text(encoding="utf-8"))
    contents = quarto["website"]["sidebar"]["contents"]
    pages = [entry for entry in contents if isinstance(entry, str)]
    folders = [entry["auto"] for entry in contents if isinstance(entry, dict)]
    assert all((NBS / page).is_file() for page in pages)
    for path in NOTEBOOKS:
        reached = path.name in pages if path.parent == NBS else path.parent.name in folders
        assert reached, f"no way to {name_of(path)} in _quarto.yml"
    with_notebooks = {path.parent for path in NUMBERED}
    assert all((folder / "index.ipynb").is_file() for folder in with_notebooks), "family pages"


def test_list_of_all_papers_looks_into_every_family():
    (raw,) = sources(NBS / "papers.ipynb", "raw")
    globs = yaml.safe_load(raw.strip("-\n"))["listing"]["contents"]
    listed = set(chain.from_iterable(NBS.glob(glob) for glob in globs))
    assert listed >= set(PAPERS)


def test_docs_are_processed_without_quarto(project):
    """nbdev's own part of the docs build: front matter, signatures, links."""
    program = "from nbdev.serve import proc_nbs; proc_nbs(n_workers=2)"
    script = project / "process.py"
    script.write_text(f"if __name__ == '__main__':\n    {program}\n", encoding="utf-8")
    printed = run(sys.executable, script, cwd=project)
    assert not printed, printed
    for path in NOTEBOOKS:
        page = project / "_proc" / path.relative_to(NBS)
        raw, *cells = read_cells(page)
        facts = yaml.safe_load(raw["source"].strip("-\n"))
        assert facts["title"] and facts["description"], name_of(path)
        assert facts["output-file"] == f"{slug_of(path)}.html"
        shown = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "code")
        for source in sources(path, "code"):
            if source.startswith("#| exports\n"):
                assert source.removeprefix("#| exports\n").strip() in shown, source
    assert (project / "_proc" / "_quarto.yml").is_file()
    assert (project / "_proc" / "styles.css").is_file()


# Make and its workflows ----------------------------------------------------------------------


def test_make_alone_lists_its_targets():
    listed = run("make", "--no-print-directory")
    for target in ("run", "test", "lab", "docs", "check", "clean", "help"):
        assert f"make {target} " in listed


def test_make_says_in_one_line_that_python_is_too_old(tmp_path):
    make, tools = shutil.which("make"), tmp_path / "tools"
    tools.mkdir()
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy2(TOP / name, tmp_path / name)
    old = tools / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    printed = run(make, "run", cwd=tmp_path, expect=2, PATH=str(tools), PYTHON="")
    said = [line for line in printed.splitlines() if not line.startswith("make")]
    assert said == [
        "No Python 3.11 or newer with venv was found (python3 is Python 3.9.2): "
        "install one, or name it with make PYTHON=..."
    ]


def test_workflows_and_ci_call_make():
    targets = set(re.findall(r"^([a-z]+):.*## ", (TOP / "Makefile").read_text(), flags=re.M))
    for workflow in (TOP / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
        calls = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
        assert all(call.startswith("make ") and call[5:] in targets for call in calls)
    assert (TOP / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == "exec make test"
    assert os.access(TOP / ".ci" / "run", os.X_OK)
