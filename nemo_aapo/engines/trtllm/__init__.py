"""The engine of TensorRT-LLM, in the learner's GPUs or behind a rollout server."""
