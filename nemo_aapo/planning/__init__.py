"""Planning: memory, FLOPs, lower bounds of time and fitting layouts of a run, computed without a GPU.

Pure arithmetic on a configuration, a model's shape and a GPU's datasheet; nothing here imports torch.

inputs -> memory (parameters, activations), compute -> layouts -> report
"""
