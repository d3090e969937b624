"""Entropy mechanisms: each file is one method, a factory of `base.Mechanism`. Combine them with `compose.chain`."""
