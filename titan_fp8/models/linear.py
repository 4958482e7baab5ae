"""The linear layer of the models: the weight is cast where it is used.

Mixed precision in this project is one idea: *the compute dtype is the dtype of the activations*. Parameters stay in
the dtype they are trained in (float32 as a rule), the decoder casts the embedding's output to the compute dtype, and
every layer casts its own parameters to the dtype of what it is given. One process without any wrapper is then as much
bf16 as a thousand of them, and a float8 layer that replaces this one can quantize from the float32 master instead.
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` whose weight and bias are cast to the input's dtype: `y = x @ weight.to(x.dtype).T`.

    The parameters keep their names and their dtype, and their gradients arrive in that dtype.
    """

    casts_weight_to_input_dtype: ClassVar[bool] = True
    """Whoever replaces or wraps the layer may hand it weights of any floating dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` of any floating dtype to `[..., out_features]` of the same dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)
