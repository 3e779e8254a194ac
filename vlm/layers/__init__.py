"""Building blocks shared by every encoder: linear maps, norms, positions, masks, attention, blocks, stacks.

Each layer takes plain arguments. A weight declares its logical axes where it is created (`axes=("embed", "mlp")`);
which mesh axis a logical axis maps to is decided once, by the configuration.
"""
