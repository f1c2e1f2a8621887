"""How the bundled Stable Diffusion was made: its parts, its trainings, its model card."""
