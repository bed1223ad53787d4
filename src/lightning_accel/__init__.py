"""Train over the network you have: data-parallel training that sends less or waits less.

Importing the package makes the strategy's names known to Lightning (`Trainer(strategy="accel")`), and has no other effect.
"""
