"""The in-process engine: continuous batching over the learner's own weights, on the learner's own ranks.

scheduler -> kv_cache -> decoder (or cuda_graphs) -> sampling; engine is the loop over them.
"""
