"""The foundation, which knows nothing of networks: files, messages, random streams, processes."""
