"""The server: live sequences in one arena, all ready ones in one run."""
