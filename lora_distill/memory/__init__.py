"""The memory and the operations of a training or sampling step: on paper, simulated and measured."""
