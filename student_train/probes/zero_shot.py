"""The zero-shot probe: classes by the cosine with a stored classifier's rows.

Nothing is fitted and nothing chosen.

Shape suffixes: N rows, C channels, K classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from student_train.errors import TrainingError
from student_train.probes.scores import ProbeScore
from student_train.probes.splits import ClassSplit, Values, as_tensor, class_tensors

PIECE_ROWS = 4096
TOP = 5


def zero_shot_probe(
    test: ClassSplit,
    classifier_KC: Values,
    *,
    device: str | torch.device = "cpu",
) -> ProbeScore:
    """Returns the top-1 accuracy of the class with the highest cosine.

    Scale and bias of the classifier change no order, so they take no part. Of classes
    with equal cosines the first counts. ``details`` has ``top5_accuracy``, where there
    are more than 5 classes, and ``chance``, 1 / K.

    Args:
        test: embeddings in the classifier's space, as the teacher gives them.
        classifier_KC: (K, C) float, a row per class.
        device: where to compute.

    Raises:
        TrainingError: a split that cannot be used, or of another width.

    Source: Radford et al., "Learning transferable visual models from natural language
        supervision" (2021), section 3.1.
    """
    device = torch.device(device)
    rows_KC = F.normalize(as_tensor(classifier_KC, torch.float64, device))
    num_classes, width = rows_KC.shape
    tensors = class_tensors({"test": test}, num_classes, device)
    features_NC, labels_N = tensors["test"]
    if features_NC.shape[1] != width:
        raise TrainingError(
            f"features must have the classifier's {width} channels, got "
            f"{features_NC.shape[1]}; take the embedding that it was made for"
        )
    first = fifth = 0
    for piece_NC, piece_N in zip(
        features_NC.split(PIECE_ROWS), labels_N.split(PIECE_ROWS), strict=True
    ):
        cosine_NK = F.normalize(piece_NC.double()) @ rows_KC.T
        true_N1 = cosine_NK.gather(1, piece_N[:, None])
        classes_K = torch.arange(num_classes, device=device)
        tied_NK = (cosine_NK == true_N1) & (classes_K < piece_N[:, None])
        place_N = ((cosine_NK > true_N1) | tied_NK).sum(1)
        first += int((place_N == 0).sum())
        fifth += int((place_N < TOP).sum())
    details = {"chance": 1 / num_classes, "num_test": float(len(labels_N))}
    if num_classes > TOP:
        details["top5_accuracy"] = fifth / len(labels_N)
    return ProbeScore(
        value=first / len(labels_N),
        metric="accuracy",
        higher_is_better=True,
        setting={},
        choose_value=math.nan,
        details=details,
    )
