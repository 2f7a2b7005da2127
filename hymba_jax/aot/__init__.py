"""Programs compiled ahead of time, no device needed: what will they cost?

topology     slices by name, and data-sheet numbers of chips
programs     the training step, prefill and decode
hlo          the compiled program as a table of instructions, with trip counts
traffic      HBM bytes of each instruction
matmuls      their FLOPs
kernels      calls of kernels, the size of their arrays, and what they say they cost
collectives  what the chips send each other
kernel_time  how long kernels take by their own instructions
instructions what each instruction costs, and the part of the model it belongs to
cost         all of these, of a program
fit          memory against the chip's, and what to change if it is not enough
estimate     the time of a step
command      `hymba compile`
"""
