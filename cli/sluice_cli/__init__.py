"""`sluice`: one file a command."""
