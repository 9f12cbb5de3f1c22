"""The single checks of the doctor, each of one subject."""
