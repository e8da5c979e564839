"""Pretraining on megatron-core: data, loop, checkpoints, reports."""
