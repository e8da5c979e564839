"""`lightseq plan`: memory and time of a run on a cluster that is not here.

Memory comes from running one rank's training step on fake tensors (``trace``), with formulas only for what such a run
cannot see; time comes from counts of operations and bytes and from tables of GPUs and networks (``cluster``).
"""
