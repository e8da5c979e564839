"""From text to batches: preparation, checks, Megatron's datasets, and resumable iterators.

`tokenizers`, `sources`, `documents`, `corpus` and `prepare` do not import Megatron or torch, so that
`lightseq prepare-data` starts quickly; `datasets` and `loaders` import Megatron.
"""
