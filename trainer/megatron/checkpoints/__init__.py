"""Checkpoints of the trainer: written in the background, checked when they are read, and loadable at any layout.

boxes.py             which part of a tensor a rank holds, and what two such parts share
manifest.py          the marker of a finished checkpoint, with a checksum of every file
header.py            what a checkpoint says of its model
sources.py           what a run can begin with: telling directories apart
state.py             what an engine has to keep: weights, moments, buffers, random state
safetensors_file.py  one file, written as a stream
writer.py            a snapshot, and the thread that writes it
reader.py            a checkpoint into an engine, whatever layout wrote it
keeper.py            the checkpoints of one policy: header, layout, model
torch_dist.py        Megatron-core's own format, for the weights
trusted.py           its pickled parts, read without running what they name
"""
