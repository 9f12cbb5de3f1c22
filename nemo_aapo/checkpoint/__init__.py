"""Checkpoints that are whole or not there: what is saved, when, in which format, and how damage is found."""

import nemo_aapo.mcore  # noqa: F401  (says how megatron-core is imported, which the modules here do by themselves)
