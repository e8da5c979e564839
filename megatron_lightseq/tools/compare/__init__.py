"""Comparisons: the same model, data and steps with several systems, and predictions of published measurements.

* :mod:`systems` defines the systems; :mod:`sdpa` and :mod:`padding` set up Megatron the way its users run it;
* :mod:`worker` runs one system on one rank and measures it; :mod:`launch` starts the ranks;
* :mod:`tables` compares the measurements, and refuses to compare systems whose losses differ;
* :mod:`paper` repeats the paper's experiments on a small scale, and predicts its figures from its schedules.
"""
