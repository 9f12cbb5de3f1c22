"""From the words of a command to a ``Job``: everything is decided and refused here, before anything is made."""

from nemo_aapo.prepare.job import Job, prepare, prepare_fill, prepare_tree, resolve, settings_of

__all__ = ["Job", "prepare", "prepare_fill", "prepare_tree", "resolve", "settings_of"]
