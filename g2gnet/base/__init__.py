"""What the rest stands on and knows nothing of networks: files, messages, random streams, processes."""
