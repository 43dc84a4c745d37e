"""What is written to the store and when, and which process owns a sequence."""
