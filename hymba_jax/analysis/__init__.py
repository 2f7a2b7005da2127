"""Analysis of models.

memory    `hymba memory`: the memory footprint of inference and training, nothing allocated
"""
