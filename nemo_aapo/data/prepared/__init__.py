"""Large data sets, rendered and tokenised once: a memory-mapped Arrow file that runs and ranks share."""
