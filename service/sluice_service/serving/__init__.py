"""What happens to a sequence: it is opened, attached, run, answered, ended."""
