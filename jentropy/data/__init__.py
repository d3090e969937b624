"""Tasks and their data: TFDS builders, readers into NumPy arrays, and sources that are pure in (seed, step)."""
