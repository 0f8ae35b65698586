import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances, losses

from triplet_dataset import TwinTripletDataset
from triplet_loss import TripletLoss

KINDS = ["cosine", "euclidean"]


def batch(n=16, size=512):
    return [torch.randn(n, size, dtype=torch.float32, requires_grad=True) for _ in range(3)]


def distance(a, b, kind):
    """The definition, spelled out for two vectors of Python floats."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    a, b = a / np.sqrt((a * a).sum()), b / np.sqrt((b * b).sum())
    return 1 - (a * b).sum() if kind == "cosine" else np.sqrt(((a - b) ** 2).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_a_slow_loop(kind):
    a, p, n = batch()
    rows = [x.detach().numpy() for x in (a, p, n)]
    expected = np.mean(
        [max(0, distance(x, y, kind) - distance(x, z, kind) + 0.3) for x, y, z in zip(*rows, strict=True)]
    )
    assert TripletLoss(0.3, kind)(a, p, n).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_torchs(kind):
    ours, theirs = batch(), None
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    TripletLoss(0.2, kind)(*ours).backward()
    if kind == "cosine":
        reference = torch.nn.TripletMarginWithDistanceLoss(
            distance_function=lambda x, y: 1 - F.cosine_similarity(x, y), margin=0.2
        )(*theirs)
    else:
        reference = F.triplet_margin_loss(*(F.normalize(x) for x in theirs), margin=0.2, eps=0.0)
    reference.backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("parts", [(9,), (4, 0, 5)])
def test_across_equals_all_comparisons_also_in_parts(parts):
    criterion = TripletLoss(0.3)
    positive, negative = torch.rand(2, 9, dtype=torch.float64).requires_grad_().unbind(0)
    leaf = [positive.detach().requires_grad_(), negative.detach().requires_grad_()]
    expected = (leaf[0][:, None] - leaf[1][None, :] + 0.3).clamp_min(0).mean()
    gradients = torch.autograd.grad(expected, leaf)
    cut = [x.detach().clone().requires_grad_() for x in leaf]
    pieces = zip(*(x.split(parts) for x in cut), strict=True)
    loss = sum(criterion.across(p, n, 9, positive, negative) for p, n in pieces)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    for got, gradient in zip(torch.autograd.grad(loss, cut), gradients, strict=True):
        torch.testing.assert_close(got, gradient)
    if len(parts) == 1:
        assert criterion.across(*leaf).item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_index_form_equals_three_matrices_and_pytorch_metric_learning(kind):
    criterion = TripletLoss(0.3, kind)
    embeddings = torch.randn(12, 512, requires_grad=True)
    triplets = torch.randint(0, 12, (40, 3))
    loss = criterion.loss(*criterion.distances(embeddings, triplets))
    (gradient,) = torch.autograd.grad(loss, embeddings)

    copy = embeddings.detach().clone().requires_grad_()
    direct = criterion(*(copy[triplets[:, i]] for i in range(3)))
    torch.testing.assert_close(loss, direct)
    torch.testing.assert_close(gradient, torch.autograd.grad(direct, copy)[0], atol=1e-7, rtol=1e-4)

    metric = distances.CosineSimilarity() if kind == "cosine" else distances.LpDistance()
    from pytorch_metric_learning.reducers import MeanReducer

    library = losses.TripletMarginLoss(margin=0.3, distance=metric, reducer=MeanReducer())
    reference = library(embeddings.detach(), torch.arange(12), indices_tuple=tuple(triplets.unbind(1)))
    torch.testing.assert_close(loss.detach(), reference, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_where_embeddings_coincide(kind):
    a = torch.randn(4, 512)
    p, n = a.clone(), a.clone()
    for x in (a, p, n):
        x.requires_grad_()
    loss = TripletLoss(0.3, kind)(a, p, n)
    loss.backward()
    assert loss.item() == pytest.approx(0.3, abs=1e-6)
    assert all(torch.isfinite(x.grad).all() for x in (a, p, n))
    one = torch.ones(2, 512, requires_grad=True)
    criterion = TripletLoss(0.3, kind)
    criterion.loss(*criterion.distances(one, torch.tensor([[0, 1, 1], [0, 0, 1]]))).backward()
    assert torch.isfinite(one.grad).all()


def test_statistics_of_a_hand_made_batch():
    criterion = TripletLoss(margin=0.3)
    to_positive = torch.tensor([0.1, 0.5, 0.4, 0.2])
    to_negative = torch.tensor([0.9, 0.3, 0.5, 0.2])  # easy, violated, active, active with a tie
    got = {name: value.item() for name, value in criterion.statistics(to_positive, to_negative).items()}
    assert got == pytest.approx(
        {
            "loss": (0 + 0.5 + 0.2 + 0.3) / 4,
            "positive_distance": 0.3,
            "negative_distance": 0.475,
            "active_triplets": 0.75,
            "violated_triplets": 0.25,
        }
    )


def test_loss_is_float32_under_autocast():
    embeddings = F.normalize(torch.randn(6, 512))
    triplets = torch.tensor([[0, 1, 2], [3, 4, 5]])
    criterion = TripletLoss()
    expected = criterion.distances(embeddings, triplets)
    with torch.autocast("cpu", torch.bfloat16):
        got = criterion.distances(embeddings, triplets)
    assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))


def test_statistics_over_a_dataset_equal_one_large_batch():
    images = {name: [f"{name}{i}" for i in range(n)] for name, n in (("a", 4), ("b", 3), ("c", 1), ("d", 2))}
    dataset = TwinTripletDataset(images, [("a", "b"), ("c", "d"), ("b", "d")], percentage=60)
    embeddings = torch.randn(len(dataset.images.paths), 16)
    criterion = TripletLoss(0.3, "euclidean")
    triplets = torch.from_numpy(dataset.triplets(np.arange(len(dataset))))
    expected = criterion.statistics(*criterion.distances(embeddings, triplets))
    assert criterion.over(dataset, embeddings) == pytest.approx({k: v.item() for k, v in expected.items()}, abs=1e-6)


@pytest.mark.parametrize("arguments", [{"margin": 0}, {"margin": float("nan")}, {"distance": "manhattan"}])
def test_wrong_settings_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        TripletLoss(**arguments)
