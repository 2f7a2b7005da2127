"""Programs compiled ahead of time, for accelerators that need not be there: what will they cost?

topology     names of slices -> devices to compile for, and the facts of each chip
programs     the training step, reading and continuing texts, as the real commands run them
hlo          the compiled program as a table of instructions, and how often each is run
traffic      bytes that each instruction moves to and from HBM
products     operations of matrix products
kernels      calls of kernels, and the size of their arrays
collectives  what the chips send each other
measured     all of these, of a program
fit          memory against the chip's, and what to change where it is not enough
estimate     the time of a step
command      `hymba compile`
"""
