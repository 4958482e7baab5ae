"""Swizzled scales: where each byte lies, for dense operands, groups and experts, and back."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

from titan_fp8.kernels import mx
from titan_fp8.kernels.mx import layout

SIZES = [(1, 1), (128, 4), (129, 5), (200, 12), (300, 3), (32, 128)]
GROUPS = {
    "uneven": [32, 160, 64],
    "empty first, between and last": [0, 96, 0, 0, 128, 0],
    "whole tiles": [128, 256],
    "one group": [224],
    "none": [0, 0],
}


def random_scale(*shape: int) -> Tensor:
    """Any bytes but zero, which padding is."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator).view(mx.E8M0)


def bits(scale: Tensor) -> Tensor:
    return scale.contiguous().view(torch.uint8)


def ends_of(sizes: list[int]) -> Tensor:
    return torch.tensor(sizes).cumsum(0).int()


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_plain_scales_may_lie_in_columns(rows: int, columns: int) -> None:
    for shape in ((rows, columns), (3, rows, columns)):
        scale = random_scale(*shape)
        lying = bits(scale).transpose(-2, -1).contiguous().view(mx.E8M0).transpose(-2, -1)
        assert torch.equal(bits(mx.swizzle(lying)), bits(mx.swizzle(scale)))


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_each_byte_is_where_the_formula_says_and_padding_is_zero(rows: int, columns: int) -> None:
    scale = random_scale(rows, columns)
    blocked = mx.swizzle(scale)
    assert blocked.shape == (-(-rows // 128) * 128, -(-columns // 4) * 4)
    assert blocked.is_contiguous()
    expected = torch.zeros(blocked.numel(), dtype=torch.uint8)
    column_tiles = blocked.shape[1] // 4
    for row in range(rows):
        for column in range(columns):
            tile = row // 128 * column_tiles + column // 4
            expected[512 * tile + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] = bits(scale)[row, column]
    assert torch.equal(bits(blocked).flatten(), expected)
    assert torch.equal(bits(mx.unswizzle(blocked, rows, columns)), bits(scale))


def test_a_tile_of_rows_of_its_own_number_lies_in_steps_of_32() -> None:
    """A row of the stored 32x16 bytes has rows r, r + 32, r + 64 and r + 96 of the tile."""
    scale = torch.arange(128, dtype=torch.uint8).unsqueeze(1).expand(128, 4).contiguous().view(mx.E8M0)
    stored = bits(mx.swizzle(scale)).view(32, 4, 4)[:, :, 0]
    assert stored[0].tolist() == [0, 32, 64, 96]
    assert stored[31].tolist() == [31, 63, 95, 127]


def test_experts_are_swizzled_one_by_one() -> None:
    scale = random_scale(3, 130, 6)
    blocked = mx.swizzle(scale)
    assert blocked.shape == (3, 256 * 8)
    for e in range(3):
        assert torch.equal(bits(blocked[e]), bits(mx.swizzle(scale[e])).flatten())
    assert torch.equal(bits(mx.unswizzle(blocked, 130, 6)), bits(scale))


def test_swizzled_scales_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[128, 4\] are not those of 200 x 4 scales, which take 256 x 4"):
        mx.unswizzle(mx.swizzle(random_scale(100, 4)), 200, 4)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("behind", [0, 64])
def test_groups_are_swizzled_one_behind_the_other(name: str, behind: int) -> None:
    sizes, features = GROUPS[name], 160
    ends, rows = ends_of(sizes), sum(sizes) + behind
    by_rows, by_columns = random_scale(rows, features // 32), random_scale(features, rows // 32)
    blocked, blocked_t = mx.swizzle_row_groups(by_rows, ends), mx.swizzle_column_groups(by_columns, ends)
    assert blocked.shape == (layout.rows_of_groups(rows, len(sizes)), 8)
    assert blocked_t.shape == (256, layout.rows_of_groups(rows, len(sizes)) // 32)
    groups = by_rows[: sum(sizes)].split(sizes), by_columns[:, : sum(sizes) // 32].split([s // 32 for s in sizes], 1)
    for result, parts in zip((blocked, blocked_t), groups, strict=True):
        expected = torch.cat(
            [bits(mx.swizzle(part)).flatten() for part in parts if part.numel()] or [bits(by_rows[:0, 0])]
        )
        assert torch.equal(bits(result).flatten()[: len(expected)], expected)
        assert not bits(result).flatten()[len(expected) :].any()
    back = mx.unswizzle_row_groups(blocked, ends, rows, features // 32)
    back_t = mx.unswizzle_column_groups(blocked_t, ends, features, rows // 32)
    assert torch.equal(bits(back)[: sum(sizes)], bits(by_rows)[: sum(sizes)])
    assert torch.equal(bits(back_t)[:, : sum(sizes) // 32], bits(by_columns)[:, : sum(sizes) // 32])
    assert not bits(back)[sum(sizes) :].any()
    assert not bits(back_t)[:, sum(sizes) // 32 :].any()


@pytest.mark.parametrize("groups", [1, 3, 40])
def test_groups_never_need_more_rows_than_are_there(groups: int) -> None:
    for worst in (32, 96, 128, 160):
        sizes = [worst] * groups
        assert sum(-(-size // 128) * 128 for size in sizes) <= layout.rows_of_groups(sum(sizes), groups)
    assert layout.rows_of_groups(32 * groups, groups) == 128 * groups, "and here all of them are needed"


def test_swizzled_casts_are_the_plain_ones_swizzled() -> None:
    x, ends = torch.randn(192, 96), ends_of([64, 0, 96])
    weight = torch.randn(2, 64, 96)
    codes, scale, codes_t, scale_t = mx.cast_both(x, "floor")
    swizzled = mx.cast_both(x, "floor", swizzled=True)
    assert torch.equal(bits(swizzled[1]), bits(mx.swizzle(scale)))
    assert torch.equal(bits(swizzled[3]), bits(mx.swizzle(scale_t)))
    assert (bits(swizzled[0]) == bits(codes)).all()
    assert (bits(swizzled[2]) == bits(codes_t)).all()
    _, scale, _, scale_t = mx.cast_experts(weight, "floor")
    swizzled = mx.cast_experts(weight, "floor", swizzled=True)
    assert torch.equal(bits(swizzled[1]), bits(mx.swizzle(scale)))
    assert torch.equal(bits(swizzled[3]), bits(mx.swizzle(scale_t)))
    _, scale, _, scale_t = mx.cast_group_both(x, ends, "floor")
    swizzled = mx.cast_group_both(x, ends, "floor", swizzled=True)
    assert torch.equal(bits(swizzled[1]), bits(mx.swizzle_row_groups(scale, ends)))
    assert torch.equal(bits(swizzled[3]), bits(mx.swizzle_column_groups(scale_t, ends)))


def on_fake_gpu(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]


@pytest.mark.parametrize("tokens", [32, 100, 300])
def test_pytorch_takes_dense_operands(tokens: int) -> None:
    with FakeTensorMode():
        a, scale_a = on_fake_gpu(mx.cast_rows(torch.ones(tokens, 96), "rceil", swizzled=True))
        b, scale_b = on_fake_gpu(mx.cast_rows(torch.ones(160, 96), "rceil", swizzled=True))
        recipe, swizzle = ScalingType.BlockWise1x32, SwizzleType.SWIZZLE_32_4_4
        assert scaled_mm(a, b.t(), scale_a, recipe, scale_b, recipe, swizzle, swizzle).shape == (tokens, 160)
        short = torch.empty(1, 4, dtype=mx.E8M0, device="cuda")
        with pytest.raises(RuntimeError, match="for MX scaling scale_a must have"):
            scaled_mm(a, b.t(), short, recipe, scale_b, recipe, swizzle, swizzle)


def test_pytorch_takes_operands_of_grouped_products() -> None:
    ends = torch.tensor([32, 32, 192], dtype=torch.int32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, scale_x, x_t, scale_t = on_fake_gpu(mx.cast_group_both(torch.ones(192, 96), ends, "rceil", swizzled=True))
        weight, scale_w = on_fake_gpu(mx.cast_experts(torch.ones(3, 160, 96), "rceil", swizzled=True)[:2])
        offsets = torch.empty(3, dtype=torch.int32, device="cuda")
        output = torch._scaled_grouped_mm(x, weight.transpose(1, 2), scale_x, scale_w, offsets)
        assert output.shape == (192, 160)
        assert torch._scaled_grouped_mm(x_t, x_t.t(), scale_t, scale_t, offsets).shape == (3, 96, 96)
        short = torch.empty(3, 512, dtype=mx.E8M0, device="cuda")
        with pytest.raises(RuntimeError, match="to have scale shape"):
            torch._scaled_grouped_mm(x, weight.transpose(1, 2), scale_x, short, offsets)


@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_no_tokens_have_no_scales_or_padding_alone(kernel: str) -> None:
    x = torch.zeros(0, 64)
    codes, scale = mx.cast_rows(x, "floor", swizzled=True)
    codes_t, scale_t = mx.cast_columns(x, "floor", swizzled=True, kernel=kernel)
    assert (codes.shape, scale.shape) == ((0, 64), (0, 4))
    assert (codes_t.shape, scale_t.shape) == ((64, 0), (128, 0))
