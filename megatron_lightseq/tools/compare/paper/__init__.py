"""The paper's experiments: its :mod:`published` measurements, a cost :mod:`model` of its cluster with constants from a
:mod:`fit`, and the same experiments on a small scale (:mod:`rows`).
"""
