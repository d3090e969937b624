"""What a person sees of a run: plots and tables, made from the lines of its metrics file."""
