"""The only importer of megatron-core and Megatron-Bridge: model, optimizer, precision, weight map."""

from nemo_aapo.mcore.cpu import uncompiled

uncompiled.install()
