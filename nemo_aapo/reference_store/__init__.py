"""Reference rewards on disk: what they belong to, and files that several jobs fill."""
