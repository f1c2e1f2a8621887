"""What is learnt from and asked for: the bundled world, captioned images of every source, teacher images."""
