"""The programs: the flags of each, and what it prints and writes."""
