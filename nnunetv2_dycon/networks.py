"""All networks but the student: averaged teacher, second network, projection head, tap on the encoder.

Shapes: `(B, C, *S)` is batch, channel, space (two or three axes). None of these parts changes the student's
class or its state dict, so that stock nnU-Net can load what was trained.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, normalize
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_dycon.errors import ConfigError

SECOND = 2_654_435_769  # far from any seed that is likely next to another, so that no student starts as this network


def unwrap(network: Any) -> Any:
    """Return the plain network below any nesting of DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(network, DistributedDataParallel):
            network = network.module
        elif hasattr(network, "_orig_mod"):
            network = network._orig_mod
        else:
            return network


def has_encoder_stages(network: nn.Module) -> bool:
    """Return whether the network is an encoder with stages and known strides, followed by a decoder."""
    plain = unwrap(network)
    encoder = getattr(plain, "encoder", None)
    return hasattr(plain, "decoder") and hasattr(encoder, "stages") and hasattr(encoder, "strides")


def choose_stage(strides: Sequence[Sequence[int]], target: float = 8) -> int:
    """Return the encoder stage whose cumulative stride is nearest `target` on the high-resolution axes.

    The high-resolution axes are those with the largest cumulative stride at the bottleneck: nnU-Net halves an
    axis of coarse spacing later or less often. A stage's stride is the geometric mean over them, distances
    are taken between logarithms, and of equally near stages the finest is chosen.

    Parameters
    ----------
    strides : sequence of sequences of int
        Stride of each stage relative to the one before, per axis, as in `network.encoder.strides`.
    target : float
        Wanted stride in voxels, above 0.

    Raises
    ------
    ValueError
        If there is no stage.

    Examples
    --------
    >>> choose_stage([[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]])
    3
    """
    if not strides:
        raise ValueError("No encoder stage to choose from.")
    cumulative = [[math.prod(axis) for axis in zip(*strides[: i + 1], strict=True)] for i in range(len(strides))]
    finest = [a for a, total in enumerate(cumulative[-1]) if total == max(cumulative[-1])]
    # Rounded, so that a tie stays a tie in floating point; min returns the first of equals.
    distances = [
        round(abs(sum(math.log2(total[a]) for a in finest) / len(finest) - math.log2(target)), 9)
        for total in cumulative
    ]
    return distances.index(min(distances))


def total_stride(network: nn.Module) -> tuple[int, ...]:
    """Return the voxels of a patch for one at the bottleneck, per axis, of a network with encoder stages."""
    encoder: Any = unwrap(network).encoder
    return tuple(math.prod(axis) for axis in zip(*encoder.strides, strict=True))


class TargetNetwork(nn.Module):
    """A plain network that gives targets, held in `network`; its state dict has the student's names there.

    Parameters
    ----------
    network : nn.Module
        The network, not wrapped.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class Teacher(TargetNetwork):
    """The exponential moving average of a student: always in eval mode, never with a gradient.

    `step.average_` moves it.

    Parameters
    ----------
    student : nn.Module
        The network to copy, wrapped or not, with the weights to start from. Its forward hooks are not copied.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__(_copied(student).requires_grad_(False))
        decoder: Any = getattr(self.network, "decoder", None)
        if hasattr(decoder, "deep_supervision"):
            decoder.deep_supervision = False
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode, whatever is asked: the module that owns a teacher is switched to and fro."""
        return super().train(False)


class SecondNetwork(TargetNetwork):
    """A network of the student's architecture with random weights of its own, to be trained next to it.

    Layers are initialised as torch and the network's own `initialize` do it. No global random state moves, so that a
    training with a second network draws what one without it draws.

    Parameters
    ----------
    student : nn.Module
        The network whose architecture to take, wrapped or not.
    seed : int
        Seed of the weights; they differ from those of a student that was made after `torch.manual_seed(seed)`.
    """

    def __init__(self, student: nn.Module, *, seed: int) -> None:
        network: Any = _copied(student).cpu()
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed((seed + SECOND) % 2**32)  # it looks at 32 bits only
        try:
            for module in network.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            if hasattr(network, "initialize"):
                network.apply(network.initialize)
        finally:
            torch.default_generator.set_state(state)
        super().__init__(network)


def _copied(student: nn.Module) -> nn.Module:
    """Return a copy of the plain student without its forward hooks.

    A hook belongs to the student alone, and may hold a tensor with a graph, which deepcopy refuses: it is handed an
    empty container for each of the student's.
    """
    plain = unwrap(student)
    hooks = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    memo = {id(getattr(m, name)): type(getattr(m, name))() for m in plain.modules() for name in hooks}
    return deepcopy(plain, memo)


class ProjectionHead(nn.Module):
    """Two pointwise layers that turn each cell of a feature map into an embedding of length one.

    A 1x1x1 convolution is a linear layer on the channels of each cell, and written as one it serves 2D and
    3D. The norm in between is over the channels of a cell: it works for one image and for a map of one cell
    (where instance norm raises), and a cell's embedding does not depend on what else is in the patch, which
    mixing views change.

    Parameters
    ----------
    channels : int
        Channels of the feature map.
    hidden, embedding : int
        Width of the hidden layer and of the embedding.
    seed : int
        Seed of the initial weights. They have a generator of their own, so that a run with a head draws the
        same global random numbers as a run without.

    References
    ----------
    DyCON (CVPR 2025) has 256 to 512 to 256 with batch norm; a batch of two patches is too small for that.
    """

    def __init__(self, channels: int, *, hidden: int = 256, embedding: int = 128, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.expand = _linear(channels, hidden, generator)
        self.norm = nn.LayerNorm(hidden)
        self.project = _linear(hidden, embedding, generator)

    def forward(self, features: Tensor) -> Tensor:
        """Return embeddings of unit norm, in float32 also under autocast.

        Parameters
        ----------
        features : Tensor, shape (B, C, *G)
            Output of an encoder stage, n = prod(G) cells.

        Returns
        -------
        Tensor, shape (B, n, embedding)
            Cells in the order of `features.flatten(2)`. A vector shorter than 1e-6 is not stretched to length
            one, which keeps its gradient finite.
        """
        with torch.autocast(features.device.type, enabled=False):
            cells = features.float().flatten(2).transpose(1, 2)
            hidden = leaky_relu(self.norm(self.expand(cells)), 0.01)
            return normalize(self.project(hidden), dim=-1, eps=1e-6)


class CubeClassifier(nn.Module):
    """A linear layer that tells the place of a cube from the mean of its features over space.

    Parameters
    ----------
    channels : int
        Channels of the features.
    cubes : sequence of int
        Cubes along each axis; their product is the number n of places.
    seed : int
        Seed of the initial weights, which have a generator of their own.
    """

    def __init__(self, channels: int, cubes: Sequence[int], *, seed: int = 0) -> None:
        super().__init__()
        self.layer = _linear(channels, math.prod(cubes), torch.Generator().manual_seed(seed))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, n) of features (B, C, *G), in float32 also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            return self.layer(features.float().flatten(2).mean(2))


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer with torch's usual bounds, drawn from a given generator.

    The bias is drawn too: with zeros, a patch of constant intensity would have embeddings of length zero.
    """
    layer = torch.nn.utils.skip_init(nn.Linear, inputs, outputs)
    bound = inputs**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


class FeatureTap:
    """Keeps the output of one encoder stage each time the student runs with gradients.

    Make it before the first call of a compiled student (a later hook is silently ignored), once per student.
    Passes without gradients (validation) are not kept, so that nothing stale can be taken.

    Parameters
    ----------
    student : nn.Module
        A network with `encoder.stages`, wrapped or not.
    stage : int
        Index of the stage, 0 is the finest.

    Raises
    ------
    ConfigError
        If there is no such stage.
    """

    def __init__(self, student: nn.Module, stage: int) -> None:
        stages = unwrap(student).encoder.stages
        if not 0 <= stage < len(stages):
            raise ConfigError(f"Option stage: the encoder has stages 0 to {len(stages) - 1}, not {stage}.")
        self._features: Tensor | None = None
        self._handle = stages[stage].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._features = output

    def take(self) -> Tensor:
        """Return the features `(B, F, *G)` of the student's last pass, and forget them.

        Raises
        ------
        RuntimeError
            If there was no pass with gradients since the last call.
        """
        if self._features is None:
            raise RuntimeError(
                "FeatureTap has nothing to give: no student pass with gradients since the last take(), "
                "or the tap was made after the first call of a compiled student."
            )
        features, self._features = self._features, None
        return features

    def close(self) -> None:
        """Take the hook off the student and forget what it kept."""
        self._handle.remove()
        self._features = None
