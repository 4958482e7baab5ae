"""`filter_fqns` of `quantize.grouped_mm.float8`: which experts stay in high precision, and why."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

import titan_fp8
from tests.unit.converters.test_float8_grouped import ALL, SIZES, build, convert, converted_names, violations
from tests.unit.converters.test_other_experts import Layer, ours
from titan_fp8.converters import ConversionError
from titan_fp8.converters.config import Float8GroupedSection
from titan_fp8.converters.protocol import Placement
from titan_fp8.converters.size_rule import EXPERTS_RULE
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.dispatch import BF16_ALIGNMENT
from titan_fp8.models.moe import Experts

LARGE = {"dim": 4112, "n_heads": 1, "moe_ffn_dim": 4096, "ffn_dim": 16, "n_experts": 2, "top_k": 1}


def on_meta(**options: Any) -> Decoder:
    """Experts large enough to gain, of which nothing is computed."""
    with torch.device("meta"):
        return Decoder(ModelDims(**SIZES | LARGE | options))


@pytest.mark.parametrize("pattern", ["layers.1", "layers.1.moe.experts", "layers.1.moe", "1", "layers.1.*"])
def test_experts_that_a_filter_names_stay_in_high_precision(pattern: str) -> None:
    model = build()
    report = convert(model, filter_fqns=[pattern])
    assert converted_names(model) == {"layers.2.moe.experts"}
    assert {row.fqn.rpartition(".")[0]: row.reason for row in report.rows} == {
        "layers.1.moe.experts": f'filter "{pattern}"',
        "layers.2.moe.experts": None,
    }
    assert model.layers["1"].moe.dispatcher.alignment == BF16_ALIGNMENT
    assert f'3 left alone (filter "{pattern}")' in report.summary()
    assert report.fingerprint()["exceptions"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filter_fqns": ["layers.3"]}, r"filter_fqns: 'layers.3' matches no module of the model \(did you mean"),
        ({"filter_fqns": ["auto_filter_small_nk"]}, r"matches no module .*did you mean \"auto_filter_small_kn\""),
        ({"filter_fqns": ["layers.0"]}, r"'layers.0' matches no experts that quantize.grouped_mm.float8.fqns names"),
        ({"filter_fqns": ["layers.2"], "fqns": ["layers.1"]}, r"'layers.2' matches no experts that"),
        ({"filter_fqns": ["shared_experts"]}, r"'shared_experts' matches no experts that"),
        ({"filter_fqns": ["experts"]}, r"filter_fqns leaves all experts alone that .*fqns names, so nothing would run"),
        ({"filter_fqns": ["layers.1", "layers.2"]}, r"leaves all experts alone that"),
    ],
)
def test_filters_without_an_effect_and_without_a_rest_are_refused(settings: dict[str, Any], message: str) -> None:
    (problem,) = violations(build(), **settings)
    assert re.search(message, problem), problem


def test_a_filter_that_can_match_nothing_is_refused_in_the_section() -> None:
    section = Float8GroupedSection(fqns=["experts"], filter_fqns=["layers..1", "auto_filter_small_kn"])
    (problem,) = section.problems()
    assert problem.key == "filter_fqns"
    assert "'layers..1' is not a module name" in problem.text


def test_what_a_filter_leaves_alone_may_be_what_float8_cannot_multiply() -> None:
    model = on_meta()
    model.layers["1"].moe.experts = Experts(2, 4112, 40, 0.02)
    assert len(violations(model)) == 3
    for pattern in ("layers.1", "auto_filter_small_kn"):
        other = copy.deepcopy(model)
        report = convert(other, filter_fqns=[pattern])
        assert {row.reason for row in report.rows if "layers.1" in row.fqn} == {
            pattern if pattern == "auto_filter_small_kn" else f'filter "{pattern}"'
        }


@pytest.mark.parametrize(
    ("dims", "stays"),
    [
        ({"dim": 768}, True),
        ({"dim": 784}, False),
        ({"hidden_dim": 768}, True),
        ({"hidden_dim": 784}, False),
        ({"dim": 4112, "hidden_dim": 4096 + 8}, True),
    ],
    ids=str,
)
def test_the_rule_of_size_leaves_small_experts_alone(dims: dict[str, int], stays: bool) -> None:
    model = on_meta()
    with torch.device("meta"):
        model.layers["1"].moe.experts = Experts(2, **{"dim": 4112, "hidden_dim": 4096} | dims, residual_std=0.02)
    report = convert(model, filter_fqns=["auto_filter_small_kn"])
    assert converted_names(model) == ({"layers.2.moe.experts"} if stays else ALL)
    reasons = {row.reason for row in report.rows if row.fqn.startswith("layers.1.")}
    assert reasons == {"auto_filter_small_kn" if stays else None}
    assert report.fingerprint()["auto_filter_small_kn"] == {"rowwise": EXPERTS_RULE.in_words()}


def test_the_rule_of_size_counts_the_part_of_experts_that_a_rank_has() -> None:
    def to_convert() -> Decoder:
        model = on_meta()
        with torch.device("meta"):
            model.layers["1"].moe.experts = Experts(2, 4112, 1536, 0.02)
        return model

    for ranks, expected in ((1, ALL), (2, {"layers.2.moe.experts"})):
        model = to_convert()
        convert(model, placement=Placement(expert_tensor=ranks), filter_fqns=["auto_filter_small_kn"])
        assert converted_names(model) == expected


@pytest.mark.parametrize(
    ("filters", "small"), [(["auto_filter_small_kn"], 2), (["auto_filter_small_kn", "layers.2"], 1)]
)
def test_a_rule_of_size_that_leaves_all_experts_alone_is_refused(filters: list[str], small: int) -> None:
    prefix = "quantize.grouped_mm.float8"
    (problem,) = violations(build(), filter_fqns=filters)
    assert problem == (
        f"{prefix}.filter_fqns leaves all experts alone that {prefix}.fqns names, {small} of 2 by auto_filter_small_kn "
        "as too small to gain (features K and hidden features H on a rank: "
        f"{EXPERTS_RULE.in_words()}, or 16 does not divide both), so nothing would run in float8; take "
        "auto_filter_small_kn out of it, or take the converter out of model.converters"
    )
    with pytest.raises(ConversionError, match=r"^filter_fqns leaves .* out of it, or do not convert the model$"):
        titan_fp8.convert_to_float8_grouped_training(build(), filter_fqns=filters, emulate=True)


def test_the_rule_of_size_is_refused_where_the_parts_of_all_experts_are_too_small() -> None:
    convert(on_meta(moe_ffn_dim=1536), filter_fqns=["auto_filter_small_kn"])
    with pytest.raises(ConversionError, match="leaves all experts alone"):
        convert(on_meta(moe_ffn_dim=1536), placement=Placement(expert_tensor=2), filter_fqns=["auto_filter_small_kn"])


def test_a_name_counts_before_the_rule_of_size() -> None:
    model = on_meta(n_layers=4)
    with torch.device("meta"):
        model.layers["1"].moe.experts = Experts(2, 32, 48, 0.02)
        model.layers["2"].moe.experts = Experts(2, 32, 48, 0.02)
    report = convert(model, filter_fqns=["auto_filter_small_kn", "layers.2"])
    reasons = {row.fqn.rpartition(".")[0]: row.reason for row in report.rows}
    assert list(reasons.values()) == ["auto_filter_small_kn", 'filter "layers.2"', None]


def test_filters_are_an_argument_in_python() -> None:
    model = build()
    report = titan_fp8.convert_to_float8_grouped_training(model, filter_fqns=["layers.2"], emulate=True)
    assert {row.reason for row in report.rows} == {None, 'filter "layers.2"'}
    with pytest.raises(
        ConversionError, match=r"^filter_fqns = 'layers.1': expected a list of names; write \['layers.1'\]$"
    ):
        titan_fp8.convert_to_float8_grouped_training(build(), filter_fqns="layers.1", emulate=True)


def test_experts_of_other_models_are_filtered_by_name_and_not_by_size() -> None:
    def to_convert() -> nn.Module:
        return nn.ModuleDict({"ours": ours(), "theirs": Layer(), "left": Layer()})

    model = to_convert()
    report = titan_fp8.convert_to_float8_grouped_training(model, filter_fqns=["left"], emulate=True)
    reasons = {row.fqn.partition(".")[0]: row.reason for row in report.rows}
    assert reasons == {"ours": None, "theirs": None, "left": 'filter "left"'}
    assert "forward" in vars(model["theirs"].experts)
    assert "forward" not in vars(model["left"].experts)
    with pytest.raises(ConversionError, match=r"do not say which is which \(theirs\.experts\); name those") as error:
        titan_fp8.convert_to_float8_grouped_training(
            to_convert(), filter_fqns=["left", "auto_filter_small_kn"], emulate=True
        )
    assert len(error.value.violations) == 1
