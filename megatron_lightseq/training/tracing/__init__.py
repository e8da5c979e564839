"""``--trace``: what every rank did in some training steps, in one file, with what was predicted beside it."""
