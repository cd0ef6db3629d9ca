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
from nnunetv2_dycon.options import stored_values
from nnunetv2_dycon.pieces import OnePiece, largest_pieces
from tests.recipes import CLASSES, SPACE, Net, batch, made, seeded
from tests.steps import SMALL, loader_batch
from tests.steps import made as of_step


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
@pytest.mark.parametrize(
    ("largest", "whole", "cleaned"),
    [
        ("none", [1, 2], []),
        ("all", [], [1, 2]),
        ("labeled", [], []),
        ("labeled", [1], [1]),
        ("labeled", [1, 2], [1, 2]),
    ],
)
def test_copy_paste_teaches_the_largest_pieces(kind, settings, view: str, largest: str, whole, cleaned) -> None:
    data = replace(batch(), now={"ramp": 1.0, "beta": 0.1})
    method, student = made(kind, settings(view=view, largest=largest, paste=0.0))
    if method.one_piece is not None:
        method.one_piece.counts[:] = 1.0
        method.one_piece.counts[0, whole] = 0.0
    method.teacher.network = Scattered()
    passes = list(method.passes(student, data))[:-1]
    assert passes
    for p in passes:
        answer = p.ask(p, data, None)
        assert torch.equal(answer.target, p.view.mix(largest_pieces(answer.logits, cleaned)))
        assert torch.equal(answer.target, p.view.mix(answer.logits)) == (not cleaned)


def labels_of(*patches: str) -> Tensor:
    """Label maps (B, 1, Y, X) from a text each, rows separated by spaces."""
    return torch.tensor([[[[int(c) for c in row] for row in patch.split()]] for patch in patches])


def test_a_class_is_one_piece_by_the_truth_of_all_labelled_patches() -> None:
    pieces = OnePiece(5)
    assert pieces.classes == []
    pieces.see(labels_of("1102 1100 0020", "1110 0333 0000"))  # 2 in two pieces, 1 and 3 in one, 4 not shown
    assert pieces.classes == [1, 3]
    pieces.see(labels_of("4000 0400 1110", "0000 0000 0000"))  # by corners too
    assert pieces.classes == [1, 3, 4]
    pieces.see(labels_of("1000 0000 0001", "0000 0000 0000"))
    assert pieces.classes == [3, 4]  # one voxel of twelve lies elsewhere


def test_a_class_may_have_a_hundredth_of_its_voxels_elsewhere() -> None:
    pieces = OnePiece(3)
    patch = torch.zeros((1, 1, 11, 22), dtype=torch.int16)
    patch[0, 0, :9, :11] = 1
    patch[0, 0, 10, 0] = 1  # one of 100
    patch[0, 0, :9, 12] = 2
    patch[0, 0, 10, 12] = 2  # one of ten
    pieces.see(patch)
    assert pieces.classes == [1]
    patch[0, 0, 10, 2] = 1
    pieces.see(patch)  # three of 201
    assert pieces.classes == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.int64])  # nnU-Net's augmentation gives int16
def test_counts_of_pieces_are_those_of_flooding(dtype: torch.dtype) -> None:
    labels = torch.randint(-1, 5, (3, 1, 4, 5, 6), generator=seeded(7))  # 4 classes, and 4 is the ignore label
    labels[torch.rand(labels.shape, generator=seeded(8)) < 0.5] = 0
    pieces = OnePiece(4)
    for patches in (labels, labels.flip(2)):
        pieces.see(patches.to(dtype))
    wanted = torch.zeros(2, 4)
    for patch in labels[:, 0]:
        piece = numbered(patch)
        for c in (1, 2, 3):
            sizes = Counter(number for at, number in piece.items() if patch[at] == c)
            wanted[:, c] += 2 * torch.tensor([sum(sizes.values()) - max(sizes.values()), sum(sizes.values())])
    assert wanted[0, 1:].min() > 0
    assert torch.equal(pieces.counts, wanted)


def test_pieces_of_all_processes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = OnePiece(2)
    monkeypatch.setattr("nnunetv2_dycon.ranks.world_size", lambda: 4)
    monkeypatch.setattr("nnunetv2_dycon.ranks.mean_everywhere", lambda value: value / 2)
    pieces.see(labels_of("1100 0000 0001"))
    assert pieces.counts.tolist() == [[0, 2], [0, 6]]


@pytest.mark.parametrize(("kind", "settings"), [(BCP, BCPSettings), (DyCONBCP, partial(DyCONBCPSettings, wfecl=0.0))])
def test_a_step_counts_the_pieces_of_its_labelled_patches_and_a_checkpoint_holds_them(kind, settings) -> None:
    data = loader_batch()
    data["target"][:] = 0
    data["target"][:, :, 1:, 1:3, 1:3] = 2
    of_option = {}
    for largest in ("labeled", "all", "none"):
        step = of_step(kind, settings(**SMALL, largest=largest), Net())
        step(data)
        of_option[largest] = {name: value for name, value in step.method.state_dict().items() if "one_piece" in name}
    voxels = 2 * (SPACE[0] - 1) * 2 * 2
    assert {name: value.tolist() for name, value in of_option["labeled"].items()} == {
        "one_piece.counts": [[0, 0, 0], [0, 0, voxels]]
    }
    assert of_option["all"] == of_option["none"] == {}


@pytest.mark.parametrize("kind", [BCPSettings, DyCONBCPSettings])
def test_a_former_switch_is_understood(kind) -> None:
    assert stored_values(kind, {"largest": True})["largest"] == "all"
    assert stored_values(kind, {"largest": False})["largest"] == "none"
    assert stored_values(kind, {"largest": "labeled"})["largest"] == "labeled"
    assert stored_values(kind, {})["largest"] == "none"
    assert stored_values(kind, {})["paste"] == 0.0


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
