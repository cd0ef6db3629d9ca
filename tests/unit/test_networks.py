"""Teacher, head, tap and stage choice, on the two architectures that nnU-Net plans."""

import copy

import pytest
import torch
import torch.distributed as dist
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.networks import (
    FeatureTap,
    ProjectionHead,
    Teacher,
    choose_stage,
    has_encoder_stages,
    unwrap,
)
from nnunetv2_dycon.step import average_

torch.set_num_threads(1)

ANISOTROPIC = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
CASES = {
    "plain3d": (PlainConvUNet, 3, 2),
    "plain2d": (PlainConvUNet, 2, 2),
    "anisotropic": (PlainConvUNet, 3, ANISOTROPIC),
    "residual3d": (ResidualEncoderUNet, 3, 2),
    "residual2d": (ResidualEncoderUNet, 2, 2),
}


def build(case: str = "plain3d", *, norm: str = "instance", seed: int = 0, deep_supervision: bool = True) -> nn.Module:
    """A U-Net of three stages, features 4, 6, 8, three classes, one input channel."""
    kind, dim, strides = CASES[case]
    conv = nn.Conv3d if dim == 3 else nn.Conv2d
    norms = {
        "instance": nn.InstanceNorm3d if dim == 3 else nn.InstanceNorm2d,
        "batch": nn.BatchNorm3d if dim == 3 else nn.BatchNorm2d,
    }
    blocks = {"n_conv_per_stage" if kind is PlainConvUNet else "n_blocks_per_stage": 1}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return kind(
            input_channels=1,
            n_stages=3,
            features_per_stage=[4, 6, 8],
            conv_op=conv,
            kernel_sizes=3,
            strides=[1, strides, strides] if isinstance(strides, int) else strides,
            num_classes=3,
            n_conv_per_stage_decoder=1,
            conv_bias=True,
            norm_op=norms[norm],
            norm_op_kwargs={"affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=deep_supervision,
            **blocks,
        )


def image(case: str = "plain3d", seed: int = 1) -> torch.Tensor:
    return torch.randn((2, 1) + (8,) * CASES[case][1], generator=torch.Generator().manual_seed(seed))


def shake(network: nn.Module, seed: int) -> None:
    """Move every weight and every floating buffer at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in (*network.parameters(), *network.buffers()):
            if t.is_floating_point():
                t.add_(0.1 * torch.randn(t.shape, generator=generator))
            else:
                t.add_(1)


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --- unwrap and stages


def test_unwrap_finds_the_plain_network_below_any_nesting(one_process_group):
    net = build()
    ddp = nn.parallel.DistributedDataParallel
    assert unwrap(net) is net
    assert unwrap(torch.compile(net, backend="eager")) is net
    assert unwrap(ddp(net)) is net
    assert unwrap(torch.compile(ddp(net), backend="eager")) is net
    assert unwrap(ddp(torch.compile(net, backend="eager"))) is net


@pytest.mark.parametrize("case", CASES)
def test_unets_have_encoder_stages(case):
    assert has_encoder_stages(torch.compile(build(case), backend="eager"))


def test_other_networks_have_no_encoder_stages():
    assert not has_encoder_stages(nn.Conv3d(1, 2, 3))
    for owner, missing in (("", "decoder"), ("encoder", "stages"), ("encoder", "strides")):
        net = build()
        delattr(net.get_submodule(owner), missing)
        assert not has_encoder_stages(net), missing


@pytest.mark.parametrize(
    ("strides", "target", "stage"),
    [
        ([[1, 1, 1]] + [[2, 2, 2]] * 5, 8, 3),
        ([[1, 1]] + [[2, 2]] * 6, 8, 3),
        ([[1, 1, 1]] + [[2, 2, 2]] * 5, 4, 2),
        ([[1, 1, 1]] + [[2, 2, 2]] * 5, 1000, 5),  # the bottleneck is the nearest
        ([[1, 1, 1]] + [[2, 2, 2]] * 2, 8, 2),
        ([[1, 1, 1]], 8, 0),
        (
            [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]],
            8,
            3,
        ),  # coarse axis ends at 4, not 32
        ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 1]], 8, 3),  # one axis ends deeper
        ([[1, 1, 1], [4, 4, 4], [4, 4, 4]], 8, 1),  # 4 and 16 are as far: the finer
        (
            [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 1], [2, 2, 2]],
            8,
            3,
        ),  # two stages at 8: the first
        ([[1, 1, 1], [3, 2, 2], [2, 3, 3], [2, 2, 2]], 6, 2),
        ([[2, 1], [1, 4], [8, 4]], 2.0, 0),  # geometric means 2^0.5 and 2^1.5 are as far: the finer
        ([[2, 1], [1, 4], [8, 4]], 2.1, 1),
        ([[5], [9]], 15, 0),  # a tie that bare logarithms miss by one bit
    ],
)
def test_choose_stage_by_hand(strides, target, stage):
    assert choose_stage(strides, target) == stage


def test_choose_stage_reads_what_the_encoder_says():
    encoder = build("anisotropic").encoder
    assert choose_stage(encoder.strides, 2) == 1
    assert choose_stage(encoder.strides) == 2


def test_choose_stage_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="No encoder stage"):
        choose_stage([])


# --- teacher


@pytest.mark.parametrize("case", CASES)
def test_teacher_gives_the_students_full_resolution_logits(case):
    net = build(case)
    teacher = Teacher(net)
    logits = teacher.network(image(case))
    torch.testing.assert_close(logits, net.eval()(image(case))[0])
    assert net.decoder.deep_supervision
    assert not logits.requires_grad


def test_teacher_shares_no_memory_with_the_student():
    student = build()
    teacher = Teacher(student)
    mine = {p.data_ptr() for p in teacher.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in student.parameters())
    average_(teacher.network, student, 0.0)
    assert mine == {p.data_ptr() for p in teacher.parameters()}


def test_teacher_of_a_training_student_starts_in_eval_mode():
    assert not any(m.training for m in Teacher(build(norm="batch").train()).modules())


def test_teacher_stays_in_eval_mode_and_without_gradient_inside_a_module_that_trains():
    student = build(norm="batch").train()
    owner = nn.ModuleList([Teacher(student)]).train()
    (teacher,) = owner
    before = copy.deepcopy(teacher.state_dict())
    teacher.network(image())
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert student.training
    assert all(p.requires_grad for p in student.parameters())


def test_teacher_never_gets_a_gradient_and_the_student_does():
    student = build()
    teacher = Teacher(student)
    shake(student, 1)
    out = student(image())[0]
    (out - teacher.network(image())).square().mean().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    average_(teacher.network, student, 0.5)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("case", CASES)
def test_teacher_weights_load_strictly_into_a_stock_network(case):
    student = build(case)
    teacher = Teacher(torch.compile(student, backend="eager"))
    shake(student, 1)
    average_(teacher.network, student, 0.5)
    weights = teacher.network.state_dict()
    assert list(weights) == list(student.state_dict())
    stock = build(case, seed=9, deep_supervision=False).eval()
    stock.load_state_dict(weights, strict=True)
    assert torch.equal(stock(image(case)), teacher.network(image(case)))


def test_teacher_state_survives_a_round_trip_with_its_aliases():
    teacher = Teacher(build())
    shake(teacher.network, 2)
    other = Teacher(build(seed=5))
    other.load_state_dict(teacher.state_dict(), strict=True)
    assert torch.equal(other.network(image()), teacher.network(image()))
    # decoder.encoder is the encoder, in the copy too
    assert other.network.decoder.encoder is other.network.encoder
    shake(teacher.network, 3)
    assert not torch.equal(other.network(image()), teacher.network(image()))


# --- tap


def test_tap_gives_the_stage_output_with_its_graph():
    net, x = build(), image()
    tap = FeatureTap(net, 1)
    net(x)
    features = tap.take()
    assert torch.equal(features, net.encoder(x)[1])
    features.sum().backward()
    assert next(net.encoder.stages[0].parameters()).grad.abs().sum() > 0
    assert next(net.encoder.stages[2].parameters()).grad is None


def test_tap_keeps_the_last_pass_and_forgets_what_was_taken():
    net = build()
    tap = FeatureTap(net, 2)
    with pytest.raises(RuntimeError, match="no student pass"):
        tap.take()
    net(image(seed=1))
    net(image(seed=2))
    assert torch.equal(tap.take(), net.encoder(image(seed=2))[2])
    tap.take()  # from the line above
    with pytest.raises(RuntimeError, match="no student pass"):
        tap.take()


def test_tap_does_not_keep_passes_without_gradients():
    net = build()
    tap = FeatureTap(net, 2)
    with torch.no_grad():
        net(image())
    with pytest.raises(RuntimeError, match="no student pass"):
        tap.take()


def test_closed_tap_leaves_no_hook():
    net = build()
    tap = FeatureTap(net, 0)
    net(image())
    tap.close()
    with pytest.raises(RuntimeError):
        tap.take()
    net(image())
    with pytest.raises(RuntimeError):
        tap.take()
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("stage", [-1, 3])
def test_a_stage_the_encoder_does_not_have_is_an_error(stage):
    with pytest.raises(ConfigError, match=f"stages 0 to 2, not {stage}"):
        FeatureTap(build(), stage)


@pytest.mark.parametrize("case", ["plain3d", "residual2d"])
def test_tap_works_under_compile_when_made_before_the_first_call(case):
    torch._dynamo.reset()
    net, x = build(case), image(case)
    compiled = torch.compile(net, backend="aot_eager")
    tap = FeatureTap(compiled, 1)
    plain = net.encoder(x)[1]
    tap.take()
    (wanted,) = torch.autograd.grad(plain.square().sum(), next(net.parameters()))
    for _ in range(2):
        net.zero_grad()
        compiled(x)
        features = tap.take()
        torch.testing.assert_close(features, plain)
        features.square().sum().backward()
        torch.testing.assert_close(next(net.parameters()).grad, wanted)
        with pytest.raises(RuntimeError):
            tap.take()
    torch._dynamo.reset()


def test_teacher_made_after_a_tap_has_no_hook_and_leaves_the_tap_alone():
    net = build()
    tap = FeatureTap(net, 1)
    net(image())  # the hook now holds a tensor with a graph, which deepcopy refuses
    teacher = Teacher(net)
    assert not any(m._forward_hooks for m in teacher.modules())
    kept = tap.take()
    with torch.enable_grad():
        teacher.network(image(seed=8))
    with pytest.raises(RuntimeError):
        tap.take()
    net(image())
    assert torch.equal(tap.take(), kept)


# --- head


@pytest.mark.parametrize("grid", [(3, 4), (2, 3, 4), (1, 1, 1), (1, 1)])
@pytest.mark.parametrize("size", [1, 2])
def test_head_gives_unit_vectors_one_per_cell(grid, size):
    head = ProjectionHead(6).train()
    features = torch.randn((size, 6, *grid), generator=torch.Generator().manual_seed(0))
    z = head(features)
    assert z.shape == (size, features[0, 0].numel(), 128)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(z.shape[:2]))


def test_head_embeds_each_cell_on_its_own_in_flattened_order():
    head = ProjectionHead(5)
    features = torch.randn((2, 5, 2, 3, 4), generator=torch.Generator().manual_seed(0))
    z = head(features)
    for n, (i, j, k) in enumerate((i, j, k) for i in range(2) for j in range(3) for k in range(4)):
        alone = head(features[:, :, i : i + 1, j : j + 1, k : k + 1])
        torch.testing.assert_close(z[:, n : n + 1], alone)


def test_head_equals_pointwise_convolutions():
    head = ProjectionHead(5)
    features = torch.randn((2, 5, 2, 3, 4), generator=torch.Generator().manual_seed(0))
    first, second = nn.Conv3d(5, 256, 1), nn.Conv3d(256, 128, 1)
    for conv, layer in ((first, head.expand), (second, head.project)):
        conv.weight.data, conv.bias.data = layer.weight.data[..., None, None, None], layer.bias.data
    hidden = first(features)
    centred = hidden - hidden.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    out = second(torch.where(normed > 0, normed, 0.01 * normed)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(head(features), out / out.norm(dim=-1, keepdim=True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_head_works_in_float32_under_autocast(dtype):
    head = ProjectionHead(6)
    features = torch.randn((1, 6, 4, 4), generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = head(features)
    assert z.dtype == torch.float32
    assert torch.equal(z, head(features.float()))


def test_head_has_finite_gradients_where_the_embedding_is_zero():
    head = ProjectionHead(3)
    with torch.no_grad():
        head.project.weight.zero_()
        head.project.bias.zero_()
    features = torch.randn((1, 3, 2, 2)).requires_grad_()
    z = head(features)
    assert torch.equal(z, torch.zeros_like(z))
    z.sum().backward()
    for t in (features, *head.parameters()):
        assert torch.isfinite(t.grad).all()
    assert head.project.bias.grad.abs().max() < 1e8


def test_head_embeds_a_patch_of_constant_intensity_at_length_one():
    z = ProjectionHead(3)(torch.zeros(1, 3, 2, 2))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(1, 4))


def test_head_is_made_without_touching_the_global_random_numbers():
    state = torch.get_rng_state()
    one, same, other = ProjectionHead(4), ProjectionHead(4), ProjectionHead(4, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.expand.weight, same.expand.weight)
    assert not torch.equal(one.expand.weight, other.expand.weight)
    for layer, fan in ((one.expand, 4), (one.project, 256)):
        assert layer.weight.abs().max() <= fan**-0.5
        assert layer.weight.std().item() == pytest.approx((3 * fan) ** -0.5, rel=0.1)
