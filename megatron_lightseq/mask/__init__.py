"""Which keys a query may attend to, as arithmetic on positions; no S x S array anywhere. Standard library only.

* :mod:`mask` is what users build, combine, print and parse; :mod:`kinds` makes each kind that has a name;
* :mod:`term` has the one canonical description of a set of (query, key) pairs, and its "and" and "or";
* :mod:`edge` says where a query's keys start and stop, and counts pairs;
* :mod:`text` writes the text form, with the names that :mod:`recognise` finds for terms, and takes it apart.
"""

from megatron_lightseq.mask.edge import FAR, Edge, Line
from megatron_lightseq.mask.mask import Mask
from megatron_lightseq.mask.term import Run, Term

__all__ = ["FAR", "Edge", "Line", "Mask", "Run", "Term"]
