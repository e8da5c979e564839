"""`lightseq verify`: does every way to cut a sequence, in every way to cut a model, train like one process?"""
