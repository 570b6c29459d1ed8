"""The nearest-neighbour probe: classes by the votes of similar vectors.

Owns neighbours and votes; nothing is trained. The rows to classify meet the fit split
in pieces, so beside the features memory is bounded by about 100 MB whatever their
number. All similarities are computed once for ``choose`` and once for ``test``.

Shape suffixes: N rows, D features, M fit rows, k neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from student_train.probes.scores import (
    ProbeScore,
    accuracy,
    curve_details,
    majority_accuracy,
)
from student_train.probes.splits import ClassSplit, class_tensors

NUM_NEIGHBOURS = (10, 20, 100, 200)
"""The grid that ``choose`` picks k from. Source: DINO's and EUPE's evaluation."""

TEMPERATURE = 0.07
"""Of the softmax that weighs votes by cosine. Source: DINO's and EUPE's evaluation."""

QUERY_ROWS = 128
FIT_ROWS = 32_768


def knn_probe(
    fit: ClassSplit,
    choose: ClassSplit,
    test: ClassSplit,
    *,
    device: str | torch.device = "cpu",
) -> ProbeScore:
    """Returns the top-1 accuracy of weighted votes of the k most similar fit rows.

    Cosine similarity; votes weigh exp(cosine / 0.07); k is that of ``NUM_NEIGHBOURS``,
    limited to the number of fit rows, with the best accuracy on ``choose``, the smaller
    k where equal. Classes whose votes tie go to the nearest neighbour's. Features are
    taken as they are: unlike ``linear_probe``, the result depends on their scale and
    centre, so a caller that wants them standardised does it with the fit split's
    statistics.

    Args:
        fit: rows that vote.
        choose: rows that choose k.
        test: rows scored.
        device: where to compute.

    Raises:
        TrainingError: a split that cannot be used; it is named.

    Source: Wu et al., "Unsupervised feature learning via non-parametric instance
        discrimination" (2018), section 3.4; DINO's kNN evaluation.
    """
    tensors = class_tensors(
        {"fit": fit, "choose": choose, "test": test}, None, torch.device(device)
    )
    unit = {name: F.normalize(features) for name, (features, _) in tensors.items()}
    labels = {name: labels_N for name, (_, labels_N) in tensors.items()}
    grid = sorted({min(k, len(unit["fit"])) for k in NUM_NEIGHBOURS})

    predicted = _classify(unit["choose"], unit["fit"], labels["fit"], grid)
    curve = {k: accuracy(predicted[k], labels["choose"]) for k in grid}
    best = max(grid, key=lambda k: (curve[k], -k))

    answer_N = _classify(unit["test"], unit["fit"], labels["fit"], [best])[best]
    details = curve_details("k", curve)
    details["majority_accuracy"] = majority_accuracy(labels["fit"], labels["test"])
    details |= {f"num_{name}": float(len(rows)) for name, rows in labels.items()}
    return ProbeScore(
        value=accuracy(answer_N, labels["test"]),
        metric="accuracy",
        higher_is_better=True,
        setting={"k": float(best)},
        choose_value=curve[best],
        details=details,
    )


def _classify(
    queries_ND: Tensor, fit_MD: Tensor, labels_M: Tensor, grid: list[int]
) -> dict[int, Tensor]:
    """Returns for each k of ``grid``, ascending, the (N,) int64 classes voted."""
    answers: dict[int, list[Tensor]] = {k: [] for k in grid}
    for piece_ND in queries_ND.split(QUERY_ROWS):
        cosine_Nk, nearest_Nk = _neighbours(piece_ND, fit_MD, grid[-1])
        weights_Nk = ((cosine_Nk - cosine_Nk[:, :1]).double() / TEMPERATURE).exp()
        classes_Nk = labels_M[nearest_Nk]
        for k in grid:
            answers[k].append(_vote(classes_Nk[:, :k], weights_Nk[:, :k]))
    return {k: torch.cat(pieces) for k, pieces in answers.items()}


def _neighbours(queries_ND: Tensor, fit_MD: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Returns (N, num) cosines, descending, and the fit rows they belong to."""
    best_Nk = queries_ND.new_empty((len(queries_ND), 0))
    rows_Nk = torch.empty_like(best_Nk, dtype=torch.int64)
    for start in range(0, len(fit_MD), FIT_ROWS):
        cosine_NM = queries_ND @ fit_MD[start : start + FIT_ROWS].T
        found_Nk, at_Nk = cosine_NM.topk(min(num, cosine_NM.shape[1]), dim=1)
        both_Nk = torch.cat([best_Nk, found_Nk], dim=1)
        both_rows_Nk = torch.cat([rows_Nk, at_Nk + start], dim=1)
        best_Nk, order_Nk = both_Nk.topk(min(num, both_Nk.shape[1]), dim=1)
        rows_Nk = both_rows_Nk.gather(1, order_Nk)
    return best_Nk, rows_Nk


def _vote(classes_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
    """Returns (N,) the class with most weight, the nearest neighbour's where equal.

    Each neighbour sums the weights of those of its class: no cost per class, and unlike
    adding into a table of classes, the same sums on CUDA every time.
    """
    same_Nkk = classes_Nk.unsqueeze(2) == classes_Nk.unsqueeze(1)
    votes_Nk = (same_Nkk.double() @ weights_Nk.unsqueeze(2)).squeeze(2)
    return classes_Nk.gather(1, votes_Nk.argmax(dim=1, keepdim=True)).squeeze(1)
