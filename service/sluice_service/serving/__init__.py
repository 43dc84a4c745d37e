"""What happens to a sequence here: opened, attached, run, answered, ended."""
