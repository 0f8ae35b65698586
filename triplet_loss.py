"""Triplet margin loss on face embeddings, cosine or euclidean, and what a batch of triplets tells.

    criterion = TripletLoss(margin=0.3, distance="cosine")
    loss = criterion(anchor, positive, negative)                    # three (B, 512) tensors
    positive, negative = criterion.distances(embeddings, triplets)  # one (N, 512) matrix, (T, 3) indices
    loss = criterion.loss(positive, negative)

The loss is `mean(max(0, d(a, p) - d(a, n) + margin))` (Schroff et al., FaceNet, arXiv 1503.03832). d is `1 - cos` or
the euclidean distance of the L2-normalised embeddings, both in [0, 2]. Training embeds an image of many triplets once.
"""

import torch
import torch.nn.functional as F
from torch import nn

DISTANCES = ("cosine", "euclidean")


class TripletLoss(nn.Module):
    """Triplet margin loss; `margin` is in units of the distance (> 0), `distance` one of DISTANCES.

    All computation is float32, whatever autocast says: near a loss of zero bf16 has two digits. Where two embeddings
    coincide, the subgradient 0 of the euclidean distance is taken, so gradients stay finite.
    """

    STATISTICS = ("loss", "positive_distance", "negative_distance", "active_triplets", "violated_triplets")

    def __init__(self, margin=0.3, distance="cosine"):
        super().__init__()
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {DISTANCES}, not {distance!r}")
        if not 0 < margin < float("inf"):
            raise ValueError(f"margin must be above 0, not {margin!r}")
        self.margin, self.distance = float(margin), distance

    def forward(self, anchor, positive, negative):
        """Three (B, D) float tensors, of any length per row -> scalar float32 loss."""
        rows = torch.arange(3 * len(anchor), device=anchor.device).view(3, -1).T
        return self.loss(*self.distances(torch.cat([anchor, positive, negative]), rows))

    def distances(self, embeddings, triplets):
        """(N, D) embeddings and (T, 3) int64 rows of them -> (d(a, p), d(a, n)), each (T,) float32."""
        anchor, positive, negative = triplets.unbind(1)
        with torch.autocast(embeddings.device.type, enabled=False):
            unit = F.normalize(embeddings.float(), dim=1)
            if self.distance == "cosine":
                matrix = 1 - unit @ unit.T
            else:  # sqrt(2 - 2 cos) would be shorter, but loses half of the digits of small distances
                matrix = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
        return matrix[anchor, positive], matrix[anchor, negative]

    def loss(self, to_positive, to_negative):
        """Distances (T,) from the anchors to positives and negatives -> scalar triplet loss."""
        return F.relu(to_positive - to_negative + self.margin).mean()

    def quadruplet_loss(self, to_positive, to_negative):
        """The loss with each d(a, p) compared with every d(a, n), not only with its own anchor's -> scalar.

        A triplet never compares scores of different families, but one threshold has to serve them all. This is the
        mean over all pairs of triplets i, j of `max(0, d(a_i, p_i) - d(a_j, n_j) + margin)`, after the second term of
        the quadruplet loss (Chen et al., CVPR 2017), in T log T by sorting the distances (T,).
        """
        raised = to_positive + self.margin  # compared as one number on both sides, so that ties agree
        below = torch.searchsorted(to_negative.detach().sort().values, raised.detach())
        above = len(raised) - torch.searchsorted(raised.detach().sort().values, to_negative.detach(), right=True)
        return ((below * raised).sum() - (above * to_negative).sum()) / len(raised) ** 2

    def statistics(self, to_positive, to_negative):
        """What the triplets of a batch say, from their distances (T,): the means of STATISTICS, (5,) detached.

        The loss; both distances; "active_triplets", the share with a loss above zero, which alone have a gradient;
        "violated_triplets", the share with d(a, p) > d(a, n), where the twin looks more like the person.
        """
        to_positive, to_negative = to_positive.detach(), to_negative.detach()
        excess = to_positive - to_negative + self.margin
        active, violated = (excess > 0).float(), (to_positive > to_negative).float()
        return torch.stack([x.mean() for x in (F.relu(excess), to_positive, to_negative, active, violated)])
