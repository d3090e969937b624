"""Graders: pure functions of token arrays that run on the device, and Python functions of text."""
