"""`lightseq verify`: does every method, with every kind of model parallelism, train like a single process?"""
