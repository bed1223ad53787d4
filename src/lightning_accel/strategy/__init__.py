"""Lightning glue: hooks of a strategy, no maths. `mixin` has all of it, the roots give it a base class."""
