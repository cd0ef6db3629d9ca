"""Cubes are cut, exchanged and put back, and fit the networks that nnU-Net plans."""

import itertools
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_dycon.cubes import draw_exchange, exchange, fitting_cubes, partition, recover
from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.networks import unwrap
from scripts import cube_figure
from tests.oracles import cube_places
from tests.recipes import seeded

axes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=2, max_size=3)  # cubes, side


@given(axes, st.integers(1, 3), st.integers(1, 2))
def test_cubes_put_back_are_the_patch(axes: list, batch: int, channels: int) -> None:
    cubes, sides = zip(*axes, strict=True)
    x = torch.arange(batch * channels * math.prod(cubes) * math.prod(sides))
    x = x.view(batch, channels, *(c * s for c, s in axes))
    pieces = partition(x, cubes)
    assert pieces.shape == (batch * math.prod(cubes), channels, *sides)
    assert torch.equal(recover(pieces, cubes), x)
    for b in range(batch):
        for k, place in enumerate(cube_places(x.shape[2:], cubes)):
            assert torch.equal(pieces[b * math.prod(cubes) + k], x[(b, slice(None), *place)])


@given(axes, st.integers(2, 4), st.integers(0, 99))
def test_exchanged_cubes_stay_at_their_place_and_come_back(axes: list, batch: int, seed: int) -> None:
    cubes = [c for c, _ in axes]
    x = torch.randn(batch, 2, *(c * s for c, s in axes), generator=seeded(seed))
    origin = draw_exchange(batch, math.prod(cubes), x.device, seeded(seed))
    mixed = exchange(x, origin, cubes)
    for k, place in enumerate(cube_places(x.shape[2:], cubes)):
        assert sorted(origin[:, k].tolist()) == list(range(batch))
        for b in range(batch):
            assert torch.equal(mixed[(b, slice(None), *place)], x[(int(origin[b, k]), slice(None), *place)])
    assert torch.equal(exchange(mixed, origin.argsort(0), cubes), x)


def test_each_place_has_a_permutation_of_its_own() -> None:
    origin = draw_exchange(4, 500, torch.device("cpu"), seeded(0))
    assert {tuple(column) for column in origin.T.tolist()} == set(itertools.permutations(range(4)))


@pytest.mark.parametrize("change", ["plain", "anisotropic"])
def test_outputs_put_back_are_those_of_features_put_back_on_a_planned_network(trainer, change: str) -> None:
    """The last layer is pointwise, so that its outputs can be permuted in place of the features before it."""
    t = trainer("nnUNetTrainerLabeledOnly_seed1")
    t.initialize()
    network = unwrap(t.network)
    x = torch.randn(
        3, network.encoder.stages[0][0].convs[0].conv.in_channels, *((16, 16, 16) if change == "plain" else (8, 16, 32))
    )
    cubes = (2, 2, 2) if change == "plain" else (1, 2, 4)
    origin = draw_exchange(3, math.prod(cubes), x.device, seeded(1))
    mixed, back = exchange(x, origin, cubes), origin.argsort(0)
    features: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda m, i, o: features.append(i[0])) for layer in network.decoder.seg_layers]
    with torch.no_grad():
        outputs = network(mixed)
        for hook in hooks:
            hook.remove()
        layers = network.decoder.seg_layers
        assert len(outputs) == len(layers) == len(features)
        for output, layer, feature in zip(outputs, reversed(layers), reversed(features), strict=True):
            wanted = layer(exchange(feature, back, cubes))
            torch.testing.assert_close(exchange(output, back, cubes), wanted, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(output, wanted)


@pytest.mark.parametrize(
    ("patch", "stride", "wanted", "cubes"),
    [
        ((96, 96, 96), (32, 32, 32), 3, None),  # three cubes of 32 have one voxel at the bottleneck: one axis stays
        ((128, 128, 128), (32, 32, 32), 2, (2, 2, 2)),
        ((48, 192, 192), (8, 32, 32), 2, (2, 2, 2)),
        ((160, 128, 112), (32, 32, 16), 2, (1, 2, 1)),  # 5 and 7 voxels at the bottleneck are no two halves
        ((7, 320, 320), (1, 32, 32), 2, (1, 2, 2)),
        ((512, 512), (128, 128), 2, (2, 2)),
        ((64, 64, 64), (32, 32, 32), 2, (1, 2, 2)),  # else one voxel of the bottleneck
        ((16, 64, 64), (8, 16, 16), 2, (2, 2, 2)),  # one voxel along an axis is none too few
        ((64, 64), (8, 8), 4, (4, 4)),
    ],
)
def test_cubes_fit_the_stride_of_the_network(patch: tuple, stride: tuple, wanted: int, cubes: tuple | None) -> None:
    cubes = (1, 3, 3) if cubes is None else cubes
    assert fitting_cubes(patch, stride, wanted) == cubes


@pytest.mark.parametrize(
    ("patch", "stride", "wanted"), [((96, 96), (32, 32), 2), ((7, 9, 11), (1, 1, 1), 2), ((32, 16), (32, 8), 3)]
)
def test_a_patch_that_cannot_be_cut_is_one_line_with_what_to_type(patch: tuple, stride: tuple, wanted: int) -> None:
    with pytest.raises(ConfigError, match=rf"option cubes{wanted}: .*_noacross_nowithin") as caught:
        fitting_cubes(patch, stride, wanted)
    assert "\n" not in str(caught.value)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\) cubes do not fit patches of \(4, 5\) voxels"):
        partition(torch.zeros(1, 1, 4, 5), (2, 2))
    with pytest.raises(ValueError, match="cubes do not fit"):
        partition(torch.zeros(1, 1, 4, 4), (2, 2, 2))
    with pytest.raises(ValueError, match="not whole patches"):
        recover(torch.zeros(3, 1, 2, 2), (2, 2))


def test_the_figure_in_the_docs_is_what_its_script_draws() -> None:
    figure = Path(__file__).parents[2] / "docs" / "figures" / "cubes.svg"
    assert figure.read_text(encoding="utf-8") == cube_figure.picture()
    ElementTree.fromstring(figure.read_text(encoding="utf-8"))
