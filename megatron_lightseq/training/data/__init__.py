"""From text to batches: preparation, checks, Megatron's datasets, and resumable iterators.

`tokenizers`, `sources`, `corpus` and `prepare` need numpy only, so that `lightseq prepare-data` starts at once;
`datasets` and `loaders` import Megatron.
"""
