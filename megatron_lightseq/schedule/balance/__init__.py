"""The `balanced` placement: any mask, balanced by moving rectangles of work between contiguous shards.

* :mod:`rows` computes the work that a mask requires in every row of queries;
* :mod:`solve` decides which rank computes what (owner computes, except for what helpers take over);
* :mod:`blocks` turns the decision into rectangles; :mod:`steps` decides when each is computed.

Standard library only. All ranks make the same plan from the same borders, without communication.
"""
