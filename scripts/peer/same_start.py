"""The peer with the initial weights and the token sequences of ours: what differs then is how each side computes.

Weights. Ours draws each parameter by generators that depend on the run's seed and the parameter's name alone, however
the parameter is sharded (`titan_fp8/models/initialization.py`). The peer's parameters have the names and shapes of
ours, so `initialize` fills them in the same way, over what the peer has drawn itself. Layouts are the same but for one
thing: in its Qwen3 the peer turns feature i of a head together with i + head_dim / 2, ours 2i with 2i + 1, so rows of
`wq` and `wk` change places. (So would the scales of the norms of queries and keys, all of which start at one.)

Text. Our loader of token shards stands in the place of the peer's: each rank gets, microbatch for microbatch, the
sequences that the rank of ours with this number gets. It reads ahead in a thread, where the peer tokenizes between
steps, so the peer is a little faster with it, if anything.

`tests/peer/test_torchtitan_start.py` holds that both sides have the same logits then, to fp32's rounding.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_fp8.data.config import TrainingSection
from titan_fp8.data.loader import TrainLoader, build_train_loader
from titan_fp8.data.tokenizer import build_tokenizer
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.flavors import resolve_dims
from titan_fp8.models.initialization import Distribution, Initializable, clean_fqn, initialize

HALVES = ("qwen3_moe",)
"""Our names of the families in which the peer turns features of the two halves of a head together."""


def same_start(spec: Any, args: argparse.Namespace) -> Any:
    """The peer's description of a training, `torchtitan.protocols.train_spec.TrainSpec`, with our weights and text.

    Args:
        spec: of a family.
        args: of `launch.py`.
    """
    family, _, flavor = args.same_start.partition("/")
    dims = resolve_dims(family, flavor, {"n_layers": args.layers, "vocab_size": args.vocab_size})

    def build_loader(*, dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: Any) -> TokenBatches:
        return TokenBatches(token_loader(args.data, args.tokenizer, job_config.training, dp_rank, dp_world_size))

    return dataclasses.replace(
        spec,
        model_cls=with_our_weights(spec.model_cls, dims, args.seed, halves=family in HALVES),
        build_dataloader_fn=build_loader,
        build_tokenizer_fn=None,
    )


def with_our_weights(model_cls: type[Any], dims: ModelDims, seed: int, *, halves: bool) -> type[Any]:
    """A subclass of a model of the peer that starts with the weights of ours.

    Args:
        model_cls: has `init_weights(buffer_device)`, which is called once parameters are sharded.
        dims: of our model.
        seed: of our run.
        halves: it turns the features of the two halves of a head together.
    """

    class SameStart(model_cls):
        def init_rules(self) -> dict[str, Distribution]:
            """See `titan_fp8.models.initialization`."""
            rules = rules_of(dims)  # not before: by now the process has its own device
            names = [name for name, _ in self.named_parameters()]
            # `initialize` refuses parameters that are not named here.
            return {name: rules[clean_fqn(name)] for name in names if clean_fqn(name) in rules}

        def init_weights(self, buffer_device: torch.device | None = None) -> None:
            """Buffers as the peer has them, and our parameters."""
            super().init_weights(buffer_device=buffer_device)
            initialize(self, seed)
            if halves:
                turn_halves(self, dims.head_width)

    SameStart.__name__ = SameStart.__qualname__ = model_cls.__name__
    return SameStart


def rules_of(dims: ModelDims) -> dict[str, Distribution]:
    """Parameter name -> how it starts, of our model."""
    with torch.device("meta"):
        model = Decoder(dims, attention_backend="math")
    rules = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Initializable):
            rules |= {clean_fqn(f"{prefix}.{name}"): rule for name, rule in module.init_rules().items()}
    return rules


@torch.no_grad()
def turn_halves(model: nn.Module, head_dim: int) -> None:
    """Put the even rows of each head of `wq` and `wk` before the odd ones, in place.

    Raises:
        RuntimeError: a rank holds a part of a head.
    """
    for name, parameter in model.named_parameters():
        if clean_fqn(name).split(".")[-2] in ("wq", "wk"):
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if local.shape[0] % head_dim:
                raise RuntimeError(f"{name}: {local.shape[0]} rows here are no multiple of head_dim {head_dim}")
            local.copy_(halves_first(local.clone(), head_dim))


def halves_first(rows: Tensor, head_dim: int) -> Tensor:
    """`[H * head_dim, ...]` with the even rows of each head before the odd ones."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def token_loader(data: str, tokenizer: str, training: Any, dp_rank: int, dp_world_size: int) -> TrainLoader:
    """What our trainer would read from the shards in `data` on a rank, with the batches of the peer's `training`."""
    section = TrainingSection(dataset="tokens", dataset_path=data, seq_len=training.seq_len, shuffle=False)
    return build_train_loader(
        section,
        build_tokenizer(tokenizer),
        seed=0,  # of the shuffling
        global_batch_sequences=training.global_batch_size,
        local_batch_sequences=training.local_batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
    )


class TokenBatches:
    """Our loader as the peer's trainer asks for one; runs that are compared save no checkpoint."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Microbatches, tokens and labels `[B, S]`, without end."""
        while True:
            for batch in self._loader.next_step():
                yield {"input": batch.tokens}, batch.labels

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
