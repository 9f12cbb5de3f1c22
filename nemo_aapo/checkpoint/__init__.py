"""Checkpoints that are whole or not there: written, kept, found damaged, and loaded under any layout."""
