"""What becomes of the weights of a model in MXFP8, by where they will lie; what cannot be gathered as codes is refused
at conversion, with every weight's name."""

from typing import Any

import pytest
import torch
from torch import nn

import titan_fp8
from tests.unit.converters.test_mx_grouped import decoder
from titan_fp8.converters.config import MXGroupedSection, MXLinearSection
from titan_fp8.converters.mx_grouped import MXFP8Experts, MXGroupedConverter
from titan_fp8.converters.mx_linear import MXLinearConverter
from titan_fp8.converters.protocol import ConversionError, Placement
from titan_fp8.quantization.fsdp_weight import states_of
from titan_fp8.quantization.mx_linear import MXFP8Linear
from titan_fp8.quantization.mx_sharded import ShardableMXWeight
from titan_fp8.quantization.weights import caches_of
from titan_fp8.runtime.device import detect_device

OPTION = "enable_fsdp_mxfp8_all_gather"
TWO_SHARDS, TWO_COPIES = Placement(ranks=2, shards=2, expert_shards=2), Placement(ranks=2)
OFFLOADED = Placement(offloaded=True)
STAY = Placement(ranks=2, shards=2, expert=2, experts_stay=True)
GATHERED = "gathered in high precision, cast in each forward and each backward pass"
CODES = "cast shard by shard, gathered as MXFP8 codes"
ONCE, ONCE_EACH = "cast once an optimizer step", "cast once an optimizer step on each rank"


class Model(nn.Module):
    def __init__(self, rows: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        self.first, self.second = nn.Linear(64, rows, bias=False), nn.Linear(rows, 64, bias=False)
        self.output = nn.Linear(64, 64, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.second(self.first(self.embedding(tokens))))


def converter(placement: Placement, **settings: Any) -> MXLinearConverter:
    return MXLinearConverter(MXLinearSection(emulate=True, **settings), detect_device(), placement)


def experts_converter(placement: Placement, **settings: Any) -> MXGroupedConverter:
    section = MXGroupedSection(fqns=["experts"], emulate=True, **settings)
    return MXGroupedConverter(section, detect_device(), placement)


CASES = pytest.mark.parametrize(
    ("placement", "gathers", "words", "what"),
    [
        (Placement(), False, ONCE, "caches"),
        (TWO_COPIES, False, ONCE_EACH, "states"),
        (OFFLOADED, False, GATHERED, None),
        (TWO_SHARDS, False, GATHERED, None),
        (TWO_SHARDS, True, CODES, "states"),
    ],
)


def assert_kept(modules: list[nn.Module], what: str | None) -> None:
    assert modules
    for module in modules:
        assert bool(caches_of(module)) == (what == "caches")
        assert bool(states_of(module)) == (what == "states")
        assert all(state.caches for _, state in states_of(module))
        assert module.reads_master_weights == (what != "states")  # pyright: ignore
        for parameter in module.parameters():
            assert isinstance(parameter, ShardableMXWeight) == (what == "states")


@CASES
def test_weights_of_linears(placement: Placement, gathers: bool, words: str, what: str | None) -> None:
    model = Model()
    report = converter(placement, **{OPTION: gathers}).convert(model)
    assert report.weights == words
    assert words in report.summary()
    assert_kept([module for module in model.modules() if isinstance(module, MXFP8Linear)], what)


@CASES
def test_weights_of_experts(placement: Placement, gathers: bool, words: str, what: str | None) -> None:
    model = decoder()
    report = experts_converter(placement, **{OPTION: gathers}).convert(model)
    assert report.weights == words
    assert_kept([module for module in model.modules() if isinstance(module, MXFP8Experts)], what)


def test_experts_that_stay_on_their_rank_are_cast_once_a_step_and_have_nothing_to_gather() -> None:
    model = decoder()
    assert experts_converter(STAY).convert(model).weights == ONCE
    with pytest.raises(ConversionError, match=f"{OPTION}: each rank has its experts for good"):
        experts_converter(STAY, **{OPTION: True}).convert(decoder())


def test_a_bias_is_gathered_in_full() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    converter(TWO_SHARDS, filter_fqns=[], **{OPTION: True}).convert(model)
    assert model[0].reads_master_weights


def test_shards_that_are_no_whole_blocks_are_refused_by_name_and_nothing_is_changed() -> None:
    model = Model(rows=96)
    with pytest.raises(ConversionError) as error:
        converter(TWO_SHARDS, **{OPTION: True}).convert(model)
    (problem,) = error.value.violations
    assert problem == (
        "first: weight 96 x 64: 96 rows in 2 shards are not whole blocks of 32 rows in each, as blocks along the rows "
        "must be: 96 is not a multiple of 64, so quantize.linear.mx.enable_fsdp_mxfp8_all_gather cannot gather it as "
        "codes; take another number of shards, leave it out with quantize.linear.mx.filter_fqns, or turn the option off"
    )
    assert type(model.first) is nn.Linear
    converter(TWO_SHARDS, filter_fqns=["output", "first"], **{OPTION: True}).convert(model)
    converter(Placement(ranks=3, shards=3), filter_fqns=["output", "second"], **{OPTION: True}).convert(Model(rows=96))


def test_the_parts_of_tensor_parallel_ranks_are_what_shards_are_of() -> None:
    model = nn.ModuleDict({"attention": nn.ModuleDict({"wq": nn.Linear(64, 128, bias=False)})})
    both = Placement(ranks=4, shards=2, tensor=4)
    with pytest.raises(ConversionError) as error:
        converter(both, filter_fqns=[], **{OPTION: True}).convert(model)
    assert "weight 128 x 64, of which a rank of 4 has 32 x 64: 32 rows in 2 shards" in str(error.value)


def test_experts_that_shards_do_not_divide_are_refused_by_name() -> None:
    four = Placement(ranks=4, shards=4, expert=2, expert_shards=3)
    with pytest.raises(ConversionError) as error:
        experts_converter(four, **{OPTION: True}).convert(decoder(n_experts=8))
    assert len(error.value.violations) == 6
    assert "layers.0.moe.experts.w1: 4 x " in error.value.violations[0]
    assert "4 experts do not come out even in 3 shards" in error.value.violations[0]


def test_a_weight_that_something_else_reads_is_not_gathered_as_codes() -> None:
    model = Model()
    model.output.weight = model.embedding.weight
    with pytest.raises(ConversionError, match=r"embedding.weight \(high precision\), output.weight \(mxfp8_cublas\)"):
        converter(TWO_SHARDS, filter_fqns=[], **{OPTION: True}).convert(model)
    assert type(model.output) is nn.Linear
    assert converter(TWO_COPIES, filter_fqns=[]).convert(model).weights == GATHERED


@pytest.mark.parametrize("settings", [{}, {OPTION: True}], ids=["one process", "all-gather"])
def test_after_the_optimizer_step_codes_are_stale_however_the_weight_was_written(settings: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    subject = converter(TWO_SHARDS if settings else Placement(), filter_fqns=[], **settings)
    subject.convert(model)
    subject.pre_training([model])
    if settings:
        ((_, state),) = states_of(model[0])
        state._made_from = object()  # pyright: ignore
        subject.post_optimizer([model])
        assert state._made_from is None
        return
    x = torch.randn(32, 64)
    before = model(x)
    torch.from_numpy(model[0].weight.detach().numpy()).neg_()  # seen by nothing in PyTorch
    assert torch.equal(model(x), before)
    subject.post_optimizer([model])
    assert torch.equal(model(x), -before)


def test_the_api_keeps_and_gathers_codes_if_asked_to() -> None:
    def weights(**arguments: bool) -> str:
        return titan_fp8.convert_to_mxfp8_training(Model(), emulate=True, **arguments).weights

    assert weights() == "cast in each forward and each backward pass"
    assert weights(cache_weights=True) == ONCE
    assert weights(enable_fsdp_mxfp8_all_gather=True) == CODES
    model = decoder()
    assert titan_fp8.convert_to_mxfp8_grouped_training(model, emulate=True, cache_weights=True).weights == ONCE
    with pytest.raises(ConversionError, match="cache_weights = 1: expected True or False"):
        titan_fp8.convert_to_mxfp8_training(Model(), emulate=True, cache_weights=1)  # pyright: ignore
