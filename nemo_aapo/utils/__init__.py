"""What every layer may use: whole files and directories, buckets, tables, the token, background work, quiet imports."""
