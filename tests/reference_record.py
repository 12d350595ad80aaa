"""What `make reference` adds to pytest: it runs the tests that use `agree`, and keeps how near."""

import json

KEPT = {}  # slug -> case -> what is kept of it, None until it has agreed


def pytest_collection_modifyitems(config, items):
    """Leave only the tests that compare with the authors' numbers."""
    config.hook.pytest_deselected(items=[i for i in items if "agree" not in i.fixturenames])
    items[:] = [item for item in items if "agree" in item.fixturenames]


def begin(case):
    """A case that does not come to its end does not agree."""
    KEPT.setdefault(case.slug, {}).setdefault(case.name, None)


def keep(case, difference):
    """Keep the largest difference of a case, with two digits."""
    known = KEPT[case.slug][case.name]
    if known is None or difference.size > known["difference"]:
        numbers = {"difference": difference.size, "allowed": difference.allowed}
        KEPT[case.slug][case.name] = {name: float(f"{n:.2g}") for name, n in numbers.items()}


def pytest_sessionfinish():
    """Write what was kept over what is recorded; a case that is in no file any more goes."""
    from shuffle_nb.foundations.reference import AGREEMENT_FILE, load_reference, reference_files

    recorded = json.loads(AGREEMENT_FILE.read_text()) if AGREEMENT_FILE.is_file() else {}
    chosen = {}
    for slug in sorted(reference_files()):
        known = recorded.get(slug, {}) | KEPT.get(slug, {})
        names = sorted(case.name for case in load_reference(slug))
        if agreed := {name: known[name] for name in names if known.get(name)}:
            chosen[slug] = agreed
    fresh = AGREEMENT_FILE.with_suffix(".tmp")
    fresh.write_text(json.dumps(chosen, indent=1) + "\n")
    fresh.replace(AGREEMENT_FILE)
