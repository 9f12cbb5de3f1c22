"""The words of a command: what every entry point does with them, and the messages that a person gets."""
