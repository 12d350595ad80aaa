"""Rich representations: concatenated features, probes, heads, the twin, how features differ."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, RidgeClassifierCV
from torch import nn

from shuffle_nb.features.rich_representations import (
    ALPHAS,
    ConcatFeatures,
    FeatureNet,
    NetStack,
    ParallelNet,
    ProbeHead,
    average_heads,
    class_shift,
    cross_predictability,
    distill_features,
    effective_rank,
    linear_probe,
    redundant_xors,
    ridge,
    train_episodes,
    two_stage_finetune,
)
from shuffle_nb.foundations.costs import count_flops, count_parameters
from shuffle_nb.foundations.datasets import ImageData, digits, load_images
from shuffle_nb.foundations.reference import load_reference
from shuffle_nb.foundations.training import MiniBatches, fit

SMALL = settings(deadline=None, max_examples=20)
SEEDS = st.integers(0, 2**32)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def labelled(rows, d, classes, seed=0):
    """Features whose mean depends on the class."""
    y = torch.arange(rows) % classes
    return normal(rows, d, seed=seed) + normal(classes, d, seed=seed + 1)[y], y


def some_nets(count=3, sizes=(5, 4, 3), classes=2):
    return [FeatureNet(sizes, classes) for _ in range(count)]


class Normed(nn.Module):
    """A model that changes in training mode."""

    def __init__(self, d=3):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, d), nn.BatchNorm1d(d), nn.Dropout(0.5))
        self.head = nn.Linear(d, 2)

    def features(self, x):
        return self.layers(x)


# ---------------------------------------------------------------- the task with redundancy


@pytest.mark.parametrize("redundant", [True, False])
def test_pairs_say_what_their_labels_say(redundant):
    x, y = redundant_xors(400, 5, redundant, noise=0.0, generator=torch.Generator().manual_seed(1))
    assert x.shape == (400, 10) and y.shape == (400, 5) and set(x.unique().tolist()) == {-1, 1}
    assert torch.equal((x[:, ::2] == x[:, 1::2]).long(), y)
    assert (y == y[:, :1]).all().item() is redundant
    assert x.mean(0).abs().max() < 0.25  # no single input tells
    noisy, _ = redundant_xors(4000, 2, noise=0.1)
    assert (noisy.abs() - 1).std().item() == pytest.approx(0.1, abs=0.01)
    y[0, 0] = 7  # no view of one column
    assert y[0, 1] != 7


def test_the_draw_follows_the_generator():
    first, again = (redundant_xors(9, generator=torch.Generator().manual_seed(3)) for _ in "ab")
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], redundant_xors(9)[0])


# ---------------------------------------------------------------- episodes and stacks


def batches_of(x, y, seed):
    return MiniBatches(x, y, batch_size=8, seed=seed)


def entropy(model, x, y):
    return F.cross_entropy(model(x), y)


def stacked_entropy(stack, x, y):
    logits = stack(x)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()) * len(logits)


def test_episodes_differ_by_their_seed_alone():
    x, y = labelled(40, 5, 2)

    def train(model, seed):
        fit(model, entropy, batches_of(x.float(), y, seed), steps=3, seed=seed, device="cpu")

    before = torch.get_rng_state()
    models = train_episodes(lambda: FeatureNet((5, 3), 2), train, [4, 7])
    assert torch.equal(torch.get_rng_state(), before)
    (again,) = train_episodes(lambda: FeatureNet((5, 3), 2), train, [7])
    pairs = zip(models[1].parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(models[0].head.weight, models[1].head.weight)


def test_a_stack_is_its_networks():
    nets, x = [net.double() for net in some_nets()], normal(6, 5)
    stack = NetStack(nets)
    assert torch.allclose(stack(x), torch.stack([net(x) for net in nets]))
    assert torch.allclose(stack.features(x), ConcatFeatures(nets)(x))
    own = normal(3, 6, 5)
    apart = torch.stack([net(each) for net, each in zip(nets, own, strict=True)])
    assert torch.allclose(stack(own), apart)
    assert torch.allclose(stack(own.mT.contiguous().mT), apart)
    alone = NetStack(nets[:1])
    assert torch.allclose(alone(x)[0], nets[0](x)) and alone(x[:1]).shape == (1, 1, 2)
    assert stack(x[:0]).shape == (3, 0, 2)
    assert not [p for p in nets[0].parameters() if p.data_ptr() == stack.weights[0].data_ptr()]


def test_a_stack_trains_as_its_networks_do():
    x, y = labelled(40, 5, 2)
    nets = [net.double() for net in some_nets()]
    stack = NetStack(nets)
    parts = [batches_of(x, y, seed) for seed in range(3)]
    options = {"steps": 10, "lr": 0.01, "weight_decay": 0.3, "schedule": "cosine", "device": "cpu"}

    def together(step):
        return tuple(map(torch.stack, zip(*(part(step) for part in parts), strict=True)))

    fit(stack, stacked_entropy, together, **options)
    for k, (net, part) in enumerate(zip(nets, parts, strict=True)):
        fit(net, entropy, part, **options)
        assert torch.allclose(stack(x)[k], net(x), atol=1e-9)
        assert torch.allclose(stack.weights[0][k].T, net.trunk[0][0].weight, atol=1e-9)


def test_gradients_of_a_stack_are_exact():
    stack = NetStack([net.double() for net in some_nets()])
    assert torch.autograd.gradcheck(stack, normal(4, 5, seed=5).requires_grad_())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_operations_of_a_stack_grow_with_the_networks(count):
    nets = some_nets(count, (16, 16), 2)
    expected = 2 * 128 * count * (16 * 16 + 16 * 2)
    assert count_flops(NetStack(nets), torch.randn(128, 16)) == expected
    assert count_flops(ConcatFeatures(nets), torch.randn(128, 16)) == 2 * 128 * count * 16 * 16


def test_parameters_of_the_experiment():
    four, wide = NetStack(some_nets(4, (16, 16))), FeatureNet((16, 64), 2)
    assert count_parameters(four).trainable == 1224 and count_parameters(wide).trainable == 1218
    twin = ParallelNet(lambda: FeatureNet((16, 16), 2), 4, 2)
    assert count_parameters(twin).trainable == 1218
    assert count_parameters(FeatureNet((64, 64, 64, 16), 4)).trainable * 4 == 37_712
    assert count_parameters(FeatureNet((64, 128, 128, 64), 4)).trainable == 33_348


# ---------------------------------------------------------------- features side by side


def test_concatenation_leaves_models_as_they_are():
    models, x = [Normed(3), Normed(2)], torch.randn(6, 5)
    models[0].eval()
    before = copy.deepcopy([model.state_dict() for model in models])
    cat = ConcatFeatures(models)
    cat.models[1].train()
    z = cat(x)
    assert z.shape == (6, 5) and not z.requires_grad and torch.equal(cat(x), z)
    assert not models[0].training and models[1].training and models[1].layers[2].training
    assert torch.equal(z[:, :3], models[0].features(x))
    assert torch.equal(cat.train()(x), z) and models[0].training
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(cat(x[:1])[0], z[0]) or torch.allclose(cat(x[:1])[0], z[0], atol=1e-6)
    assert cat(x[:0]).shape == (0, 5)


def test_modes_come_back_after_an_error():
    models = [Normed()]
    with pytest.raises(RuntimeError):
        ConcatFeatures(models)(torch.randn(2, 4))
    assert models[0].training


def test_gradients_pass_only_where_they_are_wanted():
    models, x = some_nets(), torch.randn(4, 5)
    z = ConcatFeatures(models, grad=True)(x)
    z.sum().backward()
    assert all(net.trunk[0][0].weight.grad is not None for net in models)
    with torch.no_grad():
        assert not ConcatFeatures(models, grad=True)(x).requires_grad


def test_a_function_of_x_serves_as_a_model_and_the_order_permutes():
    models = [nn.Flatten(), nn.Linear(4, 2)]
    x = torch.randn(3, 4)
    z = ConcatFeatures(models)(x)
    assert torch.equal(ConcatFeatures(models[::-1])(x), torch.cat([z[:, 4:], z[:, :4]], dim=1))
    assert torch.equal(ConcatFeatures(models[:1])(x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    nets, x = [net.to(dtype) for net in some_nets()], torch.randn(6, 5).to(dtype)
    z = ConcatFeatures(nets)(x)
    stacked = NetStack(nets).features(x)
    assert z.dtype == stacked.dtype == dtype and torch.allclose(z, stacked, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    nets, x = some_nets(), torch.randn(6, 5)
    parts = [ConcatFeatures(nets), NetStack(nets), ProbeHead(5, 2).eval()]
    parts.append(ParallelNet(lambda: FeatureNet((5, 3), 2), 2, 2))
    for part in parts:
        with torch.autocast("cpu", dtype=dtype):
            found = part(x)
        assert found.dtype == dtype and torch.allclose(found.float(), part(x), atol=0.05)


def test_one_graph(plain_python):
    nets, x = some_nets(), torch.randn(6, 5)
    parts = [ConcatFeatures(nets), NetStack(nets), ProbeHead(5, 2), ParallelNet(Normed, 2, 2)]
    parts.append(ConcatFeatures([Normed(), Normed()]))  # in training mode outside
    for part in parts:
        compiled = torch.compile(copy.deepcopy(part), fullgraph=True, backend="aot_eager")
        torch.manual_seed(0)
        found = compiled(x)
        torch.manual_seed(0)
        assert torch.allclose(found, part(x), atol=1e-6)
    assert all(module.training for module in parts[-1].modules())


# ---------------------------------------------------------------- probes


@pytest.mark.parametrize(
    ("rows", "d", "classes"), [(60, 7, 3), (30, 50, 4), (40, 40, 2), (9, 1, 2)]
)
def test_the_probe_is_that_of_scikit_learn(rows, d, classes):
    (z, y), (z_test, y_test) = labelled(rows, d, classes), labelled(50, d, classes, seed=9)
    if d > 2:
        z[:, 2] = z_test[:, 2] = 0.5  # a dead unit
    y, y_test = 3 * y - 2, 3 * y_test - 2  # labels need not count from 0
    found = linear_probe(z, y, z_test, y_test)
    mean, sd = z.mean(0), z.std(0, correction=0)
    sd[sd < 1e-8] = 1
    plain = RidgeClassifierCV(np.array(ALPHAS)).fit(((z - mean) / sd).numpy(), y.numpy())
    scaled = ((z_test - mean) / sd).numpy()
    assert found.alpha == pytest.approx(plain.alpha_)
    assert found.accuracy == pytest.approx(plain.score(scaled, y_test.numpy()))
    scores = found.head(z_test).detach().numpy()
    theirs = plain.decision_function(scaled)
    assert np.allclose(scores[:, -1] if classes == 2 else scores, theirs, atol=1e-9)
    raw = RidgeClassifierCV(np.array(ALPHAS)).fit(z.numpy(), y.numpy())
    assert linear_probe(z, y, z_test, y_test, standardize=False).alpha == pytest.approx(raw.alpha_)


def test_the_error_of_left_out_rows_is_that_of_leaving_them_out():
    z, targets = normal(12, 3), normal(12, 2, seed=4)
    errors, *_ = ridge(z, targets, (0.5,), standardize=False)
    wrong = []
    for row in range(12):
        kept = torch.arange(12) != row
        *_, weight, bias = ridge(z[kept], targets[kept], (0.5,), standardize=False)
        wrong.append(targets[row] - z[row] @ weight - bias)
    assert torch.allclose(errors[0], torch.stack(wrong).square().mean(0))


def test_tasks_are_probed_one_by_one():
    z, y = normal(80, 6), (normal(80, 3, seed=2) > 0).long()
    y[:, 1] = (z[:, 0] > 0).long()
    z_test = normal(50, 6, seed=5)
    y_test = torch.stack([torch.zeros(50).long(), (z_test[:, 0] > 0).long(), y[:50, 2]], dim=1)
    *_, weight, bias = ridge(z, 2 * y.double() - 1, each=True)
    found = ((z_test @ weight + bias > 0) == y_test.bool()).double().mean(0)
    alone = [linear_probe(z, y[:, j], z_test, y_test[:, j]).accuracy for j in range(3)]
    assert found.tolist() == pytest.approx(alone) and found[1] > 0.9


@SMALL
@given(SEEDS, st.integers(2, 5))
def test_copies_are_no_information(seed, copies):
    z, y = labelled(30, 4, 3, seed=seed)
    z_test, y_test = labelled(20, 4, 3, seed=seed + 5)
    once = linear_probe(z, y, z_test, y_test, alphas=[0.7])
    many = linear_probe(
        z.repeat(1, copies), y, z_test.repeat(1, copies), y_test, alphas=[0.7 * copies]
    )
    assert torch.allclose(once.head(z_test), many.head(z_test.repeat(1, copies)), atol=1e-8)
    assert once.accuracy == many.accuracy


@SMALL
@given(SEEDS)
def test_order_does_not_matter_and_features_only_lower_the_training_objective(seed):
    z, y = labelled(40, 6, 3, seed=seed)
    order = torch.randperm(6)
    first, mixed = linear_probe(z, y, z, y), linear_probe(z[:, order], y, z[:, order], y)
    assert first.alpha == mixed.alpha and first.accuracy == mixed.accuracy
    targets = 2 * F.one_hot(y).double() - 1

    def objective(part):
        part = (part - part.mean(0)) / part.std(0, correction=0)
        *_, weight, bias = ridge(part, targets, (1.0,))
        return (targets - part @ weight - bias).square().sum() + weight.square().sum()

    values = [objective(z[:, :count]).item() for count in (2, 4, 6)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_probe_of_other_dtypes_computes_in_double(dtype):
    z, y = labelled(60, 5, 3)
    z = z.to(dtype)
    found, wide = linear_probe(z, y, z, y), linear_probe(z.double(), y, z.double(), y)
    assert found.accuracy == wide.accuracy and found.alpha == wide.alpha
    assert found.head.weight.dtype == torch.float32
    wide.head(z.double()).sum().backward()  # an ordinary layer


def test_a_probe_of_strided_rows_draws_nothing_and_counts_unknown_classes_as_wrong():
    z, y = labelled(60, 5, 3)
    before = torch.get_rng_state()
    strided = torch.stack([z, z], dim=2)[..., 0]
    found = linear_probe(strided, y, strided[:1], y[:1])
    assert torch.equal(torch.get_rng_state(), before) and not strided.is_contiguous()
    assert torch.allclose(found.head.weight, linear_probe(z, y, z, y).head.weight)
    assert linear_probe(z, y, z, torch.full((60,), 8)).accuracy == 0


def test_penalties_of_any_size_stay_finite():
    z, y = labelled(6, 9, 2)
    for alpha in (1e-30, 1e30):
        found = linear_probe(z, y, z, y, alphas=[alpha])
        assert found.head.weight.isfinite().all()
    assert linear_probe(torch.ones(6, 2), y, torch.ones(6, 2), y).accuracy == 0.5


# ---------------------------------------------------------------- heads, the twin, fine-tuning


@SMALL
@given(SEEDS, st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans())
def test_averaged_heads_give_the_mean_of_the_logits(seed, widths, bias):
    heads = [nn.Linear(width, 3, bias=bias).double() for width in widths]
    parts = [normal(4, width, seed=seed + width) for width in widths]
    head = average_heads(heads)
    expected = sum(head(z) for head, z in zip(heads, parts, strict=True)) / len(heads)
    assert torch.allclose(head(torch.cat(parts, dim=1)), expected, atol=1e-12)
    assert (head.bias is None) is not bias and head.weight.requires_grad


def test_the_probe_head_starts_near_zero():
    torch.manual_seed(0)
    head = ProbeHead(400, 9)
    assert head.linear.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (head.linear.bias == 0).all() and isinstance(ProbeHead(4, 2, False).bn, nn.Identity)


def test_the_twin_has_one_head_and_no_others():
    twin = ParallelNet(lambda: FeatureNet((5, 3), 7), 4, 2)
    x = torch.randn(6, 5)
    assert twin(x).shape == (6, 2) and twin.features(x).shape == (6, 12)
    assert torch.equal(twin.features(x), ConcatFeatures(twin.models)(x))
    assert sum(p.numel() for p in twin.parameters()) == 4 * (5 * 3 + 3) + 12 * 2 + 2
    twin(x).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_the_twin_of_one_layer_is_a_wider_network():
    twin, wide, x = (
        ParallelNet(lambda: FeatureNet((5, 3), 2), 4, 2),
        FeatureNet((5, 12), 2),
        normal(6, 5),
    )
    layers = [net.trunk[0][0] for net in twin.models]
    with torch.no_grad():
        wide.trunk[0][0].weight.copy_(torch.cat([layer.weight for layer in layers]))
        wide.trunk[0][0].bias.copy_(torch.cat([layer.bias for layer in layers]))
    wide.head.load_state_dict(twin.head.state_dict())
    assert torch.allclose(twin(x.float()), wide(x.float()), atol=1e-6)


def test_two_stages_on_copies():
    x, y = labelled(60, 5, 3)
    models = [Normed().double(), FeatureNet((5, 6), 2).double()]
    before = copy.deepcopy([model.state_dict() for model in models])
    state = torch.get_rng_state()
    tuned, head = two_stage_finetune(models, x, y, 3, steps=40, head_steps=0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(model.state_dict()[name], value) for name, value in old.items())
    for net in tuned:
        net.eval()
    logits = head(ConcatFeatures(tuned)(x))
    assert torch.allclose(logits, sum(net(x) for net in tuned) / 2)
    again, trained = two_stage_finetune(models, x, y, 3, steps=40, head_steps=30, seed=1)
    pairs = zip(tuned[0].parameters(), again[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    z = ConcatFeatures(again)(x)
    assert F.cross_entropy(trained(z), y) < F.cross_entropy(logits, y) < math.log(3)
    one, _ = two_stage_finetune(models[1:], x[:1], y[:1], 3, steps=1)  # a single row
    assert one[0](x[:1]).shape == (1, 3)


def test_a_student_learns_what_its_teachers_know():
    x = normal(300, 5).float()
    teachers = some_nets(3, (5, 4))
    torch.manual_seed(1)
    student = FeatureNet((5, 32), 2)
    z = ConcatFeatures(teachers)(x)
    before = cross_predictability(student.features(x), z)
    found = distill_features(student, teachers, x, steps=300, lr=0.01)
    assert found is student
    after = cross_predictability(student.features(x), z)
    assert 1 - after < 0.6 * (1 - before)


# ---------------------------------------------------------------- how features differ


@SMALL
@given(SEEDS, st.integers(1, 6), st.floats(0.01, 100))
def test_effective_rank_knows_no_rotation_and_no_scale(seed, d, scale):
    z = normal(20, d, seed=seed)
    rank = effective_rank(z)
    assert 1 <= rank <= d + 1e-9
    turn, _ = torch.linalg.qr(normal(d, d, seed=seed + 1))
    assert effective_rank(scale * z @ turn + 5) == pytest.approx(rank)


def test_effective_rank_by_hand():
    square = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert effective_rank(square) == pytest.approx(2)
    assert effective_rank(square[:, :1].repeat(1, 5)) == pytest.approx(1)
    share = torch.tensor([0.9, 0.1])
    expected = math.exp(-(share * share.log()).sum())
    assert effective_rank(square * torch.tensor([3.0, 1.0])) == pytest.approx(expected)


@SMALL
@given(SEEDS, st.integers(1, 6), st.integers(1, 4))
def test_cross_predictability_is_r_squared(seed, d, e):
    a, b = normal(25, d, seed=seed), normal(25, e, seed=seed + 1)
    fitted = torch.from_numpy(LinearRegression().fit(a.numpy(), b.numpy()).predict(a.numpy()))
    rest = (b - fitted.reshape(b.shape)).square().sum() / (b - b.mean(0)).square().sum()
    assert cross_predictability(a, b) == pytest.approx(1 - rest.item(), abs=1e-9)
    doubled = torch.cat([a, a, torch.ones(25, 1)], dim=1)  # rank is not full
    assert cross_predictability(doubled, b) == pytest.approx(1 - rest.item(), abs=1e-9)
    assert cross_predictability(a, 2 * a[:, :1] + 3) == pytest.approx(1)


def test_expected_number_of_features_kept():
    m, r, n = 10, 3, 4
    kept = torch.rand(20_000, n, m).argsort(-1) < r
    assert kept.any(1).sum(1).double().mean().item() == pytest.approx(
        m * (1 - (1 - r / m) ** n), abs=0.03
    )


# ---------------------------------------------------------------- classes that shift


def test_classes_are_split_between_two_tasks():
    data = digits(3, 1200)
    source, target = class_shift(data, 4, 300, seed=5)
    _, whole = class_shift(data, 4, 600, seed=5)
    assert torch.equal(whole.train_images[:300], target.train_images)
    assert len(target.train_images) == 300
    assert len(source.test_images) + len(target.test_images) == 597
    assert source.num_classes == 4 and target.num_classes == 6
    for task in (source, target):
        for y in (task.train_labels, task.test_labels):
            assert y.unique().tolist() == list(range(task.num_classes))
    again, _ = class_shift(data, 4, 300, seed=5)
    assert torch.equal(again.train_labels, source.train_labels)
    # A class keeps its images: each label of a split stands for one digit.
    images = torch.cat([data.train_images, data.test_images]) - data.train_images.mean(0)
    labels = torch.cat([data.train_labels, data.test_labels]).tolist()
    digit_of = dict(zip(map(as_key, images), labels, strict=True))
    pairs = zip(source.train_labels.tolist(), map(as_key, source.train_images), strict=True)
    assert len({(label, digit_of[key]) for label, key in pairs}) == 4


def as_key(image):
    return tuple(image.flatten().tolist())


def test_public_images_come_from_a_local_folder_of_the_same_format(tmp_path):
    hub = pytest.importorskip("datasets")
    colours = np.random.default_rng(0).integers(0, 255, (24, 6, 6, 3), np.uint8)
    from PIL import Image

    for split, count in (("train", 16), ("test", 8)):
        (tmp_path / "set").mkdir(exist_ok=True)
        rows = {
            "image": [Image.fromarray(colour) for colour in colours[:count]],
            "label": [i % 4 for i in range(count)],
        }
        hub.Dataset.from_dict(rows).to_parquet(str(tmp_path / "set" / f"{split}.parquet"))
    source, target = class_shift(load_images(str(tmp_path / "set")), 2, 3)
    assert source.train_images.shape == (8, 3, 6, 6) and len(target.train_images) == 3
    assert target.test_labels.unique().tolist() == [0, 1]


# ---------------------------------------------------------------- the authors' numbers


def extractor(tensors, k):
    net = FeatureNet((5, len(tensors[f"b{k}"])), 3).double()
    with torch.no_grad():
        net.trunk[0][0].weight.copy_(tensors[f"W{k}"])
        net.trunk[0][0].bias.copy_(tensors[f"b{k}"])
    return net


def of_head(case):
    given = case.tensors
    z = ConcatFeatures([extractor(given, k) for k in range(3)])(given["x"]).requires_grad_()
    heads = [ProbeHead(9, 3, use_bn).double() for use_bn in (True, False)]
    with torch.no_grad():
        for head in heads:
            head.linear.weight.copy_(given["head.weight"])
            head.linear.bias.copy_(given["head.bias"])
        heads[0].bn.weight.copy_(given["bn.weight"])
        heads[0].bn.bias.copy_(given["bn.bias"])
    head = heads[0]
    output = head(z)
    output.square().sum().backward()
    of = "gradient of sum(output**2) w.r.t."
    return {
        "concatenated features": z,
        "head output, train mode": output,
        f"{of} features": z.grad,
        f"{of} head.weight": head.linear.weight.grad,
        f"{of} bn.weight": head.bn.weight.grad,
        "running mean after one step": head.bn.running_mean,
        "running variance after one step": head.bn.running_var,
        "head output, eval mode after that step": head.eval()(z),
        "head output, use_bn=False": heads[1](z),
    }


def of_average(case):
    heads = []
    for k in range(4):
        weight, bias = case.tensors[f"V{k}"], case.tensors[f"c{k}"]
        head = nn.Linear(*weight.shape[::-1]).double()
        head.load_state_dict({"weight": weight, "bias": bias})
        heads.append(head)
    head = average_heads(heads)
    return {"weight": head.weight, "bias": head.bias, "logits": head(case.tensors["z"])}


def of_probe(case):
    t = case.tensors
    alphas = case.settings["alphas"]
    found = linear_probe(t["z"], t["y"], t["z_test"], t["y_test"], alphas)
    return {
        "chosen alpha": [found.alpha],
        "head.weight on raw features": found.head.weight,
        "head.bias on raw features": found.head.bias,
        "test scores": found.head(t["z_test"]),
        "test accuracy": [found.accuracy],
        "effective_rank(z)": [effective_rank(t["z"])],
        "cross_predictability(z, z_other)": [cross_predictability(t["z"], t["z_other"])],
    }


REFERENCE = {
    "concatenated features and probe head with BatchNorm": of_head,
    "averaged heads of four networks of different widths": of_average,
    "linear probe, effective rank, cross predictability": of_probe,
}


@pytest.mark.parametrize("name", REFERENCE)
def test_the_authors_numbers(name, agree):
    case = load_reference("rich_representations")[name]
    agree(case, REFERENCE[name](case))


def test_every_reference_case_is_compared():
    assert {case.name for case in load_reference("rich_representations")} == set(REFERENCE)


# ---------------------------------------------------------------- bad input

Z, Y = labelled(12, 4, 2)
ONE = Normed()


def of_z(z=Z, y=Y, z_test=Z, y_test=Y, **options):
    return linear_probe(z, y, z_test, y_test, **options)


def images(classes):
    x, y = torch.rand(12, 1, 2, 2), torch.arange(12) % classes
    return ImageData(x, y, x, y, classes, "here")


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: redundant_xors(0), "rows must be at least 1, got 0"),
        (lambda: redundant_xors(3, m=0), "m must be at least 1, got 0"),
        (lambda: FeatureNet([4], 2), "sizes must hold two numbers or more, got .4."),
        (lambda: FeatureNet([4, 0], 2), r"sizes\[1\] must be at least 1, got 0"),
        (lambda: FeatureNet([4, 3], 2)(torch.ones(5)), r"x must be \(batch, 4\), got shape \(5,\)"),
        (lambda: train_episodes(nn.Flatten, id, []), "seeds must be different numbers, got"),
        (lambda: train_episodes(nn.Flatten, id, [1, 1]), r"different numbers, got \[1, 1\]"),
        (lambda: ConcatFeatures([]), "models must hold at least one model, got none"),
        (lambda: ConcatFeatures([nn.Identity()])(torch.ones(2, 3, 4)), "features of model 0 must"),
        (lambda: ConcatFeatures([nn.Flatten(0)])(torch.ones(2, 3)), r"got shape \(6,\)"),
        (lambda: NetStack([]), "nets must have one shape, got 0"),
        (lambda: NetStack([FeatureNet([4, 3], 2), FeatureNet([4, 2], 2)]), "one shape, got 2"),
        (lambda: NetStack(some_nets())(torch.ones(2, 6, 5)), r"x must be \(3, batch, 5\)"),
        (lambda: NetStack(some_nets())(torch.ones(6, 4)), r"x must be \(batch, 5\)"),
        (lambda: of_z(y=Y[:5]), r"y_train must be \(12\), got shape \(5,\)"),
        (lambda: of_z(z_test=Z[:0], y_test=Y[:0]), "rows of z_test must be at least 1, got 0"),
        (lambda: of_z(z_test=Z[:, :2]), r"z_test must be \(rows, 4\), got shape \(12, 2\)"),
        (lambda: of_z(z=Z[0], y=Y[:4]), r"z_train must be \(rows, d\)"),
        (lambda: of_z(y=torch.zeros_like(Y)), r"two classes or more, got \[0\]"),
        (lambda: of_z(y=Y.float()), "labels must be whole numbers, got torch.float32"),
        (lambda: of_z(z=Z / 0), "z_train must be finite"),
        (lambda: of_z(z_test=Z * math.nan), "z_test must be finite, got nan"),
        (lambda: of_z(alphas=[]), "number of alphas must be at least 1, got 0"),
        (lambda: of_z(alphas=[1.0, 0.0]), r"alphas\[1\] must be positive and finite, got 0"),
        (lambda: average_heads([]), r"one number of classes, got \[\]"),
        (lambda: average_heads([nn.Linear(2, 3), nn.Linear(2, 4)]), r"got \[3, 4\]"),
        (lambda: ProbeHead(0, 2), "dim must be at least 1, got 0"),
        (lambda: ProbeHead(3, 2)(torch.ones(2, 4)), r"z must be \(batch, 3\)"),
        (lambda: ParallelNet(lambda: FeatureNet([4, 3], 2), 0, 2), "n must be at least 1, got 0"),
        (lambda: ParallelNet(nn.Flatten, 2, 2), "a new model with a linear head"),
        (lambda: ParallelNet(lambda: ONE, 2, 2), "a new model with a linear head"),
        (lambda: two_stage_finetune([], Z, Y, 2), "number of models must be at least 1, got 0"),
        (lambda: two_stage_finetune(some_nets(), Z, Y, 1), r"y must be in 0..0, got 0 to 1"),
        (lambda: two_stage_finetune(some_nets(), Z, Y[:3], 2), r"y must be \(12\)"),
        (lambda: two_stage_finetune(some_nets(), Z, Y, 2, steps=0), "steps must be at least 1"),
        (lambda: two_stage_finetune(some_nets(), Z, Y, 2, head_steps=-1), "head_steps must be"),
        (lambda: distill_features(some_nets()[0], [], Z), "models must hold at least one model"),
        (lambda: distill_features(some_nets()[0], some_nets(), Z[:0]), "rows of x must be at"),
        (lambda: effective_rank(torch.ones(4, 2)), "must vary over two rows or more, got 4 equal"),
        (lambda: effective_rank(torch.ones(1, 2)), "got 1 equal rows"),
        (lambda: effective_rank(torch.ones(4)), r"z must be \(rows, d\)"),
        (lambda: effective_rank(torch.tensor([[1.0], [math.nan]])), "z must be finite, got nan"),
        (lambda: cross_predictability(Z, Z[:3]), r"z_b must be \(12, e\)"),
        (lambda: class_shift(images(4), 3, 2), "num_source must be in 2..2, got 3"),
        (lambda: class_shift(images(4), 2, 7), "num_labels must be in 1..6, got 7"),
    ],
)  # fmt: skip
def test_messages_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
