"""The named peers, one module a library, each in its strongest form."""
