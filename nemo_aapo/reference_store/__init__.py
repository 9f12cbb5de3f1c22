"""Reference rewards on disk: the key that they belong to, the file that holds them, and shards filled side by side."""
