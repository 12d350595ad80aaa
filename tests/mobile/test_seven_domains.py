"""The seven sets: sizes, labels, what is drawn where, and that a seed repeats them."""

import numpy as np
import pytest
import skimage
import torch

from shuffle_nb.mobile import seven_domains
from shuffle_nb.mobile.seven_domains import cross_dataset_suite, standardised

CLASSES = {
    "digits": 10,
    "digits-shifted": 10,
    "digit-rotation": 4,
    "textures": 3,
    "photo-id": 5,
    "faces": 2,
    "shapes": 5,
}


@pytest.fixture(scope="module")
def suite():
    return cross_dataset_suite(seed=3, n_train=300, n_test=500)


def test_sizes_types_and_classes(suite):
    assert list(suite) == list(CLASSES)
    for name, (x, y, x_test, y_test) in suite.items():
        few = name == "faces"
        assert x.shape == (100 if few else 300, 1, 16, 16) and len(y) == len(x)
        assert x_test.shape == (100 if few else 500, 1, 16, 16) and len(y_test) == len(x_test)
        assert x.dtype == x_test.dtype == torch.float32 and y.dtype == y_test.dtype == torch.int64
        assert set(torch.cat([y, y_test]).tolist()) == set(range(CLASSES[name]))
        assert abs(x.mean()) < 1e-4 and abs(x.std(correction=0) - 1) < 1e-3
        assert x_test.isfinite().all()


def test_a_seed_repeats_the_suite_and_another_draws_another(suite):
    again, other = cross_dataset_suite(3, 300, 500), cross_dataset_suite(4, 300, 500)
    for name in suite:
        assert all(torch.equal(a, b) for a, b in zip(suite[name], again[name], strict=True))
        assert not torch.equal(suite[name][0], other[name][0])


def test_no_digit_is_in_both_halves(suite):
    for name in ("digits", "digits-shifted"):
        x, _, x_test, _ = suite[name]
        if name == "digits":
            assert torch.cdist(x.flatten(1), x_test.flatten(1)).min() > 0.5


def test_shifted_digits_keep_their_pixels():
    images = np.random.default_rng(0).random((50, 8, 8))
    moved = seven_domains._somewhere(np.random.default_rng(1), images)
    assert moved.shape == (50, 16, 16)
    for canvas, image in zip(moved, images, strict=True):
        rows, columns = (np.flatnonzero(canvas.any(axis)) for axis in (1, 0))
        assert np.array_equal(canvas[np.ix_(rows, columns)], image)


def test_turns_are_counted():
    images = np.random.default_rng(0).random((40, 8, 8))
    turned, turns = seven_domains._turned(np.random.default_rng(1), images)
    for picture, image, turn in zip(turned, images, turns, strict=True):
        assert np.array_equal(picture, np.rot90(np.kron(image, np.ones((2, 2))), turn))


def test_patches_come_from_the_half_that_is_named():
    picture = np.concatenate([np.arange(400.0).reshape(20, 20), np.ones((20, 20))], axis=1)
    left, right = (seven_domains._halves([picture], side)[0] for side in (False, True))
    assert np.array_equal(left, picture[:, :20]) and (right == 1).all()
    patches, labels = seven_domains._patches(np.random.default_rng(0), [left, right], 60)
    assert (patches[labels == 1] == 0).all()  # flat: no deviation to divide by
    standard = patches[labels == 0]
    assert np.allclose(standard.mean((1, 2)), 0) and np.allclose(standard.std((1, 2)), 1)
    assert seven_domains._halves([np.ones((4, 6, 3))], False)[0].shape == (4, 3)


def test_training_sees_left_halves_and_the_test_right_ones(monkeypatch):
    seen = []

    def record(rng, pictures, count):
        seen.append(pictures)
        return np.zeros((count, 16, 16)), np.zeros(count, int)

    monkeypatch.setattr(seven_domains, "_patches", record)
    cross_dataset_suite(0, 5, 5)
    brick, camera = skimage.data.brick(), skimage.data.camera()
    assert np.array_equal(seen[0][0], brick[:, :256]) and np.array_equal(seen[1][0], brick[:, 256:])
    assert np.array_equal(seen[2][3], camera[:, :256])
    assert np.array_equal(seen[3][3], camera[:, 256:])


def test_shapes_lie_inside_and_differ():
    images, labels = seven_domains._shapes(np.random.default_rng(0), 4000)
    border = np.ones((16, 16), bool)
    border[1:-1, 1:-1] = False
    assert abs(images[:, border].mean()) < 0.07  # noise, and what just touches
    area = [images[labels == kind].sum((1, 2)).mean() for kind in range(5)]
    assert all(area[0] > area[kind] for kind in (2, 3, 4)) and min(area) > 10


def test_a_small_suite_and_more_digits_than_there_are(plain_python):
    small = cross_dataset_suite(0, 1, 1)
    assert all(len(x) == 1 and x.isfinite().all() for x, *_ in small.values())
    for arguments, message in (
        ((0, 1500, 500), r"n_train \+ n_test must be in 2..1797, got 2000"),
        ((0, 0, 5), "n_train must be at least 1, got 0"),
        ((0, 5, 2.5), "n_test must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            cross_dataset_suite(*arguments)


def test_standardising_takes_the_training_images():
    x, x_test, y = torch.tensor([1.0, 3.0]), torch.tensor([5.0]), torch.tensor([0])
    assert standardised(x, y, x_test, y)[2].item() == 3.0
