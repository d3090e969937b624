"""The theory as measuring instruments: predictions of the papers, fitted to and checked against runs."""
