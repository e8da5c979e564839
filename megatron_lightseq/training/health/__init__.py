"""Is the training still sound? Judges every step before its update, and compares batches and weights over ranks."""
