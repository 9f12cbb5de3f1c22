"""The checks of the doctor, one module for each subject; each returns its findings."""

"""The checks of the doctor, one module for each subject; each returns its findings."""
