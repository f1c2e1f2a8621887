"""Training data and prompts: the bundled world, captioned images of every source, teacher images."""
