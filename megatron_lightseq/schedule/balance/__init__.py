"""The `balanced` placement: any mask, balanced by moving rectangles of work between contiguous shards.

* :mod:`rows` says what a mask asks of every chunk of queries;
* :mod:`solve` decides which rank computes what (owner computes, except for what helpers take over);
* :mod:`blocks` writes the decision down as rectangles; :mod:`steps` decides when each is computed.

All of it is the standard library only. Ranks plan alike from the same borders; nothing is communicated.
"""
