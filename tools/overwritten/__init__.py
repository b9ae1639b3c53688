"""The parts of `tools.overwritten_variables`: rows, training, processes, results."""
