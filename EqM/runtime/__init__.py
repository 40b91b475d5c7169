"""What every script needs around its story: flags and errors, ranks, random draws, signals, folders, metrics."""
