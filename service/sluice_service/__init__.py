"""The server: it keeps the state of live sequences and runs all ready ones together."""
