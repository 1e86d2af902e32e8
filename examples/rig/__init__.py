"""A small rig on which weight surgery can be tried in seconds.

It makes ordinary checkpoints (safetensors directories), data files and tasks for `surgery`; everything that is done to the
weights afterwards is done by `surgery`. A rig is built once per seed and kept in a folder; the seed decides the split, the
initial weights and the order of examples.
"""
