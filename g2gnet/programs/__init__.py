"""The programs: their flags, and what they print and write."""
