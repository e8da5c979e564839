"""Iteration times of the paper's cluster, computed: :mod:`published` measurements, a cost :mod:`model`, its
:mod:`fit`. Standard library and this package's schedules; numpy for the fit.
"""
