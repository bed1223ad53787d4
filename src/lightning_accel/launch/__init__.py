"""The command `lightning-accel`: programs on several processes and machines."""
