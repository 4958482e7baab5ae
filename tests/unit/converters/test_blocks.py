"""The repeated blocks of a model are found in anybody's model, and in doubt there is an error."""

import pytest
import torch
from torch import nn

from titan_fp8.converters.blocks import find_blocks, kept_blocks
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.flavors import resolve_dims
from titan_fp8.runtime.errors import UserError


def block() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.ModuleList([nn.Sequential(nn.Linear(4, 4))]))


def blocks(count: int) -> nn.ModuleList:
    return nn.ModuleList(block() for _ in range(count))


def gpt(count: int) -> nn.Module:
    """As nanoGPT has it: a dict of parts, one of which is the list of blocks."""
    parts = {"wte": nn.Embedding(8, 4), "h": blocks(count), "ln_f": nn.LayerNorm(4)}
    return nn.ModuleDict({"transformer": nn.ModuleDict(parts), "lm_head": nn.Linear(4, 8)})


def test_blocks_are_the_outermost_list_whose_members_hold_linears() -> None:
    assert find_blocks(gpt(2)) == ["transformer.h.0", "transformer.h.1"]
    assert find_blocks(blocks(2)) == ["0", "1"]


def test_a_numbered_dict_of_blocks_counts_and_a_dict_of_parts_does_not() -> None:
    assert find_blocks(nn.Sequential(nn.ModuleDict({"0": block(), "1": block()}))) == ["0.0", "0.1"]
    with pytest.raises(UserError, match=r"no nn\.ModuleList"):
        find_blocks(nn.ModuleDict({"encoder": block().get_submodule("2.0"), "decoder": nn.Sequential(nn.Linear(4, 4))}))


def test_our_decoder_and_a_hugging_face_llama_have_blocks() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        decoder = Decoder(resolve_dims("llama3", "debugmodel", {"n_layers": 3}))
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=64
        )
        llama = transformers.LlamaForCausalLM(config)
    assert find_blocks(decoder) == [f"layers.{i}" for i in range(3)]
    assert find_blocks(llama) == [f"model.layers.{i}" for i in range(3)]


def test_several_lists_of_blocks_have_no_first_block() -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(blocks(2)), "decoder": nn.Sequential(blocks(2), nn.ReLU())})
    with pytest.raises(UserError, match=r"several lists of blocks, encoder\.0, decoder\.0"):
        find_blocks(model)


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)]), nn.ModuleList()])
def test_without_blocks_there_is_none_to_keep(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"no nn\.ModuleList, or numbered nn\.ModuleDict"):
        kept_blocks(model, 1, 0)
    assert kept_blocks(model, 0, 0) == {}


def test_kept_blocks_have_their_reasons() -> None:
    assert kept_blocks(blocks(5), 2, 1) == {"0": "first 2 blocks", "1": "first 2 blocks", "4": "last block"}
    assert set(kept_blocks(blocks(3), 2, 1)) == {"0", "1", "2"}


def test_more_blocks_than_there_are_cannot_be_kept() -> None:
    with pytest.raises(UserError, match=r"2 \+ 2 blocks are more than the 3"):
        kept_blocks(blocks(3), 2, 2)
