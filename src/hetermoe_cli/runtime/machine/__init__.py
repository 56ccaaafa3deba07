"""Who is there and what is shared: ranks, cores, memory, process groups, lost peers."""
