"""Programs compiled ahead of time, no device needed: what will they cost?

topology     names of slices -> devices to compile for, and the facts of each chip
programs     the training step, prefill and decode, as the real commands run them
hlo          the compiled program as a table of instructions, and how often each is run
traffic      HBM bytes of each instruction
matmuls      their FLOPs
kernels      calls of kernels, and the size of their arrays
collectives  what the chips send each other
cost         all of these, of a program
fit          memory against the chip's, and what to change where it is not enough
estimate     the time of a step
command      `hymba compile`
"""
