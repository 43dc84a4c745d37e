"""What is alive: every sequence with its state, and the streams that sequences are on."""
