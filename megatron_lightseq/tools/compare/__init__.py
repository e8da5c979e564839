"""Comparisons: the same model, data and steps under several systems, and predictions of published measurements.

* :mod:`systems` says what each system is; :mod:`sdpa`, :mod:`padding` make Megatron's as its users run it;
* :mod:`worker` runs one system on one rank and measures it; :mod:`launch` starts the ranks;
* :mod:`tables` compares what they measured and refuses to compare what did not compute the same;
* :mod:`predict` computes the iteration times of the paper's cluster from its schedules.
"""
