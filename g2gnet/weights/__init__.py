"""The weights of a connection: packed, tied to averages, and where they begin (patterns and groupings)."""
