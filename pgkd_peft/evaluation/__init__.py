"""Did it work? Answers and scores, recovered gap, drift, the preflight, and the controls a result is laid to.

A new scorer is an entry in ``scorers``. Measuring stands here, showing in ``view``.
"""
