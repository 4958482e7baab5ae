"""Where the operands of a weight in MXFP8 come from: the parameter, a cache, or codes that FSDP gathered. All give the
same bits, on tensor cores that multiply blocks (here simulated) and emulated."""

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from titan_fp8.converters.mx_weights import MXWeights, prepare_weights
from titan_fp8.kernels import mx
from titan_fp8.quantization import mx_ops, mx_weight
from titan_fp8.quantization.mx_grouped import MXGroupedConfig, mx_grouped_feed_forward
from titan_fp8.quantization.mx_linear import MXConfig, MXFP8Linear
from titan_fp8.quantization.mx_recipes import MX_RECIPES
from titan_fp8.quantization.mx_sharded import GatheredMXWeight, ShardableMXWeight, cast_weight, shard_problem
from titan_fp8.quantization.mx_weight import Cast, Made, MXWeightCache, column_operand, made_of, row_operand
from titan_fp8.quantization.weights import mark_stale

N, K, E = 160, 96, 3
"""Swizzled scales are padded in both directions."""
SHAPES = pytest.mark.parametrize("shape", [(N, K), (E, N, K)], ids=["a linear", "experts"])
EMULATE = pytest.mark.parametrize("emulate", [True, False], ids=["emulated", "native"])


def weight_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gathered(weight: Tensor, mode: str = "rceil", dtype: torch.dtype = torch.float32) -> GatheredMXWeight:
    return GatheredMXWeight(*cast_weight(weight, mode), dtype)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@EMULATE
@SHAPES
def test_operands_are_the_same_wherever_they_come_from(shape: tuple[int, ...], emulate: bool) -> None:
    weight, cast = weight_of(shape), Cast("rceil", "triton", emulate)
    cache = MXWeightCache(cast)
    cache.refresh(weight)
    module = nn.Module()
    module.w = weight
    sources = [Made(), made_of(module, "w", weight, cache), made_of(module, "w", gathered(weight), None)]
    grad = torch.ones(1)
    rows = [row_operand(weight, made, cast) for made in sources]
    columns = [column_operand(weight, made, cast, grad) for made in sources]
    for expected, *others in (rows, columns):
        assert (expected[1] is None) == emulate
        for other in others:
            assert all(same(*pair) for pair in zip(expected, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [-1, -2])
def test_gathered_codes_stand_for_the_numbers_of_the_format(dim: int, dtype: torch.dtype) -> None:
    """Every code with every scale."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scale = torch.arange(256, dtype=torch.uint8).unsqueeze(1).repeat(1, 8)
    if dim == -2:
        codes, scale = codes.t().contiguous(), scale.t().contiguous()
    codes, scale = codes.view(torch.float8_e4m3fn), scale.view(mx.E8M0)
    found, wanted = mx_weight.dequantized(codes, scale, dtype), mx.from_mx(scale, codes, dtype)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(0.5, 1e30, -1e30), wanted.nan_to_num(0.5, 1e30, -1e30))


@pytest.mark.parametrize("kernel", mx.DIM1_KERNELS)
def test_a_shard_is_cast_by_the_kernel_that_was_chosen(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, used = weight_of((N, K)), []

    def cast_columns(x: Tensor, mode: str, *, kernel: str = "triton", swizzled: bool = False) -> tuple[Tensor, Tensor]:
        used.append(kernel)
        return original(x, mode, swizzled=swizzled)

    original = mx.cast_columns
    monkeypatch.setattr(mx, "cast_columns", cast_columns)
    for found, wanted in zip(cast_weight(weight, "floor", kernel), cast_weight(weight, "floor"), strict=True):
        assert same(found, wanted)
    assert used[: 0 if kernel == "triton" else 1] == ([] if kernel == "triton" else [kernel])


def test_shards_have_the_rows_of_the_whole_weights_codes() -> None:
    weight = weight_of((N + 32, K))
    first, second = (cast_weight(part, "even") for part in weight.chunk(2))
    for of_first, of_second, whole in zip(first, second, cast_weight(weight, "even"), strict=True):
        found = torch.cat([of_first.view(torch.uint8), of_second.view(torch.uint8)])
        assert torch.equal(found, whole.view(torch.uint8))


@pytest.mark.parametrize(
    ("shape", "dim", "ranks", "problem"),
    [
        ((256, 32), 0, 8, None),
        ((256, 32), 0, 16, "256 rows in 16 shards are not whole blocks of 32 rows in each"),
        ((96, 32), 0, 1, None),
        ((4, 32, 32), 0, 4, None),
        ((4, 32, 32), 0, 3, "4 experts do not come out even in 3 shards"),
        ((3, 64, 32), 1, 2, None),
        ((3, 96, 32), 1, 2, "96 is not a multiple of 64"),
    ],
)
def test_shards_are_whole_blocks_or_whole_experts(
    shape: tuple[int, ...], dim: int, ranks: int, problem: str | None
) -> None:
    found = shard_problem(shape, dim, ranks)
    assert found is None if problem is None else problem in (found or "")


# ---- modules


def linear(*, emulate: bool = True, bias: bool = False) -> MXFP8Linear:
    torch.manual_seed(0)
    config = MXConfig(MX_RECIPES["mxfp8_cublas_rceil"], emulate, dim1_kernel="torch")
    return MXFP8Linear.from_linear(nn.Linear(K, N, bias=bias), config)


def run(module: nn.Module, seed: int = 0) -> list[Tensor]:
    """Output and gradients; the weight's is dropped after."""
    x = weight_of((64, K), seed).requires_grad_()
    output = module(x)
    output.square().sum().backward()
    (weight,) = [p for p in module.parameters() if p.dim() == 2]
    assert x.grad is not None
    assert weight.grad is not None
    result = [output.detach(), x.grad, weight.grad]
    module.zero_grad()
    return result


def prepared(weights: MXWeights, **keys: Any) -> nn.Sequential:
    model = nn.Sequential(linear(**keys))
    cast = model[0].config.weight_cast
    prepare_weights(model, {"0": model[0]}, ["weight"], cast, weights, True)
    return model


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("weights", [MXWeights.CACHED, MXWeights.GATHERED_CODES])
@EMULATE
def test_a_linear_computes_the_same_bits_from_a_cache_and_where_nobody_shards_it(
    emulate: bool, weights: MXWeights
) -> None:
    expected, model = nn.Sequential(linear()), prepared(weights, emulate=emulate)
    for seed in range(2):
        assert all(torch.equal(*pair) for pair in zip(run(expected, seed), run(model, seed), strict=True))
        for module in (expected, model):
            for parameter in module.parameters():
                parameter.grad = torch.ones_like(parameter)
            torch.optim.SGD(module.parameters(), lr=0.5).step()
            module.zero_grad()


@pytest.mark.usefixtures("native")
@EMULATE
def test_a_linear_computes_the_same_bits_from_gathered_codes(emulate: bool) -> None:
    plain, module = linear(), linear(emulate=emulate)
    master = module.weight.detach()
    x, other = (weight_of((64, K)).requires_grad_() for _ in range(2))
    weight = gathered(master).requires_grad_()
    output, expected = module.multiply(x, weight, None), plain(other)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(output, expected)
    assert torch.equal(x.grad, other.grad)
    assert torch.equal(weight.grad, plain.weight.grad)


def test_experts_compute_the_same_bits_from_gathered_codes_and_from_caches() -> None:
    config = MXGroupedConfig("rceil", emulate=True)
    shapes = [(E, 64, K), (E, 64, K), (E, K, 64)]
    ends = torch.tensor([32, 32, 96], dtype=torch.int32)
    results = []
    for how in ("parameter", "gathered", "cache"):
        masters = [weight_of(shape, seed) for seed, shape in enumerate(shapes)]
        weights = [(gathered(w) if how == "gathered" else w.clone()).requires_grad_() for w in masters]
        caches = [MXWeightCache(config.weight_cast) if how == "cache" else None for _ in weights]
        modules = [SimpleNamespace(w=weight) for weight in weights]
        made = [made_of(*each) for each in zip(modules, "www", weights, caches, strict=True)]  # pyright: ignore
        x = weight_of((96, K), 7).requires_grad_()
        output = mx_grouped_feed_forward(x, weights, ends, config, made)
        output.square().sum().backward()
        results.append([output, x.grad, *(weight.grad for weight in weights)])
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], result, strict=True))


def casts_of(module: nn.Module, monkeypatch: pytest.MonkeyPatch, change: Callable[[], Any], passes: int = 3) -> int:
    """How often a weight is cast in so many forward and backward passes after a change."""
    counts = []
    with monkeypatch.context() as patch:
        for name in ("row_values", "column_values"):
            original = getattr(mx_ops, name)
            patch.setattr(mx_ops, name, lambda x, *rest, f=original: (counts.append(x.shape[0] == N), f(x, *rest))[1])
        change()
        for seed in range(passes):
            run(module, seed)
    return sum(counts)


def test_a_weight_is_cast_once_an_optimizer_step_in_each_orientation(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = nn.Sequential(linear()), prepared(MXWeights.CACHED)
    weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert casts_of(plain, monkeypatch, lambda: None) == 2 * 3
    assert casts_of(model, monkeypatch, lambda: None) == 2
    assert casts_of(model, monkeypatch, lambda: None) == 0
    assert casts_of(model, monkeypatch, lambda: run(model) and optimizer.step()) == 2
    assert casts_of(model, monkeypatch, lambda: weight.detach().mul_(2)) == 2
    assert casts_of(model, monkeypatch, lambda: model.load_state_dict(model.state_dict())) == 2
    assert casts_of(model, monkeypatch, lambda: mark_stale(model)) == 2


def test_linears_that_share_a_weight_share_its_operands() -> None:
    model = nn.Sequential(linear(), linear())
    model[1].weight = model[0].weight
    cast = model[0].config.weight_cast
    prepare_weights(model, {"0": model[0], "1": model[1]}, ["weight"], cast, MXWeights.CACHED, True)
    assert model[0].weight_cache is model[1].weight_cache


def test_a_compiled_linear_with_cached_or_gathered_codes_gives_the_same_bits() -> None:
    for weights in (MXWeights.CACHED, MXWeights.GATHERED_CODES):
        model = prepared(weights)
        expected = run(model)
        compiled = prepared(weights)
        compiled[0].compile(backend="aot_eager", fullgraph=True)
        assert all(torch.equal(*pair) for pair in zip(run(compiled), expected, strict=True))
    torch._dynamo.reset()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("weights", [MXWeights.CACHED, MXWeights.GATHERED_CODES])
def test_a_copy_has_codes_of_its_own(weights: MXWeights, how: Callable[[nn.Module], nn.Module]) -> None:
    model = prepared(weights)
    expected = run(model)
    copied = how(model)
    with torch.no_grad():
        copied[0].weight.mul_(2)  # pyright: ignore
    assert torch.equal(run(copied)[0], 2 * expected[0])
    assert torch.equal(run(model)[0], expected[0])


def test_a_state_dict_holds_plain_tensors_and_takes_them() -> None:
    model = prepared(MXWeights.GATHERED_CODES)
    assert isinstance(model[0].weight, ShardableMXWeight)
    expected = run(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert {type(value) for value in model.state_dict().values()} == {Tensor}
    with torch.no_grad():
        model[0].weight.zero_()
    for assign in (False, True):
        model.load_state_dict(state, assign=assign)
        assert isinstance(model[0].weight, ShardableMXWeight)
        assert torch.equal(run(model)[0], expected[0])


def test_what_cannot_be_computed_with_codes_is_an_error_that_says_what_to_do() -> None:
    weight = gathered(weight_of((N, K)))
    with pytest.raises(NotImplementedError, match=r"MXFP8 codes, which only an MXFP8Linear can use.*filter_fqns"):
        weight + 1
    assert torch.equal(weight.dequantize(), mx.from_mx(weight.scale, weight.codes, torch.float32))
    model = prepared(MXWeights.GATHERED_CODES)
    model[0].weight = nn.Parameter(weight_of((N, K)))
    with pytest.raises(
        RuntimeError,
        match=r"converted for MXFP8 all-gather \(enable_fsdp_mxfp8_all_gather\).*its parameter was replaced",
    ):
        run(model)


@SHAPES
def test_operators_give_what_the_compiler_is_told_that_they_do(shape: tuple[int, ...]) -> None:
    codes, scale, codes_n, scale_n = cast_weight(weight_of(shape), "rceil")
    for operator, arguments in (
        (mx_weight.values_of_weight, (codes, scale)),
        (mx_weight.values_of_weight, (codes_n, scale_n, torch.ones(1))),
        (mx_weight.swizzled, (scale,)),
        (mx_weight.transposed, (codes_n, scale_n, torch.ones(1))),
    ):
        actual = operator(*arguments)
        with FakeTensorMode() as mode:
            told = operator(*(mode.from_tensor(argument) for argument in arguments))
        for real, fake in zip(
            *((each if isinstance(each, tuple) else (each,)) for each in (actual, told)), strict=True
        ):
            assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())
