"""How much an annotation of a case would tell: scores from what student and teacher say of it."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class OneSays(NamedTuple):
    """What one network says of an image.

    Class and entropy (nats) of each voxel, both (Z, Y, X), and the sums of the probabilities (C,).
    """

    labels: NDArray
    entropy: NDArray[np.float32]
    expected: NDArray[np.float64]


class ClassScores(NamedTuple):
    """Of one class: mean dual entropy where either network sees it, disagreement, and expected volume in ml."""

    entropy: float
    disagreement: float
    expected_ml: float


class CaseScores(NamedTuple):
    """Scores of a case.

    Attributes
    ----------
    entropy : float
        Sum of the dual entropy over the image, for each expected voxel of foreground: errors are where entropy is, and
        a large structure may have more of them.
    entropy_image : float
        Mean of the dual entropy over the image, in [0, 1]: UnCL's entropy part over `2 beta ln C`.
    disagreement : float
        One minus the mean Dice of student and teacher over classes that either sees, in [0, 1].
    expected_ml : float
        Expected volume of the foreground, the mean of both networks.
    segmented : bool
        Whether either network sees foreground.
    classes : mapping
        By name.
    """

    entropy: float
    entropy_image: float
    disagreement: float
    expected_ml: float
    segmented: bool
    classes: Mapping[str, ClassScores]


def dual_entropy(student: NDArray, teacher: NDArray, classes: int) -> NDArray[np.float32]:
    """Return the mean of both entropies as a share of the largest possible one, in [0, 1].

    Parameters
    ----------
    student, teacher : array
        Entropies in nats.
    classes : int
        C, background included.

    Examples
    --------
    A student that knows nothing and a certain teacher, two classes:

    >>> float(round(dual_entropy(np.array([math.log(2)]), np.array([0.0]), 2)[0], 4))
    0.5
    """
    return ((student + teacher) / (2 * math.log(classes))).astype(np.float32)


def score_case(student: OneSays, teacher: OneSays, names: Mapping[int, str], voxel_ml: float) -> CaseScores:
    """Return the scores of a case.

    Parameters
    ----------
    student, teacher : OneSays
        What they say of it.
    names : mapping
        Value and name of each foreground class.
    voxel_ml : float
        Volume of a voxel.
    """
    dual = dual_entropy(student.entropy, teacher.entropy, len(names) + 1)
    expected = (student.expected + teacher.expected) / 2
    by_class = {}
    for position, (value, name) in enumerate(names.items(), start=1):
        s, t = student.labels == value, teacher.labels == value
        either = s | t
        by_class[name] = ClassScores(
            entropy=float(dual[either].mean()) if either.any() else math.nan,
            disagreement=_one_minus_dice(s, t),
            expected_ml=float(expected[position] * voxel_ml),
        )
    seen = [scores.disagreement for scores in by_class.values() if not math.isnan(scores.disagreement)]
    foreground = float(expected[1:].sum())
    return CaseScores(
        entropy=float(dual.sum(dtype=np.float64)) / max(foreground, 1.0),
        entropy_image=float(dual.mean(dtype=np.float64)),
        disagreement=float(np.mean(seen)) if seen else 0.0,
        expected_ml=foreground * voxel_ml,
        segmented=bool(seen),
        classes=by_class,
    )


def _one_minus_dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    size = int(one.sum()) + int(other.sum())
    return 1 - 2 * int((one & other).sum()) / size if size else math.nan


def farthest_first(points: NDArray[np.float64], start: int, number: int) -> list[int]:
    """Return rows of `points`, each farthest from those before it.

    Parameters
    ----------
    points : array, shape (n, d)
        One row for each case; columns are brought to unit variance.
    start : int
        The first row.
    number : int
        How many to return; at most n.

    Examples
    --------
    >>> farthest_first(np.array([[0.0], [0.1], [1.0], [0.6]]), 0, 3)
    [0, 2, 3]
    """
    scaled = (points - points.mean(0)) / np.maximum(points.std(0), 1e-12)
    chosen = [start]
    nearest = np.full(len(points), np.inf)
    while len(chosen) < min(number, len(points)):
        nearest = np.minimum(nearest, np.linalg.norm(scaled - scaled[chosen[-1]], axis=1))
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
    return chosen
