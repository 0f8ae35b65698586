"""The losses equal slow loops over the definitions, PyTorch's own losses and pytorch-metric-learning's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances, losses
from pytorch_metric_learning.reducers import MeanReducer

from triplet_loss import TripletLoss

KINDS = ["cosine", "euclidean"]


def batch(n=16, size=512):
    return [torch.randn(n, size, requires_grad=True) for _ in range(3)]


def copies(tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def distance(a, b, kind):
    """The definition, spelled out for two vectors of Python floats."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    a, b = a / np.sqrt((a * a).sum()), b / np.sqrt((b * b).sum())
    return 1 - (a * b).sum() if kind == "cosine" else np.sqrt(((a - b) ** 2).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_a_slow_loop(kind):
    batches = batch()
    rows = zip(*(x.detach().numpy() for x in batches), strict=True)
    expected = [max(0, distance(a, p, kind) - distance(a, n, kind) + 0.3) for a, p, n in rows]
    assert TripletLoss(0.3, kind)(*batches).item() == pytest.approx(np.mean(expected), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_pytorchs(kind):
    ours = batch()
    theirs = copies(ours)
    if kind == "cosine":
        cosine = {"distance_function": lambda x, y: 1 - F.cosine_similarity(x, y)}
        reference = torch.nn.TripletMarginWithDistanceLoss(**cosine, margin=0.2)(*theirs)
    else:
        reference = torch.nn.TripletMarginLoss(margin=0.2, eps=0.0)(*(F.normalize(x) for x in theirs))
    loss = TripletLoss(0.2, kind)(*ours)
    torch.testing.assert_close(loss, reference)
    loss.backward()
    reference.backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_index_form_equals_three_matrices_and_pytorch_metric_learning(kind):
    criterion, triplets = TripletLoss(0.3, kind), torch.randint(0, 12, (40, 3))
    embeddings = torch.randn(12, 512, requires_grad=True)
    (copy,) = copies([embeddings])
    loss, direct = criterion.loss(*criterion.distances(embeddings, triplets)), criterion(*copy[triplets.T])
    torch.testing.assert_close(loss, direct)
    gradients = torch.autograd.grad(loss, embeddings)[0], torch.autograd.grad(direct, copy)[0]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-4)

    metric = distances.CosineSimilarity() if kind == "cosine" else distances.LpDistance()
    library = losses.TripletMarginLoss(margin=0.3, distance=metric, reducer=MeanReducer())
    reference = library(embeddings.detach(), torch.arange(12), indices_tuple=tuple(triplets.unbind(1)))
    torch.testing.assert_close(loss.detach(), reference, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("values", ["random", "tied"])
def test_quadruplet_loss_is_the_mean_over_all_comparisons(values):
    ours = [torch.rand(9, dtype=torch.float64) for _ in range(2)]
    if values == "tied":  # and no difference of two is the margin, where the derivative jumps
        ours = [(8 * x).round() / 8 for x in ours]
    ours, theirs = copies(ours), copies(ours)
    loss = TripletLoss(0.3).quadruplet_loss(*ours)
    reference = sum(F.relu(p - n + 0.3) for p in theirs[0] for n in theirs[1]) / 81
    assert loss.item() == pytest.approx(reference.item(), abs=1e-12)
    loss.backward()
    reference.backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_quadruplet_loss_of_one_triplet_is_the_triplet_loss():
    criterion, distances_ = TripletLoss(0.3), (torch.tensor([0.5]), torch.tensor([0.4]))
    assert criterion.quadruplet_loss(*distances_).item() == pytest.approx(criterion.loss(*distances_).item())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_where_embeddings_coincide(kind):
    criterion, ours = TripletLoss(0.3, kind), copies([torch.randn(4, 512)] * 3)
    loss = criterion(*ours)
    loss.backward()
    assert loss.item() == pytest.approx(0.3, abs=1e-6)
    one = torch.ones(2, 512, requires_grad=True)
    to_positive, to_negative = criterion.distances(one, torch.tensor([[0, 1, 1], [0, 0, 1]]))
    (criterion.loss(to_positive, to_negative) + criterion.quadruplet_loss(to_positive, to_negative)).backward()
    assert all(torch.isfinite(x.grad).all() for x in (*ours, one))


def test_statistics_of_a_hand_made_batch():
    criterion = TripletLoss(margin=0.3)
    to_positive = torch.tensor([0.1, 0.5, 0.4, 0.2], requires_grad=True)
    to_negative = torch.tensor([0.9, 0.3, 0.5, 0.2])  # easy, violated, active, active with a tie
    values = criterion.statistics(to_positive, to_negative)
    assert values.shape == (5,)
    assert not values.requires_grad
    assert dict(zip(criterion.STATISTICS, values.tolist(), strict=True)) == pytest.approx(
        {
            "loss": (0 + 0.5 + 0.2 + 0.3) / 4,
            "positive_distance": 0.3,
            "negative_distance": 0.475,
            "active_triplets": 0.75,
            "violated_triplets": 0.25,
        }
    )


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_float32_under_autocast(kind):
    embeddings, triplets = torch.randn(6, 512), torch.tensor([[0, 1, 2], [3, 4, 5]])
    criterion = TripletLoss(0.3, kind)

    def both(values):
        return *criterion.distances(values, triplets), criterion(*values[triplets.T])

    expected = both(embeddings)
    with torch.autocast("cpu", torch.bfloat16):
        got = both(embeddings)
        half = both(embeddings.bfloat16())
    assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))
    assert {x.dtype for x in half} == {torch.float32}


@pytest.mark.parametrize("settings", [{"margin": 0}, {"margin": float("nan")}, {"distance": "manhattan"}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match="must be"):
        TripletLoss(**settings)
