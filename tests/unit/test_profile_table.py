"""The table of a profiler trace: categories, what overlaps, and sums a step."""

import gzip
import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(load):
    return load("profile_table")


def _event(category: str, name: str, start: float, length: float, **arguments: object) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "args": arguments}


def _kernel(name: str, start: float, length: float, number: int = -1) -> dict:
    return _event("kernel", name, start, length, **{"External id": number, "correlation": number})


@pytest.mark.parametrize(
    ("operator", "kernel", "category"),
    [
        ("aten::_scaled_mm", "nvjet_sm90_qqtst_256x128", "FP8 GEMM"),
        ("", "nvjet_sm90_qrtst_128x160", "FP8 GEMM"),
        ("aten::mm", "nvjet_sm90_tst_320x128", "GEMM"),
        ("aten::_cudnn_attention_backward", "cudnn_generated_fort_native_sdpa", "attention"),
        ("titan_fp8::cast_tensor", "_cast_tiles_kernel", "casts"),
        ("titan_fp8::rms_norm_cast", "_norm_kernel", "norm and activation"),
        ("", "triton_red_fused_abs_amax_view_0", "casts"),
        ("", "triton_poi_fused__scaled_mm__to_copy_clamp_mul_2", "casts"),
        ("triton_poi_fused__scaled_mm_silu_2", "triton_poi_fused__scaled_mm_silu_2", "norm and activation"),
        ("", "triton_per_fused__fused_rms_norm__amax_0", "norm and activation"),
        ("record_param_comms", "ncclDevKernel_AllGather_RING_LL", "communication"),
        ("titan_fp8::gather_products", "Memcpy PtoP (Device -> Device)", "communication"),
        ("record_param_comms", "ncclDevKernel_SendRecv", "all-to-all"),
        ("_c10d_functional::all_to_all_single", "ncclDevKernel_SendRecv", "all-to-all"),
        ("titan_fp8::moe_permute", "_to_groups_kernel", "routing and permutation"),
        ("titan_fp8::moe_unpermute_backward", "_to_tokens_kernel", "routing and permutation"),
        ("", "_place_kernel", "routing and permutation"),
        ("aten::index_put_", "indexing_backward_kernel", "routing and permutation"),
        ("titan_fp8::gather_group_both", "_gather_cast_kernel", "permutation with casts"),
        ("titan_fp8::gather_group_both", "_scales_kernel", "permutation with casts"),
        ("", "_gather_amax_kernel", "permutation with casts"),
        ("", "_gather_cast_kernel", "permutation with casts"),
        ("titan_fp8::cast_group_both", "_cast_kernel", "casts"),
        ("titan_fp8::cast_group_columns", "_amax_kernel", "casts"),
        ("titan_fp8::columns_of_experts", "_columns_kernel", "casts"),
        ("titan_fp8::swiglu_group_rows", "_swiglu_rows_kernel", "experts' activation with casts"),
        ("titan_fp8::swiglu_group_backward", "_scales_kernel", "experts' activation with casts"),
        ("", "_swiglu_groups_amax_kernel", "experts' activation with casts"),
        ("", "_swiglu_groups_cast_kernel", "experts' activation with casts"),
        ("titan_fp8::swiglu_cast", "_swiglu_tiles_kernel", "norm and activation"),
        ("titan_fp8::grouped_scaled_mm_rows", "cutlass_kernel", "FP8 GEMM"),
        ("aten::_grouped_mm", "cutlass3x_grouped_kernel", "GEMM"),
        ("aten::_fused_adamw_", "multi_tensor_apply_kernel", "optimizer"),
        ("aten::_foreach_norm", "lpnorm_cleanup", "optimizer"),
        ("", "_squares_kernel", "optimizer"),
        ("titan_fp8::rotate", "_rotate_kernel", "other"),
        ("", "split_with_sizes_copy_out_contiguous_no_cast_kernel", "copies"),
        ("aten::copy_", "Memcpy DtoD (Device -> Device)", "copies"),
        ("aten::add_", "vectorized_elementwise_kernel", "other"),
        ("", "_update_kernel", "optimizer"),
        ("", "multi_tensor_apply_kernel<LpNormFunctor<float>>", "optimizer"),
        ("", "multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>", "optimizer"),
        ("", "multi_tensor_apply_kernel<BinaryOpScalarTensorFunctor<float>>", "optimizer"),
        ("", "multi_tensor_apply_kernel<UnaryOpFunctor<float>>", "copies"),
        ("", "vectorized_elementwise_kernel<FillFunctor<float>>", "copies"),
        ("", "_norm_rows_kernel", "norm and activation"),
        ("", "cudnn::fusion::convert_dq_to_16bits", "attention"),
    ],
)
def test_a_kernel_belongs_to_the_operator_that_launched_it_or_to_its_name(
    script, operator: str, kernel: str, category: str
) -> None:
    assert script.category_of(operator, kernel) == category


def test_times_are_those_of_a_step_and_overlap_is_seen(script) -> None:
    events = [
        *(_event("user_annotation", f"ProfilerStep#{n}", 0, 1e4) for n in (4, 5)),
        _event("cpu_op", "aten::mm", 0, 1, **{"External id": 7}),
        _kernel("some_kernel", 0, 4000, 7),
        _kernel("ncclDevKernel_AllReduce", 3000, 2000),  # with the next: 1 ms hidden, 2 exposed
        _kernel("ncclDevKernel_SendRecv", 5000, 1000),
        _kernel("vectorized_elementwise_kernel", 8000, 2000),  # after 2 ms of nothing
    ]
    summary = script.summarize(events, longest=1)
    assert summary.steps == 2
    assert summary.by_category["GEMM"] == pytest.approx(2)
    assert summary.by_category["communication"] == pytest.approx(1)
    assert summary.by_category["all-to-all"] == pytest.approx(0.5)
    assert summary.by_category["other"] == pytest.approx(1)
    assert (summary.exposed, summary.gaps, summary.span) == pytest.approx((1, 1, 5))
    assert summary.longest == [("some_kernel", 2.0, 0.5)]


def test_what_the_optimizer_launches_is_the_optimizers(script) -> None:
    events = [
        _event("user_annotation", "Optimizer.step#AdamW.step", 100, 50),
        *(_event("cuda_runtime", "cudaLaunchKernel", 10 * n, 1, correlation=n) for n in (9, 12, 14, 16)),
        *(_kernel("vectorized_elementwise_kernel", 1000 + n, 1, n) for n in (9, 12, 16)),
        _kernel("ncclDevKernel_AllReduce", 2000, 1, 14),
    ]
    categories = [kernel.category for kernel in script.kernels_of(events)]
    assert categories == ["other", "optimizer", "other", "communication"]


def test_kernels_of_the_step_before_do_not_count(script) -> None:
    events = [
        _event("user_annotation", "ProfilerStep#19", 0, 1000),
        _event("gpu_user_annotation", "Optimizer.step#AdamW.step", 2000, 500),
        _event("gpu_user_annotation", "ProfilerStep#19", 2000, 4000),
        _event("gpu_user_annotation", "ProfilerStep#19", 2500, 1000),  # on another stream
        _kernel("nvjet_sm90_q", 0, 1500),
        _kernel("nvjet_sm90_q", 2000, 1000),
        _kernel("ncclDevKernel_AllGather", 2500, 1000),
        _kernel("nvjet_sm90_q", 5000, 1000),
    ]
    summary = script.summarize(events)
    assert (summary.by_category["FP8 GEMM"], summary.communication, summary.span) == (2.0, 1.0, 4.0)
    without = script.summarize([event for event in events if event["cat"] != "gpu_user_annotation"])
    assert (without.by_category["FP8 GEMM"], without.span) == (3.5, 6.0)


def test_without_marks_a_step_begins_with_the_first_kernel_that_was_launched_in_the_trace(script) -> None:
    events = [
        *(_event("cuda_runtime", "cudaLaunchKernel", 100 * n, 1, correlation=n) for n in (7, 8)),
        _kernel("_update_kernel", 0, 900, 3),  # of the step before
        _kernel("_update_kernel", 900, 300, 4),
        _kernel("nvjet_sm90_q", 1200, 1000, 7),
        _kernel("_update_kernel", 2500, 500, 8),
        _kernel("nvjet_sm90_q", 3000, 1000),  # whoever launched it
    ]
    summary = script.summarize(events)
    assert (summary.steps, summary.by_category["FP8 GEMM"], summary.by_category["optimizer"]) == (1, 2.0, 0.5)
    assert (summary.gaps, summary.span) == pytest.approx((0.3, 2.8))


def test_files_become_columns(script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, packed = tmp_path / "a.json", tmp_path / "b.json.gz"
    trace = {"traceEvents": [_kernel("nvjet_sm90_tst", 0, 1500), {"ph": "M", "name": "process_name"}]}
    plain.write_text(json.dumps(trace))
    with gzip.open(packed, "wt") as file:
        json.dump(trace, file)
    assert script.main([str(plain), str(packed), "--names", "ours,peer"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| ms a step | ours | peer |"
    assert "| GEMM | 1.5 | 1.5 |" in lines


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents": [{"ph": "X"'])
def test_a_file_that_is_no_trace_is_named(script, tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=f"{path} is not a whole trace"):
        script.main([str(path)])
    with pytest.raises(SystemExit, match=r"other\.json: No such file"):
        script.main([str(tmp_path / "other.json")])
    packed = tmp_path / "trace.json.gz"
    packed.write_bytes(gzip.compress(b"[]" * 9)[:-9])
    with pytest.raises(SystemExit, match="is not a whole trace"):
        script.main([str(packed)])


def test_a_trace_without_kernels_is_refused(script) -> None:
    with pytest.raises(SystemExit, match="no kernels"):
        script.summarize([_event("cpu_op", "aten::mm", 0, 1)])
