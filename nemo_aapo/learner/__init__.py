"""The learner: scored groups in, optimizer steps out.

learner -> batch_plan, microbatch -> policy -> logprobs
"""

"""The learner: scored groups in, optimizer steps out.

learner -> batch_plan, microbatch -> policy -> logprobs
"""
