"""What a run would take, worked out without a GPU: memory, FLOPs, lower bounds of time, layouts that fit.

Pure arithmetic on a configuration, a model's shape and a GPU's datasheet; nothing here imports torch.

inputs -> memory (parameters, activations), compute -> layouts -> report
"""
