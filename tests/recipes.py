"""Small networks, made-up batches, and the check of one term against its recipe."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nnunetv2_dycon.step import Batch, Cost, DataInfo, Method
from tests.oracles import relative_error

CLASSES = 3
SPACE = (3, 4, 5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int, number: int = 2) -> Tensor:
    return torch.randn(number, 1, *SPACE, generator=seeded(seed))


class Net(nn.Module):
    """A network that is unsure enough for every recipe to have something to choose."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, CLASSES, 3, padding=1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=seeded(seed)))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def all_learned(method: Method) -> Method:
    """Return the method, as if its students had answered all labelled patches so far without a mistake."""
    method.learned.counts[:, 0] = 1e6
    return method


def made(method: type[Method], settings) -> tuple[Method, Net]:
    """Return the method, built, with all classes learnt, and its student; the teacher has weights of its own."""
    student = Net()
    built = all_learned(method(settings, DataInfo(CLASSES), seed=3))
    built.build(student)
    built.teacher.network.load_state_dict({k: v / 2 for k, v in Net(1).state_dict().items()})
    return built, student


def batch(*, labels: Tensor | None = None) -> Batch:
    if labels is None:
        labels = torch.randint(0, CLASSES, (2, 1, *SPACE), generator=seeded(5))
    return Batch(
        x_l=images(3),
        y_l=labels,
        x_u=images(4),
        supervised=lambda outputs: nn.functional.cross_entropy(outputs, labels[:, 0].long(), ignore_index=-1),
        now={},
        generator=seeded(6),
        levels=((1.0, labels),),
    )


def check(group: Callable[[], Cost], name: str, network: nn.Module, recipe: Callable[[nn.Module], Tensor]) -> Cost:
    """Compare value and gradient of one term with the recipe, a function of a copy of the network in float64."""
    found = group()
    term = found.terms[name]
    gradients = torch.autograd.grad(term.value, list(network.parameters()), retain_graph=True)
    copy = type(network)().double()
    copy.load_state_dict(network.state_dict())
    wanted = recipe(copy)
    wanted_gradients = torch.autograd.grad(wanted, list(copy.parameters()))
    assert wanted.item() > 0
    assert relative_error(term.value, wanted) <= 1e-5
    for ours, theirs in zip(gradients, wanted_gradients, strict=True):
        assert relative_error(ours, theirs) <= 1e-5
    return found


class Recorder(nn.Module):
    """A network that remembers its input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.network(x)


def boxes_of(seen: Tensor, inside: Tensor, outside: Tensor) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Find for each image its box of 2 x 3 x 3 voxels, which image the box came from and which the rest."""
    boxes, origins = [], []
    for image in seen:
        ((box, i, o),) = (
            (box, i, o)
            for i, o in itertools.product(range(len(inside)), range(len(outside)))
            if (box := image[0] == inside[i, 0]).sum() == 2 * 3 * 3 and torch.equal(image[0, ~box], outside[o, 0, ~box])
        )
        assert all(int(axis) in (2, 3) for axis in box.nonzero().amax(0) - box.nonzero().amin(0) + 1)
        boxes.append(box)
        origins.append((i, o))
    return boxes, origins


class Encoder(nn.Module):
    strides = ((1, 1, 1),)
    output_channels = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv3d(1, 6, 3, padding=1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.stages[0](x)]


class Decoder(nn.Module):
    deep_supervision = False

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(6, CLASSES, 1)

    def forward(self, skips: list[Tensor]) -> Tensor:
        return self.conv(skips[0])


class UNet(nn.Module):
    """Encoder and decoder of one stage: every voxel is a patch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=seeded(seed)))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))
