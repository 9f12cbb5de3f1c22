"""Looks at a machine or an allocation before it burns hours: ``scripts/doctor.py``; docs/doctor.md.

Each check is a small function that returns findings. It runs in a process of its own under a deadline (guard.py), on
every rank that it concerns, all ranks in step (ranks.py); catalog.py lists the checks.
"""
