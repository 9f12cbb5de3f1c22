"""From the words of a command to a ``Job``: everything is decided and refused here, before anything is made."""
