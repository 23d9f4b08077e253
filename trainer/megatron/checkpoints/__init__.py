"""Checkpoints of the trainer: written in the background, checked when they are read, and loadable at any layout.

boxes.py       which part of a tensor a rank holds, and what two such parts share
manifest.py    the marker of a finished checkpoint, with a checksum of every file
state.py       what an engine has to keep: weights, moments, buffers, random state
writer.py      a snapshot, and the thread that writes it
reader.py      a checkpoint into an engine, whatever layout wrote it
torch_dist.py  Megatron-core's own format, for the weights
trusted.py     its pickled parts, read without running what they name
"""
