"""The only importer of megatron-core and Megatron-Bridge: model, optimizer, precision, weight map."""
