"""Where a request is to go by the operator's word: conditions, weights, fallbacks, shadows.

Decides which model and which of its targets; which endpoint of a target is `policies.placement`'s.
"""
