"""The largest connected pieces of what a teacher says, and where copy-paste uses them."""

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_dycon.methods.bcp import BCP, BCPSettings
from nnunetv2_dycon.methods.dycon_bcp import DyCONBCP, DyCONBCPSettings
from nnunetv2_dycon.pieces import largest_pieces
from tests.recipes import CLASSES, SPACE, batch, made, seeded


def numbered(labels: Tensor) -> dict[tuple[int, ...], int]:
    """The piece of each foreground voxel of labels (*S), by flooding from voxel to voxel."""
    piece: dict[tuple[int, ...], int] = {}
    inside = {tuple(at) for at in (labels > 0).nonzero().tolist()}
    for start in sorted(inside):
        if start in piece:
            continue
        front, number = [start], len(piece)
        piece[start] = number
        while front:
            at = front.pop()
            for step in product((-1, 0, 1), repeat=labels.ndim):
                to = tuple(a + s for a, s in zip(at, step, strict=True))
                if to in inside and to not in piece and labels[to] == labels[at]:
                    piece[to] = number
                    front.append(to)
    return piece


class Scattered(nn.Module):
    """A network that sees small pieces of every class."""

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.randn((len(x), CLASSES, *x.shape[2:]), generator=seeded(2))
        logits[:, 0] += 1.2
        return logits


@pytest.mark.parametrize("space", [(5, 6, 7), (9, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_but_the_largest_piece_of_each_class_become_background(space: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = torch.randn((2, 4, *space), generator=seeded(1))
    logits[:, 0] += 1.2  # so that there are pieces
    logits = logits.to(dtype)
    given = logits.clone()
    cleaned = largest_pieces(logits)
    assert torch.equal(logits, given)
    assert cleaned.dtype == dtype
    dropped = 0
    for b in range(2):
        said = logits[b].argmax(0)
        piece = numbered(said)
        sizes = Counter(piece.values())
        largest: dict[int, int] = {}
        for at in sorted(piece):  # of equal ones the first
            c = int(said[at])
            if c not in largest or sizes[piece[at]] > sizes[largest[c]]:
                largest[c] = piece[at]
        for at in product(*map(range, space)):
            if at in piece and piece[at] != largest[int(said[at])]:
                dropped += 1
                assert cleaned[(b, slice(None), *at)].float().softmax(0).tolist() == pytest.approx([1, 0, 0, 0])
            else:
                assert torch.equal(cleaned[(b, slice(None), *at)], logits[(b, slice(None), *at)])
    assert dropped > 10


@pytest.mark.parametrize(("kind", "settings"), [(BCP, BCPSettings), (DyCONBCP, partial(DyCONBCPSettings, wfecl=0.0))])
@pytest.mark.parametrize("view", ["bcp", "copy_paste_either"])
def test_copy_paste_teaches_the_largest_pieces_where_asked(kind, settings, view: str) -> None:
    data = replace(batch(), now={"ramp": 1.0, "beta": 0.1})
    targets = {}
    for largest in (False, True):
        method, student = made(kind, settings(view=view, largest=largest))
        method.teacher.network = Scattered()
        data.generator.manual_seed(4)
        for p in list(method.passes(student, data))[:-1]:
            answer = p.ask(p, data, None)
            targets[p.view.name, largest] = answer.target
            if largest:
                assert torch.equal(answer.target, p.view.mix(largest_pieces(answer.logits)))
                pasted = p.view.pasted.expand_as(answer.target)
                assert torch.equal(answer.target[pasted], targets[p.view.name, False][pasted])
    assert any(not torch.equal(targets[name, True], targets[name, False]) for name, _ in targets)


def test_a_class_in_one_piece_stays() -> None:
    labels = torch.zeros((1, *SPACE), dtype=torch.long)
    labels[:, 1:3, 1:3] = 1
    logits = 5.0 * torch.nn.functional.one_hot(labels, CLASSES).movedim(-1, 1)
    assert torch.equal(largest_pieces(logits), logits)


def test_two_pieces_of_a_class_become_one_and_those_of_the_background_stay() -> None:
    labels = torch.zeros((1, 5, 4, 6), dtype=torch.long)
    labels[:, 2] = 1  # a wall through the background
    labels[:, 0, 0, :2] = 2
    labels[:, 4, 3, 5] = 2
    logits = 5.0 * torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)
    wanted = labels.clone()
    wanted[:, 4, 3, 5] = 0
    cleaned = largest_pieces(logits)
    assert torch.equal(cleaned.argmax(1), wanted)
    assert ((cleaned != logits).any(1) == (wanted != labels)).all()
