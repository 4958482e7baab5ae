"""The block-scaled reference casts: what shares a scale, in which layout it lies, and shards that cut tiles."""

import pytest
import torch
from torch import Tensor

from titan_fp8.kernels import blockwise
from titan_fp8.kernels.blockwise import reference
from titan_fp8.kernels.float8 import E4M3
from titan_fp8.kernels.float8 import reference as float8

BLOCK = blockwise.BLOCK
POWERS = pytest.mark.parametrize("power_of_two", [False, True], ids=["exact", "power of two"])


def values(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Rows and columns of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    return x * torch.randn(1, columns, generator=generator).exp()


def bits(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


def expanded(scale: Tensor, row_block: int, column_block: int) -> Tensor:
    """A scale for each value."""
    return scale.repeat_interleave(row_block, 0).repeat_interleave(column_block, 1)


@POWERS
def test_each_block_is_the_tensorwise_cast_of_itself(power_of_two: bool) -> None:
    x = values(256, 384)
    codes, scale, codes_t, scale_t = blockwise.cast_block_both(x, E4M3, power_of_two)
    w_codes, w_scale = blockwise.cast_blocks(x, E4M3, power_of_two)

    def alone(block: Tensor) -> tuple[Tensor, Tensor]:
        inv_scale, block_scale = float8.scales(float8.amax_bits(block), E4M3, power_of_two)
        return bits(float8.to_codes(block, inv_scale, E4M3)), block_scale

    for row, column in ((0, 0), (200, 1), (255, 2)):
        expected, expected_scale = alone(x[row : row + 1, column * BLOCK : (column + 1) * BLOCK])
        assert scale[row, column] == expected_scale
        assert torch.equal(bits(codes)[row : row + 1, column * BLOCK : (column + 1) * BLOCK], expected)
    for row, column in ((0, 0), (1, 130), (1, 383)):
        expected, expected_scale = alone(x[row * BLOCK : (row + 1) * BLOCK, column : column + 1])
        assert scale_t[column, row] == expected_scale
        assert torch.equal(bits(codes_t)[column, row * BLOCK : (row + 1) * BLOCK], expected.squeeze(1))
    for row, column in ((0, 0), (1, 2)):
        tile = (slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK))
        expected, expected_scale = alone(x[tile])
        assert w_scale[row, column] == expected_scale
        assert torch.equal(bits(w_codes)[tile], expected)


@POWERS
def test_codes_times_scales_are_the_values(power_of_two: bool) -> None:
    x = values(256, 256)
    codes, scale, codes_t, scale_t = blockwise.cast_block_both(x, E4M3, power_of_two)
    w_codes, w_scale = blockwise.cast_blocks(x, E4M3, power_of_two)
    rows = codes.float() * expanded(scale, 1, BLOCK)
    columns = (codes_t.float() * expanded(scale_t, 1, BLOCK)).t()
    tiles = w_codes.float() * expanded(w_scale, BLOCK, BLOCK)
    spans = expanded(scale, 1, BLOCK), expanded(scale_t, 1, BLOCK).t(), expanded(w_scale, BLOCK, BLOCK)
    for result, span in zip((rows, columns, tiles), spans, strict=True):
        # Half a unit of a 3-bit mantissa, or of a subnormal.
        assert ((result - x).abs() <= torch.maximum(x.abs() * 2.0**-4, span * 2.0**-10)).all()


@POWERS
def test_powers_of_two_only_where_asked_for(power_of_two: bool) -> None:
    x = values(128, 256)
    for scale in (
        *blockwise.cast_block_both(x, E4M3, power_of_two)[1::2],
        blockwise.cast_blocks(x, E4M3, power_of_two)[1],
    ):
        mantissa, _ = torch.frexp(scale)
        assert (mantissa == 0.5).all() == power_of_two


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129, 200])
def test_columns_are_padded_to_whole_blocks_with_zeros_even_where_the_scale_is_nan(tokens: int) -> None:
    x = values(tokens, 128)
    if tokens:
        x[tokens - 1, 3] = torch.nan
    codes, scale, codes_t, scale_t = blockwise.cast_block_both(x, E4M3, False)
    padded = -(-tokens // BLOCK) * BLOCK
    assert (codes.shape, scale.shape) == ((tokens, 128), (tokens, 1))
    assert (codes_t.shape, scale_t.shape) == ((128, padded), (128, padded // BLOCK))
    assert (bits(codes_t)[:, tokens:] == 0).all()
    assert codes_t.is_contiguous()
    if tokens:
        assert scale_t[:, -1].isnan().nonzero().tolist() == [[3]]


def test_padding_takes_no_part_in_a_scale() -> None:
    x = values(130, 128)
    _, scale_t = blockwise.cast_block_columns(x, E4M3, False)
    _, of_the_rest = blockwise.cast_block_columns(x[128:], E4M3, False)
    assert torch.equal(scale_t[:, 1:], of_the_rest)


def test_scales_of_rows_of_blocks_have_the_outer_dimension_contiguous_and_those_of_tiles_the_inner() -> None:
    x = values(256, 384)
    _, scale, _, scale_t = blockwise.cast_block_both(x, E4M3, False)
    assert scale.stride() == (1, 256)
    assert scale_t.stride() == (1, 384)
    assert blockwise.cast_blocks(x, E4M3, False)[1].stride() == (3, 1)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_block_with_nan_or_inf_is_nan_throughout_and_leaves_the_others_alone(bad: float) -> None:
    clean, x = values(256, 256), values(256, 256)
    x[130, 5] = bad
    before, after = (blockwise.cast_block_both(t, E4M3, False) for t in (clean, x))
    tiles_before, tiles_after = (blockwise.cast_blocks(t, E4M3, False) for t in (clean, x))
    checks = [
        (before[:2], after[:2], (130, slice(0, 128)), (130, 0)),
        (before[2:], after[2:], (5, slice(128, 256)), (5, 1)),
        (tiles_before, tiles_after, (slice(128, 256), slice(0, 128)), (1, 0)),
    ]
    for (codes, scale), (codes_bad, scale_bad), values_hit, scale_hit in checks:
        assert scale_bad[scale_hit].isnan()
        assert (bits(codes_bad)[values_hit] == float8.NAN_CODE).all()
        codes, scale = bits(codes).clone(), scale.clone()
        codes[values_hit], scale[scale_hit] = bits(codes_bad)[values_hit], 0.0
        assert torch.equal(codes, bits(codes_bad))
        assert torch.equal(scale, scale_bad.nan_to_num(0.0))


def test_a_cast_of_zeros_is_zero_with_a_finite_scale() -> None:
    codes, scale, codes_t, scale_t = blockwise.cast_block_both(torch.zeros(3, 128), E4M3, False)
    w_codes, w_scale = blockwise.cast_blocks(torch.zeros(128, 128), E4M3, False)
    for c, s in ((codes, scale), (codes_t, scale_t), (w_codes, w_scale)):
        assert s.isfinite().all()
        assert (bits(c) == 0).all()


def test_the_transpose_of_a_weight_has_the_transposed_tiles() -> None:
    w = values(256, 384)
    codes, scale = blockwise.cast_blocks(w, E4M3, False)
    codes_t, scale_t = blockwise.cast_blocks(w.t(), E4M3, False)
    assert torch.equal(bits(codes_t), bits(float8.transpose_codes(codes)))
    assert torch.equal(scale_t, scale.t())


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strides_do_not_matter(input_dtype: torch.dtype) -> None:
    base = torch.randn(256, 384, generator=torch.Generator().manual_seed(3)).to(input_dtype)
    for x in (base.t(), base[::2, ::3], base[:1].expand(128, 384)):
        copy = x.contiguous()
        for call in (blockwise.cast_block_both, blockwise.cast_blocks):
            for result, expected in zip(call(x, E4M3, False), call(copy, E4M3, False), strict=True):
                assert torch.equal(result.float(), expected.float())
                assert result.stride() == expected.stride()


@POWERS
@pytest.mark.parametrize(("rows", "ranks"), [(384, 5), (384, 2), (256, 8), (128, 128), (256, 300), (384, 1)])
def test_shards_that_cut_tiles_give_the_codes_and_scales_of_the_whole_weight(
    rows: int, ranks: int, power_of_two: bool
) -> None:
    weight = values(rows, 256)
    weight[rows // 2, 7] = torch.nan
    codes, scale = blockwise.cast_blocks(weight, E4M3, power_of_two)
    each = -(-rows // ranks)
    firsts = [min(rank * each, rows) for rank in range(ranks)]
    shards = [weight[first : first + each] for first in firsts]
    parts = [blockwise.block_amax(shard, first, rows) for shard, first in zip(shards, firsts, strict=True)]
    amax = torch.stack(parts).amax(0)
    assert amax.dtype == torch.int32
    assert torch.equal(blockwise.block_scale(amax, E4M3, power_of_two).view(torch.int32), scale.view(torch.int32))
    for shard, first in zip(shards, firsts, strict=True):
        part = blockwise.cast_blocks_from_amax(shard, amax, E4M3, power_of_two, first)
        assert torch.equal(bits(part), bits(codes)[first : first + each])


def test_a_shard_says_nothing_about_tiles_that_it_has_no_row_of() -> None:
    amax = blockwise.block_amax(torch.ones(10, 256), 250, 500)
    assert (amax.view(torch.float32) == torch.tensor([[0.0], [1.0], [1.0], [0.0]])).all()
    assert amax.shape == (4, 2)
    assert (blockwise.block_amax(torch.ones(0, 256), 500, 500) == 0).all()


def test_amax_of_a_tile_with_any_nan_is_the_one_that_a_maximum_of_integers_keeps() -> None:
    shard = torch.ones(2, 128)
    shard[0, 0] = -torch.nan
    shard[1, 5] = torch.inf
    assert blockwise.block_amax(shard, 0, 2).tolist() == [[0x7FC00000]]
    assert blockwise.block_amax(shard[1:], 1, 2).tolist() == [[0x7F800000]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: blockwise.cast_block_rows(torch.ones(3, 130), E4M3, False), r"multiples of 128.*\[3, 130\]"),
        (lambda: blockwise.cast_block_both(torch.ones(3), E4M3, False), "2-D"),
        (lambda: blockwise.cast_block_columns(torch.ones(3, 128), torch.float16, False), "float8_e4m3fn"),
        (lambda: blockwise.cast_blocks(torch.ones(130, 128), E4M3, False), r"whole 128x128 tiles.*\[130, 128\]"),
        (lambda: blockwise.block_amax(torch.ones(10, 128), 250, 128), "rows 250 to 260"),
        (lambda: blockwise.block_amax(torch.ones(10, 128), -1, 128), "rows -1 to 9"),
        (
            lambda: blockwise.cast_blocks_from_amax(
                torch.ones(1, 128), torch.zeros(1, 2, dtype=torch.int32), E4M3, False, 0
            ),
            "int32 amax",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_sizes_are_rounded_up_to_blocks() -> None:
    assert [reference.blocks(n) for n in (0, 1, 128, 129)] == [0, 1, 1, 2]
    assert [reference.padded(n) for n in (0, 1, 128, 129)] == [0, 128, 128, 256]
