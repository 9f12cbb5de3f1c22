"""Readers of files and data sets, one for each form: rows as plain values, in chunks that processes can share out."""
