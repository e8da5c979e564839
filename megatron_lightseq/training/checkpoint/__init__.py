"""Checkpoints: saving, loading, and the folder that holds them."""
