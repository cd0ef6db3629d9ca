"""Slow reference values, written from the equations in float64 before and apart from the code they judge."""

import math
from itertools import product

import numpy as np
import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------
# Losses. Loops over voxels, patches and pairs; autograd gives the reference gradients, `detach` says what is constant.
# ---------------------------------------------------------------------------------------------------------------


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest deviation as a share of the largest reference number (0 where both are 0 throughout)."""
    deviation = (value.double() - reference.double()).abs().max().item()
    size = reference.double().abs().max().item()
    return 0.0 if deviation == 0 else deviation / size if size else math.inf


def voxels(x: Tensor) -> list[tuple]:
    """All indices (b, :, *voxel) of a map (B, C, *S)."""
    return [(b, slice(None), *v) for b in range(x.shape[0]) for v in product(*(range(s) for s in x.shape[2:]))]


def entropy_of(log_p: Tensor) -> Tensor:
    """Entropy in nats of one voxel's log probabilities (C,)."""
    return -sum(lp.exp() * lp for lp in log_p)


def log_probabilities(logits: Tensor) -> Tensor:
    """Log probabilities (C,) of one voxel in float64."""
    logits = logits.double()
    return logits - torch.logsumexp(logits, 0)


def uncl(
    student: Tensor, teacher: Tensor, *, beta: float, entropy: str, guarded: bool, focus: str = "confident"
) -> tuple[Tensor, Tensor]:
    """Consistency and entropy part of UnCL (supplement Eq. 1, or the guarded form)."""
    consistency, entropies, n = 0.0, 0.0, 0
    unit = math.log(student.shape[1]) if guarded else 1.0
    for at in voxels(student):
        log_p, log_q = log_probabilities(student[at]), log_probabilities(teacher[at].detach())
        h_s, h_t = entropy_of(log_p) / unit, entropy_of(log_q) / unit
        first, second = {"dual": (h_s, h_t), "teacher": (h_t, h_t), "student": (h_s, h_s)}[entropy]
        square = sum((p - q) ** 2 for p, q in zip(log_p.exp(), log_q.exp(), strict=True))
        if focus == "uncertain":
            first, second = 1 - first, 1 - second
        denominator = torch.exp(beta * first) + torch.exp(beta * second)
        if guarded:
            consistency = consistency + 2 / denominator.detach() * square
            entropies = entropies + h_s * float(student[at].argmax() == teacher[at].argmax())
        else:
            consistency = consistency + square / denominator
            entropies = entropies + beta * (first + second)
        n += 1
    return consistency / n, entropies / n


def entropy_weights(student: Tensor, teacher: Tensor, *, beta: float, entropy: str) -> Tensor:
    """Weight (B, *S) of guarded UnCL at each voxel."""
    weight = torch.zeros(student.shape[:1] + student.shape[2:], dtype=torch.float64)
    for at in voxels(student):
        h_s, h_t = (
            entropy_of(log_probabilities(one[at].detach())) / math.log(len(one[at])) for one in (student, teacher)
        )
        first, second = {"dual": (h_s, h_t), "teacher": (h_t, h_t), "student": (h_s, h_s)}[entropy]
        weight[(at[0], *at[2:])] = 2 / (torch.exp(beta * first) + torch.exp(beta * second))
    return weight


def uncl_gradient_eq10(student: Tensor, teacher: Tensor, *, beta: float) -> Tensor:
    """Supplement Eq. 10 with the squared norm, multiplied out to the student logits through the softmax Jacobian."""
    out = torch.zeros_like(student, dtype=torch.float64)
    places = voxels(student)
    for at in places:
        log_p, log_q = log_probabilities(student[at]), log_probabilities(teacher[at])
        p, q = log_p.exp(), log_q.exp()
        e_s, e_t = torch.exp(beta * entropy_of(log_p)), torch.exp(beta * entropy_of(log_q))
        d_entropy = -(log_p + 1)
        slope = 2 * (p - q) / (e_s + e_t)
        slope = slope - beta * ((p - q) ** 2).sum() * e_s * d_entropy / (e_s + e_t) ** 2
        slope = slope + beta * d_entropy
        jacobian = torch.diag(p) - torch.outer(p, p)
        out[at] = jacobian @ slope / len(places)
    return out


def mse(student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over voxels of the weighted squared norm of the probability difference."""
    total, places = 0.0, voxels(student)
    for at in places:
        p, q = log_probabilities(student[at]).exp(), log_probabilities(teacher[at]).exp()
        w = 1.0 if weight is None else weight[(at[0], *at[2:])].double()
        total = total + w * sum((a - b) ** 2 for a, b in zip(p, q, strict=True))
    return total / len(places)


def soft_ce_dice(student: Tensor, q: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted soft cross-entropy plus one minus soft Dice (squares below, one voxel of smoothing), by image, class."""
    cross, places = 0.0, voxels(student)
    top, bottom = {}, {}
    for at in places:
        log_p, t = log_probabilities(student[at]), q[at].double()
        w = 1.0 if weight is None else weight[(at[0], *at[2:])].double()
        for c, (lp, qc) in enumerate(zip(log_p, t, strict=True)):
            cross = cross - w * qc * lp
            if c > 0:
                top[at[0], c] = top.get((at[0], c), 0.0) + 2 * w * lp.exp() * qc
                bottom[at[0], c] = bottom.get((at[0], c), 0.0) + w * (lp.exp() ** 2 + qc**2)
    dice = [(top[key] + 1) / (bottom[key] + 1) for key in top]
    return cross / len(places) + 1 - sum(dice) / len(dice)


def pseudo_label(student: Tensor, teacher: Tensor, gate: float) -> tuple[Tensor, float]:
    """Cross-entropy over all voxels and Dice over the kept ones, against argmax where max >= gate; share kept."""
    q, weight = torch.zeros(teacher.shape, dtype=torch.float64), torch.zeros(teacher.shape[:1] + teacher.shape[2:])
    for at in voxels(teacher):
        p = log_probabilities(teacher[at]).exp().tolist()
        best = max(range(len(p)), key=lambda c: p[c])
        q[(at[0], best, *at[2:])] = 1.0
        weight[(at[0], *at[2:])] = float(p[best] >= gate)
    return soft_ce_dice(student, q, weight), weight.mean().item()


def uamt(student: Tensor, teacher: Tensor, samples: list[Tensor], r: float) -> tuple[Tensor, float]:
    """Mean squared norm over the voxels where the mean of the samples has entropy < (3/4 + r/4) ln C; their share."""
    total, kept, places = 0.0, 0, voxels(student)
    for at in places:
        mean = sum(log_probabilities(s[at]).exp() for s in samples) / len(samples)
        if -sum(p * math.log(p) for p in mean.tolist()) < (0.75 + 0.25 * r) * math.log(len(mean)):
            p, q = log_probabilities(student[at]).exp(), log_probabilities(teacher[at]).exp()
            total, kept = total + sum((a - b) ** 2 for a, b in zip(p, q, strict=True)), kept + 1
    return total / kept, kept / len(places)


def region_loss(student: Tensor, labels: Tensor, region: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy as the mean over a region (B, *S), plus Dice over it by image and class, smoothed by its share.

    `weight` (B, *S) is that of each voxel in all sums but those that count voxels.
    """
    w = torch.ones_like(student[:, 0]) if weight is None else weight
    q = torch.stack([(labels == c).double() for c in range(student.shape[1])], 1)
    cross = mean = 0.0
    for at in voxels(student):
        if region[(at[0], *at[2:])]:
            cross = cross - w[(at[0], *at[2:])] * (log_probabilities(student[at]) * q[at]).sum() / region.sum()
    p, m, smooth = student.double().softmax(1), region.double() * w, region.double().mean()
    for b, c in product(range(student.shape[0]), range(1, student.shape[1])):
        top = 2 * (m[b] * p[b, c] * q[b, c]).sum() + smooth
        mean = mean + 1 - top / ((m[b] * p[b, c] ** 2).sum() + (m[b] * q[b, c] ** 2).sum() + smooth)
    return cross + mean / (student.shape[0] * (student.shape[1] - 1))


def cube_places(space: tuple[int, ...], cubes: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Where the cubes of a patch lie, the last axis fastest."""
    sides = [s // c for s, c in zip(space, cubes, strict=True)]
    return [
        tuple(slice(i * side, (i + 1) * side) for i, side in zip(index, sides, strict=True))
        for index in product(*(range(c) for c in cubes))
    ]


def rarity(shares: list[float]) -> list[float]:
    """DHC's weight of each class by its share of the voxels, at least one in a million; the largest is C."""
    logs = [math.log(max(shares) / max(share, 1e-6)) for share in shares]
    return [len(shares) * value / max(logs) for value in logs]


class Difficulty:
    """DHC's weight of each class by the course of its hard Dice; a class that nobody shows stays as it was."""

    def __init__(self, classes: int) -> None:
        self.last, self.learn, self.unlearn = ([value] * classes for value in (1e-8, 0.0, 0.0))
        self.error = [1.0] * classes

    def see(self, said: np.ndarray, truth: np.ndarray) -> None:
        for c in range(len(self.last)):
            both, either = ((said == c) & (truth == c)).sum(), (said == c).sum() + (truth == c).sum()
            if either == 0:
                continue
            dice = (2 * both + 1e-8) / (either + 2e-8)
            gain = dice - self.last[c]
            change = gain * math.log(dice / self.last[c])
            self.learn[c] = 49 / 50 * self.learn[c] + (change if gain > 0 else 0.0) / 50
            self.unlearn[c] = 49 / 50 * self.unlearn[c] + (0.0 if gain > 0 else change) / 50
            self.error[c] = 49 / 50 * self.error[c] + (1 - dice) / 50
            self.last[c] = dice

    @property
    def weights(self) -> list[float]:
        values = [
            ((u + 1e-8) / (v + 1e-8)) ** 0.2 * e for u, v, e in zip(self.unlearn, self.learn, self.error, strict=True)
        ]
        return [len(values) * value / max(values) for value in values]


def _counted(labels: Tensor, ignore: int | None) -> list[tuple]:
    """Indices (b, 0, *voxel) of the voxels that have a label, in the order of memory."""
    places = [(b, 0, *v) for b in range(len(labels)) for v in product(*(range(s) for s in labels.shape[2:]))]
    return [at for at in places if labels[at] >= 0 and labels[at] != ignore]


def gadice(
    logits: Tensor, labels: Tensor, weight: Tensor | None, *, ignore: int | None = None, factors: list | None = None
) -> Tensor:
    """GADice: absent classes cost the mean of p^2, with one factor p held constant; the mean over all classes."""
    places, classes, total = _counted(labels, ignore), logits.shape[1], 0.0
    p = {at: log_probabilities(logits[(at[0], slice(None), *at[2:])]).exp() for at in places}
    w = {at: 1.0 if weight is None else weight[(at[0], *at[2:])].double() for at in places}
    for c in range(classes):
        mine = [at for at in places if labels[at] == c and w[at] > 0]
        if mine:
            top = 2 * sum(w[at] * p[at][c] for at in mine) + 1e-10
            loss = 1 - top / (sum(w[at] * p[at][c] ** 2 for at in places) + sum(w[at] for at in mine) + 1e-10)
        else:
            others = sum(w[at] for at in places)
            loss = sum(w[at] * (p[at][c] / others).detach() * p[at][c] for at in places)
        total = total + loss * (1.0 if factors is None else factors[c])
    return total / classes


def gace(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    *,
    keep: float,
    ignore: int | None = None,
    factors: list | None = None,
) -> Tensor:
    """GACE with exponent 1/2 over the voxels of largest cross-entropy; of equal ones the first are kept."""
    places, losses = _counted(labels, ignore), {}
    for at in places:
        w = 1.0 if weight is None else weight[(at[0], *at[2:])].double()
        losses[at] = -w * log_probabilities(logits[(at[0], slice(None), *at[2:])])[int(labels[at])]
    kept = sorted(places, key=lambda at: -losses[at].item())[: max(1, int(len(places) * keep))]  # sorting is stable
    total = 0.0
    for c in range(logits.shape[1]):
        mine = [losses[at] for at in kept if labels[at] == c]
        if mine:
            factor = 1.0 if factors is None else factors[c]
            total = total + factor * sum(mine) / (len(mine) ** 0.5 * len(kept) ** 0.5 + 1e-10)
    return total


def class_weighted(logits: Tensor, labels: Tensor, factors: list, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """DHC's Dice (plain sums over the batch, without background) and weighted mean cross-entropy."""
    places, dice, cross, total = _counted(labels, None), 0.0, 0.0, 0.0
    log_p = {at: log_probabilities(logits[(at[0], slice(None), *at[2:])]) for at in places}
    w = {at: 1.0 if weight is None else weight[(at[0], *at[2:])].double() for at in places}
    for c in range(1, logits.shape[1]):
        mine = [at for at in places if labels[at] == c]
        top = 2 * sum(w[at] * log_p[at][c].exp() for at in mine) + 1
        bottom = sum(w[at] * log_p[at][c].exp() for at in places) + sum(w[at] for at in mine) + 1
        dice = dice + factors[c] * (1 - top / bottom)
    for at in places:
        cross = cross - factors[int(labels[at])] * w[at] * log_p[at][int(labels[at])]
        total = total + factors[int(labels[at])]
    return dice / (logits.shape[1] - 1), cross / total if total else cross * 0


def fecl_image(
    z: Tensor, labels: Tensor, teacher: Tensor | None, weight: Tensor | None, *, tau: float, gamma: float, topk: int
) -> Tensor | None:
    """FeCL of one image by loops over pairs; None without an anchor. z (n, d), labels (n,)."""
    z, used = z.double(), [i for i, y in enumerate(labels.tolist()) if y >= 0]

    def cosine(i: int, k: int) -> Tensor:
        return (z[i] * z[k]).sum()

    def closeness(i: int, k: int) -> Tensor:
        return ((1 + cosine(i, k).detach()) / 2).clamp(0, 1)

    total, weights = 0.0, 0.0
    for i in used:
        positives = [k for k in used if k != i and labels[k] == labels[i]]
        negatives = [k for k in used if labels[k] != labels[i]]
        if not positives or not negatives:
            continue
        d = sum(closeness(i, q) ** gamma * torch.exp(cosine(i, q) / tau) for q in negatives)
        if teacher is not None and topk > 0:
            hard = sorted(((z[i] * teacher[q].double().detach()).sum() / tau for q in negatives), reverse=True)[:topk]
            d = d + sum(closeness(i, q) ** gamma for q in negatives) * sum(map(torch.exp, hard)) / len(hard)
        loss = 0.0
        for k in positives:
            s = torch.exp(cosine(i, k) / tau)
            loss = loss + (1 - closeness(i, k)) ** gamma * -torch.log(s / (s + d))
        u = 1.0 if weight is None else weight[i].double().detach()
        total, weights = total + u * loss / len(positives), weights + u
    return None if isinstance(weights, float) and weights == 0.0 else total / weights


def fecl(z: Tensor, labels: Tensor, teacher: Tensor | None, weight: Tensor | None, **settings: float) -> Tensor:
    """Mean of `fecl_image` over the images that have an anchor."""
    values = [
        fecl_image(
            z[b],
            labels[b],
            None if teacher is None else teacher[b],
            None if weight is None else weight[b],
            **settings,
        )
        for b in range(z.shape[0])
    ]
    values = [v for v in values if v is not None]
    return sum(values) / len(values)


def cells(space: tuple[int, ...], grid: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Voxels of each patch, in the order of the flattened grid: floor(i S / G) to ceil((i + 1) S / G)."""
    axes = [[slice(i * s // g, -(-(i + 1) * s // g)) for i in range(g)] for s, g in zip(space, grid, strict=True)]
    return list(product(*axes))


def patch_class(shares: list[float], rule: str) -> int:
    """Class of a patch with the given class shares, -1 for none."""
    if rule == "majority":
        best = max(range(len(shares)), key=lambda c: shares[c])
        return best if shares[best] >= 0.5 else -1
    foreground = max(range(1, len(shares)), key=lambda c: shares[c])
    if shares[foreground] > 0.1:
        return foreground
    return 0 if sum(shares[1:]) == 0 else -1


def target_labels(target: np.ndarray, grid: tuple[int, ...], classes: int, ignore: int | None, rule: str) -> list:
    """Patch labels of class numbers (B, 1, *S) as nested lists (B, n)."""
    out = []
    for image in target[:, 0]:
        row = []
        for cell in cells(image.shape, grid):
            inside = image[cell].ravel().tolist()
            if any(v < 0 or v == ignore for v in inside):
                row.append(-1)
            else:
                row.append(patch_class([inside.count(c) / len(inside) for c in range(classes)], rule))
        out.append(row)
    return out


def probability_labels(p: np.ndarray, grid: tuple[int, ...], gate: float, rule: str) -> list:
    """Patch labels of probabilities (B, C, *S) as nested lists (B, n)."""
    out = []
    for image in p.astype(np.float64):
        row = []
        for cell in cells(image.shape[1:], grid):
            inside = image[(slice(None), *cell)].reshape(image.shape[0], -1)
            winner = inside.argmax(0).tolist()
            hard = [winner.count(c) / len(winner) for c in range(len(inside))]
            soft = inside.mean(1).tolist()
            label = patch_class(soft if rule == "majority" else hard, rule)
            row.append(label if inside.max(0).mean() >= gate else -1)
        out.append(row)
    return out


def patch_weights(logits: Tensor, grid: tuple[int, ...]) -> Tensor:
    """exp(mean entropy / ln C) of each patch, (B, n)."""
    rows = []
    for image in logits:
        row = []
        for cell in cells(tuple(image.shape[1:]), grid):
            inside = image[(slice(None), *cell)].flatten(1)
            h = [entropy_of(log_probabilities(inside[:, v])) for v in range(inside.shape[1])]
            row.append(math.exp(sum(h) / len(h) / math.log(image.shape[0])))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)
