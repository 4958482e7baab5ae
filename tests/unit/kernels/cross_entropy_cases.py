"""Compares the kernel of the cross-entropy with the reference in Triton's interpreter; run by
test_cross_entropy_interpreter.py.

    TRITON_INTERPRET=1 python -m tests.unit.kernels.cross_entropy_cases OUT.json
"""

import torch
from torch import Tensor

from tests.unit.kernels import interpreter
from titan_fp8.kernels.cross_entropy import kernel, reference


def shrink_blocks() -> None:
    """Tiny blocks, so that a row takes several."""
    kernel.BLOCK = 16


def compare(logits: Tensor, labels: Tensor, rtol: float = 1e-5) -> str:
    """Losses, and gradients in the place of the logits: "" or what differs."""
    wrong = []
    for grad in (True, False):
        ours, theirs = logits.clone(), logits.clone()
        losses, expected = (
            module.cross_entropy(x, labels, grad=grad) for module, x in ((kernel, ours), (reference, theirs))
        )
        if not torch.allclose(losses, expected, rtol=rtol, atol=1e-6, equal_nan=True):
            wrong.append(f"losses {losses} in place of {expected}")
        if not torch.allclose(ours.float(), theirs.float(), rtol=rtol, atol=1e-6, equal_nan=True):
            wrong.append("gradients differ" if grad else "logits were written to")
    return "; ".join(wrong)


def logits_of(rows: int, vocabulary: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * vocabulary)
    logits = torch.randn(rows, vocabulary, generator=generator) * scale
    return logits, torch.randint(vocabulary, (rows,), generator=generator)


def case_sizes() -> str:
    return "; ".join(compare(*logits_of(3, vocabulary)) for vocabulary in (1, 15, 16, 17, 70))


def case_large_logits() -> str:
    logits, labels = logits_of(4, 40, scale=1e4)
    logits[0, 3], logits[1, 39] = float("-inf"), 3e38
    return compare(logits, labels)


def case_rows_apart() -> str:
    logits, labels = logits_of(4, 64)
    wide = logits[:, :50]  # rows with a gap between them
    before, ours = logits[:, 50:].clone(), wide
    expected = wide.clone()
    losses = kernel.cross_entropy(ours, labels % 50, grad=True)
    wanted = reference.cross_entropy(expected, labels % 50, grad=True)
    same = torch.allclose(losses, wanted, rtol=1e-5) and torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)
    return "" if same and torch.equal(before, logits[:, 50:]) else "rows that lie apart"


def case_labels_left_out_and_unknown() -> str:
    logits, labels = logits_of(5, 33)
    labels[1], labels[2], labels[3] = -100, 33, -1
    return compare(logits, labels)


def case_nan_and_infinity() -> str:
    logits, labels = logits_of(3, 40)
    logits[0, 20], logits[1, 5] = float("nan"), float("inf")
    losses = kernel.cross_entropy(logits.clone(), labels, grad=True)
    is_finite = losses.isfinite().tolist()
    return "" if is_finite == [False, False, True] else f"finite: {is_finite}"


def case_half_precision() -> str:
    # The interpreter truncates to bf16 where a GPU rounds, so float16 alone.
    logits, labels = logits_of(3, 40)
    return compare(logits.half(), labels, rtol=1e-3)


if __name__ == "__main__":
    interpreter.main(interpreter.cases_of(globals()), shrink_blocks)
