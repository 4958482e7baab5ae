"""TOML and the command line into typed sections. Nothing in here imports torch, so that mistakes answer at once."""
