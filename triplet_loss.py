"""What is minimised: the triplet margin loss on face embeddings, and a margin softmax beside it.

    criterion = TripletLoss(margin=0.3, distance="cosine")
    loss = criterion(anchor, positive, negative)                    # three (B, 512) tensors

Training embeds an image once, however many triplets use it, so it calls the two steps by
themselves:

    to_positive, to_negative = criterion.distances(embeddings, triplets)
    loss = criterion.loss(to_positive, to_negative)

The loss is `mean(max(0, d(a, p) - d(a, n) + margin))` (Schroff et al., FaceNet, arXiv 1503.03832).
The distance d is `1 - cos`, or the euclidean distance of the L2-normalised embeddings; both lie in
[0, 2].
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

DISTANCES = ("cosine", "euclidean")


class TripletLoss(nn.Module):
    """Triplet margin loss; `margin` is in units of the distance and above 0.

    Everything is computed in float32, whatever autocast says: bf16 has two to three digits, too few
    for the difference of two distances that are nearly equal. Where two embeddings coincide, the
    euclidean distance has the gradient 0.
    """

    STATISTICS = (
        "loss",
        "positive_distance",
        "negative_distance",
        "active_triplets",
        "violated_triplets",
    )

    def __init__(self, margin: float = 0.3, distance: str = "cosine"):
        super().__init__()
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {DISTANCES}, not {distance!r}")
        if not 0 < margin < float("inf"):
            raise ValueError(f"margin must be above 0, not {margin!r}")
        self.margin = float(margin)
        self.distance = distance

    def forward(
        self, anchor: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor
    ) -> torch.Tensor:
        """Three (B, D) float tensors, whose rows may have any length -> scalar float32 loss."""
        embeddings = torch.cat([anchor, positive, negative])
        rows = torch.arange(len(embeddings), device=anchor.device)
        triplets = rows.view(3, -1).T
        to_positive, to_negative = self.distances(embeddings, triplets)
        return self.loss(to_positive, to_negative)

    def distances(self, embeddings, triplets):
        """(N, D) embeddings and (T, 3) int64 rows of them -> (d(a, p), d(a, n)), (T,) float32."""
        anchor, positive, negative = triplets.unbind(1)
        matrix = self.matrix(embeddings)
        return matrix[anchor, positive], matrix[anchor, negative]

    def matrix(self, embeddings):
        """(N, D) embeddings -> (N, N) float32, the distances of all pairs."""
        with torch.autocast(embeddings.device.type, enabled=False):
            unit = F.normalize(embeddings.float(), dim=1)
            if self.distance == "cosine":
                return 1 - unit @ unit.T
            # sqrt(2 - 2 cos) would be shorter, but loses half the digits of small distances.
            return torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")

    def loss(self, to_positive, to_negative):
        """Distances (T,) of the anchors to positives and negatives -> scalar triplet loss."""
        return F.relu(to_positive - to_negative + self.margin).mean()

    def quadruplet_loss(self, to_positive, to_negative):
        """The loss with every d(a, p) compared with every d(a, n) of the batch -> scalar.

        A triplet never compares distances of two families, but one decision threshold has to serve
        all families. So this is the mean over all pairs of triplets i, j of
        `max(0, d(a_i, p_i) - d(a_j, n_j) + margin)`, after the second term of the quadruplet loss
        (Chen et al., CVPR 2017).

        Only pairs where d(a_i, p_i) + margin exceeds d(a_j, n_j) add to the sum. So it suffices to
        know in how many such pairs each distance is; sorting counts them in T log T steps.
        """
        with_margin = to_positive + self.margin
        sorted_with_margin = with_margin.detach().sort().values
        sorted_negative = to_negative.detach().sort().values
        n = len(with_margin)
        n_negatives_below = torch.searchsorted(sorted_negative, with_margin.detach())
        n_not_above = torch.searchsorted(sorted_with_margin, to_negative.detach(), right=True)
        n_positives_above = n - n_not_above
        total = (n_negatives_below * with_margin).sum() - (n_positives_above * to_negative).sum()
        return total / n**2

    def sums_over_all_triplets(self, matrix, n, value_number=None):
        """(5,) float64: the sums of STATISTICS over all triplets of two twins.

        matrix: (n + m, n + m) distances of the n images of one twin and the m of the other.
        value_number (n + m,): an anchor's positives are the images of its person with another
        number, as in triplet_dataset.Positives; without it, all but the anchor itself. Each
        anchor's positives are compared with its sorted negatives, so time and memory do not grow
        with the number of triplets.
        """
        if value_number is None:
            value_number = torch.arange(len(matrix), device=matrix.device)
        first_twin = slice(0, n)
        second_twin = slice(n, None)
        sums = torch.zeros(len(self.STATISTICS), dtype=torch.float64, device=matrix.device)
        for person, twin in ((first_twin, second_twin), (second_twin, first_twin)):
            is_positive = value_number[person, None] != value_number[person]
            to_positive = matrix[person, person].contiguous()
            # A row for each anchor, sorted.
            to_negative = matrix[person, twin].sort(1).values.contiguous()
            n_negatives = to_negative.shape[1]
            with_margin = to_positive + self.margin
            n_active = torch.searchsorted(to_negative, with_margin)
            n_violated = torch.searchsorted(to_negative, to_positive)
            # The active negatives are the first ones of the row: place n_active of the running
            # sum, which begins with 0, is their sum.
            running_sum = F.pad(to_negative.double().cumsum(1), (1, 0))
            loss = n_active * with_margin.double() - running_sum.gather(1, n_active)
            # For each anchor and positive, the sums over all negatives.
            sums_over_negatives = (
                loss,
                n_negatives * to_positive.double(),
                to_negative.double().sum(1, keepdim=True).expand_as(loss),
                n_active,
                n_violated,
            )
            totals = [values[is_positive].sum().double() for values in sums_over_negatives]
            sums += torch.stack(totals)
        return sums

    @torch.no_grad()
    def statistics(self, to_positive, to_negative):
        """(5,) tensor without gradients: the means named in STATISTICS, of distances (T,).

        They are the triplet loss; both distances; "active_triplets", the share of triplets with a
        loss above zero, since only these have a gradient; and "violated_triplets", the share with
        d(a, p) > d(a, n), where the twin is nearer to the anchor than the same person is.
        """
        excess = to_positive - to_negative + self.margin
        values = (
            F.relu(excess),
            to_positive,
            to_negative,
            (excess > 0).float(),
            (to_positive > to_negative).float(),
        )
        return torch.stack([value.mean() for value in values])


class MarginSoftmax(nn.Module):
    """Margin softmax over the training people (Deng et al., ArcFace, CVPR 2019).

    Every person has a centre in the space of embeddings, which is trained along with the network.
    The loss is the cross-entropy of recognising the person of an embedding by its angles to all
    centres, with the logits `scale * cos(angle)`. The angle to the person's own centre counts as
    larger by `margin`, in radians.
    """

    def __init__(self, n_people, embeddings, person, margin: float = 0.3, scale: float = 30.0):
        """A centre begins as the mean direction of its person's embeddings.

        embeddings: (N, D) float32 on the CPU. person: (N,) int64, the number of the person of each
        embedding, in [0, n_people).
        """
        super().__init__()
        sums = torch.zeros(n_people, embeddings.shape[1])
        sums.index_add_(0, person, F.normalize(embeddings, dim=1))
        self.centres = nn.Parameter(F.normalize(sums, dim=1))
        self.margin = margin
        self.scale = scale

    def forward(self, embeddings: torch.Tensor, person: torch.Tensor) -> torch.Tensor:
        """(B, D) float32 embeddings and the (B,) int64 numbers of their people -> scalar loss."""
        cosine = F.normalize(embeddings, dim=1) @ F.normalize(self.centres, dim=1).T
        own = person[:, None]
        # The slope of acos has no bound at -1 and 1.
        own_angle = cosine.gather(1, own).clamp(-1 + 1e-6, 1 - 1e-6).acos()
        own_angle = (own_angle + self.margin).clamp(max=math.pi)
        logits = self.scale * cosine.scatter(1, own, own_angle.cos())
        return F.cross_entropy(logits, person)
