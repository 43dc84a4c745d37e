"""The protocol sluice.v1: streams of frames, and single calls."""
