"""The peers, one module per library, each in its fastest form."""
