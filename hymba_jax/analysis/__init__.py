"""Looking at models: what they take and what they do.

memory    `hymba memory`: the memory footprint of inference and training, nothing allocated
"""
