"""The losses equal slow loops over their definitions and the losses of two libraries."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances, losses
from pytorch_metric_learning.reducers import MeanReducer

import triplet_loss
from triplet_loss import MarginSoftmax, TripletLoss

KINDS = ["cosine", "euclidean"]
MARGIN = 0.3


# ---- the definitions, spelled out ----------------------------------------------------------------


def slow_distance(a, b, kind):
    """The distance of two vectors, in float64."""
    a = np.asarray(a, np.float64)
    b = np.asarray(b, np.float64)
    a = a / np.sqrt((a * a).sum())
    b = b / np.sqrt((b * b).sum())
    if kind == "cosine":
        return 1 - (a * b).sum()
    return np.sqrt(((a - b) ** 2).sum())


def slow_quadruplet_loss(to_positive, to_negative):
    """The mean over all pairs of a distance to a positive and a distance to a negative."""
    losses_of_pairs = []
    for positive in to_positive:
        for negative in to_negative:
            losses_of_pairs.append(F.relu(positive - negative + MARGIN))
    return torch.stack(losses_of_pairs).mean()


def copies(tensors):
    """New leaves with the values of these tensors, which take gradients of their own."""
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


# ---- the triplet loss ----------------------------------------------------------------------------


@pytest.fixture
def batch():
    """[anchors, positives, negatives], (16, 512) each; the vectors are not of unit length."""
    return [torch.randn(16, 512, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_a_slow_loop(batch, kind):
    expected = []
    for anchor, positive, negative in zip(*(x.detach().numpy() for x in batch), strict=True):
        to_positive = slow_distance(anchor, positive, kind)
        to_negative = slow_distance(anchor, negative, kind)
        expected.append(max(0, to_positive - to_negative + MARGIN))
    loss = TripletLoss(MARGIN, kind)(*batch)
    assert loss.item() == pytest.approx(np.mean(expected), abs=1e-6)


def pytorchs_loss(anchor, positive, negative, kind, margin):
    """PyTorch's own triplet loss with one of our two distances."""
    if kind == "cosine":
        criterion = torch.nn.TripletMarginWithDistanceLoss(
            distance_function=lambda x, y: 1 - F.cosine_similarity(x, y), margin=margin
        )
        return criterion(anchor, positive, negative)
    criterion = torch.nn.TripletMarginLoss(margin=margin, eps=0.0)
    return criterion(F.normalize(anchor), F.normalize(positive), F.normalize(negative))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_pytorchs(batch, kind):
    copy = copies(batch)
    loss = TripletLoss(0.2, kind)(*batch)
    reference = pytorchs_loss(*copy, kind, margin=0.2)
    torch.testing.assert_close(loss, reference)
    loss.backward()
    reference.backward()
    for ours, theirs in zip(batch, copy, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_index_form_equals_three_matrices(kind):
    criterion = TripletLoss(MARGIN, kind)
    triplets = torch.randint(0, 12, (40, 3))
    embeddings = torch.randn(12, 512, requires_grad=True)
    (copy,) = copies([embeddings])
    loss = criterion.loss(*criterion.distances(embeddings, triplets))
    anchor, positive, negative = copy[triplets.T]
    direct = criterion(anchor, positive, negative)
    torch.testing.assert_close(loss, direct)
    loss.backward()
    direct.backward()
    torch.testing.assert_close(embeddings.grad, copy.grad, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_index_form_equals_pytorch_metric_learning(kind):
    criterion = TripletLoss(MARGIN, kind)
    triplets = torch.randint(0, 12, (40, 3))
    embeddings = torch.randn(12, 512)
    loss = criterion.loss(*criterion.distances(embeddings, triplets))

    distance = {"cosine": distances.CosineSimilarity(), "euclidean": distances.LpDistance()}[kind]
    library = losses.TripletMarginLoss(margin=MARGIN, distance=distance, reducer=MeanReducer())
    labels = torch.arange(12)  # which the library does not look at, since the triplets are given
    reference = library(embeddings, labels, indices_tuple=tuple(triplets.unbind(1)))
    torch.testing.assert_close(loss, reference, atol=1e-6, rtol=1e-5)


# ---- the quadruplet loss -------------------------------------------------------------------------


def random_distances():
    return [torch.rand(9, dtype=torch.float64) for _ in range(2)]


def tied_distances():
    """Multiples of 1/8: many are equal, but no two differ by the margin, where the slope jumps."""
    return [(8 * values).round() / 8 for values in random_distances()]


@pytest.mark.parametrize("make_distances", [random_distances, tied_distances])
def test_quadruplet_loss_and_gradients_equal_the_mean_over_all_comparisons(make_distances):
    values = make_distances()
    ours = copies(values)
    theirs = copies(values)
    loss = TripletLoss(MARGIN).quadruplet_loss(*ours)
    reference = slow_quadruplet_loss(*theirs)
    assert loss.item() == pytest.approx(reference.item(), abs=1e-12)
    loss.backward()
    reference.backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_quadruplet_loss_of_one_triplet_is_the_triplet_loss():
    criterion = TripletLoss(MARGIN)
    to_positive = torch.tensor([0.5])
    to_negative = torch.tensor([0.4])
    quadruplet = criterion.quadruplet_loss(to_positive, to_negative)
    triplet = criterion.loss(to_positive, to_negative)
    assert quadruplet.item() == pytest.approx(triplet.item())


# ---- numbers that are hard -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_where_all_three_embeddings_coincide_the_loss_is_the_margin(kind):
    same = copies([torch.randn(4, 512)] * 3)
    loss = TripletLoss(MARGIN, kind)(*same)
    assert loss.item() == pytest.approx(MARGIN, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_where_embeddings_coincide(kind):
    criterion = TripletLoss(MARGIN, kind)
    same = copies([torch.randn(4, 512)] * 3)
    criterion(*same).backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in same)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_both_losses_are_finite_where_an_image_meets_itself(kind):
    criterion = TripletLoss(MARGIN, kind)
    embeddings = torch.ones(2, 512, requires_grad=True)
    triplets = torch.tensor([[0, 1, 1], [0, 0, 1]])
    to_positive, to_negative = criterion.distances(embeddings, triplets)
    loss = criterion.loss(to_positive, to_negative)
    loss = loss + criterion.quadruplet_loss(to_positive, to_negative)
    loss.backward()
    assert torch.isfinite(embeddings.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind):
    criterion = TripletLoss(MARGIN, kind)
    embeddings = torch.randn(6, 512)
    triplets = torch.tensor([[0, 1, 2], [3, 4, 5]])
    distances_alone = criterion.distances(embeddings, triplets)
    loss_alone = criterion(*embeddings[triplets.T])
    with torch.autocast("cpu", torch.bfloat16):
        to_positive, to_negative = criterion.distances(embeddings, triplets)
        loss = criterion(*embeddings[triplets.T])
    assert torch.equal(to_positive, distances_alone[0])
    assert torch.equal(to_negative, distances_alone[1])
    assert torch.equal(loss, loss_alone)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_embeddings_give_float32_distances_and_losses(kind):
    criterion = TripletLoss(MARGIN, kind)
    embeddings = torch.randn(6, 512).bfloat16()
    triplets = torch.tensor([[0, 1, 2], [3, 4, 5]])
    with torch.autocast("cpu", torch.bfloat16):
        to_positive, to_negative = criterion.distances(embeddings, triplets)
        loss = criterion(*embeddings[triplets.T])
    assert to_positive.dtype == torch.float32
    assert to_negative.dtype == torch.float32
    assert loss.dtype == torch.float32


# ---- statistics and settings ---------------------------------------------------------------------


def test_statistics_of_a_hand_made_batch():
    criterion = TripletLoss(MARGIN)
    # An easy triplet, a violated one, an active one, and an active one with a tie.
    to_positive = torch.tensor([0.1, 0.5, 0.4, 0.2], requires_grad=True)
    to_negative = torch.tensor([0.9, 0.3, 0.5, 0.2])
    values = criterion.statistics(to_positive, to_negative)
    assert values.shape == (5,)
    assert dict(zip(criterion.STATISTICS, values.tolist(), strict=True)) == pytest.approx(
        {
            "loss": (0 + 0.5 + 0.2 + 0.3) / 4,
            "positive_distance": 0.3,
            "negative_distance": 0.475,
            "active_triplets": 0.75,
            "violated_triplets": 0.25,
        }
    )


def test_statistics_carry_no_gradients():
    to_positive = torch.tensor([0.1, 0.5], requires_grad=True)
    to_negative = torch.tensor([0.9, 0.3], requires_grad=True)
    values = TripletLoss(MARGIN).statistics(to_positive, to_negative)
    assert not values.requires_grad


def slow_sums(matrix, n, margin):
    """The sums of the statistics over all triplets of two twins, from one triplet after another."""
    twins = [range(n), range(n, len(matrix))]
    sums = np.zeros(5)
    for own, twin in (twins, twins[::-1]):
        for anchor, positive in itertools.permutations(own, 2):
            for negative in twin:
                to_positive = matrix[anchor, positive].item()
                to_negative = matrix[anchor, negative].item()
                excess = to_positive - to_negative + margin
                is_violated = to_positive > to_negative
                sums += [max(0, excess), to_positive, to_negative, excess > 0, is_violated]
    return sums


SIZES_OF_TWINS = [(5, 3), (2, 7), (4, 1), (1, 2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), SIZES_OF_TWINS)
def test_sums_over_all_triplets_equal_a_slow_loop(kind, n, m):
    criterion = TripletLoss(MARGIN, kind)
    # People of two dimensions, so that triplets of all kinds come up.
    embeddings = torch.nn.functional.pad(torch.randn(n + m, 2), (0, 510))
    matrix = criterion.matrix(embeddings)
    sums = criterion.sums_over_all_triplets(matrix, n)
    assert sums.dtype == torch.float64
    np.testing.assert_allclose(sums, slow_sums(matrix, n, MARGIN), rtol=1e-6)


@pytest.mark.parametrize(("n", "m"), SIZES_OF_TWINS)
def test_sums_over_all_triplets_are_exact_where_distances_tie(n, m):
    """Distances and the margin are multiples of 1/4, so many losses are exactly zero."""
    values = torch.randint(0, 5, (n + m, n + m)) / 4
    matrix = values.triu(1) + values.triu(1).T
    sums = TripletLoss(0.25).sums_over_all_triplets(matrix, n)
    assert sums.tolist() == slow_sums(matrix, n, 0.25).tolist()


def test_sums_with_blocks_are_those_of_the_triplets_across_blocks():
    criterion = TripletLoss(MARGIN)
    embeddings = torch.randn(9, 3)
    block = torch.tensor([0, 0, 1, 2, 2, 0, 0, 1, 1])
    triplets = []
    for own, twin in ((range(5), range(5, 9)), (range(5, 9), range(5))):
        for anchor, positive, negative in itertools.product(own, own, twin):
            if block[anchor] != block[positive]:
                triplets.append((anchor, positive, negative))
    means = criterion.statistics(*criterion.distances(embeddings, torch.tensor(triplets)))
    sums = criterion.sums_over_all_triplets(criterion.matrix(embeddings), 5, block)
    torch.testing.assert_close(sums / len(triplets), means.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_all_triplets_are_those_of_the_statistics(kind):
    criterion = TripletLoss(MARGIN, kind)
    embeddings = torch.randn(9, 3)
    anchors = itertools.chain(
        itertools.product(range(5), range(5), range(5, 9)),
        itertools.product(range(5, 9), range(5, 9), range(5)),
    )
    triplets = torch.tensor([triplet for triplet in anchors if triplet[0] != triplet[1]])
    means = criterion.statistics(*criterion.distances(embeddings, triplets))
    sums = criterion.sums_over_all_triplets(criterion.matrix(embeddings), 5)
    torch.testing.assert_close(sums / len(triplets), means.double(), rtol=1e-5, atol=1e-6)


ALL_TRIPLETS_OF_A_THOUSAND_IMAGES_EACH = """
import resource, time, torch
from triplet_loss import TripletLoss
criterion = TripletLoss(0.3)
embeddings = torch.randn(2000, 512)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
sums = criterion.sums_over_all_triplets(criterion.matrix(embeddings), 1000)
seconds = time.process_time() - start
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(seconds, (after - before) / 1024, sums[3].item() / 2e9)
"""


def test_all_triplets_of_a_thousand_images_each_take_little_time_and_memory():
    """They are two billion."""
    command = [sys.executable, "-c", ALL_TRIPLETS_OF_A_THOUSAND_IMAGES_EACH]
    folder = Path(triplet_loss.__file__).parent
    output = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    seconds, megabytes, share_active = map(float, output.split())
    assert seconds < 2
    assert megabytes < 500
    assert share_active > 0.9  # random embeddings are as far from each other as from the twin's


@pytest.mark.parametrize(
    "settings", [{"margin": 0}, {"margin": float("nan")}, {"distance": "manhattan"}]
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match="must be"):
        TripletLoss(**settings)


# ---- the margin softmax --------------------------------------------------------------------------


@pytest.fixture
def people():
    """(embeddings (12, 512), the number of each one's person (12,)); people 0 to 4."""
    person = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 4, 4, 4, 4])
    return torch.randn(12, 512), person


def test_centres_begin_as_the_mean_directions_of_people(people):
    embeddings, person = people
    centres = MarginSoftmax(5, embeddings, person).centres
    for number in range(5):
        directions = [e / e.norm() for e, p in zip(embeddings, person, strict=True) if p == number]
        mean = sum(directions) / len(directions)
        torch.testing.assert_close(centres[number], mean / mean.norm())


@pytest.mark.parametrize("margin", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("scale", [16.0, 64.0])
def test_margin_softmax_equals_that_of_pytorch_metric_learning(people, margin, scale):
    embeddings, person = people
    ours = MarginSoftmax(5, embeddings, person, margin, scale)
    theirs = losses.ArcFaceLoss(5, 512, margin=math.degrees(margin), scale=scale)
    ours.centres.data = torch.randn(5, 512)
    theirs.W.data = ours.centres.detach().T.clone()
    first, second = copies([embeddings, embeddings])
    loss = ours(first, person)
    expected = theirs(second, person)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(first.grad, second.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours.centres.grad.T, theirs.W.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_margin_softmax_has_a_finite_slope_at_a_centre_and_opposite_to_it(sign):
    embeddings = torch.eye(3, 512)
    margin_softmax = MarginSoftmax(3, embeddings, torch.arange(3))
    (moved,) = copies([sign * embeddings])
    margin_softmax(moved, torch.arange(3)).backward()
    assert moved.grad.isfinite().all()
    assert margin_softmax.centres.grad.isfinite().all()
