"""From files, streams or a grammar to batches of token ids: tokenizers, sources, packing, loaders with resumable state.

Read `packing.py` for what a sample is, `sources.py` for which sample comes when, `loader.py` for who reads it.
"""
