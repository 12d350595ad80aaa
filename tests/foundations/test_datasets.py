"""Data: real, fixed by a seed, never a silent stand-in; public sets through their own library."""

import sys
from pathlib import Path
from types import SimpleNamespace

import datasets as hub
import numpy as np
import pytest
import torch
from PIL import Image

from shuffle_nb.foundations import datasets
from shuffle_nb.foundations.datasets import (
    digits,
    faces,
    lfw_people,
    load_images,
    load_text,
    package_docstrings,
    photographs,
    textures,
)


@pytest.fixture(scope="module")
def local_images(tmp_path_factory):
    """A small image set, written the way the hub stores one."""
    folder = tmp_path_factory.mktemp("pictures")
    numbers = np.random.default_rng(0)

    def split(count):
        pictures = numbers.integers(0, 256, (count, 8, 6, 3), dtype=np.uint8)
        table = {
            "image": [Image.fromarray(p) for p in pictures],
            "label": [i % 3 for i in range(count)],
        }
        features = hub.Features(image=hub.Image(), label=hub.ClassLabel(names=["a", "b", "c"]))
        return pictures, hub.Dataset.from_dict(table, features=features)

    expected = {}
    for name, count in (("train", 7), ("test", 4)):
        expected[name], table = split(count)
        table.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return str(folder), expected


@pytest.fixture(scope="module")
def local_texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name in ("train", "test"):
        rows = {"text": [f"{name} story {i}" for i in range(3)]}
        hub.Dataset.from_dict(rows).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return str(folder)


def test_digits_are_split_by_the_seed_without_loss():
    data = digits(seed=1, num_train=1000)
    assert data.train_images.shape == (1000, 1, 8, 8) and data.test_images.shape == (797, 1, 8, 8)
    assert data.train_images.dtype == torch.float32 and data.train_labels.dtype == torch.long
    both = torch.cat([data.train_images, data.test_images])
    assert both.min() == 0 and both.max() == 1 and data.num_classes == 10
    other = digits(seed=2, num_train=1000)
    assert not torch.equal(other.train_labels, data.train_labels)
    assert both.sum() == torch.cat([other.train_images, other.test_images]).sum()
    assert torch.equal(digits(seed=1, num_train=1000).train_images, data.train_images)


def test_bundled_pictures():
    assert photographs(32).shape == (4, 3, 32, 32)
    assert textures(16).shape == (3, 1, 16, 16)
    assert faces().shape == (100, 1, 25, 25)
    for pictures in (photographs(32), textures(16), faces()):
        assert pictures.min() >= 0 and pictures.max() <= 1 and pictures.std() > 0.05


def test_people_are_split_by_the_seed(monkeypatch):
    count = 407

    def fetch(min_faces_per_person, color, slice_):
        assert color and min_faces_per_person == 20
        pictures = np.full((count, 64, 64, 3), 255, dtype=np.float32)
        pictures[:, 0, 0, 0] = np.arange(count) % 250
        return SimpleNamespace(images=pictures, target=np.arange(count) % 3)

    monkeypatch.setattr("sklearn.datasets.fetch_lfw_people", fetch)
    data, again = lfw_people(1), lfw_people(1)
    assert data.train_images.shape == (7, 3, 64, 64) and len(data.test_labels) == 400
    assert data.num_classes == 3 and data.train_images.max() == 1
    assert torch.equal(data.test_images, again.test_images)
    assert not torch.equal(data.test_images, lfw_people(2).test_images)


def test_docstrings_are_read_without_importing_the_package():
    before = set(sys.modules)
    found = package_docstrings(["networkx.algorithms.approximation", "scipy.stats"], 100_000)
    assert not {"networkx", "scipy.stats"} & (set(sys.modules) - before)
    texts = [text for _, text in found]
    assert len(texts) == len(set(texts)) > 10
    assert 50_000 < sum(map(len, texts)) <= 100_000
    assert found[0][0] == "networkx.algorithms.approximation"
    assert package_docstrings(["networkx.algorithms.approximation"], 100_000)[:5] == found[:5]


def test_public_images_are_read_from_a_local_folder_in_the_same_format(local_images):
    folder, expected = local_images
    data = load_images(folder)
    assert data.train_images.shape == (7, 3, 8, 6) and data.test_images.shape == (4, 3, 8, 6)
    pixels = torch.from_numpy(expected["train"]).permute(0, 3, 1, 2) / 255
    assert torch.allclose(data.train_images, pixels)
    assert data.train_labels.tolist() == [0, 1, 2, 0, 1, 2, 0] and data.num_classes == 3
    small = load_images(folder, num_train=2, size=4)
    assert small.train_images.shape == (2, 3, 4, 4) and small.test_images.shape == (4, 3, 4, 4)


def test_public_text_is_read_from_a_local_folder_in_the_same_format(local_texts):
    assert load_text(local_texts) == [f"train story {i}" for i in range(3)]
    assert load_text(local_texts, split="test", max_documents=1) == ["test story 0"]


def test_a_folder_of_another_format_is_refused_by_its_columns(local_texts, local_images, tmp_path):
    with pytest.raises(ValueError, match=r"must hold columns \['image', 'label'\].*got .*'text'"):
        load_images(local_texts)
    with pytest.raises(ValueError, match=r"must hold columns \['text'\].*got .*'image', 'label'"):
        load_text(Path(local_images[0]))
    with pytest.raises(RuntimeError, match="could not load the train split of"):
        load_images(tmp_path)


def test_every_public_set_is_asked_for_under_its_own_name(monkeypatch):
    asked = []

    def record(path, config=None, split=None):
        asked.append((path, config, split))
        raise OSError("no network in this test")

    monkeypatch.setattr(hub, "load_dataset", record)
    for name in datasets.PUBLIC_IMAGES:
        with pytest.raises(RuntimeError, match="could not load the train split"):
            load_images(name)
    for name in datasets.PUBLIC_TEXTS:
        with pytest.raises(RuntimeError, match="no network in this test"):
            load_text(name)
    assert [path for path, _, _ in asked] == [
        "uoft-cs/cifar10", "uoft-cs/cifar100", "frgfm/imagenette",
        "Salesforce/wikitext", "roneneldan/TinyStories",
    ]  # fmt: skip


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'shuffle_nb\[data\]'"):
        load_images("cifar10")


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: digits(num_train=1797), r"num_train must be in 1..1796, got 1797"),
        (lambda: digits(num_train=2.5), "num_train must be a whole number, got 2.5"),
        (lambda: load_images("mnist"), "one of .*'cifar100'.*got 'mnist'$"),
        (lambda: load_images("CIFAR10"), "got 'CIFAR10'; did you mean 'cifar10'"),
        (lambda: load_images("Digit"), "got 'Digit'; did you mean 'digits'"),
        (lambda: load_images(size=16), "size must be None or 8: digits are 8 x 8 pixels, got 16"),
        (lambda: load_images("cifar10", size=0), "size must be at least 1, got 0"),
        (lambda: load_images("cifar10", num_train=-5), "num_train must be at least 1, got -5"),
        (lambda: load_text("wikitext", max_documents=3), "did you mean 'wikitext103'"),
        (lambda: load_text(max_documents=-1), "max_documents must be at least 1, got -1"),
        (
            lambda: package_docstrings("torch.nn"),
            "packages must be a list of names, got 'torch.nn'",
        ),
        (lambda: package_docstrings([]), "packages must be a list of names"),
        (lambda: package_docstrings(["torch..nn"]), "no installed package 'torch..nn'"),
        (lambda: package_docstrings(["torch.nn"], max_chars=0), "max_chars must be at least 1"),
        (lambda: textures(513), "size must be in 1..512, got 513"),
        (lambda: load_text("books"), "'documentation', one of .*got 'books'"),
        (lambda: load_text(split="validation"), r"split must be one of \['train', 'test'\]"),
        (lambda: load_text(split="test"), "documentation is not split"),
        (lambda: photographs(0), "size must be at least 1"),
        (lambda: package_docstrings(["no_such_package"]), "no installed package 'no_such_package'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
