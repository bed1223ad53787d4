"""Lightning glue: hooks of a strategy, no maths. `trainer` and `fabric` hold all of it, the four roots add a base class."""
